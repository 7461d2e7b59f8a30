"""Rounding to 16 bits and to int8: unbiased, mirrored, exact where it must be, and within one unit."""

import math

import numpy as np
import pytest
import torch

from ds_zoadamu.kernels import perturb_, reference, update_
from ds_zoadamu.kernels.types import Rounding, fp32

from .common import KEY, UNIT, assert_same_bits, direction, momenta, scalars, special_values, warm_up

ALL_W = torch.arange(1 << 16, dtype=torch.int32)
HALVES = (torch.bfloat16, torch.float16)
SIGMAS = 5.0  # of the statistic's own law; all draws are fixed


def random_patterns(numel: int) -> torch.Tensor:
    """fp32 numbers with uniformly random bits: every exponent, infinities and NaN."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**31), 2**31, (numel,), generator=generator).to(torch.int32).view(torch.float32)


def cast(x: torch.Tensor, dtype: torch.dtype, rounding: Rounding, scale: float = 1.0) -> torch.Tensor:
    """x rounded by the backend in use: a perturbation of size zero. ``scale`` < 0 takes the mirrored bits."""
    out = torch.empty(x.numel(), dtype=dtype)
    nothing = torch.zeros(x.numel())
    step = scalars(1, alpha=1.0, beta1=0.0)  # m_t = m_{t-1} = 0
    perturb_(out, x, nothing, direction(step), key=KEY, start=3, scale=scale, rounding=rounding)
    return out


def floor_with_bits(x: np.ndarray, w: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The definition in fp64: floor(|x| / spacing, in units of 2**-16, + w), for finite x."""
    digits, lowest = (10, -24) if dtype == torch.float16 else (7, -133)
    magnitude = np.abs(x.astype(np.float64))
    _, exponent = np.frexp(magnitude)  # magnitude = fraction * 2**exponent, fraction in [1/2, 1)
    spacing = np.ldexp(1.0, np.maximum(exponent - 1 - digits, lowest))
    fixed = np.floor(magnitude / spacing * 65536)
    return np.copysign(np.floor((fixed + w) / 65536) * spacing, x)


@pytest.mark.parametrize("dtype", HALVES)
def test_nearest_is_torchs_conversion(dtype):
    x = torch.cat((random_patterns(1 << 16), special_values(torch.float32), torch.tensor([65519.99, 65520.0, 2.0**-25])))
    # Adding a zero turns -0 into +0 where the zero is positive; torch's own sum does so too.
    assert_same_bits(cast(x, dtype, Rounding.NEAREST), (x + 0.0).to(dtype), dtype)
    assert_same_bits(reference.round_to(x, dtype, Rounding.NEAREST, ALL_W[:1]), x.to(dtype), dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_is_its_definition(dtype):
    x = random_patterns(1 << 16)
    x = torch.where(x.isfinite(), x, 1.0)
    if dtype == torch.float16:
        x[::2] = x[::2].frexp().mantissa * torch.exp2(torch.arange(x[::2].numel()) % 46 - 28)  # 2**-28 to 2**17
    w = ALL_W.flip(0)
    with np.errstate(over="ignore"):
        expected = torch.from_numpy(floor_with_bits(x.numpy(), w.numpy(), dtype)).to(dtype)  # exact, or infinite
    assert_same_bits(reference.round_to(x, dtype, Rounding.STOCHASTIC, w), expected, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("x", [0.5, 0.7001234, -0.98765, 1e-3, -3.3333, 60000.1])
def test_stochastic_is_unbiased_over_its_random_bits(dtype, x):
    x = fp32(x)
    rounded = reference.round_to(torch.full((1 << 16,), x), dtype, Rounding.STOCHASTIC, ALL_W).double()
    assert rounded.mean().item() == x
    assert rounded.unique().numel() <= 2


@pytest.mark.parametrize("dtype", HALVES)
def test_mirrored_bits_are_unbiased_too_and_cancel(dtype):
    x, delta = fp32(0.7), fp32(1e-4)
    above, below = torch.full((1 << 16,), x + delta), torch.full((1 << 16,), x - delta)
    plus = reference.round_to(above, dtype, Rounding.STOCHASTIC, ALL_W).double()
    minus = reference.round_to(below, dtype, Rounding.STOCHASTIC, ALL_W ^ 0xFFFF).double()
    assert (plus - minus).mean().item() == (above[0].double() - below[0].double()).item()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rounding", Rounding)
def test_special_values_survive(dtype, rounding):
    x = torch.tensor([math.inf, -math.inf, math.nan, -0.0, 0.0])
    for scale in (1.0, -1.0):
        rounded = cast(x, dtype, rounding, scale)
        assert rounded[:2].tolist() == [math.inf, -math.inf]
        assert rounded[2].isnan()
        assert rounded[3:].tolist() == [0.0, 0.0]
    assert reference.round_to(x, dtype, rounding, ALL_W[-1:]).signbit().tolist()[3:] == [True, False]


def test_fp16_overflows_to_infinity_only_where_it_must():
    top = torch.full((1 << 16,), 65504.0)
    assert torch.all(reference.round_to(top, torch.float16, Rounding.STOCHASTIC, ALL_W) == 65504.0)
    between = reference.round_to(top + 8, torch.float16, Rounding.STOCHASTIC, ALL_W)  # a quarter of the spacing of 32
    assert between.isinf().double().mean() == 0.25
    assert torch.all(reference.round_to(top * 2, torch.float16, Rounding.STOCHASTIC, ALL_W).isinf())


@pytest.mark.parametrize("dtype, spacing", [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
@pytest.mark.parametrize("probability", [1e-3, 1e-4])
def test_small_updates_arrive_with_the_right_probability(dtype, spacing, probability):
    """theta in [0.5, 1) and a step far below the spacing: as many elements move as the step is long, in its direction."""
    numel = 1 << 21
    theta = torch.full((numel,), 0.75, dtype=dtype)
    theta[1::2] = -0.625
    before = theta.clone()
    xi1, _, _ = reference.noise_and_bits(KEY, 5, 0, numel, theta.device)
    update_(
        theta, None, direction(warm_up(5)), key=KEY, start=0, lr_grad=fp32(probability * spacing), lr_decay=0.0, sigma=0.0,
        normalize=True, write_weight=True, rounding=Rounding.STOCHASTIC,
    )  # fmt: skip
    moved = (theta.double() - before.double()) / spacing
    assert set(moved.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert torch.all(moved * xi1 <= 0)  # against the direction, sign(xi1)
    # x - step is rounded to fp32 first, to a multiple of 2**-24: that moves the probability by up to 2**-25 / spacing.
    for side in (1.0, -1.0):
        count, possible = (moved == side).sum().item(), (xi1 * side < 0).sum().item()
        bias = possible * 2.0**-25 / spacing
        assert abs(count - possible * probability) < SIGMAS * math.sqrt(possible * probability) + bias


@pytest.mark.parametrize("dtype", HALVES)
def test_the_mean_of_the_difference_of_the_two_perturbations_is_the_momentum(dtype):
    numel, zo_eps = 1 << 20, fp32(1e-3)
    weight = (0.5 + 0.5 * torch.rand(numel, generator=torch.Generator().manual_seed(3))).to(dtype)
    plus, minus = torch.empty_like(weight), torch.empty_like(weight)
    momentum = torch.randn(numel, generator=torch.Generator().manual_seed(4))
    at = {"key": KEY, "start": 1, "rounding": Rounding.STOCHASTIC}
    step = direction(scalars(8))
    perturb_(plus, weight, momentum, step, scale=zo_eps, **at)
    perturb_(minus, weight, momentum, step, scale=-zo_eps, **at)
    m, _, _ = reference.advance(momentum, step, KEY, 1, 1 + numel, weight.device)
    error = (plus.double() - minus.double()) / (2 * zo_eps) - m
    # theta +- eps m is itself rounded to fp32 (2**-25 at most, at random): far below the statistical bound.
    assert abs(error.mean()) < SIGMAS * error.std() / math.sqrt(numel)
    assert abs((error * m).mean()) < SIGMAS * (error * m).std() / math.sqrt(numel)  # nor in proportion to m


# ---------------------------------------------------------------- momentum


def advanced(stored: torch.Tensor, numel: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(what is stored after a step, the fp32 momentum it stands for)."""
    step = direction(scalars(6))
    exact, _, _ = reference.advance(stored, step, KEY, 0, numel, stored.device)
    update_(
        torch.zeros(numel), stored, step, key=KEY, start=0, lr_grad=0.0, lr_decay=0.0, sigma=1.0,
        normalize=False, write_weight=False, rounding=Rounding.NEAREST,
    )  # fmt: skip
    return stored, exact


@pytest.mark.parametrize("dtype, digits", [(torch.bfloat16, 7), (torch.float16, 10)])
def test_16_bit_momentum_is_within_one_spacing_and_unbiased(dtype, digits):
    numel = 1 << 18
    m0 = torch.randn(numel, generator=torch.Generator().manual_seed(9)).to(dtype)
    stored, exact = advanced(m0, numel)
    error = stored.double() - exact.double()
    # One spacing is 2**-digits of the power of two below |m|; fp16's spacing stops at 2**-24.
    assert torch.all(error.abs() <= torch.clamp(exact.double().abs() * 2.0**-digits, min=2.0**-24))
    assert abs(error.mean()) < SIGMAS * error.std() / math.sqrt(numel)


def test_int8_momentum_is_within_one_unit_and_unbiased_and_clamped():
    numel = 1 << 18
    stored, exact = advanced(momenta(numel, torch.int8) // 8, numel)
    inside = exact.abs() < 126 * UNIT
    error = stored.double() * UNIT - exact.double()
    # encode_scale is the fp32 nearest to 1 / UNIT, so a value is off by 2**-24 of itself: far less than a thousandth of a unit.
    assert inside.double().mean() > 0.99
    assert torch.all(error[inside].abs() < 1.001 * UNIT)
    assert abs(error[inside].mean()) < SIGMAS * error[inside].std() / math.sqrt(numel)

    huge = torch.full((64,), 127, dtype=torch.int8)
    huge[::2] = -127
    step = direction(scalars(6, alpha=1.0, beta1=0.0))
    large = type(step)(step.steps, decode_scale=UNIT * 10, encode_scale=step.encode_scale)
    before = huge.clone()
    update_(
        torch.zeros(64), huge, large, key=KEY, start=0, lr_grad=0.0, lr_decay=0.0, sigma=1.0,
        normalize=False, write_weight=False, rounding=Rounding.NEAREST,
    )  # fmt: skip
    assert torch.equal(huge, before)  # ten times too large: clamped to 127 units


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("storage", [None, torch.float32, torch.int8])
def test_a_skipped_step_leaves_every_bit_of_the_weight(dtype, storage):
    weight = random_patterns(1001).to(dtype)
    before, m = weight.clone(), momenta(1001, storage)
    m_before = None if m is None else m.clone()
    update_(
        weight, m, direction(scalars(3)), key=KEY, start=1, lr_grad=math.nan, lr_decay=math.inf, sigma=0.0,
        normalize=True, write_weight=False, rounding=Rounding.STOCHASTIC,
    )  # fmt: skip
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(weight.view(integer), before.view(integer))  # also the NaNs' payloads
    assert m is None or not torch.equal(m, m_before)
