"""What a run leaves in its output directory."""

import json
import os
import platform
import shlex
import sys
from argparse import Namespace
from importlib import metadata
from pathlib import Path

import torch

from ds_zoadamu.config import Config
from ds_zoadamu.durability.journal import Record
from ds_zoadamu.durability.published import ADAPTERS
from ds_zoadamu.files.folders import put_back, remove, replace
from ds_zoadamu.files.json_files import dumps, write_json
from ds_zoadamu.files.locks import is_locked
from ds_zoadamu.files.safetensors_io import naming, write_durably
from ds_zoadamu.tasks import InputError
from ds_zoadamu.zero3.records import StepRecord

METRICS, RESULTS, CURVES, SEARCH, BEST, MODEL = "metrics.jsonl", "results.json", "curves.png", "find_lr.json", "best", "model"
PROFILE, INITIAL, MERGED = "profile.json", ADAPTERS, "merged"
JOURNAL, CHECKPOINTS = "journal.jsonl", "checkpoints"
_OURS = (METRICS, RESULTS, CURVES, SEARCH, PROFILE, BEST, MODEL, MERGED, JOURNAL, CHECKPOINTS)
_PACKAGES = ("ds_zoadamu", "deepspeed", "torch", "transformers", "datasets", "numpy")


class OutputDirectory:
    """A run's folder; rank 0 writes, the other ranks' calls do nothing.

    Making the object writes nothing. Call `begin` when all checks are over.

    Args:
        path: the folder.
        writes: whether this rank writes.
        overwrite: whether results that are there may be replaced.
        resume: whether the run that is there goes on.

    Raises:
        InputError: it is a file, cannot be written, holds results and `overwrite` is not set, or a run that has not ended.
    """

    def __init__(self, path: str, *, writes: bool, overwrite: bool, resume: bool = False):
        self.path = Path(path)
        self._writes, self._overwrite = writes, overwrite
        present = [name for name in _OURS if (self.path / name).exists()]
        if overwrite and resume:
            raise InputError("--resume goes on with a run and --overwrite_output_dir replaces it; give one of the two")
        if resume and present and JOURNAL not in present:
            raise InputError(
                f"--resume: --output_dir {path} holds {present[0]} but no {JOURNAL}, so there is no run to go on with"
            )
        if present and not overwrite and not resume:
            raise InputError(
                f"--output_dir {path} holds the {present[0]} of an earlier run; give another folder, --resume or "
                "--overwrite_output_dir"
            )
        if overwrite and is_locked(self.path / JOURNAL):
            raise InputError(
                f"--output_dir {path}: another run is writing its {JOURNAL} now; wait until that has ended, stop it, or give "
                "another folder"
            )
        check_writable(self.path)

    def begin(self) -> None:
        """Makes the folder and removes an earlier run's results, which the constructor was allowed to overwrite."""
        if not self._writes:
            return
        if is_locked(self.path / JOURNAL) or (not self._overwrite and any((self.path / name).exists() for name in _OURS)):
            raise InputError(f"--output_dir {self.path}: another run has begun there meanwhile; give this one another folder")
        self.path.mkdir(parents=True, exist_ok=True)
        for name in (*_OURS, INITIAL):
            for each in (name, *(f".{name}.{what}" for what in ("writing", "old", "creating"))):  # what kills have left, too
                remove(self.path / each)

    def log(self, record: dict) -> None:
        """Appends one line to metrics.jsonl; complete even if the run is stopped later. An evaluation is made durable: from it
        follows which model is kept as the best."""
        if self._writes:
            with naming(self.path / METRICS), open(self.path / METRICS, "a", encoding="utf-8") as file:
                file.write(dumps(record) + "\n")
                if record["kind"] == "eval":
                    file.flush()
                    os.fsync(file.fileno())

    def records(self) -> list[dict]:
        """The lines of metrics.jsonl; without one that a kill left unfinished at the end."""
        path = self.path / METRICS
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def replace_records(self, records: list[dict]) -> None:
        """Rewrites metrics.jsonl in one go."""
        if self._writes:
            write_durably(self.path / METRICS, "".join(dumps(record) + "\n" for record in records).encode())

    def write_json(self, name: str, content: dict) -> None:
        """Writes a JSON file in one go."""
        if self._writes:
            write_json(self.path / name, content)

    @property
    def best(self) -> Path:
        """The best model so far; in its final place, if the run was stopped after `promote_best`."""
        return self.path / (BEST if (self.path / BEST).exists() else MODEL)

    def promote_best(self) -> None:
        """The best model so far becomes the run's model."""
        if self._writes and (self.path / BEST).exists():
            aside = self.path / f".{MODEL}.old"
            put_back(self.path / MODEL, aside)
            replace(self.path / BEST, self.path / MODEL, aside)
            remove(aside)


def check_writable(path: Path) -> None:
    """Raises InputError where --output_dir cannot be made or written."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise InputError(f"--output_dir {path}: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK):
        raise InputError(f"--output_dir {path}: no permission to write in {existing}")


def quantiles(seconds: list[float]) -> dict[str, float]:
    """median, p10 and p90 of at least one number."""
    times = torch.tensor(seconds, dtype=torch.float64)
    return {name: times.quantile(q).item() for name, q in (("median", 0.5), ("p10", 0.1), ("p90", 0.9))}


def step_scalars(record: StepRecord | Record) -> dict:
    """Of a step, as metrics.jsonl has them: a number, a list for several directions; the first group's lr."""
    grads = record.projected_grads
    return {"projected_grad": grads[0] if len(grads) == 1 else list(grads), "lr": record.lrs[0]}


def command_line() -> str:
    """What a user types to run this process again, but for the launcher's options."""
    return shlex.join([*sys.argv[0].split(), *sys.argv[1:]] if sys.argv[0].startswith("ds_zoadamu ") else sys.argv)


def settings(args: Namespace, config: Config | None) -> dict:
    """What was asked for and on which machine, for a results file."""
    given = {} if config is None else config.deepspeed
    return {**environment(), "command": command_line(), "arguments": vars(args), "config": given}


def environment() -> dict:
    """Versions and machine, for a results file."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # imported from a checkout that is not installed
            versions[package] = getattr(__import__(package), "__version__", "unknown")
    return {
        "versions": {"python": platform.python_version(), **versions},
        "platform": platform.platform(),
        "processor": processor_name(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "num_cpus": len(os.sched_getaffinity(0)),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def processor_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
