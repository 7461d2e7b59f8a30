"""Small talk between ranks on the host: bytes, JSON, and "has it failed anywhere?", so that no rank waits for one that is gone.

Nothing is pickled. The messages go over gloo, also where the model's collectives use NCCL: they never make the host wait for a
GPU. Without a process group there is one rank, and every function is the identity.

Every message says at which place of the work its rank is, so that ranks which do different things get an error and not each
other's bytes.
"""

import functools
import json
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ..errors import RankError
from .waiting import begin_call, current_limit, everywhere, is_known, tell

_HEAD = struct.Struct("<40sq")  # the place, and the length of the data
_FIRST = 256  # bytes of the first message: head, and data that is short
_place = ""


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


@functools.cache
def _gloo_beside(world: Any) -> Any:
    return dist.new_group(backend="gloo", timeout=current_limit())


def _group() -> Any:
    return None if dist.get_backend() == "gloo" else _gloo_beside(dist.group.WORLD)


# --- together -----------------------------------------------------------------------------------------------------------------


@contextmanager
def together(place: str) -> Iterator[None]:
    """Something that all ranks do, with collectives inside; ``place`` names it in messages.

    What the body raises on one rank ends it on all, an interrupt and sys.exit too: the rank itself raises its own exception,
    the others, who may be anywhere in the body or behind it, a RankError with its message, as soon as they wait for a rank. The
    process group cannot be used any more then. Where every rank raises in the body, each raises its own exception, and the
    group stays as it is.
    """
    global _place
    outside, _place = _place, place
    if not outside:
        begin_call()
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if not is_distributed() or is_known(error):
            raise
        told = tell(error, place)
        if told is error or not isinstance(error, Exception):
            raise
        raise told from error
    finally:
        _place = outside


def _all_gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    try:
        dist.all_gather(parts, tensor, group=_group())
    except RuntimeError as error:
        raise tell(error, _place) from error
    return parts


def _as_tensor(data: bytes, length: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(data.ljust(length, b"\0")), dtype=torch.uint8)


def _exchange(data: bytes) -> list[bytes]:
    """Every rank's ``data``, in the order of ranks. One collective where it is short on all ranks, else two."""
    room = _FIRST - _HEAD.size
    message = _HEAD.pack(_place.encode()[:40], len(data)) + data[:room]
    answers = [part.numpy().tobytes() for part in _all_gather(_as_tensor(message, _FIRST))]
    heads = [_HEAD.unpack_from(answer) for answer in answers]
    if len({place for place, _ in heads}) > 1:
        raise RankError(_other_places([place.rstrip(b"\0").decode(errors="replace") for place, _ in heads]))
    parts = [answer[_HEAD.size : _HEAD.size + length] for answer, (_, length) in zip(answers, heads, strict=True)]
    longest = max(length for _, length in heads)
    if longest > room:
        rest = _all_gather(_as_tensor(data[room:], longest - room))
        parts = [(p + r.numpy().tobytes())[:length] for p, r, (_, length) in zip(parts, rest, heads, strict=True)]
    return parts


def _other_places(places: list[str]) -> str:
    at = "; ".join(f"{by_rank(ranks)} at {place or 'another place'}" for place, ranks in grouped(places).items())
    return f"the ranks are not at the same place: {at}. All must make the same calls in the same order, also where data ends"


def grouped(values: Iterable) -> dict[Any, list[int]]:
    """Each different value and the ranks that have it."""
    result: dict[Any, list[int]] = {}
    for number, value in enumerate(values):
        result.setdefault(value, []).append(number)
    return result


def by_rank(ranks: list[int], limit: int = 8) -> str:
    """ "rank 3", "ranks 0, 1, 2"; of many the first few."""
    more = f" and {len(ranks) - limit} more" if len(ranks) > limit else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:limit]))}{more}"


# --- messages -----------------------------------------------------------------------------------------------------------------


def barrier() -> None:
    """All ranks have got here."""
    if is_distributed():
        _exchange(b"")


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
    mine = (data or b"") if rank() == 0 else b""
    length = int.from_bytes(_exchange(len(mine).to_bytes(8, "little"))[0], "little")
    if length == 0:
        return b""
    buffer = _as_tensor(mine, length)
    try:
        dist.broadcast(buffer, 0, group=_group())
    except RuntimeError as error:
        raise tell(error, _place) from error
    return buffer.numpy().tobytes()


def gather_json(value: Any) -> list[Any]:
    """Every rank's ``value`` (anything JSON can hold), in the order of ranks, on every rank."""
    data = json.dumps(value).encode()
    return [json.loads(part) for part in (_exchange(data) if is_distributed() else [data])]


@dataclass
class Answers:
    """What the ranks have found out: ``mine`` is set in the body (anything JSON can hold), ``all`` is there behind it."""

    mine: Any = None
    all: list[Any] = field(default_factory=list)


@contextmanager
def on_all_ranks(error_type: type[Exception]) -> Iterator[Answers]:
    """What the body raises on one rank is raised on every rank. No collective may be inside the body.

    The rank that failed raises its own exception (an OSError becomes an ``error_type``), the others an ``error_type`` with its
    message, or a RankError where its exception is not one: so an ``except error_type`` catches on all ranks or on none.
    """
    answers, failure = Answers(), None
    try:
        yield answers
    except Exception as e:
        failure = e
        if isinstance(e, OSError) and not isinstance(e, error_type):
            failure = error_type(describe(e))
            failure.__cause__ = e
    found = gather_json([_failed(failure, error_type), None if failure else answers.mine])
    failed = {number: outcome for number, (outcome, _) in enumerate(found) if outcome is not None}
    if not failed:
        answers.all = [value for _, value in found]
        return
    unexpected = {number: outcome for number, outcome in failed.items() if not outcome[0]}
    if failure is not None and (not unexpected or not isinstance(failure, error_type)):
        raise everywhere(failure)
    number, (_, message) = min((unexpected or failed).items())
    raise everywhere((RankError if unexpected else error_type)(f"rank {number}: {message}"))


def _failed(failure: Exception | None, error_type: type[Exception]) -> list | None:
    """[whether it is of the expected type, the message], or None where nothing failed."""
    if failure is None:
        return None
    name = type(failure).__name__
    if isinstance(failure, error_type):
        return [True, str(failure) or name]
    return [False, f"{name}: {failure}"]


def describe(error: OSError) -> str:
    """One line for what the operating system refused: the file and the reason."""
    name = f"{str(error.filename)!r}: " if error.filename is not None else ""
    return f"{name}{error.strerror or error}"
