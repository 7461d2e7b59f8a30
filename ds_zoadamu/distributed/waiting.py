"""How long ranks wait for each other, and what ends a wait: the time limit, or a rank that fails alone and says why.

A rank that fails where the others go on writes the reason into the process group's store and breaks its connections. Whoever
waits for it in a collective, whichever, then gets an error at once, finds the reason in the store and raises it. No thread
watches, and a step without a failure touches nothing of this.
"""

import contextlib
import json
import os
import time
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from ..errors import ConfigError, RankError

DEFAULT_TIME_LIMIT = 3600.0
"""Seconds. The longest wait of a healthy run is for rank 0, which hashes the base model's files: 350 GB at 100 MB/s."""
_LOWEST, _HIGHEST = 1.0, 7 * 24 * 3600.0
_PATIENCE = 10.0  # seconds that a failing rank waits for the others at most: to fail alike, and to read why
_PATIENCE_OF_USERS = 1.0  # the same for one who was interrupted by a user
_UNTIL_ENDED = 2.0  # seconds from the moment when a process's connections break to that when it is gone, at most
_NOBODY_SENDS = 0x0FA1  # a tag

_Error = TypeVar("_Error", bound=BaseException)


# --- the time limit -----------------------------------------------------------------------------------------------------------


def time_limit(timeout: float | timedelta | None = None) -> timedelta:
    """The time limit that ``timeout`` asks for, in seconds or as a timedelta; None: DEEPSPEED_TIMEOUT, which is in minutes, or
    DEFAULT_TIME_LIMIT. Raises ConfigError.
    """
    where = f"timeout is {timeout!r}"
    if timeout is None:
        minutes = os.environ.get("DEEPSPEED_TIMEOUT", "")
        where, timeout = f"DEEPSPEED_TIMEOUT is {minutes!r}, in minutes", DEFAULT_TIME_LIMIT
        if minutes:
            try:
                timeout = 60.0 * float(minutes)
            except ValueError:
                timeout = None
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not _LOWEST <= seconds <= _HIGHEST:
        raise ConfigError(f"{where}; ranks can wait for each other {_LOWEST:g} to {_HIGHEST:g} seconds")
    return timedelta(seconds=seconds)


def current_limit() -> timedelta:
    """The time limit of the process group, whoever started it."""
    world = dist.group.WORLD
    options = getattr(world._get_backend(world._device_types[0]), "options", None)  # gloo and NCCL have them
    return time_limit() if options is None else options._timeout


def limit_waits(limit: timedelta) -> None:
    """Give every process group there is this time limit; those that DeepSpeed makes beside the first have torch's 30
    minutes."""
    for group in _groups():
        with contextlib.suppress(RuntimeError):  # a backend without limits
            group.set_timeout(limit)


def _groups() -> list:
    return [group for group in dist.distributed_c10d._world.pg_map if isinstance(group, dist.ProcessGroup)]


# --- a rank that fails alone --------------------------------------------------------------------------------------------------


_calls = 0


def begin_call() -> None:
    """A call begins in which all ranks do something together: what was known of an exception in an earlier one holds no more,
    for the same object may be raised again by one rank alone."""
    global _calls
    _calls += 1


def everywhere(error: _Error) -> _Error:
    """Mark an exception that every rank raises at this place: nobody needs to be told."""
    error._on_all_ranks = _calls
    return error


def is_known(error: BaseException) -> bool:
    """Whether the other ranks know of an exception: every one raises it, or they have been told."""
    return isinstance(error, RankError) or getattr(error, "_on_all_ranks", None) == _calls


def tell(error: BaseException, place: str) -> BaseException:
    """What this rank shall raise where ``error`` has ended what all ranks do together at ``place``.

    Its own error where all ranks fail (the connections stay whole then) or where it is the first to fail; its connections are
    broken then, so that nobody waits for it. Else a RankError with the first one's.
    """
    lost, ended, first = _is_lost(error), [], None
    mine = f"rank {dist.get_rank()}, at {place}: {_phrase(error)}"
    try:
        store = _store()
        if not lost and _all_fail(store, place, error):
            return everywhere(error)
        if lost and not _is_timeout(error):
            _break_connections()  # before the others are asked: they know which process of their machine has ended
            ended = _ended_ranks(store)
            mine = _phrase_of_ended(error, ended, place)
        first = store.compare_set("first", "", mine).decode()
        _break_connections()
        died = lost and first == mine and not _is_timeout(error)  # nobody else has said that it breaks its connections
        _wait_for_readers(store, dist.get_world_size() - max(died, len(ended)))
    except RuntimeError:  # the store was in rank 0's process
        _break_connections()
    if not lost and first in (mine, None):
        return everywhere(error)
    return RankError(first or "rank 0's process has ended; its own output says why")


def _store() -> dist.Store:
    return dist.PrefixStore("ds_zoadamu", dist.group.WORLD.get_group_store())


def _all_fail(store: dist.Store, place: str, error: BaseException) -> bool:
    """Whether every rank comes here, for instance since all were given the same bad batch. The same answer on all of them: who
    is last, or gives up, decides, and the first decision stands."""
    times = store.add(f"{place}, rank {dist.get_rank()}", 1)
    patience = _patience() if not isinstance(error, KeyboardInterrupt) else min(_PATIENCE_OF_USERS, _patience())
    key, end = f"{place}, time {times}", time.monotonic() + patience
    arrived, decision = store.add(key, 1), ""
    while not decision:
        if arrived >= dist.get_world_size():
            decision = "all"
        elif store.check(["first"]) or time.monotonic() > end:
            decision = "alone"
        else:
            time.sleep(0.02)
            arrived = store.add(key, 0)
    return store.compare_set(f"{key}, decision", "", decision) == b"all"


def _break_connections() -> None:
    """A receive that runs into its time limit makes gloo close the connections of its group, at both ends. gloo's abort() and
    shutdown() do nothing in torch 2.13.
    """
    for group in _groups():
        peers = [rank for rank in dist.get_process_group_ranks(group) if rank != dist.get_rank()]
        # NCCL takes no tensor of the host; a group that is broken already refuses.
        with contextlib.suppress(RuntimeError, ValueError):
            if peers:
                dist.irecv(torch.zeros(1), peers[0], group, _NOBODY_SENDS).wait(timedelta(milliseconds=1))


def _wait_for_readers(store: dist.Store, alive: int) -> None:
    """Rank 0's process holds the store, so it must not end before the others have read it: ``alive`` ranks at most."""
    if store.add(f"read/{dist.get_rank()}", 1) == 1:
        store.add("read", 1)
    end = time.monotonic() + _patience()
    while dist.get_rank() == 0 and store.add("read", 0) < alive and time.monotonic() < end:
        time.sleep(0.02)


# --- a rank whose process has ended -------------------------------------------------------------------------------------------


def register_process() -> None:
    """Let the other ranks know this process, so that those on its machine see whether it has ended."""
    machine = _machine()
    with contextlib.suppress(RuntimeError):  # without it the others say that a rank has ended, and not which
        _store().set(f"process/{dist.get_rank()}", json.dumps([machine, os.getpid(), _started(os.getpid())]))


def _machine() -> str | None:
    """The same for processes that see each other under /proc; None without it."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process has started, in ticks; None for one that has ended, also where its parent has not asked how."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, *fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in (b"Z", b"X") else fields[18].decode()


def _ended_ranks(store: dist.Store) -> list[int]:
    """The ranks of this machine whose processes have ended; none where another rank says first what has happened, or this
    machine's are all there."""
    ranks = [rank for rank in range(dist.get_world_size()) if store.check([f"process/{rank}"])]
    processes = {rank: json.loads(store.get(f"process/{rank}")) for rank in ranks}
    here, end, ended = _machine(), time.monotonic() + min(_UNTIL_ENDED, _patience()), []
    while not ended and not store.check(["first"]) and time.monotonic() < end:
        time.sleep(0.02)
        ended = [r for r, (machine, pid, started) in processes.items() if machine == here and _started(pid) != started]
    return ended


def _patience() -> float:
    return min(_PATIENCE, current_limit().total_seconds() / 4)


def _is_lost(error: BaseException) -> bool:
    """Whether it is a collective that has failed, hence another rank."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo/transport" in text or "caused pair closure" in text)
    )


def _is_timeout(error: BaseException) -> bool:
    return "Timed out" in str(error)


def _phrase(error: BaseException) -> str:
    """One line."""
    text = " ".join(str(error).split())[:500]
    if _is_lost(error) and _is_timeout(error):
        return (
            f"waited {current_limit().total_seconds():g} s for another rank, which hangs or does something else; the limit is "
            "timeout= of ds_zoadamu.initialize, or DEEPSPEED_TIMEOUT in minutes"
        )
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _phrase_of_ended(error: BaseException, ended: list[int], place: str) -> str:
    who = ", ".join(f"rank {rank}'s process" for rank in ended) or "another rank's process"
    reason = " ".join(str(error).split())[:500].partition(". This is")[0]
    return f"{who} has ended without a word, at {place}: killed, or out of memory? ({reason})"
