"""An error that all ranks have alike is said once: by rank 0.

Most of what a user has got wrong is found by each rank for itself, before there is a process group. Ranks therefore compare
their last words through the store that the launcher's environment names, where rank 0 leaves its own.
"""

import itertools
import os
import socket
import sys
import time
from datetime import timedelta

import torch.distributed as dist

_PATIENCE = 10.0  # seconds in which the slowest rank comes to the error that it shares with the others
_times = itertools.count()  # a process that ends does it once; one that goes on does it as often as the others


def is_rank_0() -> bool:
    """By the launcher's environment."""
    return _rank() == 0


def say(message: str, line: str) -> None:
    """Print ``line`` to stderr as the last one of this process, unless rank 0 ends with the same ``message``.

    Rank 0 prints and stays until the others have read the message, some seconds at most, since it holds the store. What the
    others cannot compare they print.
    """
    if _rank() == 0:
        print(line, file=sys.stderr, flush=True)
        _said_by_rank_0(message)
    elif not _said_by_rank_0(message):
        print(line, file=sys.stderr, flush=True)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _said_by_rank_0(message: str) -> bool:
    rank, others = _rank(), int(os.environ.get("WORLD_SIZE", "1")) - 1
    if others < 1:
        return False
    number = next(_times)
    words, readers = f"ds_zoadamu/last words of rank 0, {number}", f"ds_zoadamu/ranks that have read them, {number}"
    try:
        store = dist.group.WORLD.get_group_store() if dist.is_initialized() else _launchers_store(rank == 0)
        if rank == 0:
            store.set(words, message)
            end = time.monotonic() + _PATIENCE
            while store.add(readers, 0) < others and time.monotonic() < end:
                time.sleep(0.02)
            return False
        store.wait([words], timedelta(seconds=_PATIENCE))
        said = store.get(words).decode()
        store.add(readers, 1)
    except (RuntimeError, ValueError, KeyError):
        return False
    return said in (message, f"rank {rank}: {message}") or message.startswith("rank 0, ") and message.endswith(said)


def _launchers_store(is_first: bool) -> dist.Store:
    hosting = is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    end = time.monotonic() + _PATIENCE
    while not hosting and not _answers(address, port):  # torch would wait too, and print a C++ stack in the end
        if time.monotonic() > end:
            raise RuntimeError("no store")
        time.sleep(0.1)
    return dist.TCPStore(address, port, None, hosting, timedelta(seconds=_PATIENCE), wait_for_workers=False)


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1.0).close()
    except OSError:
        return False
    return True
