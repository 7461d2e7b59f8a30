"""A fine-tuning run: accuracy before, training with accuracies on the way, accuracy after, and what it leaves behind."""

import shlex
import sys
import time
from argparse import Namespace
from dataclasses import asdict

import numpy
import torch
from deepspeed import comm as dist
from deepspeed.utils import logger
from tqdm import tqdm

from ds_zoadamu.distributed.collective import gather_json
from ds_zoadamu.distributed.start import launched_rank as rank
from ds_zoadamu.durability.digest import weights_digest
from ds_zoadamu.durability.engine import ZerothOrderEngine
from ds_zoadamu.errors import CheckpointError, NonFiniteLossError
from ds_zoadamu.hf.models import load_weights, save_pretrained
from ds_zoadamu.tasks import Evaluation, InputError, evaluate
from ds_zoadamu.training.curves import draw_curves
from ds_zoadamu.training.memory import PeakMemory
from ds_zoadamu.training.output import (
    BEST,
    CHECKPOINTS,
    CURVES,
    JOURNAL,
    METRICS,
    RESULTS,
    OutputDirectory,
    environment,
    quantiles,
)
from ds_zoadamu.training.plan import Plan, make_plan
from ds_zoadamu.training.progress import Progress, begin, better, resume
from ds_zoadamu.training.steps import Stepper, make_stepper
from ds_zoadamu.training.summary import scores, summary
from ds_zoadamu.zero3.divergence import nonfinite_parameter, weights_are_the_reason
from ds_zoadamu.zero3.memory import stored_bytes


def finetune(args: Namespace) -> dict:
    """Runs what launch/finetune.py's arguments say; returns what results.json holds. All ranks call it.

    Raises:
        InputError, ConfigError: before a model is loaded or a file written.
    """
    output = OutputDirectory(args.output_dir, writes=rank() == 0, overwrite=args.overwrite_output_dir, resume=args.resume)
    plan = make_plan(args)
    memory = PeakMemory()
    stepper = make_stepper(plan)
    resumed = resume(plan, output, stepper)
    progress = resumed or Progress()
    before = {split: progress.evaluations.get((split, 0)) or _measure(plan, stepper, split) for split in ("dev", "test")}
    _check_finite(before, stepper)
    if resumed is None:
        begin(plan, output, stepper)
    for split, result in before.items():
        if (split, 0) not in progress.evaluations:
            _log(output, split, 0, result)
    seconds, best_step, best = _train(plan, stepper, output, progress)
    if stepper.journaled:
        stepper.engine.close_journal()  # durable, also with --journal_fsync_every above 1
    peak = memory.report()  # before the best model is loaded
    last = progress.evaluations.get(("test", args.max_steps)) or _evaluate(plan, stepper, output, "test", args.max_steps)
    after = last
    if best_step != args.max_steps:
        if stepper.journaled:
            stepper.engine.close_journal()  # the run is over
        load_weights(stepper.engine, output.best)
        after = _evaluate(plan, stepper, output, "test", step=best_step)
    dist.barrier()  # rank 0 may have been the one to read the best model: all have it before it is renamed
    output.promote_best()
    results = _results(plan, stepper, before, (best_step, best, after), last, seconds, peak)
    output.write_json(RESULTS, results)
    if rank() == 0:
        title = f"{plan.model_input.task.name}, {args.model_name_or_path}, {plan.config.optimizer}"
        if not draw_curves(output.records(), output.path / CURVES, title, plan.dev_majority):
            logger.warning(f"no {CURVES}: Matplotlib is not installed (pip install ds_zoadamu[plots])")
        if best.accuracy <= before["dev"].accuracy:
            logger.warning("no evaluated step was better on the development set than the model before training; try --find_lr")
        print(summary(results, args.output_dir), flush=True)
    return results


def _train(plan: Plan, stepper: Stepper, output: OutputDirectory, progress: Progress) -> tuple[list[float], int, Evaluation]:
    """Trains and keeps the best model of the evaluated steps; returns the seconds of each step, the best step and its score."""
    args, total, first = plan.args, plan.args.max_steps, progress.step
    every = args.eval_steps or max(1, total // 10)
    seconds, (best_step, best) = list(progress.seconds), progress.best()
    with tqdm(total=total, initial=first, desc="fine-tuning", unit="step", disable=rank() != 0, mininterval=1.0) as bar:
        # A resumed run may have been stopped after its last step and before what follows a step.
        for step in range(first if first else 1, total + 1):
            if step > first:
                start = time.perf_counter()
                record = stepper.step()
                seconds.append(time.perf_counter() - start)
                output.log({"kind": "step", **record, "seconds": seconds[-1]})
                keys = ("loss", "projected_grad", "grad_norm")
                shown = {key: numpy.mean(record[key]) for key in keys if record.get(key) is not None}
                bar.set_postfix({key: f"{value:.4g}" for key, value in shown.items()}, refresh=False)
                bar.update()
            if step % every == 0 or step == total:
                now = progress.evaluations.get(("dev", step)) or _evaluate(plan, stepper, output, "dev", step)
                if best_step == step or better(now, best):
                    best_step, best = step, now
                    save_pretrained(
                        stepper.engine, output.path / BEST, plan.model_input.tokenizer, args.max_shard_size, overwrite=True
                    )
            if step > first and stepper.journaled and args.save_steps and step % args.save_steps == 0:
                _save_checkpoint(stepper.engine, output, step, args.save_total_limit)
    if best is None:
        raise NonFiniteLossError(
            f"no evaluated step of {total} has finite scores on the development set, while the model before training has: it "
            f"diverged. Lower the lr, see --find_lr; what was measured is in {output.path / METRICS}"
        )
    return seconds, best_step, best


def _check_finite(before: dict[str, Evaluation], stepper: Stepper) -> None:
    """Raises InputError where the model before training has scores that are not finite. All ranks call it."""
    for split, result in before.items():
        if result.finite:
            continue
        dtype = next(stepper.engine.module.parameters()).dtype
        if (name := nonfinite_parameter(stepper.engine.module)) is not None:
            reason = weights_are_the_reason(name, dtype)
        else:
            reason = "its weights are finite: " + (
                "use bf16 instead of fp16" if dtype == torch.float16 else "look for broken examples"
            )
        raise InputError(
            f"before training the scores of {result.num_nonfinite} of {result.num_examples} {split} examples are not finite: "
            f"{reason}"
        )


def _save_checkpoint(engine: ZerothOrderEngine, output: OutputDirectory, step: int, limit: int) -> None:
    """Saves a checkpoint, or warns: the journal has every step, a checkpoint only makes a resume faster."""
    try:
        engine.save_checkpoint(output.path / CHECKPOINTS, save_total_limit=limit)
    except CheckpointError as error:  # raised on all ranks alike
        if rank() == 0:
            logger.warning(
                f"no checkpoint of step {step}: {error}. The run goes on and is safe: journal {str(output.path / JOURNAL)!r} "
                "holds every step. The next save step tries again"
            )


def _evaluate(plan: Plan, stepper: Stepper, output: OutputDirectory, split: str, step: int) -> Evaluation:
    result = _measure(plan, stepper, split)
    _log(output, split, step, result)
    return result


def _measure(plan: Plan, stepper: Stepper, split: str) -> Evaluation:
    examples = {"dev": plan.dev, "test": plan.test}[split]
    return evaluate(stepper.engine.module, examples, plan.model_input.collate, plan.args.per_device_eval_batch_size)


def _log(output: OutputDirectory, split: str, step: int, result: Evaluation) -> None:
    output.log({"kind": "eval", "split": split, "step": step, **asdict(result)})
    if rank() == 0:
        nonfinite = f", {result.num_nonfinite} of them with scores that are not finite" if result.num_nonfinite else ""
        tqdm.write(
            f"step {step}: {split} accuracy {result.accuracy:.4f}, loss {result.loss:.4f} ({result.num_examples} examples"
            f"{nonfinite})"
        )


def _results(plan, stepper, before, best_model, last, seconds, peak) -> dict:
    args, (best_step, best, after) = plan.args, best_model
    return {
        "task": plan.model_input.task.name,
        "model": args.model_name_or_path,
        "optimizer": plan.config.optimizer,
        "world_size": dist.get_world_size(),
        "max_steps": args.max_steps,
        "best_step": best_step,
        **scores(plan, before, best, after, last),
        "num_examples": {"train": len(plan.train), "dev": len(plan.dev), "test": len(plan.test)},
        "seconds_a_step": quantiles(seconds[1:] or seconds),  # the first step pays for caches and traces
        "passes_a_step": stepper.passes_a_step,
        "skipped_steps": stepper.engine.skipped_steps,
        "weights_sha256": weights_digest(stepper.engine) if stepper.journaled else None,
        "ranks": gather_json({**peak, **stored_bytes(stepper.engine)}),
        **environment(),
        "command": shlex.join(sys.argv),
        "arguments": vars(args),
        "config": plan.config.deepspeed,
    }
