"""A command and its children: none outlives the benchmark that waits for them."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_SECONDS_TO_END = 20.0


def execute(command: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
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
    with suppress(subprocess.TimeoutExpired):
        process.wait(_SECONDS_TO_END)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # also ranks that outlived the launcher
    process.wait()
