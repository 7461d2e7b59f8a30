"""The noise: known answers, file format, accuracy of its polynomials, its law, and that it depends on the element alone."""

import math
import sys

import numpy as np
import pytest
import torch

from ds_zoadamu.kernels import reference
from ds_zoadamu.rules.noise import NOISE_VERSION, noise, parameter_key, parameter_keys
from tests.helpers.reference_numpy import noise64, philox4x32

EMBEDDING, NORM = "model.embed_tokens.weight", "model.layers.0.norm.bias"


# ---------------------------------------------------------------- the integer part


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    words = reference.philox(tuple(torch.tensor([word]) for word in counter), tuple(key))
    assert [int(word) for word in words] == expected
    assert [int(word) for word in philox4x32(counter, key)] == expected


# ---------------------------------------------------------------- the file format

# (name, step, start) -> the bits of xi1 and of xi2, for seed 42.
GOLDEN = {
    (EMBEDDING, 1, 0): (
        [0x3EB988FF, 0x3EA2553B, 0xBFE65E75, 0x3F794B9B],
        [0xBC23EF7A, 0xBDD89663, 0xBF105CC0, 0x3F624EA6],
    ),
    (EMBEDDING, 2, 7): (
        [0xBF84020F, 0xBF523AD5, 0xBF2533C0, 0xBF0E32DA],
        [0xBFAAA419, 0x3EA54B44, 0x3F5453E8, 0xBCA42CBF],
    ),
    (NORM, 1, 2**33 - 1): (
        [0x3F84DAC9, 0x3F2009CA, 0x3EC7B9D9, 0x3FB7FF6D],
        [0xBF87EAD0, 0x3F8B29DD, 0xC00A15EA, 0x3E0952CF],
    ),
    (NORM, 2**32 - 1, 2**40 + 3): (
        [0x3FFC0326, 0x3F468383, 0x3DB33BDB, 0x3EF13F57],
        [0x3F5E7CB0, 0xBF6CC9E5, 0x3F667A4C, 0xBF4B941A],
    ),
}


@pytest.mark.parametrize("name, step, start", GOLDEN)
def test_version_1_of_the_noise_never_changes(name, step, start):
    assert NOISE_VERSION == 1
    expected = GOLDEN[name, step, start]
    xi1, xi2 = noise(seed=42, step=step, name=name, start=start, stop=start + len(expected[0]))
    for xi, patterns in zip((xi1, xi2), expected, strict=True):
        assert [pattern & 0xFFFFFFFF for pattern in xi.view(torch.int32).tolist()] == patterns


def test_version_1_of_the_keys_never_changes():
    assert parameter_key(0, "weight") == (0x08A6BE63, 0x91E5B6DA)
    assert parameter_key(2**64 - 1, "größe") == (0xBB7A947A, 0xAFF8E9F6)


def test_keys_depend_on_seed_and_name():
    keys = {parameter_key(seed, name) for seed in (0, 1, 2**32, 2**63) for name in ("", "a", "b", "ab", "a.b")}
    assert len(keys) == 20


@pytest.mark.parametrize("seed", [True, 1.0, "1", None])
def test_a_seed_of_another_type_is_refused(seed):
    with pytest.raises(TypeError, match="seed must be an int"):
        parameter_key(seed, "a")


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=r"0 <= seed < 2\*\*64, got"):
        parameter_key(seed, "a")


def test_names_that_share_a_key_are_refused(monkeypatch):
    assert parameter_keys(3, ["a", "b"]) == {"a": (parameter_key(3, "a"),), "b": (parameter_key(3, "b"),)}
    assert list(parameter_keys(3, ["a", "a"])) == ["a"]
    monkeypatch.setattr(sys.modules[parameter_keys.__module__], "parameter_key", lambda seed, name, direction: (1, 2))
    with pytest.raises(ValueError, match=r"'a' \(direction 0\) and 'b' \(direction 0\) get the same noise key"):
        parameter_keys(3, ["a", "b"])


@pytest.mark.parametrize(
    "step, start, stop, message",
    [
        (-1, 0, 1, "step"),
        (2**32, 0, 1, "step"),
        (0, -1, 1, "start"),
        (0, 0, 2**63, "stop"),
        (0, 5, 4, "stop must not be below start"),
    ],
)
def test_steps_and_ranges_out_of_bounds_are_refused(step, start, stop, message):
    with pytest.raises(ValueError, match=message):
        noise(0, step, "a", start, stop)


def test_an_empty_range_is_empty():
    assert [xi.numel() for xi in noise(0, 1, "a", 7, 7)] == [0, 0]


# ---------------------------------------------------------------- accuracy

WORDS = 1 << 24
SLICE = 1 << 21


def slices():
    for lo in range(0, WORDS, SLICE):
        yield torch.arange(lo, lo + SLICE)


def test_the_logarithm_is_good_to_one_unit_in_the_last_place_for_every_input():
    # Half a unit (2**-24 relative) for the last addition, and as much again for all before it: the polynomial's own fit (2e-9)
    # and the rounding of x - x^2/2 + ..., of e * LN2 and of LN2, which weigh less than the sum they enter.
    worst = 0.0
    for k in slices():
        exact = np.log((k.numpy() + 1.0) / WORDS)
        error = np.abs(reference.log_uniform(k).numpy() - exact)
        assert np.all(error[exact == 0] == 0)
        worst = max(worst, float(np.max(error[exact < 0] / -exact[exact < 0])))
    assert worst < 2.0**-23


def test_sine_and_cosine_are_good_to_two_units_of_one_half_for_every_input():
    # In [1/2, 1] one unit in the last place is 2**-24. Half of it for the last operation of either polynomial; as much for the
    # products before; the rest is the fit and the rounding of the coefficients (2 pi alone: 2.8e-8 relative).
    worst = 0.0
    for k in slices():
        sin, cos = reference.sincos_turn(k)
        phi = 2 * np.pi * k.numpy() / WORDS
        worst = max(worst, np.abs(sin.numpy() - np.sin(phi)).max(), np.abs(cos.numpy() - np.cos(phi)).max())
    assert worst < 2.0**-23


def test_sine_and_cosine_are_exact_at_the_quarter_turns():
    sin, cos = reference.sincos_turn(torch.arange(4) * (WORDS // 4))
    assert sin.tolist() == [0, 1, 0, -1]
    assert cos.tolist() == [1, 0, -1, 0]


def test_the_square_root_is_correctly_rounded():
    # fp64 rounds the root of a 24-bit number once more without harm: 53 >= 2 * 24 + 2 bits.
    x = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)) * 40
    assert np.array_equal(reference.sqrt(x).numpy(), np.sqrt(x.numpy().astype(np.float64)).astype(np.float32))


# |xi| <= 5.77: the errors of sin or cos (2**-23, absolute) and of the radius and the product (2**-24 + 2 * 2**-24, relative).
NOISE_TOLERANCE = 5.77 * (2.0**-23 + 3 * 2.0**-24)


@pytest.mark.parametrize("start", [0, 1, 2**33 - 1001, 2**40 + 1])
@pytest.mark.parametrize("step", [0, 1, 2**32 - 1])
def test_noise_agrees_with_fp64(start, step):
    key = parameter_key(7, EMBEDDING)
    for xi, exact in zip(noise(7, step, EMBEDDING, start, start + 4001), noise64(key, step, start, start + 4001), strict=True):
        assert np.abs(xi.numpy() - exact).max() < NOISE_TOLERANCE


# ---------------------------------------------------------------- the law

NUMEL = 1 << 20
SIGMAS = 5.0  # of the statistic's own law: a right generator fails once in two million draws, and these draws are fixed


@pytest.fixture(scope="module")
def sample():
    return [xi.double().numpy() for xi in noise(5, 17, EMBEDDING, 0, NUMEL)]


@pytest.mark.parametrize("which", [0, 1])
def test_moments_are_those_of_the_normal_law(sample, which):
    x = sample[which]
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(np.mean(x**power) - mean) < SIGMAS * math.sqrt(variance / NUMEL), power


def kolmogorov_smirnov(x: np.ndarray) -> float:
    """sqrt(n) times the largest distance of the empirical distribution function from the normal one."""
    x = np.sort(x)
    cdf = 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    rank = np.arange(x.size + 1) / x.size
    return math.sqrt(x.size) * max(np.max(rank[1:] - cdf), np.max(cdf - rank[:-1]))


@pytest.mark.parametrize("which", [0, 1])
def test_the_distribution_is_normal(sample, which):
    # Kolmogorov's law exceeds 1.95 once in a thousand times.
    assert kolmogorov_smirnov(sample[which][: 1 << 18]) < 1.95
    assert kolmogorov_smirnov(sample[which][: 1 << 18] * 1.02) > 1.95  # the test can tell 2 % of the scale


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean(x * y))


def test_nothing_is_correlated(sample):
    xi1, xi2 = sample
    pairs = {"xi1, xi2": (xi1, xi2), "xi1^2, xi2^2": ((xi1**2 - 1) / 2**0.5, (xi2**2 - 1) / 2**0.5)}
    for lag in (1, 2, 3, 32, 1024):
        pairs[f"lag {lag}"] = xi1[lag:], xi1[:-lag]
        pairs[f"xi1, xi2 at lag {lag}"] = xi1[lag:], xi2[:-lag]
    others = {"step": (5, 18, EMBEDDING), "name": (5, 17, NORM), "seed": (6, 17, EMBEDDING)}
    for what, (seed, step, name) in others.items():
        pairs[what] = xi1, noise(seed, step, name, 0, NUMEL)[0].double().numpy()
    pairs["2**33 further"] = xi1, noise(5, 17, EMBEDDING, 2**33, 2**33 + NUMEL)[0].double().numpy()
    for what, (x, y) in pairs.items():
        assert abs(correlation(x, y)) < SIGMAS / math.sqrt(x.size), what


def test_each_rounding_bit_is_fair_and_independent_of_the_noise():
    xi1, _, w = reference.noise_and_bits((3, 4), 9, 0, NUMEL, torch.device("cpu"))
    for bit in range(16):
        sign = 1.0 - 2.0 * ((w >> bit) & 1).double()
        assert abs(sign.mean()) < SIGMAS / math.sqrt(NUMEL), bit
        assert abs((sign * xi1).mean()) < SIGMAS / math.sqrt(NUMEL), bit
    assert w.min() == 0 and w.max() == 0xFFFF


# ---------------------------------------------------------------- a function of the element alone


@pytest.mark.parametrize("start", [0, 1, 2**33 - 500])
def test_noise_does_not_depend_on_the_partition(start):
    whole = noise(1, 2, NORM, start, start + 1000)
    for cuts in ([0, 1, 2, 3, 1000], [0, 333, 666, 1000], [0, 499, 501, 1000]):
        parts = [noise(1, 2, NORM, start + lo, start + hi) for lo, hi in zip(cuts, cuts[1:], strict=False)]
        for i in range(2):
            assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])
