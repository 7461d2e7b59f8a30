"""What the kernel tests share: scalars, inputs with awkward values, and comparison bit for bit."""

import itertools
import math

import torch

from ds_zoadamu.kernels.types import Recurrence, StepScalars, fp32

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOMENTUM_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16, torch.int8)
KEY = (0x9D4A_51C3, 0x0000_F00D)
UNIT = fp32(6 * 0.9 / 127)  # of stored int8 momentum


def scalars(step: int, alpha: float = 0.55, beta1: float = 0.3, beta2: float = 0.2) -> StepScalars:
    return StepScalars(
        step=step,
        sqrt_alpha=fp32(math.sqrt(alpha)),
        sqrt_one_minus_alpha=fp32(math.sqrt(1 - alpha)),
        beta1=fp32(beta1),
        one_minus_beta1=fp32(1 - beta1),
        beta2=fp32(beta2),
        one_minus_beta2=fp32(1 - beta2),
    )


def warm_up(step: int) -> StepScalars:
    """alpha = beta1 = beta2 = 1: m_t = xi1 and v = xi1^2."""
    return scalars(step, 1.0, 1.0, 1.0)


def direction(*steps: StepScalars) -> Recurrence:
    return Recurrence(steps, decode_scale=UNIT, encode_scale=fp32(1 / UNIT))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits as integers, with one value for every NaN: a NaN's payload is not defined."""
    if not tensor.is_floating_point():
        return tensor
    integers = tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
    return torch.where(tensor.isnan(), 0x7FFF, integers)


def assert_same_bits(actual: torch.Tensor | None, expected: torch.Tensor | None, what: object) -> None:
    if expected is None:
        return
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    wrong = (bits(actual) != bits(expected)).nonzero().flatten()
    assert wrong.numel() == 0, (
        f"{what}: {wrong.numel()} of {actual.numel()} differ, first at {wrong[0]}: {actual[wrong[0]]} for {expected[wrong[0]]}"
    )


def special_values(dtype: torch.dtype) -> torch.Tensor:
    """Infinities, NaN, both zeros, the largest numbers, and the subnormal ones of fp16 and their neighbourhood."""
    values = [math.inf, -math.inf, math.nan, 0.0, -0.0, 65504.0, -65504.0, 65519.0, 3.3e38, -3.3e38, 1e-44]
    values += [sign * mantissa * 2.0**e for e, mantissa, sign in itertools.product(range(-27, -11), (1.0, 1.3), (1, -1))]
    return torch.tensor(values).to(dtype)


def weights(numel: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Values over several orders of magnitude, with the special ones among them where there is room."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(numel, generator=generator) * torch.randn(numel, generator=generator).mul(3).exp()
    special = special_values(torch.float32)
    if numel > 3 * special.numel():
        w[torch.randperm(numel, generator=generator)[: special.numel()]] = special
    return w.to(dtype)


def momenta(numel: int, dtype: torch.dtype | None, seed: int = 1) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(seed)
    if dtype is None:
        return None
    if dtype == torch.int8:
        return torch.randint(-127, 128, (numel,), dtype=torch.int8, generator=generator)
    m = torch.randn(numel, generator=generator)
    if numel > 100:
        m[5:9] = torch.tensor([math.inf, -math.inf, math.nan, -0.0])
        m[9:40] *= 2.0**-14
    return m.to(dtype)
