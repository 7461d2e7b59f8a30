"""The kernels for NVIDIA GPUs, in Triton: same functions and same bits as reference.py. Device code: triton_jit.py.

``load()`` says whether they can work here; the three functions then only queue work on the current stream. They never wait for the
device and never copy from pageable memory. The steps that a replayed momentum is made of lie in a small table on the device, made once
for each direction, device and stream.

This module can be imported without Triton. Needed: Triton >= 3.2 (which comes with torch 2.6), an NVIDIA GPU of compute capability
7.0 or more, and a C compiler, with which Triton builds its launcher. No bf16 support is asked of the GPU: bf16 is handled as integers.
"""

import functools
import importlib.util
import os
import re
from contextlib import nullcontext

import torch

from .types import Direction, Rounding

MINIMUM_VERSION = (3, 2)
MINIMUM_CAPABILITY = (7, 0)

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOMENTUM_DTYPES = (*_WEIGHT_DTYPES, torch.int8)
_NUM_WARPS = 4
_BLOCK = 32 * _NUM_WARPS  # pairs of a chunk: one a lane, so that every tensor has the same layout in registers, whatever its dtype
_CHUNKS = 4  # chunks of a program: spreads what a program does once, and gives independent work to overlap


class TritonUnavailable(RuntimeError):
    """The Triton kernels cannot work here. The message names what was found, what is needed and what takes their place."""


# ---------------------------------------------------------------- can they work here?


def _unavailable(reason: str) -> TritonUnavailable:
    return TritonUnavailable(
        f"{reason}. The plain PyTorch kernels give the same results, many times slower; DS_ZOADAMU_KERNELS=reference chooses them "
        "without a warning, DS_ZOADAMU_KERNELS=triton makes this an error"
    )


def _check_version(found: str | None) -> None:
    needed = ".".join(map(str, MINIMUM_VERSION))
    if found is None:
        raise _unavailable(f"Triton is not installed; needed is triton >= {needed} (pip install triton, or a CUDA build of torch, which brings it)")
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < MINIMUM_VERSION:
        raise _unavailable(f"Triton {found} is too old; needed is triton >= {needed}, which comes with torch >= 2.6")


def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return getattr(triton, "__version__", "0.0")


def _check_device(device: torch.device) -> None:
    if torch.version.hip is not None:
        raise _unavailable(f"this torch is built for AMD GPUs (HIP {torch.version.hip}), for which the kernels' bits were never checked")
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        raise _unavailable(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; Triton needs "
            f"{MINIMUM_CAPABILITY[0]}.{MINIMUM_CAPABILITY[1]} or more"
        )


@functools.cache
def load() -> None:
    """Checks Triton, the current GPU and, by one tiny launch, compiler and driver. Raises TritonUnavailable. Waits for the device."""
    _check_version(_triton_version())
    if _interpreting():
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
        raise _unavailable(f"Triton {_triton_version()} cannot build or run a kernel here ({type(error).__name__}: {error})") from error


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


def _interpreting() -> bool:
    """Whether Triton runs the kernels by numpy on the CPU: for tests, decided before Triton's first import in a process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# ---------------------------------------------------------------- arguments


def _check_tensor(thing: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], like: torch.Tensor) -> None:
    if tensor.device != like.device or not (tensor.is_cuda or _interpreting()):
        raise ValueError(f"{thing} is on {tensor.device}; the Triton kernels need all tensors on one GPU")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{thing} is {tensor.dtype}; it must be one of {', '.join(map(str, dtypes))}")
    if tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(
            f"{thing} has shape {tuple(tensor.shape)} and stride {tensor.stride()}; it must be flat and contiguous: pass x.view(-1)"
        )
    if tensor.numel() != like.numel():
        raise ValueError(f"{thing} has {tensor.numel()} elements where the other tensors have {like.numel()}")


def _check_position(key: tuple[int, int], start: int, numel: int) -> None:
    if len(key) != 2 or not all(0 <= word < 1 << 32 for word in key):
        raise ValueError(f"key must be two words in 0 <= word < 2**32, got {key}")
    if start < 0 or start + numel > 1 << 63:
        raise ValueError(f"flat indices must be in 0 <= i < 2**63, got start={start} and {numel} elements")


def _check_step(step: int) -> None:
    if not 0 <= step < 1 << 32:
        raise ValueError(f"step must be in 0 <= step < 2**32, got {step}")


def _check_direction(direction: Direction) -> None:
    if not direction.steps:
        raise ValueError("direction has no steps; the last one must be the step to take")
    _check_step(direction.steps[-1].step)


def _signed(word: int) -> int:
    """A 32-bit word as the int32 with the same bits: Triton would pass larger ints as int64, in another variant of the kernel."""
    return word - (1 << 32) if word >= 1 << 31 else word


# ---------------------------------------------------------------- the table of older steps

_tables: dict[tuple, tuple[Direction, torch.Tensor]] = {}
_MAX_TABLES = 16


def _table(direction: Direction, device: torch.device) -> torch.Tensor | None:
    """The steps before the last one as int32 rows of 8 (step and four fp32 numbers, by their bits), or None for a single step.

    Kept for each stream, since a copy queued on one stream is not there yet for another; found by identity, since hashing 44 steps for
    every partition would cost more than the launch.
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
        _check_step(c.step)
    scalars = [(c.sqrt_alpha, c.sqrt_one_minus_alpha, c.beta1, c.one_minus_beta1) for c in older]
    table = torch.zeros(len(older), 8, dtype=torch.int32)
    table[:, 0] = torch.tensor([_signed(c.step) for c in older], dtype=torch.int32)
    table[:, 1:5] = torch.tensor(scalars, dtype=torch.float32).view(torch.int32)
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    while len(_tables) >= _MAX_TABLES:
        del _tables[next(iter(_tables))]
    _tables[place] = (direction, table)
    return table


# ---------------------------------------------------------------- launches


def _position(tensors: tuple[torch.Tensor, ...], key: tuple[int, int], start: int) -> tuple[int, dict[str, int]]:
    """The grid, and the arguments that all kernels share.

    Positions count elements from the even one of the first pair on, so the tensors hold positions ODD, ODD + 1, ... num_full: programs
    whose last position is inside; tail: positions in the one after them. WORDS: a pair is one aligned word in every tensor. All numbers
    are int32, the pair index two of them, so that no size makes another variant of a kernel.
    """
    odd = start & 1
    num_full, tail = divmod(tensors[0].numel() + odd, 2 * _BLOCK * _CHUNKS)
    pair = start >> 1
    return num_full + (tail > 0), {
        "num_full": num_full,
        "tail": tail,
        "pair_low": _signed(pair & 0xFFFFFFFF),
        "pair_high": pair >> 32,
        "key0": _signed(key[0]),
        "key1": _signed(key[1]),
        "ODD": odd,
        "WORDS": odd == 0 and all(t.data_ptr() % (2 * t.element_size()) == 0 for t in tensors),
        "BLOCK": _BLOCK,
        "CHUNKS": _CHUNKS,
    }


def _direction_arguments(direction: Direction, device: torch.device) -> dict[str, object]:
    c = direction.steps[-1]
    return {
        "table": _table(direction, device),
        "num_older": len(direction.steps) - 1,
        "step": _signed(c.step),
        "sqrt_alpha": c.sqrt_alpha,
        "sqrt_rest": c.sqrt_one_minus_alpha,
        "beta1": c.beta1,
        "history_weight": c.one_minus_beta1,
        "decode": direction.decode_scale,
        "REPLAY": len(direction.steps) > 1,
    }


@functools.cache
def _compile_options() -> dict[str, object]:
    """What keeps the compiler from changing bits: no a * b + c in one rounding, and no flushing of subnormal numbers in div and sqrt."""
    if _interpreting():
        return {}
    from triton.backends.nvidia.compiler import CUDAOptions

    options = {"num_warps": _NUM_WARPS, "enable_fp_fusion": False}
    if "enable_reflect_ftz" in CUDAOptions.__dataclass_fields__:
        options["enable_reflect_ftz"] = False
    return options


def _launch(name: str, grid: int, device: torch.device, **arguments: object) -> None:
    from . import triton_jit

    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        # The interpreter's fma rounds twice, so there the root is numpy's.
        getattr(triton_jit, name)[(grid,)](**arguments, FAST_ROOT=not _interpreting(), **_compile_options())


# ---------------------------------------------------------------- the three operations


def noise_(xi1: torch.Tensor, xi2: torch.Tensor, *, key: tuple[int, int], step: int, start: int) -> None:
    """See reference.noise_. Raises TypeError or ValueError for tensors or numbers that do not fit."""
    _check_tensor("xi1", xi1, (torch.float32,), xi1)
    _check_tensor("xi2", xi2, (torch.float32,), xi1)
    _check_position(key, start, xi1.numel())
    _check_step(step)
    if xi1.numel() == 0:
        return
    grid, position = _position((xi1, xi2), key, start)
    _launch("noise_kernel", grid, xi1.device, xi1=xi1, xi2=xi2, step=_signed(step), **position)


def perturb_(
    out: torch.Tensor,
    weight: torch.Tensor,
    momentum: torch.Tensor | None,
    direction: Direction,
    *,
    key: tuple[int, int],
    start: int,
    scale: float,
    rounding: Rounding,
) -> None:
    """See reference.perturb_. Raises TypeError or ValueError for tensors or numbers that do not fit."""
    _check_tensor("weight", weight, _WEIGHT_DTYPES, weight)
    _check_tensor("out", out, _WEIGHT_DTYPES, weight)
    if momentum is not None:
        _check_tensor("momentum", momentum, _MOMENTUM_DTYPES, weight)
    _check_position(key, start, weight.numel())
    _check_direction(direction)
    if weight.numel() == 0:
        return
    grid, position = _position((out, weight) if momentum is None else (out, weight, momentum), key, start)
    _launch(
        "perturb_kernel",
        grid,
        weight.device,
        out=out,
        weight=weight,
        momentum=momentum,
        scale=scale,
        STOCHASTIC=Rounding(rounding) is Rounding.STOCHASTIC,
        FLIP=scale < 0,
        **position,
        **_direction_arguments(direction, weight.device),
    )


def update_(
    weight: torch.Tensor,
    momentum: torch.Tensor | None,
    direction: Direction,
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
    _check_tensor("weight", weight, _WEIGHT_DTYPES, weight)
    if momentum is not None:
        _check_tensor("momentum", momentum, _MOMENTUM_DTYPES, weight)
    _check_position(key, start, weight.numel())
    _check_direction(direction)
    if weight.numel() == 0 or (momentum is None and not write_weight):
        return
    grid, position = _position((weight,) if momentum is None else (weight, momentum), key, start)
    c = direction.steps[-1]
    _launch(
        "update_kernel",
        grid,
        weight.device,
        weight=weight,
        momentum=momentum,
        beta2=c.beta2,
        history2_weight=c.one_minus_beta2,
        encode=direction.encode_scale,
        lr_grad=lr_grad,
        lr_decay=lr_decay,
        sigma=sigma,
        STOCHASTIC=Rounding(rounding) is Rounding.STOCHASTIC,
        NORMALIZE=bool(normalize),
        WRITE_WEIGHT=bool(write_weight),
        **position,
        **_direction_arguments(direction, weight.device),
    )
