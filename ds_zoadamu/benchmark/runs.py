"""One run of one contender: its command and its folder, which is there whole or not at all."""

import os
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from ds_zoadamu.benchmark.arguments import shared_arguments
from ds_zoadamu.benchmark.contenders import Contender
from ds_zoadamu.benchmark.grid import Point
from ds_zoadamu.benchmark.outcomes import FAILED, LOG, OUTCOME, Outcome, judge, read_outcome
from ds_zoadamu.benchmark.processes import execute
from ds_zoadamu.distributed.start import free_port
from ds_zoadamu.files.folders import remove
from ds_zoadamu.files.json_files import write_json
from ds_zoadamu.training.output import BEST, CHECKPOINTS, MODEL

_PLACE = Path(__file__).resolve().parents[2]
"""Of the package, for the processes that are started."""


@dataclass(frozen=True)
class Run:
    """A contender with one lr and seed for some steps, or the profile of its step.

    Attributes:
        folder: under the benchmark's output, named after what the run is.
        module: that is the command.
        arguments: its command line, but for the folders that differ from machine to machine.
    """

    contender: Contender
    folder: Path
    module: str
    arguments: tuple[str, ...]
    ranks: int
    threads: int


class Runner:
    """Starts runs under the deepspeed launcher, or reads those that have ended.

    Args:
        args: of `benchmark_parser`.
        batch: the settings that all contenders share, of `check_settings`.
        commit: of the code, noted with every outcome.
    """

    def __init__(self, args: Namespace, batch: dict, commit: str):
        self._args, self._batch, self._commit = args, batch, commit
        self.output = Path(args.output_dir)
        self.threads = args.threads or max(1, len(os.sched_getaffinity(0)) // args.ranks)

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
        return Run(contender, folder, contender.command, tuple(words), ranks, threads)

    def config_path(self, contender: Contender) -> Path:
        """Where the benchmark keeps its copy of a contender's JSON."""
        return self.output / "configs" / f"{contender.name}.json"

    def ended(self, run: Run) -> Outcome | None:
        """Of a run that needs not be run again: all but those that failed for another reason than memory or divergence."""
        known = read_outcome(run.folder)
        return known if known and known.status != FAILED else None

    def execute(self, run: Run) -> Outcome:
        """Runs it now. Its folder gets its name when the run has ended."""
        writing = run.folder.with_name(run.folder.name + ".running")
        for folder in (writing, run.folder):
            remove(folder)
        writing.mkdir(parents=True)
        status_code = execute(self._command(run, writing), self._environment(run), writing / LOG)
        log = (writing / LOG).read_text(errors="replace")
        status, reason = judge(status_code, log, writing)
        for name in (MODEL, BEST, CHECKPOINTS):  # as large as the model, and nobody asks for them
            remove(writing / "out" / name)
        about = {"status": status, "reason": reason, "commit": self._commit, "arguments": run.arguments, "ranks": run.ranks}
        write_json(writing / OUTCOME, {**about, "threads": run.threads})
        os.rename(writing, run.folder)
        return read_outcome(run.folder)

    def _command(self, run: Run, folder: Path) -> list[str]:
        port = str(self._args.master_port or free_port())
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(run.ranks), "--master_port", port]
        return [*launcher, "--module", run.module, *run.arguments, "--output_dir", str(folder / "out")]

    def _environment(self, run: Run) -> dict[str, str]:
        path = os.pathsep.join([str(_PLACE), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(run.threads), "TOKENIZERS_PARALLELISM": "false"}
