"""What a step costs: its time, the parts of its time, its collectives and the memory it takes, without any evaluation."""

import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from ds_zoadamu.distributed.collective import gather_json
from ds_zoadamu.distributed.start import launched_rank
from ds_zoadamu.training.output import JOURNAL, PROFILE, OutputDirectory, quantiles
from ds_zoadamu.training.plan import make_plan
from ds_zoadamu.training.steps import MakePlan, MakeStepper, Section, Stepper, about, make_stepper
from ds_zoadamu.zero3.instruments import collectives_of
from ds_zoadamu.zero3.peak_memory import PeakMemory

_WARM_UP = 3  # DeepSpeed records the order of gathers in the first pass and prefetches by it from then on


class SectionClock:
    """Seconds spent in each part of a step, without the parts inside it. The device is waited for at every border."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    @contextmanager
    def on(self, sections: Sequence[Section]) -> Iterator[None]:
        """Inside, the functions are timed."""
        with ExitStack() as undo:
            for owner, name, part in sections:
                own = vars(owner).get(name)  # None: a method of the class, which the timed one covers
                undo.callback(*((delattr, owner, name) if own is None else (setattr, owner, name, own)))
                setattr(owner, name, self.timed(getattr(owner, name), part))
            yield

    def timed(self, function: Callable, part: str) -> Callable:
        """The function, with its time counted for a part."""

        def run(*args, **kwargs):
            get_accelerator().synchronize()
            begin = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                get_accelerator().synchronize()
                seconds = time.perf_counter() - begin
                self.seconds[part] += seconds - self._inner.pop()
                if self._inner:
                    self._inner[-1] += seconds

        return run


def profile(args: Namespace, make_plan: MakePlan = make_plan, make_stepper: MakeStepper = make_stepper) -> dict:
    """Measures --profile_steps steps of a run at its schedule's plateau; returns what profile.json holds. All ranks call it.

    Takes the steps three times: plainly for time and memory, then by parts, then under DeepSpeed's comms logger, since both
    make a step longer. Arguments as of `finetune`.

    Raises:
        InputError, ConfigError: before a model is loaded or a file written.
    """
    output = OutputDirectory(args.output_dir, writes=launched_rank() == 0, overwrite=args.overwrite_output_dir)
    plan = make_plan(args)
    memory = PeakMemory()
    stepper = make_stepper(plan)
    output.begin()
    if (engine := stepper.durable) is not None:
        engine.open_journal(output.path / JOURNAL, fsync_every=args.journal_fsync_every)
        engine.skip_to(getattr(engine.optimizer.rule.config, "t2", 0))  # the plateau, where replayed momentum costs most
    for _ in range(_WARM_UP):
        stepper.step()
    seconds = [_seconds(stepper.step) for _ in range(args.profile_steps)]
    results = {
        **about(plan, stepper),
        "steps": args.profile_steps,
        "seconds_a_step": quantiles(seconds),
        "ranks": gather_json({**memory.report(), **stepper.stored_bytes()}),
        "split_seconds": _split(stepper, args.profile_steps),
        "collectives": _collectives(stepper, args.profile_steps),
    }
    output.write_json(PROFILE, results)
    if launched_rank() == 0:
        print(f"{args.profile_steps} steps measured: {results['seconds_a_step']['median']:.4f} s a step", flush=True)
    return results


def _seconds(function: Callable[[], object]) -> float:
    get_accelerator().synchronize()
    begin = time.perf_counter()
    function()
    get_accelerator().synchronize()
    return time.perf_counter() - begin


def _split(stepper: Stepper, steps: int) -> dict[str, float]:
    """Mean seconds a step on this rank by part: those of the stepper's sections, and other."""
    clock = SectionClock()
    step = clock.timed(stepper.step, "other")
    with clock.on(stepper.sections()):
        for _ in range(steps):
            step()
    return {part: seconds / steps for part, seconds in clock.seconds.items()}


def _collectives(stepper: Stepper, steps: int) -> dict:
    """The collectives of a step on this rank.

    Returns:
        by_operation: name -> {calls, message_bytes} a step, see `collectives_of`. sent_bytes: what a rank sends for them in a
        ring, a step.
    """

    def run() -> None:
        for _ in range(steps):
            stepper.step()

    by_operation, sent = {}, 0.0
    for name, (calls, size) in collectives_of(run).items():
        by_operation[name] = {"calls": calls / steps, "message_bytes": size / steps}
        sent += size / steps * _sent_share(name, dist.get_world_size())
    return {"by_operation": by_operation, "sent_bytes": sent}


def _sent_share(operation: str, ranks: int) -> float:
    """Bytes that a rank sends for each byte of the logged message, with a ring of ranks."""
    if operation.startswith(("all_gather", "allgather")):
        return ranks - 1.0
    share = (ranks - 1.0) / ranks
    return 2.0 * share if "all_reduce" in operation else share
