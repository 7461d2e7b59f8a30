"""Comparisons of the Triton kernels with the reference, for Triton's interpreter (test_triton.py) and for a GPU (../gpu)."""

import torch

from ds_zoadamu.kernels import reference
from ds_zoadamu.kernels.types import Rounding, SignTable, fp32

from .common import KEY, assert_same_bits, direction, momenta, scalars, weights

LAST_STEP = 2**32 - 1
STEPS = {k: direction(*(scalars(LAST_STEP - i, alpha=0.9 - 0.1 * i) for i in reversed(range(k)))) for k in (1, 3)}
STEPS[44] = direction(*(scalars(17 + i, 0.4729, 0.1464, 0.01) for i in range(44)))


def copy(tensor: torch.Tensor | None, device: str) -> torch.Tensor | None:
    return None if tensor is None else tensor.clone().to(device)


def back(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.cpu()


def check_noise(numel: int, start: int, step: int = LAST_STEP, device: str = "cpu", key: tuple[int, int] = KEY) -> None:
    from ds_zoadamu.kernels import triton

    actual = [torch.full((numel,), 9.0, device=device) for _ in range(2)]
    expected = [torch.empty(numel) for _ in range(2)]
    triton.noise_(*actual, key=key, step=step, start=start)
    reference.noise_(*expected, key=key, step=step, start=start)
    for a, e, what in zip(actual, expected, ("xi1", "xi2"), strict=True):
        assert_same_bits(a.cpu(), e, (what, numel, start, step))


def check_perturb(
    numel: int, start: int, weight_dtype, storage, rounding: Rounding, sign: int, num_steps: int = 1, out_dtype=None,
    device: str = "cpu", offset: int = 0,
) -> None:  # fmt: skip
    """offset: elements between an aligned address and the tensors' beginning."""
    from ds_zoadamu.kernels import triton

    weight, momentum = weights(numel + offset, weight_dtype)[offset:], momenta(numel + offset, storage)
    momentum = None if momentum is None else momentum[offset:]
    at = {"key": KEY, "start": start, "scale": sign * fp32(1e-3), "rounding": rounding}
    expected = torch.empty(numel, dtype=out_dtype or weight_dtype)
    reference.perturb_(expected, weight, momentum, STEPS[num_steps], **at)
    whole = torch.full((numel + offset + 64,), 9.0, dtype=expected.dtype, device=device)
    room = torch.empty(numel + offset, dtype=weight_dtype, device=device)[offset:].copy_(weight)
    stored = copy(momentum, device)
    triton.perturb_(whole[offset : offset + numel], room, stored, STEPS[num_steps], **at)
    case = (numel, start, weight_dtype, storage, rounding, sign, num_steps, out_dtype, offset)
    assert_same_bits(whole[offset : offset + numel].cpu(), expected, case)
    assert (whole[offset + numel :] == 9).all() and (whole[:offset] == 9).all(), ("written outside", case)
    assert_same_bits(room.cpu(), weight, "the weight was written")
    assert_same_bits(back(stored), momentum, "the momentum was written")


def check_update(
    numel: int, start: int, weight_dtype, storage, rounding: Rounding, normalize: bool = True, write_weight: bool = True,
    num_steps: int = 1, device: str = "cpu",
) -> None:  # fmt: skip
    from ds_zoadamu.kernels import triton

    options = {
        "key": KEY, "start": start, "lr_grad": fp32(-3e-3), "lr_decay": fp32(1e-4), "sigma": fp32(1e-8),
        "normalize": normalize, "write_weight": write_weight, "rounding": rounding,
    }  # fmt: skip
    weight, momentum = weights(numel, weight_dtype), momenta(numel, storage)
    actual, stored = copy(weight, device), copy(momentum, device)
    reference.update_(weight, momentum, STEPS[num_steps], **options)
    triton.update_(actual, stored, STEPS[num_steps], **options)
    case = (numel, start, weight_dtype, storage, rounding, normalize, write_weight, num_steps)
    assert_same_bits(actual.cpu(), weight, ("weight", *case))
    assert_same_bits(back(stored), momentum, ("momentum", *case))


def check_signs(numel: int, start: int, direction: int, device: str = "cpu") -> None:
    from ds_zoadamu.kernels import triton

    actual, expected = torch.full((numel,), 9.0, device=device), torch.empty(numel)
    triton.signs_(actual, key=KEY, step=LAST_STEP, start=start, direction=direction)
    reference.signs_(expected, key=KEY, step=LAST_STEP, start=start, direction=direction)
    assert_same_bits(actual.cpu(), expected, (numel, start, direction))


def check_perturb_signs(
    numel: int, start: int, dtype, rounding: Rounding, scale: float, direction: int = 11, out_dtype=None, device: str = "cpu",
    offset: int = 0,
) -> None:  # fmt: skip
    """offset: as in ``check_perturb``."""
    from ds_zoadamu.kernels import triton

    weight = weights(numel, dtype)
    at = {"key": KEY, "step": LAST_STEP, "start": start, "direction": direction, "scale": fp32(scale), "rounding": rounding}
    expected = torch.empty(numel, dtype=out_dtype or dtype)
    reference.perturb_signs_(expected, weight, **at)
    whole = torch.full((numel + offset + 64,), 9.0, dtype=expected.dtype, device=device)
    given = torch.empty(numel + offset, dtype=dtype, device=device)[offset:].copy_(weight)
    triton.perturb_signs_(whole[offset : offset + numel], given, **at)
    case = (numel, start, dtype, rounding, scale, direction, out_dtype, offset)
    assert_same_bits(whole[offset : offset + numel].cpu(), expected, case)
    assert (whole[offset + numel :] == 9).all() and (whole[:offset] == 9).all(), ("written outside", case)
    assert_same_bits(given.cpu(), weight, "the weight was written")


def check_update_signs(numel: int, start: int, dtype, rounding: Rounding, count: int, device: str = "cpu") -> None:
    from ds_zoadamu.kernels import triton

    table = SignTable.of([1e-3 * (k - 2.7) for k in range(count)])
    at = {"key": KEY, "step": LAST_STEP, "start": start, "lr_decay": fp32(1e-2), "rounding": rounding}
    expected, whole = weights(numel, dtype), torch.full((numel + 64,), 9.0, dtype=dtype, device=device)
    whole[:numel] = expected
    reference.update_signs_(expected, table, **at)
    triton.update_signs_(whole[:numel], table, **at)
    assert_same_bits(whole[:numel].cpu(), expected, (numel, start, dtype, rounding, count))
    assert (whole[numel:] == 9).all(), "written outside"
