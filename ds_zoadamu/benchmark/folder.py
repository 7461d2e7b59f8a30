"""The folder of a benchmark or of a table: whether it may be written, and whether what is there belongs to the same one."""

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ds_zoadamu.files.json_files import write_json
from ds_zoadamu.tasks import InputError
from ds_zoadamu.training.output import check_writable

RESULTS, REPORT, PAGE = "results.json", "report.md", "report.html"
SETTINGS, _LOCK = "settings.json", ".lock"


def check_folder(path: Path) -> None:
    """Writes nothing.

    Raises:
        InputError: the folder is a file, cannot be written, or holds something else.
    """
    check_writable(path)
    if path.exists() and {p.name for p in path.iterdir()} - {_LOCK} and not (path / SETTINGS).exists():
        raise InputError(f"--output_dir {path} holds files but no benchmark and no table (no {SETTINGS}); give another folder")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, no other command works in the folder; it is given up when this process ends, however it ends.

    Raises:
        InputError: another one does.
    """
    path.mkdir(parents=True, exist_ok=True)
    with open(path / _LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--output_dir {path}: another command works there now; wait for it or stop it") from None
        yield


def claim_folder(path: Path, settings: Mapping[str, Any], configs: Mapping[str, dict]) -> None:
    """Makes the folder with the settings and the contenders' JSONs, or finds the same ones there.

    Seeds, grids, budget and contenders may grow: only what every run depends on must be the same.

    Raises:
        InputError: names the settings that differ from those of the benchmark that is there.
    """
    found = _read(path / SETTINGS)
    differing = [
        f"{key} is {settings[key]!r}, was {found[key]!r}" for key in settings if key in found and found[key] != settings[key]
    ]
    for name, config in configs.items():
        if (known := _read(path / "configs" / f"{name}.json")) and known != config:
            differing.append(f"the JSON of {name} is another one")
    if differing:
        raise InputError(f"--output_dir {path} holds runs with other settings: {'; '.join(differing)}. Give another folder")
    (path / "configs").mkdir(parents=True, exist_ok=True)
    write_json(path / SETTINGS, dict(settings))
    for name, config in configs.items():
        write_json(path / "configs" / f"{name}.json", config)


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
