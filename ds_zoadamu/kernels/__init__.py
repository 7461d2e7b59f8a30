"""The operations on a flat range of one parameter, each on the fastest backend that the tensors' device has.

``reference.py`` defines the bits; every backend gives the same ones (a NaN is a NaN: its payload is not defined), so a
backend is a matter of speed only and may differ between ranks.

    CPU    C++ (cpu.py), built at first use; the reference where no compiler is found
    CUDA   Triton (triton.py); the reference where it is missing or too old, and where it cannot work on the GPU
    other  the reference, in plain PyTorch

``DS_ZOADAMU_KERNELS`` = auto (default) | reference | cpu | triton forces a choice; it is read at the first use in a process.
"reference" holds for every device; "cpu" and "triton" make it an error, on the devices that they serve, if they cannot be used.
"""

import functools
import os
import warnings
from types import ModuleType

import torch

from . import reference
from .reference import NOISE_VERSION, SIGN_NOISE_VERSION
from .types import GRAD_BITS, Recurrence, Rounding, SignTable, StepScalars, fp32, round_grad

__all__ = [
    "GRAD_BITS",
    "NOISE_VERSION",
    "Recurrence",
    "SIGN_NOISE_VERSION",
    "Rounding",
    "SignTable",
    "StepScalars",
    "backend_name",
    "fp32",
    "noise_",
    "perturb_",
    "perturb_signs_",
    "round_grad",
    "signs_",
    "update_",
    "update_signs_",
]

_CHOICES = ("auto", "reference", "cpu", "triton")


def _load_cpu(forced: bool) -> ModuleType:
    from . import build, cpu

    try:
        cpu.load()
    except build.BuildError as error:
        if forced:
            raise
        warnings.warn(
            "ds_zoadamu: the C++ kernels cannot be used, the plain PyTorch ones take their place "
            f"(same results, many times slower): {error}",
            RuntimeWarning,
            stacklevel=4,
        )
        return reference
    return cpu


def _load_triton(forced: bool) -> ModuleType:
    from . import triton

    try:
        triton.load()
    except triton.TritonUnavailable as error:
        if forced:
            raise
        warnings.warn(f"ds_zoadamu: {error}", RuntimeWarning, stacklevel=4)
        return reference
    return triton


# Device type -> the choice that forces its backend, and a loader of a module with the operations below and backend_name().
# Devices not listed use the reference. A loader falls back to the reference by itself where its backend cannot work, unless it
# was forced.
_LOADERS = {"cpu": ("cpu", _load_cpu), "cuda": ("triton", _load_triton)}


@functools.cache
def _backend(device_type: str) -> ModuleType:
    choice = os.environ.get("DS_ZOADAMU_KERNELS") or "auto"
    if choice not in _CHOICES:
        raise ValueError(f"DS_ZOADAMU_KERNELS={choice!r} is not one of {', '.join(_CHOICES)}")
    if choice == "reference" or device_type not in _LOADERS:
        return reference
    name, load = _LOADERS[device_type]
    return load(forced=choice == name)


def backend_name(device: torch.device | str) -> str:
    """Name of the backend that serves ``device``, for logs: "cpu-avx512", "reference", ..."""
    backend = _backend(torch.device(device).type)
    return "reference" if backend is reference else backend.backend_name()


def noise_(xi1: torch.Tensor, xi2: torch.Tensor, *, key: tuple[int, int], step: int, start: int) -> None:
    """Fill two fp32 tensors of n elements with the noise of the flat indices start <= i < start + n.

    key: two 32-bit words, see :func:`ds_zoadamu.rules.noise.parameter_key`. step: 0 <= step < 2**32. start: 0 <= start < 2**63.
    The compiled backends raise TypeError or ValueError for tensors or numbers that do not fit, in all these functions.
    """
    _backend(xi1.device.type).noise_(xi1, xi2, key=key, step=step, start=start)


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
    """out = weight + scale * m_t, computed in fp32 and rounded once.

    out, weight: n elements, fp32, bf16 or fp16; ``out`` may be ``weight``. momentum: n elements, fp32, bf16, fp16 or int8, or
    None (zero, or replayed by a direction of several steps). All flat and contiguous; they hold the flat indices
    start <= i < start + n. scale: +zo_eps or -zo_eps. Stochastic rounding is mirrored: -zo_eps takes the complement of the
    random bits of +zo_eps, so that the mean of the difference of the two results is 2 zo_eps m_t.
    """
    _backend(weight.device.type).perturb_(
        out, weight, momentum, direction, key=key, start=start, scale=scale, rounding=rounding
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
    """weight -= lr_grad * d + lr_decay * weight and momentum = m_t, in place, each computed in fp32 and written once.

    d = m_t / sqrt(v + sigma), or m_t itself without ``normalize``. Tensors as for :func:`perturb_`. lr_grad = lr *
    projected_grad, lr_decay = lr * weight_decay. ``write_weight=False`` (a skipped step) leaves every bit of the weight and
    advances the momentum. Momentum below fp32 is always written with stochastic rounding; ``rounding`` is the weight's.
    """
    _backend(weight.device.type).update_(
        weight,
        momentum,
        direction,
        key=key,
        start=start,
        lr_grad=lr_grad,
        lr_decay=lr_decay,
        sigma=sigma,
        normalize=normalize,
        write_weight=write_weight,
        rounding=rounding,
    )


def signs_(out: torch.Tensor, *, key: tuple[int, int], step: int, start: int, direction: int) -> None:
    """Fill an fp32 tensor of n elements with the signs +1 and -1 of the flat indices start <= i < start + n.

    direction: of a step with several, 0 <= direction < 1024. Key, step and start as for :func:`noise_`.
    """
    _backend(out.device.type).signs_(out, key=key, step=step, start=start, direction=direction)


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
    """out = weight + scale * z with the signs z of ``direction``, computed in fp32 and rounded once.

    Tensors as for :func:`perturb_`, the rest as for :func:`signs_`. Stochastic rounding is mirrored: an element's two possible
    values lie at the same distance from the weight, |scale| in the mean, the same in all directions of a step.
    """
    _backend(weight.device.type).perturb_signs_(
        out, weight, key=key, step=step, start=start, direction=direction, scale=scale, rounding=rounding
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
    """weight -= d + lr_decay * weight in place, computed in fp32 and written once; d = sum over the directions of c_k z_k.

    table: ``SignTable.of`` the c_k, lr times projected gradient of each direction over their number. The rest as for
    :func:`perturb_signs_`. A skipped step leaves it out: there is no state.
    """
    _backend(weight.device.type).update_signs_(
        weight, table, key=key, step=step, start=start, lr_decay=lr_decay, rounding=rounding
    )
