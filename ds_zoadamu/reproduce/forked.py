"""Ranks on a CPU, forked from one process that has imported everything: a run of seconds then takes seconds.

Not for accelerators: a process that has looked at one cannot be forked. Their runs start under the launcher.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path

from ds_zoadamu.benchmark.processes import environment_of
from ds_zoadamu.benchmark.runs import Run
from ds_zoadamu.distributed.start import free_port

_PRELOADED = (
    __name__, "ds_zoadamu.training.finetune_command", "ds_zoadamu.training.evaluate_command", "torch._dynamo", "peft",
    "matplotlib.figure", "matplotlib.backends.backend_agg",
)  # fmt: skip


class Forked:
    """Starts runs, as `runs.Start`; the process that is forked from is started with the first one."""

    def __init__(self, master_port: int | None):
        self._port = master_port
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(_PRELOADED))

    def __call__(self, run: Run, words: Sequence[str], log: Path) -> int:
        log.write_bytes(b"")
        environment = {**environment_of(run), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._port or free_port())}
        ranks = []
        for rank in range(run.ranks):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(run.ranks)}
            own["LOCAL_SIZE"] = str(run.ranks)
            process = self._context.Process(
                target=_rank, args=(run.command, list(words), own, str(log), run.threads), daemon=True
            )
            process.start()
            ranks.append(process)
        try:
            status = _status(ranks)
            if status == -signal.SIGKILL:
                with open(log, "a") as file:
                    file.write("\na rank was ended by signal 9 (SIGKILL): out of memory, or killed by somebody\n")
            return status
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _status(ranks: list) -> int:
    """That of the first rank that ends with another than 0, as the launcher's; the others have ended or are ended then."""
    left = {process.sentinel: process for process in ranks}
    while left:
        for sentinel in wait(left):
            process = left.pop(sentinel)
            process.join()
            if process.exitcode:
                wait(list(left), timeout=_SECONDS_TO_SAY_WHY)
                return process.exitcode
    return 0


_SECONDS_TO_SAY_WHY = 5.0  # that the other ranks have after one has failed


def _rank(command: str, words: list[str], environment: dict[str, str], log: str, threads: int) -> None:
    """One rank of a command, as a process of its own."""
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update(environment)
    sys.argv = [f"ds_zoadamu {command}", *words]
    import torch

    from ds_zoadamu.distributed.ending import run_command

    torch.set_num_threads(threads)
    run_command(importlib.import_module(f"ds_zoadamu.training.{command}_command").main)


def _end_with_the_caller() -> None:
    """A run whose caller was killed must not write into a folder in which the same command goes on."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGKILL)
