"""Sign noise: its map against an independent one, its statistics, and the backends' bits against the reference's."""

import itertools
from functools import cache

import numpy as np
import pytest
import torch

import ds_zoadamu
from ds_zoadamu import kernels
from ds_zoadamu.kernels import SIGN_NOISE_VERSION, SignTable, build, cpu, reference
from ds_zoadamu.kernels.types import Rounding, fp32
from ds_zoadamu.rules.noise import parameter_key
from tests.helpers.reference_numpy import signs64

from .common import KEY, WEIGHT_DTYPES, assert_same_bits, weights

try:
    WIDTHS = cpu.available_simd()
except build.BuildError:
    WIDTHS = ()
LAST_STEP = 2**32 - 1
# A run has 256 elements, a tile up to 4096; the upper half of the counter changes at multiples of 2**36.
SHAPES = [(1, 0), (1, 255), (3, 2**36 - 1), (256, 512), (700, 2**40 + 77), (4700, 7)]
TWO_CHUNKS = (70001, 2**36 - 35001)  # for two threads


KNOWN_BYTES = [[229, 53, 63, 92, 124, 112, 137, 13, 2, 177, 163, 81], [218, 18, 45, 197, 122, 152, 38, 32, 91, 51, 92, 187]]
KNOWN_ROUNDING = [63812, 63812, 1491, 1491, 10400, 10400, 2192, 2192, 49701, 49701, 12725, 12725]


def signs(numel, start, direction, step=LAST_STEP, backend=reference):
    out = torch.empty(numel)
    backend.signs_(out, key=KEY, step=step, start=start, direction=direction)
    return out


@pytest.fixture(params=WIDTHS)
def width(request, monkeypatch):
    monkeypatch.setenv("DS_ZOADAMU_SIMD", request.param)
    return request.param


# --- the map


def test_known_answers():
    """Version 2 of the noise for ever: a journal depends on these bits."""
    assert SIGN_NOISE_VERSION == 2
    found = [[int(byte) for byte in reference.sign_bytes(KEY, 7, number, 250, 262, torch.device("cpu"))] for number in (0, 1)]
    assert found == KNOWN_BYTES
    rounding = reference.sign_rounding_bits(KEY, 7, 250, 262, torch.device("cpu"))
    assert rounding.tolist() == KNOWN_ROUNDING


@pytest.mark.parametrize("start", [0, 250, 2**36 - 20, 2**62])
def test_the_map_agrees_with_an_independent_one(start):
    for direction in (0, 3, 7, 8, 21, 1023):
        assert np.array_equal(signs(40, start, direction).numpy(), signs64(KEY, LAST_STEP, direction, start, start + 40))


def test_the_public_map_is_by_seed_and_name():
    z = ds_zoadamu.signs(5, 7, "w", 250, 300, direction=9)
    assert np.array_equal(z.numpy(), signs64(parameter_key(5, "w"), 7, 9, 250, 300))
    with pytest.raises(ValueError, match="direction must be"):
        ds_zoadamu.signs(5, 7, "w", 0, 1, direction=1024)


def test_rounding_bits_are_shared_by_neighbours_and_no_others():
    w = reference.sign_rounding_bits(KEY, 3, 0, 4096, torch.device("cpu"))
    assert torch.equal(w[0::2], w[1::2])
    # 2048 numbers of 16 bits: 32 pairs are alike by chance, with a standard deviation below 6.
    assert 2048 - w[0::2].unique().numel() < 32 + 6 * 6


# --- statistics; each bound is 5 standard deviations, one failure in 3.5 million, of numbers that never change

NUMEL = 1 << 18


@cache
def bytes_of(step: int, number: int = 0, key=KEY) -> torch.Tensor:
    return reference.sign_bytes(key, step, number, 0, NUMEL, torch.device("cpu"))


def test_all_bytes_are_equally_frequent():
    for step in (1, 2):
        count = torch.bincount(bytes_of(step), minlength=256).double()
        expected = NUMEL / 256
        chi_squared = float(((count - expected) ** 2 / expected).sum())
        # 255 degrees of freedom: mean 255, standard deviation sqrt(2 * 255).
        assert abs(chi_squared - 255) < 5 * (2 * 255) ** 0.5


def test_directions_steps_parameters_and_neighbours_are_uncorrelated():
    other_key = (KEY[0] + 1, KEY[1])
    sources = [
        bytes_of(1),
        bytes_of(1, number=1),
        bytes_of(2),
        bytes_of(1, key=other_key),
        bytes_of(1).roll(1),
        bytes_of(1).roll(64),
    ]
    rows = [(byte >> k & 1).double() * 2 - 1 for byte in sources for k in range(8)]
    rows.append((reference.sign_rounding_bits(KEY, 1, 0, NUMEL, torch.device("cpu")) & 1).double() * 2 - 1)
    z = torch.stack(rows)
    correlation = z @ z.T / NUMEL
    correlation.fill_diagonal_(0.0)
    assert correlation.abs().max() < 5 * NUMEL**-0.5
    assert z.mean(1).abs().max() < 5 * NUMEL**-0.5


# --- the table


def test_a_table_says_what_the_directions_say():
    for count in (1, 4, 5, 8, 11, 16):
        c = [fp32(0.3 * (k - 2.6)) for k in range(count)]
        table = SignTable.of(c)
        assert len(table.rows) == -(-count // 8)
        for value in (0, 1, 0x5A, 0xFF):
            for number, row in enumerate(table.rows):
                eight = c[8 * number : 8 * number + 8]
                expected = sum(x if value >> k & 1 else -x for k, x in enumerate(eight))
                # Two sums of at most four numbers below 4, each rounded once to fp32.
                assert abs(row[value & 15] + row[16 + (value >> 4)] - expected) <= 2 * 16 * 2.0**-24


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_an_update_is_the_mean_of_the_directions(dtype):
    n, start, c = 600, 2**36 - 300, [0.01 * (k - 4.3) for k in range(11)]
    weight = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = weight.double()
    kernels.update_signs_(weight, SignTable.of(c), key=KEY, step=5, start=start, lr_decay=fp32(0.25), rounding=Rounding.NEAREST)
    z = torch.stack([signs(n, start, k, step=5).double() for k in range(11)])
    expected = before - (torch.tensor(c, dtype=torch.float64) @ z + 0.25 * before)
    # A few roundings to fp32 of numbers below 4, and one to the dtype.
    spacing = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert ((weight.double() - expected).abs() <= expected.abs() * spacing + 4 * 4 * 2.0**-24).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_perturbed_values_are_mirrored_and_unbiased(dtype):
    """The two values of an element lie at the same distance from a weight in the middle of a binade, 1.5: the spacing is one
    there. The mean distance is zo_eps."""
    n, eps = 1 << 16, fp32(1e-3)
    weight = torch.full((n,), 1.5, dtype=dtype)
    found = []
    for direction in (2, 9):
        out = torch.empty_like(weight)
        kernels.perturb_signs_(
            out, weight, key=KEY, step=3, start=0, direction=direction, scale=eps, rounding=Rounding.STOCHASTIC
        )
        found.append((out - weight).double() * signs(n, 0, direction, step=3).double())
    assert torch.equal(found[0], found[1]) and (found[0] >= 0).all()
    spacing = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    share = eps / spacing % 1
    # Neighbours share their bits: n / 2 independent roundings.
    assert abs(found[0].mean() - eps) < 5 * spacing * (share * (1 - share) / (n / 2)) ** 0.5


# --- the C++ kernels


@cache
def expected_perturbed(numel, start, dtype, out_dtype, rounding, scale):
    out = torch.empty(numel, dtype=out_dtype)
    reference.perturb_signs_(
        out, weights(numel, dtype), key=KEY, step=LAST_STEP, start=start, direction=11, scale=scale, rounding=rounding
    )
    return out


@cache
def expected_updated(numel, start, dtype, rounding, count):
    weight = weights(numel, dtype)
    reference.update_signs_(weight, table(count), **update_arguments(start, rounding))
    return weight


def table(count: int) -> SignTable:
    return SignTable.of([1e-3 * (k - 2.7) for k in range(count)])


def update_arguments(start, rounding):
    return {"key": KEY, "step": LAST_STEP, "start": start, "lr_decay": fp32(1e-2), "rounding": rounding}


@pytest.mark.parametrize("numel, start", [*SHAPES, TWO_CHUNKS])
def test_cpu_signs(width, numel, start):
    for direction in (0, 7, 12, 1023):
        assert_same_bits(signs(numel, start, direction, backend=cpu), signs(numel, start, direction), direction)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_cpu_perturb_signs(width, dtype):
    for (numel, start), out_dtype in [*itertools.product(SHAPES, [dtype]), *(((700, 7), other) for other in WEIGHT_DTYPES)]:
        for rounding, scale in itertools.product(Rounding, (fp32(1e-3), -fp32(3e-2))):
            out, weight = torch.empty(numel, dtype=out_dtype), weights(numel, dtype)
            cpu.perturb_signs_(out, weight, key=KEY, step=LAST_STEP, start=start, direction=11, scale=scale, rounding=rounding)
            case = (numel, start, dtype, out_dtype, rounding, scale)
            assert_same_bits(out, expected_perturbed(*case), case)
            assert_same_bits(weight, weights(numel, dtype), "weight was written")


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_cpu_update_signs(width, dtype):
    for (numel, start), rounding, count in itertools.product(SHAPES, Rounding, (3, 8, 11)):
        weight = weights(numel, dtype)
        cpu.update_signs_(weight, table(count), **update_arguments(start, rounding))
        case = (numel, start, dtype, rounding, count)
        assert_same_bits(weight, expected_updated(*case), case)


@pytest.mark.skipif(not WIDTHS, reason="no C++ kernels here")
def test_arguments_that_do_not_fit():
    weight = torch.zeros(4)
    fine = {"key": KEY, "step": 1, "start": 0, "rounding": Rounding.NEAREST}
    with pytest.raises(ValueError, match="direction must be in 0 <= direction < 1024, got 1024"):
        cpu.perturb_signs_(torch.zeros(4), weight, direction=1024, scale=1.0, **fine)
    with pytest.raises(ValueError, match="1 to 128 rows of 32"):
        cpu.update_signs_(weight, SignTable(((1.0,) * 31,)), lr_decay=0.0, **fine)
    with pytest.raises(ValueError, match="step must be in"):
        cpu.signs_(weight, key=KEY, step=2**32, start=0, direction=0)
