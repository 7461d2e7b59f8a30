"""A run of an optimizer that needs neither ZeRO-3 nor more than one rank: same data, evaluations and files as finetune's."""

import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from deepspeed.accelerator import get_accelerator
from transformers import AutoModelForCausalLM

from ds_zoadamu.distributed.start import launched_world_size
from ds_zoadamu.errors import NonFiniteLossError
from ds_zoadamu.tasks import Evaluation, InputError, evaluate
from ds_zoadamu.training.arguments import check_arguments
from ds_zoadamu.training.memory import PeakMemory
from ds_zoadamu.training.output import BEST, PROFILE, RESULTS, OutputDirectory, environment, quantiles
from ds_zoadamu.training.plan import encode_splits, read_model_input
from ds_zoadamu.training.progress import better
from ds_zoadamu.training.summary import scores
from ds_zoadamu.zero3.data import MicroBatchSampler, repeat
from ds_zoadamu.zero3.start import init_distributed

_WARM_UP, _MAX_SKIPPED = 3, 10


class PlainOptimizer(Protocol):
    """Steps a model that lies whole on this device."""

    split: dict[str, float]
    """Seconds so far by part of a step."""

    def step(self, micro_batches: list) -> dict:
        """Makes one step; returns its record, with at least `loss`, `lr` and `skipped`."""


def run_plain(args: Namespace, optimizer: Callable[..., PlainOptimizer]) -> None:
    """A whole run, or --profile_steps steps of it, with files as of launch/finetune.py.

    Args:
        args: of `finetune_parser`; a DeepSpeed JSON is not read.
        optimizer: makes one of (model, lr, zo_eps, seed).

    Raises:
        InputError: before the model is loaded or a file written.
        NonFiniteLossError: training has diverged.
    """
    run = _Run(args, optimizer)
    run.output.write_json(*((PROFILE, run.profile()) if args.profile_steps else (RESULTS, run.train())))


class _Run:
    """A model, its data and its folder."""

    def __init__(self, args: Namespace, optimizer: Callable[..., PlainOptimizer]):
        check_arguments(args)
        if launched_world_size() != 1:
            raise InputError(f"the plain MeZO loop holds the whole model: it runs on 1 rank, not on {launched_world_size()}")
        if args.weight_decay:
            raise InputError(f"--weight_decay {args.weight_decay}: the plain MeZO loop has none; leave it out")
        self.args, self.output = args, OutputDirectory(args.output_dir, writes=True, overwrite=args.overwrite_output_dir)
        self.plan = encode_splits(args, None, read_model_input(args))
        accumulation, size = args.gradient_accumulation_steps or 1, args.per_device_train_batch_size or 8
        sampler = MicroBatchSampler(len(self.plan.train), size, accumulation, 0, 1, args.seed)
        collate, self.accumulation = self.plan.model_input.collate, accumulation
        self.batches = repeat(torch.utils.data.DataLoader(self.plan.train, batch_sampler=sampler, collate_fn=collate))
        init_distributed()
        self.memory = PeakMemory()
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        self.model = self.load(args.model_name_or_path, dtype)
        self.optimizer = optimizer(self.model, _or(args.learning_rate, 1e-6), _or(args.zo_eps, 1e-3), args.seed)
        self.output.begin()

    def load(self, path: str | Path, dtype: torch.dtype) -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=self.args.trust_remote_code)
        return model.to(get_accelerator().current_device_name()).eval()

    def step(self) -> tuple[dict, float]:
        start = time.perf_counter()
        record = self.optimizer.step([next(self.batches) for _ in range(self.accumulation)])
        return record, time.perf_counter() - start

    def evaluate(self, split: str, step: int) -> Evaluation:
        examples = {"dev": self.plan.dev, "test": self.plan.test}[split]
        result = evaluate(self.model, examples, self.plan.model_input.collate, self.args.per_device_eval_batch_size)
        self.output.log({"kind": "eval", "split": split, "step": step, **asdict(result)})
        return result

    def train(self) -> dict:
        """The whole run, with accuracies on the way; returns what results.json holds."""
        args, seconds, skipped, in_a_row = self.args, [], 0, 0
        before = {split: self.evaluate(split, 0) for split in ("dev", "test")}
        self.check_finite(before)
        best_step, best, every = 0, None, args.eval_steps or max(1, args.max_steps // 10)
        for step in range(1, args.max_steps + 1):
            record, taken = self.step()
            seconds.append(taken)
            self.output.log({"kind": "step", "step": step, **record, "seconds": taken})
            skipped, in_a_row = skipped + record["skipped"], in_a_row + 1 if record["skipped"] else 0
            if in_a_row == _MAX_SKIPPED:
                raise NonFiniteLossError(f"step {step}: the loss of {_MAX_SKIPPED} steps in a row was not finite; lower the lr")
            if step % every == 0 or step == args.max_steps:
                now = self.evaluate("dev", step)
                if better(now, best):
                    best_step, best = step, now
                    self.model.save_pretrained(self.output.path / BEST)
        if best is None:
            raise NonFiniteLossError(
                f"no evaluated step of {args.max_steps} has finite scores on the development set; lower the lr"
            )
        peak = self.memory.report()  # before the best model is loaded
        after = last = self.evaluate("test", args.max_steps)
        if best_step != args.max_steps:
            self.model = self.load(self.output.path / BEST, self.model.dtype)
            after = self.evaluate("test", best_step)
        self.output.promote_best()
        return {
            "max_steps": args.max_steps,
            "best_step": best_step,
            **scores(self.plan, before, best, after, last),
            "num_examples": {name: len(getattr(self.plan, name)) for name in ("train", "dev", "test")},
            "seconds_a_step": quantiles(seconds[1:] or seconds),
            "skipped_steps": skipped,
            **self.surroundings(peak),
        }

    def check_finite(self, before: dict[str, Evaluation]) -> None:
        """Raises InputError where the model before training has scores that are not finite."""
        if not all(result.finite for result in before.values()):
            broken = (name for name, p in self.model.named_parameters() if not p.isfinite().all())
            where = (
                f"the parameter {name!r} holds NaN or infinity" if (name := next(broken, None)) else "its weights are finite"
            )
            raise InputError(f"the scores of the model before training are not finite: {where}")

    def profile(self) -> dict:
        """--profile_steps steps without evaluations; returns what profile.json holds."""
        for _ in range(_WARM_UP):
            self.step()
        self.optimizer.split = dict.fromkeys(self.optimizer.split, 0.0)
        count = self.args.profile_steps
        seconds = [self.step()[1] for _ in range(count)]
        split = {part: total / count for part, total in self.optimizer.split.items()}
        split["other"] = sum(seconds) / count - sum(split.values())
        measured = {"steps": count, "seconds_a_step": quantiles(seconds), "split_seconds": split}
        collectives = {"by_operation": {}, "sent_bytes": 0.0}
        return {**measured, "collectives": collectives, **self.surroundings(self.memory.report())}

    def surroundings(self, peak: dict) -> dict:
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        names = {"task": self.plan.model_input.task.name, "model": self.args.model_name_or_path, "optimizer": "plain MeZO"}
        shape = {"world_size": 1, "passes_a_step": {"forward": 2, "backward": 0}, "ranks": [{**peak, "weights_bytes": weights}]}
        return {**names, **shape, **environment(), "arguments": vars(self.args), "config": {}, "command": shlex.join(sys.argv)}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
