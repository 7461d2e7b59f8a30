"""What a run leaves in its output directory."""

import json
import math
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

from ds_zoadamu.tasks import InputError

METRICS, RESULTS, CURVES, SEARCH, BEST, MODEL = "metrics.jsonl", "results.json", "curves.png", "find_lr.json", "best", "model"
_OURS = (METRICS, RESULTS, CURVES, SEARCH, BEST, MODEL)
_PACKAGES = ("ds_zoadamu", "deepspeed", "torch", "transformers", "datasets", "numpy")


class OutputDirectory:
    """A run's folder; rank 0 writes, the other ranks' calls do nothing.

    Making the object writes nothing. Call `begin` when all checks are over.

    Args:
        path: the folder.
        writes: whether this rank writes.
        overwrite: whether results that are there may be replaced.

    Raises:
        InputError: it is a file, cannot be written, or holds results and `overwrite` is not set.
    """

    def __init__(self, path: str, *, writes: bool, overwrite: bool):
        self.path = Path(path)
        self._writes = writes
        present = [name for name in _OURS if (self.path / name).exists()]
        if present and not overwrite:
            raise InputError(
                f"--output_dir {path} holds the {present[0]} of an earlier run; give another folder or --overwrite_output_dir"
            )
        existing = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not existing.is_dir():
            raise InputError(f"--output_dir {path}: {existing} is a file, not a folder")
        if not os.access(existing, os.W_OK):
            raise InputError(f"--output_dir {path}: no permission to write in {existing}")

    def begin(self) -> None:
        """Makes the folder and removes an earlier run's results, which the constructor was allowed to overwrite."""
        if not self._writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        for name in _OURS:
            target = self.path / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def log(self, record: dict) -> None:
        """Appends one line to metrics.jsonl; complete even if the run is stopped later."""
        if self._writes:
            with open(self.path / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(record)) + "\n")

    def records(self) -> list[dict]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.path / METRICS).read_text(encoding="utf-8").splitlines()]

    def write_json(self, name: str, content: dict) -> None:
        """Writes a JSON file in one go (beside its place, then renamed)."""
        if self._writes:
            temporary = self.path / f".{name}.writing"
            temporary.write_text(json.dumps(_finite(content), indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, self.path / name)

    def promote_best(self) -> None:
        """The best model so far becomes the run's model."""
        if self._writes:
            os.rename(self.path / BEST, self.path / MODEL)


def _finite(value):
    """The same with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
        "processor": _processor(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
