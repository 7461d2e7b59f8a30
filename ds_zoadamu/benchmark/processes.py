"""A run under the deepspeed launcher: no process of it outlives the one that waits for it."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ds_zoadamu.benchmark.runs import Run, Start
from ds_zoadamu.distributed.start import free_port

_SECONDS_TO_END = 20.0
_PLACE = Path(__file__).resolve().parents[2]
"""Of the package, for the processes that are started."""


def under_launcher(master_port: int | None) -> Start:
    """Starts runs in fresh processes; the port of their process groups is a free one where none is given."""

    def start(run: Run, words: Sequence[str], log: Path) -> int:
        port = str(master_port or free_port())
        command = [sys.executable, "-m", "ds_zoadamu.cli", run.command, "--num_gpus", str(run.ranks), "--master_port", port]
        return execute([*command, *words], _environment(run), log)

    return start


def environment_of(run: Run) -> dict[str, str]:
    """What a rank's environment has besides this process's."""
    return {"OMP_NUM_THREADS": str(run.threads), "TOKENIZERS_PARALLELISM": "false"}


def _environment(run: Run) -> dict[str, str]:
    path = os.pathsep.join([str(_PLACE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **environment_of(run)}


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
