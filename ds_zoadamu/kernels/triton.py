"""The kernels for NVIDIA GPUs, in Triton: same functions and same bits as reference.py. Device code: triton_jit.py.

``load()`` says whether they can work here, and waits for the device once. The operations then only queue work on the
current stream: they never wait and never copy from pageable memory. The steps that a replayed momentum is made of lie in a
small table on the device, made once for each direction, device and stream.

This module can be imported without Triton. Needed: Triton >= 3.2 (which comes with torch 2.6), an NVIDIA GPU of compute
capability 7.0 or more, and a C compiler, with which Triton builds its launcher. No bf16 support is asked of the GPU: bf16 is
handled as integers.
"""

import functools
import importlib.util
import re
from collections.abc import Iterator
from contextlib import nullcontext

import torch

from .checks import check_position, check_step
from .triton_common import NUM_WARPS, WEIGHT_DTYPES, check_tensor, compile_options, interpreting, signed
from .triton_signs import perturb_signs_, signs_, update_signs_
from .types import Recurrence, Rounding

__all__ = ["backend_name", "is_available", "load", "noise_", "perturb_", "perturb_signs_", "signs_", "update_", "update_signs_"]

MINIMUM_VERSION = (3, 2)
MINIMUM_CAPABILITY = (7, 0)

_MOMENTUM_DTYPES = (*WEIGHT_DTYPES, torch.int8)
# Pairs of a chunk: one a lane, so that every tensor has the same layout in registers, whatever its dtype.
_BLOCK = 32 * NUM_WARPS
# Chunks of a program: spreads what a program does once, and gives independent work to overlap.
_CHUNKS = 4


class TritonUnavailable(RuntimeError):
    """The Triton kernels cannot work here. The message names what was found, what is needed and what takes their place."""


# ---------------------------------------------------------------- can they work here?


def _unavailable(reason: str) -> TritonUnavailable:
    return TritonUnavailable(
        f"{reason}. The plain PyTorch kernels give the same results, many times slower; DS_ZOADAMU_KERNELS=reference chooses "
        "them without a warning, DS_ZOADAMU_KERNELS=triton makes this an error"
    )


def _check_version(found: str | None) -> None:
    needed = ".".join(map(str, MINIMUM_VERSION))
    if found is None:
        raise _unavailable(
            f"Triton is not installed; needed is triton >= {needed} (pip install triton, or a CUDA build of torch with it)"
        )
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < MINIMUM_VERSION:
        raise _unavailable(f"Triton {found} is too old; needed is triton >= {needed}, which comes with torch >= 2.6")


def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return getattr(triton, "__version__", "0.0")


def _check_device(device: torch.device) -> None:
    if torch.version.hip is not None:
        raise _unavailable(f"this torch is built for AMD GPUs (HIP {torch.version.hip}), where the kernels were never tried")
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        raise _unavailable(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; Triton needs "
            f"{MINIMUM_CAPABILITY[0]}.{MINIMUM_CAPABILITY[1]} or more"
        )


@functools.cache
def load() -> None:
    """Checks Triton, the current GPU and, by two launches, compiler and driver. Waits for the device.

    Raises TritonUnavailable.
    """
    _check_version(_triton_version())
    if interpreting():
        return
    if not torch.cuda.is_available():
        raise _unavailable("torch finds no NVIDIA GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    _check_device(device)
    xi1, xi2 = (torch.empty(2, device=device) for _ in range(2))
    try:
        noise_(xi1, xi2, key=(0, 0), step=0, start=0)
        torch.cuda.synchronize(device)
    except Exception as error:  # Triton raises what its parts raise: a missing C compiler, a driver that is too old, ...
        what = f"{type(error).__name__}: {error}"
        raise _unavailable(f"Triton {_triton_version()} cannot build or run a kernel here ({what})") from error


def is_available() -> bool:
    """Whether the kernels can work here; ``load()`` says why not."""
    try:
        load()
    except TritonUnavailable:
        return False
    return True


def backend_name() -> str:
    """Name for logs, with the version in use: "triton-3.6.0"."""
    return f"triton-{_triton_version()}"


# ---------------------------------------------------------------- arguments


def _check_direction(direction: Recurrence) -> None:
    if not direction.steps:
        raise ValueError("direction has no steps; the last one must be the step to take")
    check_step(direction.steps[-1].step)


# ---------------------------------------------------------------- the table of older steps

_tables: dict[tuple, tuple[Recurrence, torch.Tensor]] = {}
_MAX_TABLES = 16


def _table(direction: Recurrence, device: torch.device) -> torch.Tensor | None:
    """The steps before the last one as int32 rows of 8 (step and four fp32 numbers, by their bits), or None for a single step.

    Kept for each stream, since a copy queued on one stream is not there yet for another; found by identity, since hashing 44
    steps for every partition would cost more than the launch.
    """
    older = direction.steps[:-1]
    if not older:
        return None
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    place = (id(direction), device, stream)
    found = _tables.get(place)
    if found is not None and found[0] is direction:
        return found[1]
    for c in older:
        check_step(c.step)
    scalars = [(c.sqrt_alpha, c.sqrt_one_minus_alpha, c.beta1, c.one_minus_beta1) for c in older]
    table = torch.zeros(len(older), 8, dtype=torch.int32)
    table[:, 0] = torch.tensor([signed(c.step) for c in older], dtype=torch.int32)
    table[:, 1:5] = torch.tensor(scalars, dtype=torch.float32).view(torch.int32)
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    while len(_tables) >= _MAX_TABLES:
        del _tables[next(iter(_tables))]
    _tables[place] = (direction, table)
    return table


# ---------------------------------------------------------------- launches


def _parts(numel: int, start: int, aligned: bool) -> Iterator[tuple[int, int, dict[str, object]]]:
    """Up to two launches for a range: (first element, grid, arguments that say which pairs and how to read and write them).

    Words for as many whole programs as there are, where a pair is one aligned word in every tensor; elements for what is left.
    """
    in_words = 0
    if aligned and start % 2 == 0:
        in_words = numel - numel % (2 * _BLOCK * _CHUNKS)
    if in_words:
        yield 0, in_words // (2 * _BLOCK * _CHUNKS), _place(start, num_full=0, tail=0, words=True)
    if in_words < numel:
        num_full, tail = divmod(numel - in_words + start % 2, 2 * _BLOCK)
        yield in_words, num_full + (tail > 0), _place(start + in_words, num_full, tail, words=False)


def _place(start: int, num_full: int, tail: int, words: bool) -> dict[str, object]:
    """All numbers are int32, the pair index two of them, so that no size makes another variant of a kernel."""
    pair = start >> 1
    return {
        "num_full": num_full,
        "tail": tail,
        "pair_low": signed(pair & 0xFFFFFFFF),
        "pair_high": pair >> 32,
        "ODD": start % 2,
        "WORDS": words,
        "CHUNKS": _CHUNKS if words else 1,
    }


def _direction_arguments(direction: Recurrence, device: torch.device) -> dict[str, object]:
    c = direction.steps[-1]
    return {
        "table": _table(direction, device),
        "num_older": len(direction.steps) - 1,
        "step": signed(c.step),
        "sqrt_alpha": c.sqrt_alpha,
        "sqrt_rest": c.sqrt_one_minus_alpha,
        "beta1": c.beta1,
        "history_weight": c.one_minus_beta1,
        "decode": direction.decode_scale,
        "REPLAY": len(direction.steps) > 1,
    }


@functools.cache
def _fast_root() -> bool:
    """Whether the quick way to the root gives the right bits on the current GPU, tried once on all 2**24 inputs.

    Waits for the device. Not in the interpreter, whose fma rounds twice.
    """
    if interpreting():
        return False
    from . import triton_jit

    num_wrong = torch.empty((1 << 24) // 1024, dtype=torch.int32, device="cuda")
    triton_jit.root_check_kernel[(num_wrong.numel(),)](num_wrong, BLOCK=1024, **compile_options(divides=False))
    return not num_wrong.any().item()


def _launch(name: str, tensors: dict[str, torch.Tensor | None], key: tuple[int, int], start: int, **arguments: object) -> None:
    """Queues one operation on flat tensors of n > 0 elements (or None)."""
    from . import triton_jit

    given = [t for t in tensors.values() if t is not None]
    device, numel = given[0].device, given[0].numel()
    aligned = all(t.data_ptr() % (2 * t.element_size()) == 0 for t in given)
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        for first, grid, place in _parts(numel, start, aligned):
            getattr(triton_jit, name)[(grid,)](
                **{name: t if t is None or first == 0 else t[first:] for name, t in tensors.items()},
                key0=signed(key[0]),
                key1=signed(key[1]),
                **arguments,
                **place,
                BLOCK=_BLOCK,
                FAST_ROOT=_fast_root(),
                **compile_options(divides=name == "update_kernel"),
            )


# ---------------------------------------------------------------- the operations with normal numbers


def noise_(xi1: torch.Tensor, xi2: torch.Tensor, *, key: tuple[int, int], step: int, start: int) -> None:
    """See reference.noise_. Raises TypeError or ValueError for tensors or numbers that do not fit."""
    check_tensor("xi1", xi1, (torch.float32,), xi1)
    check_tensor("xi2", xi2, (torch.float32,), xi1)
    check_position(key, start, xi1.numel())
    check_step(step)
    if xi1.numel() == 0:
        return
    _launch("noise_kernel", {"xi1": xi1, "xi2": xi2}, key, start, step=signed(step))


def perturb_(
    out: torch.Tensor,
    weight: torch.Tensor,
    momentum: torch.Tensor | None,
    direction: Recurrence,
    *,
    key: tuple[int, int],
    start: int,
    scale: float,
    rounding: Rounding,
) -> None:
    """See reference.perturb_. Raises TypeError or ValueError for tensors or numbers that do not fit."""
    check_tensor("weight", weight, WEIGHT_DTYPES, weight)
    check_tensor("out", out, WEIGHT_DTYPES, weight)
    if momentum is not None:
        check_tensor("momentum", momentum, _MOMENTUM_DTYPES, weight)
    check_position(key, start, weight.numel())
    _check_direction(direction)
    if weight.numel() == 0:
        return
    _launch(
        "perturb_kernel",
        {"out": out, "weight": weight, "momentum": momentum},
        key,
        start,
        scale=scale,
        STOCHASTIC=Rounding(rounding) is Rounding.STOCHASTIC,
        FLIP=scale < 0,
        **_direction_arguments(direction, weight.device),
    )


def update_(
    weight: torch.Tensor,
    momentum: torch.Tensor | None,
    direction: Recurrence,
    *,
    key: tuple[int, int],
    start: int,
    lr_grad: float,
    lr_decay: float,
    sigma: float,
    normalize: bool,
    write_weight: bool,
    rounding: Rounding,
) -> None:
    """See reference.update_. Raises TypeError or ValueError for tensors or numbers that do not fit."""
    check_tensor("weight", weight, WEIGHT_DTYPES, weight)
    if momentum is not None:
        check_tensor("momentum", momentum, _MOMENTUM_DTYPES, weight)
    check_position(key, start, weight.numel())
    _check_direction(direction)
    if weight.numel() == 0 or (momentum is None and not write_weight):
        return
    c = direction.steps[-1]
    _launch(
        "update_kernel",
        {"weight": weight, "momentum": momentum},
        key,
        start,
        beta2=c.beta2,
        history2_weight=c.one_minus_beta2,
        encode=direction.encode_scale,
        lr_grad=lr_grad,
        lr_decay=lr_decay,
        sigma=sigma,
        STOCHASTIC=Rounding(rounding) is Rounding.STOCHASTIC,
        NORMALIZE=bool(normalize),
        WRITE_WEIGHT=bool(write_weight),
        **_direction_arguments(direction, weight.device),
    )
