"""How far a run has come: a new one with a journal, or one that goes on where its journal ends."""

import json
import math
from dataclasses import dataclass, field

from ds_zoadamu.distributed import collective
from ds_zoadamu.durability.journal import read_journal
from ds_zoadamu.tasks import Evaluation, InputError, Metric
from ds_zoadamu.training.output import CHECKPOINTS, JOURNAL, OutputDirectory, step_scalars
from ds_zoadamu.training.plan import Plan
from ds_zoadamu.training.steps import Stepper


@dataclass
class Progress:
    """What earlier processes of this run have done; the same on all ranks.

    Attributes:
        step: steps taken.
        evaluations: by split and step.
        seconds: of the steps whose time is known.
    """

    step: int = 0
    evaluations: dict[tuple[str, int], Evaluation] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def best(self, metric: Metric) -> tuple[int, Evaluation | None]:
        """The evaluated step that is best on the development set, the first of equals; (0, None) before there is one."""
        best_step, best = 0, None
        for (split, step), now in sorted(self.evaluations.items()):
            if split == "dev" and step and metric.is_better(now, best):
                best_step, best = step, now
        return best_step, best


def resume(plan: Plan, output: OutputDirectory, stepper: Stepper) -> Progress | None:
    """Goes on with the run of the output directory with --resume; None: a new run is to begin. All ranks call it.

    Raises:
        InputError: --resume with an optimizer that needs backward passes.
        JournalError, CheckpointError: what is wrong with the run's files.
    """
    args = plan.args
    if args.resume and stepper.durable is None:
        raise InputError(f"--resume needs a zeroth-order optimizer of a JSON: steps of {stepper.optimizer} are in no journal")
    journal = output.path / JOURNAL
    if not (args.resume and collective.broadcast_bytes(b"1" if journal.exists() else b"")):
        return None
    resumed = stepper.durable.resume(
        journal, output.path / CHECKPOINTS, base=plan.tuning.base(output.path), fsync_every=args.journal_fsync_every,
        task=plan.task_identity(),
    )  # fmt: skip
    lines = []
    with collective.on_all_ranks(InputError):
        if collective.rank() == 0:
            lines = _repaired(output, resumed.step)
            output.replace_records(lines)
    return _progress(resumed.step, json.loads(collective.broadcast_bytes(json.dumps(lines).encode())))


def _repaired(output: OutputDirectory, step: int) -> list[dict]:
    """The lines of metrics.jsonl up to ``step``; a step that the journal has and metrics.jsonl lost is added."""
    lines = [line for line in output.records() if line["step"] <= step]
    known = {line["step"] for line in lines if line["kind"] == "step"}
    for record in read_journal(output.path / JOURNAL, until=step).records:
        if record.step not in known:
            losses = {name: getattr(record, name) for name in ("loss_plus", "loss_minus")}
            scalars = {"loss": sum(losses.values()) / 2.0, **losses, **step_scalars(record)}
            lines.append({"kind": "step", "step": record.step, **scalars, "skipped": record.skipped})
    return lines


def _progress(step: int, lines: list[dict]) -> Progress:
    progress = Progress(step)
    for line in lines:
        if line["kind"] == "eval":
            if line["split"] == "dev" and line["step"] and line["loss"] is None and "num_nonfinite" not in line:
                raise InputError(
                    f"--resume: an earlier release has evaluated step {line['step']}, whose loss is not finite, and may have "
                    "kept it as the best; rebuild a model of an earlier step with ds_zoadamu replay --until STEP"
                )
            progress.evaluations[line["split"], line["step"]] = _evaluation(line)
        elif "seconds" in line:
            progress.seconds.append(line["seconds"])
    if step and not {("dev", 0), ("test", 0)} <= progress.evaluations.keys():
        raise InputError(
            f"--resume: metrics.jsonl has lost the evaluations before training, and the model is at step {step}; rebuild "
            "the model with ds_zoadamu replay and measure it with launch/evaluate.py"
        )
    return progress


def _evaluation(line: dict) -> Evaluation:
    """Of a line of metrics.jsonl, where null stands for a number that was not finite; older ones have no num_nonfinite."""
    line = {"num_nonfinite": 0, **line}
    return {name: math.nan if value is None else value for name, value in line.items() if name not in ("kind", "split", "step")}
