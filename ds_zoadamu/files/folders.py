"""Folders that take each other's place, so that a kill at any moment leaves a whole one. Links are moved and removed as such:
what they point to is never touched."""

import os
import shutil
from pathlib import Path

from .crash_points import reach


def remove(path: Path) -> None:
    """Remove a folder and what it holds, a file, or a link alone. Nothing there is no error. Raises OSError."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def replace(source: Path, target: Path, aside: Path, step: int = 0) -> None:
    """Give ``source`` the name ``target``. What has it lies ``aside`` meanwhile and afterwards, for the caller to remove.

    ``step``: of the run, for the tests of kills. Raises OSError; ``target`` is as it was then.
    """
    if os.path.lexists(target):
        os.rename(target, aside)
        reach("replacing", step)
    try:
        os.rename(source, target)
    except OSError:
        put_back(target, aside)
        raise


def put_back(target: Path, aside: Path) -> None:
    """Mend what a kill in ``replace`` has left: what lies ``aside`` gets its name back, or goes where ``target`` is there."""
    if not os.path.lexists(aside):
        return
    if os.path.lexists(target):
        remove(aside)
    else:
        os.rename(aside, target)
