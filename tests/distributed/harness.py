"""Runs a test's function on real gloo ranks: one process each, forked from a server that has imported DeepSpeed once."""

import multiprocessing
import os
import pickle
import socket
import traceback

_CONTEXT = multiprocessing.get_context("forkserver")
# torch._dynamo: the first torch optimizer of a process imports it, in some 3 seconds.
_CONTEXT.set_forkserver_preload(["deepspeed", "transformers", "torch._dynamo", "ds_zoadamu.initialization"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _child(connection, function, rank, world_size, port, args):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)  # the same for every number of ranks: a matrix product's bits may depend on it
    try:
        from ds_zoadamu.distributed import init_distributed

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


def run_ranks(world_size: int, function, *args, timeout: float = 240.0) -> list:
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
    results, failures = [None] * world_size, []
    try:
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(5.0 if failures else timeout):
                failures.append(f"rank {rank}: no answer within {timeout} s")
                continue
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                ok, value = False, "died without an answer"
            if ok:
                results[rank] = value
            else:
                failures.append(f"rank {rank}: {value}")
    finally:
        for process in processes:
            process.kill()
            process.join()
    if failures:
        raise AssertionError("\n".join(failures))
    return results
