"""Ranks that may be killed or fail: how each of them ended."""

import contextlib
import os
import pickle
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ds_zoadamu.files.crash_points import VARIABLE

from .harness import _CONTEXT, HANG, _child, free_port


@dataclass(frozen=True)
class Outcome:
    """How a rank ended: "returned" a value, "raised" (the value is its traceback), "killed" or, still running after the
    timeout, "hung"."""

    how: str
    value: Any = None


class Ranks:
    """``function(rank, world_size, *args)`` on gloo ranks, one process each, to be watched and killed."""

    def __init__(self, world_size: int, function: Callable, *args: Any):
        port = free_port()
        self.processes, self._pipes = [], []
        for rank in range(world_size):
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(target=_child, args=(sender, function, rank, world_size, port, args), daemon=True)
            process.start()
            sender.close()
            self.processes.append(process)
            self._pipes.append(receiver)

    def kill(self, rank: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(self.processes[rank].pid, signal.SIGKILL)

    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def outcomes(self, timeout: float = HANG) -> list[Outcome]:
        """How every rank ended; those that have not ended within ``timeout`` seconds are stopped and have hung."""
        deadline, results = time.monotonic() + timeout, []
        for process, pipe in zip(self.processes, self._pipes, strict=True):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                process.kill()
                results.append(Outcome("hung"))
                continue
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
                results.append(Outcome("returned" if ok else "raised", value))
            except EOFError:
                results.append(Outcome("killed"))
        for process in self.processes:
            process.kill()
            process.join()
        return results


def _with_crash_point(rank: int, world_size: int, crash_at: str, function: Callable, args: tuple) -> Any:
    os.environ[VARIABLE] = crash_at
    return function(rank, world_size, *args)


def run_to_crash(world_size: int, crash_at: str, function: Callable, *args: Any) -> list[Outcome]:
    """Run with a crash point, see ``ds_zoadamu.files.crash_points``."""
    return Ranks(world_size, _with_crash_point, crash_at, function, args).outcomes()


def run_outcomes(world_size: int, function: Callable, *args: Any, timeout: float = HANG) -> list[Outcome]:
    return Ranks(world_size, function, *args).outcomes(timeout)
