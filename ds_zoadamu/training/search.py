"""A cheap search for lr and zo_eps: short runs from the same weights, judged on the development set."""

import copy
import gc
import math
import time
from argparse import Namespace
from dataclasses import asdict, dataclass

from deepspeed import comm as dist

from ds_zoadamu.config import Config, load
from ds_zoadamu.distributed.start import launched_rank as rank
from ds_zoadamu.errors import NonFiniteLossError, NonFiniteWeightsError
from ds_zoadamu.tasks import InputError, evaluate
from ds_zoadamu.training.output import SEARCH, OutputDirectory, environment
from ds_zoadamu.training.plan import Plan, make_plan
from ds_zoadamu.training.steps import make_stepper


@dataclass(frozen=True)
class Trial:
    """A short run and how it ended on the development set; loss is infinite where training diverged."""

    lr: float
    zo_eps: float
    dev_loss: float
    dev_accuracy: float
    seconds: float


def find_lr(args: Namespace) -> list[Trial]:
    """Tries all pairs of --find_lr_values and --find_eps_values; returns the trials, lowest development loss first.

    Loss decides rather than accuracy, which a short run moves by few examples. Costs 2 x max_steps x accumulation forwards
    a pair and one evaluation. Each trial loads the model afresh, so all start from the same weights.

    Raises:
        InputError, ConfigError: before a model is loaded or a file written.
    """
    output = OutputDirectory(args.output_dir, writes=rank() == 0, overwrite=args.overwrite_output_dir)
    plan = make_plan(args)
    if plan.config.rule is None:
        raise InputError(f"--find_lr searches lr and zo_eps; the JSON's optimizer is {plan.config.optimizer}")
    configs = [_with(plan.config, lr, zo_eps) for zo_eps in args.find_eps_values for lr in args.find_lr_values]
    forwards = 2 * plan.config.options.num_perturbations * args.max_steps * plan.config.batch.accumulation
    _print(
        f"{len(configs)} trials of {args.max_steps} steps, {forwards} forwards a rank each, "
        f"judged by the loss on {len(plan.dev)} development examples"
    )
    output.begin()
    trials = []
    for config in configs:
        trials.append(_try(plan, config))
        _print(f"{len(trials)}/{len(configs)} {_row(trials[-1])}")
    trials.sort(key=lambda trial: trial.dev_loss)
    output.write_json(
        SEARCH,
        {"trials": [asdict(t) for t in trials], **environment(), "arguments": vars(args), "config": plan.config.deepspeed},
    )
    _print("\n".join([_row(None), *map(_row, trials)]))
    return trials


def _try(plan: Plan, config: Config) -> Trial:
    start = time.perf_counter()
    args = plan.args
    stepper = make_stepper(plan, config)
    try:
        for _ in range(args.max_steps):
            stepper.step()
        score = evaluate(stepper.engine.module, plan.dev, plan.model_input.collate, args.per_device_eval_batch_size)
        loss, accuracy = score.loss if math.isfinite(score.loss) else math.inf, score.accuracy
    except NonFiniteWeightsError:
        raise
    except NonFiniteLossError:  # raised on all ranks alike
        loss, accuracy = math.inf, 0.0
    stepper.engine.destroy()
    del stepper
    gc.collect()  # engine and module refer to each other
    dist.barrier()
    return Trial(config.options.lr, config.options.zo_eps, loss, accuracy, time.perf_counter() - start)


def _with(config: Config, lr: float, zo_eps: float) -> Config:
    """The configuration with another lr (also at the end of a scheduler's warm-up) and zo_eps. Raises ConfigError."""
    given = copy.deepcopy(config.deepspeed)
    given["optimizer"]["params"].update(lr=lr, zo_eps=zo_eps)
    if "warmup_max_lr" in given.get("scheduler", {}).get("params", {}):
        given["scheduler"]["params"]["warmup_max_lr"] = lr
    return load(given, world_size=config.world_size)


def _row(trial: Trial | None) -> str:
    if trial is None:
        return f"{'lr':>10} {'zo_eps':>10} {'dev loss':>10} {'accuracy':>10} {'seconds':>10}"
    loss = f"{trial.dev_loss:10.4f}" if math.isfinite(trial.dev_loss) else f"{'diverged':>10}"
    return f"{trial.lr:10.3g} {trial.zo_eps:10.3g} {loss} {trial.dev_accuracy:10.4f} {trial.seconds:10.1f}"


def _print(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)
