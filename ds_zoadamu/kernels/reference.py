"""The three operations on a flat range of one parameter, in plain PyTorch: the definition of their bits.

The C++ and Triton kernels must agree with this file in every bit, so every floating-point operation here is one torch call
that rounds once: no ``alpha=``, ``addcmul`` or ``lerp`` (they fuse), no scalar that is not exactly an fp32 number.

With ``i`` the flat index in the whole parameter, ``p = i >> 1`` and (x0, x1, x2, x3) = Philox(counter=(p, p >> 32, step, 0),
key):

    (a, b) = (x0, x1) if i is even else (x2, x3)
    xi1    = sqrt(-2 ln u) cos(phi)      u   = ((a >> 8) + 1) / 2**24
    xi2    = sqrt(-2 ln u) sin(phi)      phi = 2 pi (b >> 8) / 2**24
    w      = (a & 0xff) << 8 | (b & 0xff)        16 random bits, for rounding

Works on any device, also on a GPU.
"""

import math

import torch

from .types import Recurrence, Rounding

NOISE_VERSION = 1
"""Version of the map from (seed, name, step, flat index) to noise. Journals depend on it: any change of bits is a new
version.
"""

_MASK32 = 0xFFFFFFFF
_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_PURPOSE_NOISE = 0


def _fp32(*values: float) -> tuple[float, ...]:
    return tuple(torch.tensor(values, dtype=torch.float32).tolist())


# Minimax fits (relative error for ln and sin, absolute for cos), rounded to fp32.
# ln(1 + x) = x - x^2/2 + x^3 * (LN[0] + LN[1] x + ...)   for 1 + x in [sqrt(1/2), sqrt(2))
LN = _fp32(
    0.33333910739474715, -0.2500133703612675, 0.1996306369765443, -0.16577584768039144, 0.1491476922230497,
    -0.142674862162767, 0.08700430572319383,
)  # fmt: skip
LN2 = _fp32(math.log(2.0))[0]
# sin(2 pi x) = x * (SIN[0] + SIN[1] x^2 + ...)     for |x| <= 1/8 of a turn
SIN = _fp32(6.283185286831602, -41.34166145180527, 81.59235285906625, -75.39352615623254)
# cos(2 pi x) = 1 + x^2 * (COS[0] + COS[1] x^2 + ...)
COS = _fp32(-19.739167260427685, 64.92322781824248, -83.66587381045879)

_CHUNK = 1 << 20  # elements a pass: bounds the temporaries, which are int64


def philox(counter: tuple[torch.Tensor, ...], key: tuple[int, int], rounds: int = 10) -> tuple[torch.Tensor, ...]:
    """Philox-4x32 of Salmon et al. (2011). ``counter``: four int64 tensors of 32-bit words; returns the same."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The product wraps modulo 2**64 in int64; its two 32-bit halves are right all the same.
        p0, p1 = c0 * _PHILOX_M0, c2 * _PHILOX_M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + _PHILOX_W0) & _MASK32, (k1 + _PHILOX_W1) & _MASK32
    return c0, c1, c2, c3


def _horner(x: torch.Tensor, coefficients: tuple[float, ...]) -> torch.Tensor:
    y = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        y = y * x + c
    return y


def sqrt(x: torch.Tensor) -> torch.Tensor:
    """The square root of fp32, correctly rounded on every device.

    torch.sqrt in fp32 is not: with MKL it is off by one bit in 0.6 % of the results. An fp64 root that is off by as much as
    its last bit still rounds to the right fp32 number: no root of a 24-bit number is so near the middle between two of them.
    """
    return x.to(torch.float64).sqrt().to(torch.float32)


def log_uniform(k: torch.Tensor) -> torch.Tensor:
    """ln((k + 1) / 2**24) in fp32 for integers 0 <= k < 2**24 (int64 in)."""
    bits = (k + 1).to(torch.float32).view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23  # of the mantissa in [sqrt(1/2), sqrt(2)): ln u loses no digits near u = 1
    x = (bits - (exponent << 23)).view(torch.float32) - 1.0
    z = x * x
    y = (z * x) * _horner(x, LN)
    y = x + (y - z * 0.5)
    return y + (exponent - 24).to(torch.float32) * LN2


def sincos_turn(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sin, cos) of 2 pi k / 2**24 in fp32 for integers 0 <= k < 2**24 (int64 in)."""
    quadrant = (k + (1 << 21)) >> 22  # the nearest multiple of a quarter turn, 0 to 4
    x = (k - (quadrant << 22)).to(torch.float32) * 2.0**-24  # exact, |x| <= 1/8
    z = x * x
    s = x * _horner(z, SIN)
    c = z * _horner(z, COS) + 1.0
    swap = (quadrant & 1) == 1
    sin, cos = torch.where(swap, c, s), torch.where(swap, s, c)
    sin = torch.where((quadrant & 2) == 2, -sin, sin)
    cos = torch.where(((quadrant + 1) & 2) == 2, -cos, cos)
    return sin, cos


def noise_and_bits(
    key: tuple[int, int], step: int, start: int, stop: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(xi1, xi2, w) for the flat indices start <= i < stop: two fp32 tensors and the 16 rounding bits as int32."""
    pair = torch.arange(start >> 1, (stop + 1) >> 1, dtype=torch.int64, device=device)
    words = philox((pair & _MASK32, pair >> 32, torch.full_like(pair, step), torch.full_like(pair, _PURPOSE_NOISE)), key)
    first = torch.stack((words[0], words[2]), 1).reshape(-1)
    second = torch.stack((words[1], words[3]), 1).reshape(-1)
    offset = start & 1
    first, second = first[offset : offset + stop - start], second[offset : offset + stop - start]
    radius = sqrt(log_uniform(first >> 8) * -2.0)
    sin, cos = sincos_turn(second >> 8)
    w = ((first & 0xFF) << 8 | (second & 0xFF)).to(torch.int32)
    return radius * cos, radius * sin, w


def advance(
    momentum: torch.Tensor | None,
    direction: Recurrence,
    key: tuple[int, int],
    start: int,
    stop: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(m_t, v, w) of ALGORITHM section 1 for a range: fp32 momentum, second moment, rounding bits of the newest step."""
    if momentum is None:
        m = torch.zeros(stop - start, dtype=torch.float32, device=device)
    else:
        m = momentum.to(torch.float32)
        if momentum.dtype == torch.int8:
            m = m * direction.decode_scale
    for c in direction.steps:
        xi1, xi2, w = noise_and_bits(key, c.step, start, stop, device)
        centred = xi1 * c.sqrt_alpha
        history = m + xi2 * c.sqrt_one_minus_alpha
        m = centred * c.beta1 + history * c.one_minus_beta1
    v = (centred * centred) * c.beta2 + (history * history) * c.one_minus_beta2
    return m, v, w


def round_to(x: torch.Tensor, dtype: torch.dtype, rounding: Rounding, w: torch.Tensor) -> torch.Tensor:
    """fp32 to ``dtype``: to nearest even, or stochastically with 16 random bits ``w`` an element.

    Stochastic: with f the magnitude in units of the spacing of ``dtype`` at x, in fixed point with 16 fractional bits, the
    result is floor((f + w) / 2**16). Exactly unbiased where at most 16 bits are dropped: always in bf16 and for normal
    numbers in fp16.
    """
    if dtype == torch.float32:
        return x
    if rounding is Rounding.NEAREST:
        return x.to(dtype)
    bits = x.view(torch.int32)
    magnitude, sign = bits & 0x7FFFFFFF, bits & -0x80000000
    if dtype == torch.bfloat16:
        rounded = ((magnitude + w) & -0x10000) | sign
        return torch.where(magnitude >= 0x7F800000, x, rounded.view(torch.float32)).to(dtype)
    if dtype != torch.float16:
        raise ValueError(f"no rounding to {dtype}")
    exponent = magnitude >> 23
    mantissa = (magnitude & 0x7FFFFF) | torch.where(exponent > 0, 0x800000, 0)
    drop = 113 - exponent  # below 2**-14 the spacing of fp16 no longer shrinks
    fixed = torch.where(
        drop <= 0,
        mantissa << 3,
        torch.where(drop <= 3, mantissa << (3 - drop).clamp(0, 3), mantissa >> (drop - 3).clamp(0, 31)),
    )
    half = ((exponent.clamp(min=113) - 113) << 10) + ((fixed + w) >> 16)
    half = half.clamp(max=0x7C00) | torch.where(sign != 0, 0x8000, 0)
    rounded = torch.where(half >= 0x8000, half - 0x10000, half).to(torch.int16).view(torch.float16)
    return torch.where(exponent == 255, x.to(torch.float16), rounded)


def _store_momentum(momentum: torch.Tensor, m: torch.Tensor, encode_scale: float, w: torch.Tensor) -> None:
    if momentum.dtype == torch.int8:
        magnitude = (m.abs() * encode_scale).clamp(max=127.0)
        q = ((magnitude * 65536.0).to(torch.int32) + w) >> 16
        m = torch.where(m < 0, -q, q)
        momentum.copy_(m.clamp(-127, 127).to(torch.int8))
    else:
        momentum.copy_(round_to(m, momentum.dtype, Rounding.STOCHASTIC, w))


def _chunks(numel: int, start: int):
    for lo in range(0, numel, _CHUNK):
        hi = min(lo + _CHUNK, numel)
        yield slice(lo, hi), start + lo, start + hi


def noise_(xi1: torch.Tensor, xi2: torch.Tensor, *, key: tuple[int, int], step: int, start: int) -> None:
    """Fill two fp32 tensors of n elements with the noise of the flat indices start <= i < start + n."""
    for part, lo, hi in _chunks(xi1.numel(), start):
        xi1[part], xi2[part], _ = noise_and_bits(key, step, lo, hi, xi1.device)


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
    """out = weight + scale * m_t, rounded once.

    ``weight``, ``momentum`` (or None) and ``out``: n elements each, flat indices start <= i < start + n. ``scale``: +zo_eps
    or -zo_eps. Stochastic rounding is mirrored: -zo_eps takes the complement of the bits of +zo_eps, so the mean of the two's
    difference is 2 zo_eps m_t.
    """
    flip = 0xFFFF if scale < 0 else 0
    for part, lo, hi in _chunks(weight.numel(), start):
        stored = None if momentum is None else momentum[part]
        m, _, w = advance(stored, direction, key, lo, hi, weight.device)
        out[part] = round_to(weight[part].to(torch.float32) + m * scale, out.dtype, rounding, w ^ flip)


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
    """weight -= lr_grad * d + lr_decay * weight, and momentum = m_t, each written once; in place.

    d = m_t / sqrt(v + sigma), or m_t itself without ``normalize``. ``lr_grad`` = lr * projected_grad, ``lr_decay`` = lr *
    weight_decay. ``write_weight=False`` (a skipped step) leaves every bit of the weight and advances the momentum. Momentum
    below fp32 is always written with stochastic rounding; ``rounding`` is the weight's.
    """
    for part, lo, hi in _chunks(weight.numel(), start):
        stored = None if momentum is None else momentum[part]
        m, v, w = advance(stored, direction, key, lo, hi, weight.device)
        if write_weight:
            x = weight[part].to(torch.float32)
            g = m / sqrt(v + sigma) if normalize else m
            weight[part] = round_to(x - (g * lr_grad + x * lr_decay), weight.dtype, rounding, w)
        if stored is not None:
            _store_momentum(stored, m, direction.encode_scale, w)
