"""File systems without room: a small one of its own, or a limit on the size of files where none may be mounted."""

import contextlib
import os
import resource
import subprocess
from pathlib import Path


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    """A tmpfs of ``size`` at ``folder``; yields why not where this user may not mount one, else None."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        yield f"cannot mount a small tmpfs: {(getattr(error, 'stderr', '') or str(error)).strip()}"
        return
    try:
        yield None
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, left: int = 0) -> list[Path]:
    """Fill the disk of a folder but for ``left`` bytes; returns the files that do."""
    ballast, rest = folder / "ballast", folder / "rest"
    ballast.write_bytes(bytes(left))
    with contextlib.suppress(OSError), open(rest, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(ballast, 0)
    return [ballast, rest]


@contextlib.contextmanager
def file_size_limit(limit: int):
    """Inside, no file of this process may grow beyond ``limit`` bytes: writing ends as on a full disk, with "File too large"
    (Python ignores the signal)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
