"""The commands of a benchmark's runs."""

import os
from argparse import Namespace
from pathlib import Path

from ds_zoadamu.benchmark.arguments import shared_arguments
from ds_zoadamu.benchmark.contenders import Contender
from ds_zoadamu.benchmark.grid import Point
from ds_zoadamu.benchmark.runs import Run


class Plans:
    """Plans runs of contenders.

    Args:
        args: of `benchmark_parser`.
        batch: the settings that all contenders share, of `check_settings`.
    """

    def __init__(self, args: Namespace, batch: dict):
        self._args, self._batch = args, batch
        self.output = Path(args.output_dir)
        self.threads = args.threads or threads_of(args.ranks)

    def plan(self, kind: str, contender: Contender, point: Point, steps: int, seed: int, *more: str) -> Run:
        """The run of a kind: "profile", "trial" or "run"."""
        args, ranks, threads = self._args, self._args.ranks, self.threads
        if contender.plain:
            # It takes all micro-batches of a step by itself, and all threads.
            own = ("per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16")
            words = shared_arguments(args, without=own)
            words += ["--per_device_train_batch_size", str(self._batch["train_micro_batch_size_per_gpu"])]
            words += ["--gradient_accumulation_steps", str(self._batch["gradient_accumulation_steps"] * ranks)]
            words += [] if self._batch["precision"] == "fp32" else [f"--{self._batch['precision']}"]
            ranks, threads = 1, threads * ranks
        elif contender.config is None:
            words = shared_arguments(args)
        else:
            words = [*shared_arguments(args), "--deepspeed", "--deepspeed_config", str(self.config_path(contender))]
            words += ["--save_steps", "0"]
        words += [*point.arguments, "--max_steps", str(steps), "--seed", str(seed), *more]
        name = kind if kind == "profile" else f"{kind}-{point.label}-steps{steps}-seed{seed}"
        folder = self.output / "runs" / contender.name / name
        return Run(folder, contender.command, tuple(words), ranks, threads, f"{contender.name} {name}")

    def config_path(self, contender: Contender) -> Path:
        """Where the benchmark keeps its copy of a contender's JSON."""
        return self.output / "configs" / f"{contender.name}.json"


def threads_of(ranks: int) -> int:
    """CPU threads of each of so many ranks."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)
