"""A fine-tuning run: evaluation before, training with evaluations on the way, evaluation after, and what it leaves behind."""

import time
from argparse import Namespace
from dataclasses import dataclass, field

import numpy
import torch
from deepspeed import comm as dist
from deepspeed.utils import logger

from ds_zoadamu.console.progress import Progress as Bar
from ds_zoadamu.console.progress import progress, say
from ds_zoadamu.distributed.collective import gather_json
from ds_zoadamu.distributed.start import launched_rank
from ds_zoadamu.durability.digest import weights_digest
from ds_zoadamu.errors import CheckpointError, NonFiniteLossError
from ds_zoadamu.tasks import Evaluation, InputError, is_finite
from ds_zoadamu.training.curves import draw_curves
from ds_zoadamu.training.output import BEST, CHECKPOINTS, CURVES, JOURNAL, MERGED, METRICS, RESULTS, OutputDirectory, quantiles
from ds_zoadamu.training.plan import Plan, make_plan
from ds_zoadamu.training.progress import Progress, resume
from ds_zoadamu.training.publishing import prepare_repo, push, write_card
from ds_zoadamu.training.steps import MakePlan, MakeStepper, Stepper, about, make_stepper
from ds_zoadamu.training.summary import scores, summary
from ds_zoadamu.zero3.divergence import weights_are_the_reason
from ds_zoadamu.zero3.peak_memory import PeakMemory


def finetune(args: Namespace, make_plan: MakePlan = make_plan, make_stepper: MakeStepper = make_stepper) -> dict:
    """Runs what launch/finetune.py's arguments say; returns what results.json holds. All ranks call it.

    Args:
        args: of `finetune_parser`.
        make_plan, make_stepper: what is trained, and how it makes a step.

    Raises:
        InputError, ConfigError, HubError: before a model is loaded or a file written; HubError also at the end, when all of the
            run is on the disk.
    """
    first, overwrite = launched_rank() == 0, args.overwrite_output_dir
    output = OutputDirectory(args.output_dir, writes=first, overwrite=overwrite, resume=args.resume)
    plan = make_plan(args)
    repo = prepare_repo(args)
    memory = PeakMemory()
    run = _Run(plan, make_stepper(plan), output)
    before = run.begin()
    best_step, best = run.train()
    peak = memory.report()  # before the best model is loaded
    last, after = run.end(best_step)
    found = {"dev_before": before["dev"], "dev_best": best, "test_before": before["test"]}
    results = {
        **about(plan, run.stepper),
        "max_steps": args.max_steps,
        "best_step": best_step,
        **scores(plan, {**found, "test_after": after, "test_last": last}),
        "num_examples": plan.num_examples,
        "seconds_a_step": quantiles(run.progress.seconds[1:] or run.progress.seconds),  # the first pays for caches and traces
        "skipped_steps": run.stepper.skipped_steps,
        "weights_sha256": None if run.stepper.durable is None else weights_digest(run.stepper.durable),
        "ranks": gather_json({**peak, **run.stepper.stored_bytes()}),
    }
    if args.merge:
        run.stepper.merge(output.path / MERGED)
    output.write_json(RESULTS, results)
    if first:
        write_card(plan, results, output.path, repo)
        run.show(results)
    if repo is not None:
        push(output.path, repo, results)
    return results


@dataclass
class _Run:
    """A plan as it is carried out."""

    plan: Plan
    stepper: Stepper
    output: OutputDirectory
    progress: Progress = field(default_factory=Progress)

    def begin(self) -> dict[str, Evaluation]:
        """Begins, or goes on; returns the evaluations before training."""
        resumed = resume(self.plan, self.output, self.stepper)
        self.progress = resumed or self.progress
        known = self.progress.evaluations
        before = {split: known.get((split, 0)) or self._measure(split) for split in ("dev", "test")}
        self._check_finite(before)
        if resumed is None:
            self.output.begin()
            if (engine := self.stepper.durable) is not None:
                every, identity = self.plan.args.journal_fsync_every, self.plan.task_identity()
                if (base := self.plan.tuning.base(self.output.path)) is not None:
                    self.stepper.save(base)
                engine.open_journal(self.output.path / JOURNAL, base=base, fsync_every=every, task=identity)
        for split, result in before.items():
            if (split, 0) not in known:
                self._log(split, 0, result)
        return before

    def train(self) -> tuple[int, Evaluation]:
        """Trains and keeps the best model of the evaluated steps; returns the best step and its evaluation."""
        args, total, first, metric = self.plan.args, self.plan.args.max_steps, self.progress.step, self.plan.task.main_metric
        every = args.eval_steps or max(1, total // 10)
        best_step, best = self.progress.best(metric)
        with progress("fine-tuning", total, "step", initial=first) as bar:
            # A resumed run may have been stopped after its last step and before what follows a step.
            for step in range(first if first else 1, total + 1):
                if step > first:
                    self._step(bar)
                if step % every == 0 or step == total:
                    now = self.progress.evaluations.get(("dev", step)) or self._evaluate("dev", step)
                    if best_step == step or metric.is_better(now, best):
                        best_step, best = step, now
                        self.stepper.save(self.output.path / BEST)
                if step > first and args.save_steps and step % args.save_steps == 0:
                    self._save_checkpoint(step)
        if best is None:
            raise NonFiniteLossError(
                f"no evaluated step of {total} has finite scores on the development set, while the model before training has: "
                f"it diverged. Lower the lr, see --find_lr; what was measured is in {self.output.path / METRICS}"
            )
        if self.stepper.durable is not None:
            self.stepper.durable.close_journal()  # the run is over; durable, also with --journal_fsync_every above 1
        return best_step, best

    def end(self, best_step: int) -> tuple[Evaluation, Evaluation]:
        """Evaluates the last and the best model on the test set; the best becomes the run's model."""
        steps = self.plan.args.max_steps
        last = after = self.progress.evaluations.get(("test", steps)) or self._evaluate("test", steps)
        if best_step != steps:
            self.stepper.load(self.output.best)
            after = self._evaluate("test", best_step)
        dist.barrier()  # rank 0 may have been the one to read the best model: all have it before it is renamed
        self.output.promote_best()
        return last, after

    def show(self, results: dict) -> None:
        """Draws the curves and prints the summary."""
        plan, args, metric = self.plan, self.plan.args, self.plan.task.main_metric
        title = f"{plan.task.name}, {args.model_name_or_path}, {self.stepper.optimizer}"
        if not draw_curves(self.output.records(), self.output.path / CURVES, title, metric, plan.baseline("dev")):
            logger.warning(f"no {CURVES}: Matplotlib is not installed (pip install ds_zoadamu[plots])")
        values = results[metric.name]
        if not metric.improves(values["dev_best"], values["dev_before"]):
            logger.warning("no evaluated step was better on the development set than the model before training; try --find_lr")
        print(summary(results, metric, args.output_dir), flush=True)

    def _step(self, bar: Bar) -> None:
        start = time.perf_counter()
        record = self.stepper.step()
        seconds = time.perf_counter() - start
        self.progress.seconds.append(seconds)
        self.output.log({"kind": "step", **record, "seconds": seconds})
        keys = ("loss", "projected_grad", "grad_norm")
        shown = {key: numpy.mean(record[key]) for key in keys if record.get(key) is not None}
        bar.set_postfix_str(", ".join(f"{key}={value:.4g}" for key, value in shown.items()), refresh=False)
        bar.update()

    def _evaluate(self, split: str, step: int) -> Evaluation:
        result = self._measure(split)
        self._log(split, step, result)
        return result

    def _measure(self, split: str) -> Evaluation:
        return self.plan.task.evaluate(self.stepper.model, self.plan.sets[split])

    def _log(self, split: str, step: int, result: Evaluation) -> None:
        self.output.log({"kind": "eval", "split": split, "step": step, **result})
        if launched_rank() == 0:
            broken = result["num_nonfinite"]
            nonfinite = f", {broken} of them with scores that are not finite" if broken else ""
            name = self.plan.task.main_metric.name
            say(
                f"step {step}: {split} {name} {result[name]:.4f}, loss {result['loss']:.4f} ({result['num_examples']} examples"
                f"{nonfinite})"
            )

    def _check_finite(self, before: dict[str, Evaluation]) -> None:
        """Raises InputError where the model before training has scores that are not finite. All ranks call it."""
        for split, result in before.items():
            if is_finite(result):
                continue
            dtype = next(self.stepper.model.parameters()).dtype
            if (name := self.stepper.nonfinite_parameter()) is not None:
                reason = weights_are_the_reason(name, dtype)
            else:
                remedy = "use bf16 instead of fp16" if dtype == torch.float16 else "look for broken examples"
                reason = f"its weights are finite: {remedy}"
            raise InputError(
                f"before training the scores of {result['num_nonfinite']} of {result['num_examples']} {split} examples are not "
                f"finite: {reason}"
            )

    def _save_checkpoint(self, step: int) -> None:
        """Saves a checkpoint, or warns: the journal has every step, a checkpoint only makes a resume faster."""
        if self.stepper.durable is None:
            return
        path = self.output.path
        try:
            self.stepper.durable.save_checkpoint(path / CHECKPOINTS, save_total_limit=self.plan.args.save_total_limit)
        except CheckpointError as error:  # raised on all ranks alike
            if launched_rank() == 0:
                logger.warning(
                    f"no checkpoint of step {step}: {error}. The run goes on and is safe: journal {str(path / JOURNAL)!r} "
                    "holds every step. The next save step tries again"
                )
