"""Small talk between ranks on the host: bytes, JSON, and "has it failed anywhere?", so that no rank waits for one that is gone.

Nothing is pickled. The messages go over gloo, also where the model's collectives use NCCL: they never make the host wait for a
GPU. Without a process group there is one rank, and every function is the identity.
"""

import functools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


@functools.cache
def _gloo_beside(world: Any) -> Any:
    return dist.new_group(backend="gloo")


def _group() -> Any:
    return None if dist.get_backend() == "gloo" else _gloo_beside(dist.group.WORLD)


def _as_tensor(data: bytes, length: int) -> torch.Tensor:
    tensor = torch.zeros(length, dtype=torch.uint8)
    if data:
        tensor[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return tensor


def barrier() -> None:
    """All ranks have got here."""
    if is_distributed():
        dist.all_reduce(torch.zeros(1), group=_group())


def leave() -> None:
    """The last thing that a command's ranks do together: none is gone while another still needs it.

    Where that cannot be had, since a peer is gone already, it is said and no error: this rank's work is done.
    """
    try:
        barrier()
    except RuntimeError as error:
        print(f"rank {rank()}: the other ranks did not all come to the end: {error}", file=sys.stderr)


def broadcast_bytes(data: bytes | None) -> bytes:
    """Rank 0's ``data`` on every rank."""
    if not is_distributed():
        return data or b""
    length = torch.tensor([len(data or b"") if rank() == 0 else 0])
    dist.broadcast(length, 0, group=_group())
    buffer = _as_tensor((data or b"") if rank() == 0 else b"", int(length))
    if buffer.numel():
        dist.broadcast(buffer, 0, group=_group())
    return buffer.numpy().tobytes()


def gather_json(value: Any) -> list[Any]:
    """Every rank's ``value`` (anything JSON can hold), in the order of ranks, on every rank."""
    data = json.dumps(value).encode()
    if not is_distributed():
        return [json.loads(data)]
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(data)]), group=_group())
    longest = int(max(lengths))
    buffers = [torch.zeros(longest, dtype=torch.uint8) for _ in lengths]
    dist.all_gather(buffers, _as_tensor(data, longest), group=_group())
    return [json.loads(b[: int(n)].numpy().tobytes()) for b, n in zip(buffers, lengths, strict=True)]


def agree_with_rank_0(error: Exception | None, error_type: type[Exception]) -> None:
    """Raise on every rank what rank 0 met, or on none. One broadcast of 8 bytes where nothing failed.

    ``error``: of rank 0; ignored elsewhere.
    """
    if is_distributed():
        message = f"{error}".encode() if rank() == 0 and error is not None else b""
        length = torch.tensor([len(message)])
        dist.broadcast(length, 0, group=_group())
        if int(length) and rank() != 0:
            error = error_type(broadcast_bytes(None).decode())
        elif int(length):
            broadcast_bytes(message)
        elif rank() != 0:
            error = None
    if error is not None:
        raise error


@contextmanager
def on_all_ranks(error_type: type[Exception]) -> Iterator[None]:
    """What the body raises on one rank is raised on every rank. No collective may be inside the body.

    The rank that failed raises its own exception (an OSError becomes an ``error_type``), the others an ``error_type`` with its
    message.
    """
    failure = None
    try:
        yield
    except OSError as e:
        failure = e if isinstance(e, error_type) else error_type(describe(e))
        failure.__cause__ = e
    except Exception as e:
        failure = e
    messages = gather_json(None if failure is None else str(failure) or type(failure).__name__)
    if failure is not None:
        raise failure
    for number, message in enumerate(messages):
        if message is not None:
            raise error_type(f"rank {number}: {message}")


def describe(error: OSError) -> str:
    """One line for what the operating system refused: the file and the reason."""
    name = f"{str(error.filename)!r}: " if error.filename is not None else ""
    return f"{name}{error.strerror or error}"
