"""The operations with signs for NVIDIA GPUs, in Triton: see reference.py for their bits. Device code: signs_jit.py."""

import struct
from collections.abc import Iterator
from contextlib import nullcontext

import torch

from .checks import check_direction, check_position, check_step, check_table
from .triton_common import NUM_WARPS, WEIGHT_DTYPES, check_tensor, compile_options, signed
from .types import Rounding, SignTable

_RUN = 256  # elements of 16 counters
_LANES = 32 * NUM_WARPS
_SPAN = 16 * _LANES  # elements of a program, one counter a lane


def _parts(numel: int, start: int, aligned: bool) -> Iterator[tuple[int, int, bool]]:
    """Up to two launches for a range: (first element, grid, whether elements are masked). Whole programs as far as there are,
    where four neighbours are one aligned word in every tensor; what is left under masks."""
    whole = numel // _SPAN if aligned and start % _RUN == 0 else 0
    if whole:
        yield 0, whole, False
    if (first := whole * _SPAN) < numel:
        yield first, -(-(numel - first + (start + first) % _RUN) // _SPAN), True


def _launch(
    name: str, tensors: dict[str, torch.Tensor], key: tuple[int, int], step: int, start: int, **arguments: object
) -> None:
    """Queues one operation on flat tensors of n > 0 elements."""
    from . import signs_jit

    given = list(tensors.values())
    device, numel = given[0].device, given[0].numel()
    aligned = all(t.data_ptr() % 16 == 0 for t in given)
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        for first, grid, masked in _parts(numel, start, aligned):
            at = start + first
            getattr(signs_jit, name)[(grid,)](
                **{name: t if first == 0 else t[first:] for name, t in tensors.items()},
                skip=at % _RUN,
                stop=numel - first if masked else 0,
                block_low=signed((at // _RUN * 16) & 0xFFFFFFFF),
                block_high=at // _RUN * 16 >> 32,
                key0=signed(key[0]),
                key1=signed(key[1]),
                step=signed(step),
                **arguments,
                MASKED=masked,
                LANES=_LANES,
                **compile_options(divides=False),
            )


def signs_(out: torch.Tensor, *, key: tuple[int, int], step: int, start: int, direction: int) -> None:
    """See reference.signs_. Raises TypeError or ValueError for tensors or numbers that do not fit."""
    check_tensor("out", out, (torch.float32,), out)
    check_position(key, start, out.numel())
    check_step(step)
    check_direction(direction)
    if out.numel():
        _launch("signs_kernel", {"out": out}, key, step, start, direction=direction)


def perturb_signs_(
    out: torch.Tensor,
    weight: torch.Tensor,
    *,
    key: tuple[int, int],
    step: int,
    start: int,
    direction: int,
    scale: float,
    rounding: Rounding,
) -> None:
    """See reference.perturb_signs_. Raises TypeError or ValueError for tensors or numbers that do not fit."""
    check_tensor("weight", weight, WEIGHT_DTYPES, weight)
    check_tensor("out", out, WEIGHT_DTYPES, weight)
    check_position(key, start, weight.numel())
    check_step(step)
    check_direction(direction)
    if weight.numel():
        _launch(
            "perturb_signs_kernel",
            {"out": out, "weight": weight},
            key,
            step,
            start,
            direction=direction,
            negative=struct.unpack("<i", struct.pack("<f", -scale))[0],
            STOCHASTIC=_is_stochastic(out, rounding),
        )


def update_signs_(
    weight: torch.Tensor,
    table: SignTable,
    *,
    key: tuple[int, int],
    step: int,
    start: int,
    lr_decay: float,
    rounding: Rounding,
) -> None:
    """See reference.update_signs_. Raises TypeError or ValueError for tensors or numbers that do not fit."""
    check_tensor("weight", weight, WEIGHT_DTYPES, weight)
    check_position(key, start, weight.numel())
    check_step(step)
    check_table(table)
    if weight.numel():
        _launch(
            "update_signs_kernel",
            {"weight": weight},
            key,
            step,
            start,
            table=_rows(table, weight.device),
            lr_decay=lr_decay,
            ROWS=len(table.rows),
            STOCHASTIC=_is_stochastic(weight, rounding),
        )


def _is_stochastic(result: torch.Tensor, rounding: Rounding) -> bool:
    return result.dtype != torch.float32 and Rounding(rounding) is Rounding.STOCHASTIC


_tables: dict[tuple, tuple[SignTable, torch.Tensor]] = {}
_MAX_TABLES = 16


def _rows(table: SignTable, device: torch.device) -> torch.Tensor:
    """The table on the device, copied once for all partitions of a step and each stream: a copy that is queued on one stream is
    not there yet for another."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    place = (id(table), device, stream)
    found = _tables.get(place)
    if found is not None and found[0] is table:
        return found[1]
    rows = torch.tensor(table.rows, dtype=torch.float32).flatten()
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    while len(_tables) >= _MAX_TABLES:
        del _tables[next(iter(_tables))]
    _tables[place] = (table, rows)
    return rows
