"""Device code of the Triton kernels with signs: reference.py, bit for bit, over the counters of ``reference.sign_block``.

One lane computes one counter: 16 elements, four neighbours at each of four places 64 elements apart. Four neighbours lie in one
machine word of a tensor of 16 bits and in two of fp32, neighbouring lanes have neighbouring words, and nothing moves between
lanes. Where the range begins within a run of 256, at an odd address, and at its end, elements are read and written one by one,
under masks.
"""

import triton
import triton.language as tl

from . import reference
from .triton_jit import _load_one, _philox, _round, _store_one

_SIGNS = tl.constexpr(reference._PURPOSE_SIGNS)
_ROUNDING = tl.constexpr(reference._PURPOSE_SIGN_ROUNDING)


# ---------------------------------------------------------------- memory


@triton.jit
def _place(skip, block_low, block_high, LANES: tl.constexpr):
    """(where each lane's first element is in the tensors, its counter), both int64."""
    program, lane = tl.program_id(0).to(tl.int64), tl.arange(0, LANES)
    block = block_low.to(tl.uint32, bitcast=True).to(tl.int64) | (block_high.to(tl.int64) << 32)
    return program * (16 * LANES) - skip + ((lane >> 4) * 256 + (lane & 15) * 4), block + program * LANES + lane


@triton.jit
def _load_four(base, at, stop, MASKED: tl.constexpr):
    """Four neighbours from ``at`` on, as fp32; masked: those at 0 <= place < stop."""
    kind: tl.constexpr = base.dtype.element_ty
    if MASKED:
        return (
            _load_one(base + at, (at >= 0) & (at < stop)),
            _load_one(base + at + 1, (at + 1 >= 0) & (at + 1 < stop)),
            _load_one(base + at + 2, (at + 2 >= 0) & (at + 2 < stop)),
            _load_one(base + at + 3, (at + 3 >= 0) & (at + 3 < stop)),
        )
    elif kind == tl.float32:
        words = base.to(tl.pointer_type(tl.uint64), bitcast=True) + (at >> 1)
        a, b = tl.load(words), tl.load(words + 1)
        return (
            a.to(tl.uint32).to(tl.float32, bitcast=True),
            (a >> 32).to(tl.uint32).to(tl.float32, bitcast=True),
            b.to(tl.uint32).to(tl.float32, bitcast=True),
            (b >> 32).to(tl.uint32).to(tl.float32, bitcast=True),
        )
    else:
        word = tl.load(base.to(tl.pointer_type(tl.uint64), bitcast=True) + (at >> 2))
        a, b = word.to(tl.uint32), (word >> 32).to(tl.uint32)
        if kind == tl.bfloat16:
            return (
                (a << 16).to(tl.float32, bitcast=True),
                (a & 0xFFFF0000).to(tl.float32, bitcast=True),
                (b << 16).to(tl.float32, bitcast=True),
                (b & 0xFFFF0000).to(tl.float32, bitcast=True),
            )
        else:
            return (
                a.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32),
                (a >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32),
                b.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32),
                (b >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32),
            )


@triton.jit
def _store_four(base, at, stop, a, b, c, d, MASKED: tl.constexpr):
    """The reverse, from the elements' bits as uint32 with nothing above them."""
    width: tl.constexpr = base.dtype.element_ty.primitive_bitwidth
    if MASKED:
        _store_one(base + at, a, (at >= 0) & (at < stop))
        _store_one(base + at + 1, b, (at + 1 >= 0) & (at + 1 < stop))
        _store_one(base + at + 2, c, (at + 2 >= 0) & (at + 2 < stop))
        _store_one(base + at + 3, d, (at + 3 >= 0) & (at + 3 < stop))
    elif width == 32:
        words = base.to(tl.pointer_type(tl.uint64), bitcast=True) + (at >> 1)
        tl.store(words, a.to(tl.uint64) | (b.to(tl.uint64) << 32))
        tl.store(words + 1, c.to(tl.uint64) | (d.to(tl.uint64) << 32))
    else:
        word = (a | (b << 16)).to(tl.uint64) | ((c | (d << 16)).to(tl.uint64) << 32)
        tl.store(base.to(tl.pointer_type(tl.uint64), bitcast=True) + (at >> 2), word)


# ---------------------------------------------------------------- one element


@triton.jit
def _signed(word, shift, negative):
    """The bits of +magnitude where bit 31 - shift of the word is set, else those of ``negative``, -magnitude."""
    return ((word << shift) & 0x80000000) ^ negative


@triton.jit
def _perturbed(x, delta, w, kind: tl.constexpr, STOCHASTIC: tl.constexpr):
    """The bits of x + delta; stochastic rounding is mirrored, by the complement of w where delta has a minus."""
    if STOCHASTIC:
        w = (w ^ (delta.to(tl.int32, bitcast=True) >> 31).to(tl.uint32, bitcast=True)) & 0xFFFF
    return _round(x + delta.to(tl.float32, bitcast=True), w, kind, STOCHASTIC)


@triton.jit
def _looked_up(row, value):
    """What a row of the table says of a byte; bits of ``value`` above it are not looked at."""
    return tl.load(row + (value & 15)) + tl.load(row + 16 + ((value >> 4) & 15))


@triton.jit
def _updated(x, d, w, lr_decay, kind: tl.constexpr, STOCHASTIC: tl.constexpr):
    return _round(x - (d + x * lr_decay), w, kind, STOCHASTIC)


# ---------------------------------------------------------------- four neighbours


@triton.jit
def _signs_of_four(out, at, stop, word, shift, MASKED: tl.constexpr):
    negative = tl.full([1], 0xBF800000, tl.uint32)
    a, b = _signed(word, shift, negative), _signed(word, shift - 8, negative)
    c, d = _signed(word, shift - 16, negative), _signed(word, shift - 24, negative)
    _store_four(out, at, stop, a, b, c, d, MASKED)


@triton.jit
def _perturb_four(out, weight, at, stop, word, w, shift, negative, STOCHASTIC: tl.constexpr, MASKED: tl.constexpr):
    """w: a word whose halves are 16 bits for two neighbours each."""
    kind: tl.constexpr = out.dtype.element_ty
    low, high = w & 0xFFFF, w >> 16
    x0, x1, x2, x3 = _load_four(weight, at, stop, MASKED)
    a = _perturbed(x0, _signed(word, shift, negative), low, kind, STOCHASTIC)
    b = _perturbed(x1, _signed(word, shift - 8, negative), low, kind, STOCHASTIC)
    c = _perturbed(x2, _signed(word, shift - 16, negative), high, kind, STOCHASTIC)
    d = _perturbed(x3, _signed(word, shift - 24, negative), high, kind, STOCHASTIC)
    _store_four(out, at, stop, a, b, c, d, MASKED)


@triton.jit
def _four_looked_up(row, word):
    return _looked_up(row, word), _looked_up(row, word >> 8), _looked_up(row, word >> 16), _looked_up(row, word >> 24)


@triton.jit
def _update_four(
    weight, table, at, stop, block, step, key0, key1, w, lr_decay,
    quarter: tl.constexpr, ROWS: tl.constexpr, STOCHASTIC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = weight.dtype.element_ty
    low, high = w & 0xFFFF, w >> 16
    d0, d1, d2, d3 = _four_looked_up(table, _quarter(block, step, key0, key1, _SIGNS, quarter))
    for row in tl.static_range(1, ROWS):
        e0, e1, e2, e3 = _four_looked_up(table + 32 * row, _quarter(block, step, key0, key1, _SIGNS + row, quarter))
        d0, d1, d2, d3 = d0 + e0, d1 + e1, d2 + e2, d3 + e3
    x0, x1, x2, x3 = _load_four(weight, at, stop, MASKED)
    a = _updated(x0, d0, low, lr_decay, kind, STOCHASTIC)
    b = _updated(x1, d1, low, lr_decay, kind, STOCHASTIC)
    c = _updated(x2, d2, high, lr_decay, kind, STOCHASTIC)
    d = _updated(x3, d3, high, lr_decay, kind, STOCHASTIC)
    _store_four(weight, at, stop, a, b, c, d, MASKED)


@triton.jit
def _quarter(block, step, key0, key1, purpose, quarter: tl.constexpr):
    """One word of a Philox call. The compiler makes the four quarters' equal calls one."""
    a, b, c, d = _philox(block, step, key0, key1, purpose)
    if quarter == 0:
        return a
    elif quarter == 1:
        return b
    elif quarter == 2:
        return c
    else:
        return d


# ---------------------------------------------------------------- kernels

_SCALARS = ["skip", "stop", "block_low", "block_high", "key0", "key1", "step", "direction", "negative"]


@triton.jit
def _unsigned(key0, key1, step):
    return key0.to(tl.uint32, bitcast=True), key1.to(tl.uint32, bitcast=True), step.to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=_SCALARS)
def signs_kernel(
    out, skip, stop, block_low, block_high, key0, key1, step, direction, MASKED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Fills out (fp32) with signs. For the arguments that the kernels share see triton_signs._launch."""
    at, block = _place(skip, block_low, block_high, LANES)
    key0, key1, step = _unsigned(key0, key1, step)
    direction = direction.to(tl.uint32)
    a, b, c, d = _philox(block, step, key0, key1, (direction >> 3) + _SIGNS)
    shift = 31 - (direction & 7)
    _signs_of_four(out, at, stop, a, shift, MASKED)
    _signs_of_four(out, at + 64, stop, b, shift, MASKED)
    _signs_of_four(out, at + 128, stop, c, shift, MASKED)
    _signs_of_four(out, at + 192, stop, d, shift, MASKED)


@triton.jit(do_not_specialize=_SCALARS)
def perturb_signs_kernel(
    out, weight, skip, stop, block_low, block_high, key0, key1, step, direction, negative,
    STOCHASTIC: tl.constexpr, MASKED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """out = weight + scale * z, rounded once to the dtype of ``out``. negative: the bits of -scale, as int32."""
    at, block = _place(skip, block_low, block_high, LANES)
    key0, key1, step = _unsigned(key0, key1, step)
    direction = direction.to(tl.uint32)
    a, b, c, d = _philox(block, step, key0, key1, (direction >> 3) + _SIGNS)
    wa, wb, wc, wd = a, b, c, d
    if STOCHASTIC:
        wa, wb, wc, wd = _philox(block, step, key0, key1, _ROUNDING)
    shift = 31 - (direction & 7)
    negative = negative.to(tl.uint32, bitcast=True)
    _perturb_four(out, weight, at, stop, a, wa, shift, negative, STOCHASTIC, MASKED)
    _perturb_four(out, weight, at + 64, stop, b, wb, shift, negative, STOCHASTIC, MASKED)
    _perturb_four(out, weight, at + 128, stop, c, wc, shift, negative, STOCHASTIC, MASKED)
    _perturb_four(out, weight, at + 192, stop, d, wd, shift, negative, STOCHASTIC, MASKED)


@triton.jit(do_not_specialize=_SCALARS)
def update_signs_kernel(
    weight, table, skip, stop, block_low, block_high, key0, key1, step, lr_decay,
    ROWS: tl.constexpr, STOCHASTIC: tl.constexpr, MASKED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """weight -= d + lr_decay * weight in place; table: ROWS rows of 32 numbers, see types.SignTable."""
    at, block = _place(skip, block_low, block_high, LANES)
    key0, key1, step = _unsigned(key0, key1, step)
    wa, wb, wc, wd = block.to(tl.uint32), block.to(tl.uint32), block.to(tl.uint32), block.to(tl.uint32)
    if STOCHASTIC:
        wa, wb, wc, wd = _philox(block, step, key0, key1, _ROUNDING)
    _update_four(weight, table, at, stop, block, step, key0, key1, wa, lr_decay, 0, ROWS, STOCHASTIC, MASKED)
    _update_four(weight, table, at + 64, stop, block, step, key0, key1, wb, lr_decay, 1, ROWS, STOCHASTIC, MASKED)
    _update_four(weight, table, at + 128, stop, block, step, key0, key1, wc, lr_decay, 2, ROWS, STOCHASTIC, MASKED)
    _update_four(weight, table, at + 192, stop, block, step, key0, key1, wd, lr_decay, 3, ROWS, STOCHASTIC, MASKED)
