"""Runs a test's function on real gloo ranks: one process each, forked from a server that has imported DeepSpeed once.

And what tests that start processes share: how long they wait for one, and which of several are left.
"""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import socket
import time
import traceback
from collections.abc import Iterable

import psutil

HANG = 1800.0
"""Seconds after which a process counts as hanging. Far above what the slowest machine under load takes: it ends a test that
would never end, and none passes or fails by it."""

_LINGER = 120.0  # seconds: of a test that has failed already, for its other ranks to say why they do

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.helpers.preloaded"])


def free_port() -> int:
    """A TCP port that nobody listens on now. No two of pytest-xdist's workers get the same."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        if port // 2 % 8 == worker % 8:  # half of it: Linux prefers odd ports here
            return port


def _child(connection, function, rank, world_size, port, args):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)  # the same for every number of ranks: a matrix product's bits may depend on it
    try:
        from ds_zoadamu.zero3.start import init_distributed

        init_distributed(verbose=False)
        torch.distributed.barrier()  # a rank that has little to do must not be gone before its peers have connected
        answer = (True, function(rank, world_size, *args))
    except BaseException:
        answer = (False, traceback.format_exc())
    finally:
        # Not send(): it would share a tensor's memory, which dies with this process.
        connection.send_bytes(pickle.dumps(answer))
        connection.close()
        os._exit(0)  # no clean shutdown: a peer may be gone


def run_ranks(world_size: int, function, *args, timeout: float = HANG) -> list:
    """``[function(rank, world_size, *args) for every rank]``, each in its own process. A rank that raises fails the caller
    with its traceback.
    """
    port = free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_child, args=(sender, function, rank, world_size, port, args), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    results, failures, waiting = [None] * world_size, {}, dict(enumerate(pipes))
    try:
        while waiting:
            seconds = min(timeout, _LINGER) if failures else timeout
            ready = multiprocessing.connection.wait(waiting.values(), seconds)
            if not ready:
                failures |= dict.fromkeys(waiting, f"no answer within {seconds} s")
                break
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                try:
                    ok, value = pickle.loads(waiting.pop(rank).recv_bytes())
                except EOFError:
                    ok, value = False, "died without an answer"
                if ok:
                    results[rank] = value
                else:
                    failures[rank] = value
    finally:
        for process in processes:
            process.kill()
            process.join()
    if failures:
        raise AssertionError("\n".join(f"rank {rank}: {failures[rank]}" for rank in sorted(failures)))
    return results


def still_running(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that do not end. A zombie has ended, though its parent, or nobody, has reaped it yet."""
    deadline, left = time.monotonic() + HANG, list(processes)
    while left := [process for process in left if _runs(process)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return left


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
