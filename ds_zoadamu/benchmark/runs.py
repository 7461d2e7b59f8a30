"""One run of one contender: its command, its folder, and how it ended. Whole or not at all."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_zoadamu.benchmark.arguments import shared_arguments
from ds_zoadamu.benchmark.contenders import Contender
from ds_zoadamu.benchmark.grid import Point
from ds_zoadamu.training.output import BEST, CHECKPOINTS, METRICS, MODEL, PROFILE, RESULTS

OUTCOME, LOG = "outcome.json", "log.txt"
FINISHED, OUT_OF_MEMORY, DIVERGED, FAILED = "finished", "out of memory", "diverged", "failed"
# What PyTorch on CPU and on GPU, Python, and the launcher of a rank that the kernel killed say.
_MEMORY_SIGNS = ("OutOfMemoryError", "out of memory", "can't allocate memory", "MemoryError", "return code = -9")
_SECONDS_TO_END = 20.0


@dataclass(frozen=True)
class Run:
    """A contender with one lr and seed for some steps, or the profile of its step.

    Attributes:
        folder: under the benchmark's output, named after what the run is.
        script: of launch/.
        arguments: its command line, but for the folders that differ from machine to machine.
    """

    contender: Contender
    folder: Path
    script: str
    arguments: tuple[str, ...]
    ranks: int
    threads: int


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: "finished", "out of memory", "diverged" or "failed".
        reason: the last words of a run that did not finish.
        results: of results.json or profile.json; empty without one.
        metrics: lines of metrics.jsonl.
    """

    status: str
    reason: str
    commit: str
    results: dict
    metrics: list[dict]


class Runner:
    """Starts runs under the deepspeed launcher, or reads those that have ended.

    Args:
        args: of `benchmark_parser`.
        batch: the settings that all contenders share, of `check_settings`.
        repository: where launch/ is.
        commit: of the code, noted with every outcome.
    """

    def __init__(self, args: Namespace, batch: dict, repository: Path, commit: str):
        self._args, self._batch, self._repository, self._commit = args, batch, repository, commit
        self.output = Path(args.output_dir)
        self._threads = args.threads or max(1, len(os.sched_getaffinity(0)) // args.ranks)

    def plan(self, kind: str, contender: Contender, point: Point, steps: int, seed: int, *more: str) -> Run:
        """The run of a kind: "profile", "trial" or "run"."""
        args, ranks, threads = self._args, self._args.ranks, self._threads
        if contender.plain:
            # It takes all micro-batches of a step by itself, and all threads.
            own = ("per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16")
            words = shared_arguments(args, without=own)
            words += ["--per_device_train_batch_size", str(self._batch["train_micro_batch_size_per_gpu"])]
            words += ["--gradient_accumulation_steps", str(self._batch["gradient_accumulation_steps"] * ranks)]
            words += [] if self._batch["precision"] == "fp32" else [f"--{self._batch['precision']}"]
            ranks, threads = 1, threads * ranks
        else:
            words = [*shared_arguments(args), "--deepspeed", "--deepspeed_config", str(self.config_path(contender))]
            words += ["--save_steps", "0"]
        words += [*point.arguments, "--max_steps", str(steps), "--seed", str(seed), *more]
        name = kind if kind == "profile" else f"{kind}-{point.label}-steps{steps}-seed{seed}"
        script = "plain_mezo.py" if contender.plain else "finetune.py"
        return Run(contender, self.output / "runs" / contender.name / name, script, tuple(words), ranks, threads)

    def config_path(self, contender: Contender) -> Path:
        """Where the benchmark keeps its copy of a contender's JSON."""
        return self.output / "configs" / f"{contender.name}.json"

    def outcome(self, run: Run) -> Outcome:
        """Of a run that has ended, or else runs it now. A run that failed for another reason than memory or divergence is
        tried again.
        """
        if (known := read_outcome(run.folder)) and known.status != FAILED:
            return known
        writing = run.folder.with_name(run.folder.name + ".running")
        for folder in (writing, run.folder):
            shutil.rmtree(folder, ignore_errors=True)
        writing.mkdir(parents=True)
        status_code = _execute(self._command(run, writing), self._environment(run), writing / LOG)
        log = (writing / LOG).read_text(errors="replace")
        status, reason = judge(status_code, log, writing)
        for name in (MODEL, BEST, CHECKPOINTS):  # as large as the model, and nobody asks for them
            shutil.rmtree(writing / "out" / name, ignore_errors=True)
        about = {"status": status, "reason": reason, "commit": self._commit, "arguments": run.arguments, "ranks": run.ranks}
        (writing / OUTCOME).write_text(json.dumps({**about, "threads": run.threads}, indent=2) + "\n")
        os.rename(writing, run.folder)
        return read_outcome(run.folder)

    def _command(self, run: Run, folder: Path) -> list[str]:
        port = str(self._args.master_port or _free_port())
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(run.ranks), "--master_port", port]
        return [*launcher, str(self._repository / "launch" / run.script), *run.arguments, "--output_dir", str(folder / "out")]

    def _environment(self, run: Run) -> dict[str, str]:
        path = os.pathsep.join([str(self._repository), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(run.threads), "TOKENIZERS_PARALLELISM": "false"}


def read_outcome(folder: Path) -> Outcome | None:
    """Of the run in a folder; None where it has not ended."""
    if not (folder / OUTCOME).exists():
        return None
    about, out = json.loads((folder / OUTCOME).read_text()), folder / "out"
    found = next((out / name for name in (RESULTS, PROFILE) if (out / name).exists()), None)
    metrics = (out / METRICS).read_text().splitlines() if (out / METRICS).exists() else []
    return Outcome(
        status=about["status"],
        reason=about["reason"],
        commit=about["commit"],
        results=json.loads(found.read_text()) if found else {},
        metrics=[json.loads(line) for line in metrics],
    )


def judge(status_code: int, log: str, folder: Path) -> tuple[str, str]:
    """(status, reason) of a run that has ended, from its exit status, what it printed, and its results."""
    if status_code == 0:
        results = folder / "out" / RESULTS
        # JSON has no NaN: a loss that is not finite was written as null.
        if results.exists() and json.loads(results.read_text())["loss"]["test_last"] is None:
            return DIVERGED, "the loss at the last step is not finite"
        return FINISHED, ""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for status, signs in ((DIVERGED, ("NonFiniteLossError",)), (OUT_OF_MEMORY, _MEMORY_SIGNS)):
        if telling := [line for line in lines if any(sign in line for sign in signs)]:
            return status, telling[-1]
    telling = [line for line in lines if "rror" in line] or lines or [f"exit status {status_code}"]
    return FAILED, telling[0]


def _execute(command: Sequence[str], environment: dict[str, str], log: Path) -> int:
    """Runs a command with its output in a file; whatever ends this process's wait also ends the command and its children."""
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                _end(process)


def _end(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)  # also ranks that outlived the launcher
    except ProcessLookupError:
        pass
    process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
