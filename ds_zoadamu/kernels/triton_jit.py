"""Device code of the Triton kernels: reference.py, bit for bit, over pairs of flat indices. Host side: triton.py.

One lane computes a pair (2p, 2p + 1): Philox gives four words for two elements. Where the range begins on an even index and
memory is aligned, a pair is one machine word of a tensor (two bf16 in 32 bits, two int8 in 16, two fp32 in 64): lanes that
follow each other read and write words that follow each other, and nothing is ever moved between lanes. Elsewhere (odd start,
odd address, the end) the same code reads and writes the two elements one by one, under masks.

What keeps the bits:
- A compiler that may makes one fma of a multiplication and an addition; the host side forbids it (enable_fp_fusion=False).
- ``/`` and ``tl.sqrt`` are approximate on a GPU; ``tl.div_rn`` and ``tl.sqrt_rn`` are not.
- ``-x`` is 0 - x in Triton and loses the sign of zero: signs are changed by integer operations, or by a product with -1.
- Products with powers of two are exact as long as nothing is subnormal, so constants absorb them (marked "scaled" below).
- bf16 is only ever touched as integers: no bf16 arithmetic unit is needed, and every Triton version and its interpreter agree.

Instructions counted per element are in docs/kernels.md.
"""

import triton
import triton.language as tl

from . import reference

_PHILOX_M0 = tl.constexpr(reference._PHILOX_M0)
_PHILOX_M1 = tl.constexpr(reference._PHILOX_M1)
_PHILOX_W0 = tl.constexpr(reference._PHILOX_W0)
_PHILOX_W1 = tl.constexpr(reference._PHILOX_W1)

# The polynomial of ln in X = x / 2 instead of x, and 4 times as large: see _half_log_uniform.
_P0, _P1, _P2, _P3, _P4, _P5, _P6 = (tl.constexpr(c * 4.0 * 2.0**i) for i, c in enumerate(reference.LN))
_HALF_LN2_AT_BIT_23 = tl.constexpr(reference.LN2 * 2.0**-24)
# sin and cos doubled: the other half of sqrt(-2 ln u) = 2 sqrt(-ln(u) / 2).
_SIN0, _SIN1, _SIN2, _SIN3 = (tl.constexpr(2.0 * c) for c in reference.SIN)
_COS0, _COS1, _COS2 = (tl.constexpr(2.0 * c) for c in reference.COS)


# ---------------------------------------------------------------- noise


@triton.jit
def _philox(pair, step, key0, key1, purpose=0):
    """Philox-4x32-10 of counter (pair, pair >> 32, step, purpose): four uint32 blocks. pair: int64 block; step and keys:
    uint32."""
    c0 = pair.to(tl.uint32)
    c1 = (pair >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + step
    c3 = tl.zeros_like(c0) + purpose
    for _ in tl.static_range(10):
        # One wide product instead of a high and a low one: a single instruction (mul.wide.u32).
        p0 = c0.to(tl.uint64) * _PHILOX_M0
        p1 = c2.to(tl.uint64) * _PHILOX_M1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c3 = p0.to(tl.uint32)
        key0 = key0 + _PHILOX_W0
        key1 = key1 + _PHILOX_W1
    return c0, c1, c2, c3


@triton.jit
def _half_log_uniform(a):
    """-ln(u) / 2 for u = ((a >> 8) + 1) / 2**24, and -0.0 for u = 1: a quarter of what reference.py takes the root of.

    Scaled: with X = x / 2 and Z = X * X = z / 4 every intermediate is half of the reference's, and "z * 0.5" needs no product.
    """
    bits = ((a >> 8) + 1).to(tl.int32).to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits - (0x3F3504F3 + (24 << 23))) & -0x800000  # that of u, still at bit 23
    x = (bits - exponent - (25 << 23)).to(tl.float32, bitcast=True) - 0.5
    z = x * x
    p = _P6 * x + _P5
    p = p * x + _P4
    p = p * x + _P3
    p = p * x + _P2
    p = p * x + _P1
    p = p * x + _P0
    y = x + ((z * x) * p - z)
    return y * -1.0 - exponent.to(tl.float32) * _HALF_LN2_AT_BIT_23


@triton.jit
def _root(x, FAST_ROOT: tl.constexpr):
    """The correctly rounded square root of what _half_log_uniform returns: -0.0, or 2**-26 to 8.4.

    FAST_ROOT: the four operations by which ptxas itself makes sqrt.rn.f32 out of an estimate, on every GPU from sm_75 to
    sm_120, without its test for numbers outside 2**-101 .. 2**128 and the branch that follows it, which cuts the code of a
    lane's elements into pieces that cannot overlap. root_check_kernel tries all 2**24 inputs on the GPU at hand before it is
    used.
    """
    if FAST_ROOT:
        estimate = tl.rsqrt(x)
        root = x * estimate
        root = tl.fma(tl.fma(root * -1.0, root, x), estimate * 0.5, root)
        return tl.where(x == 0.0, x, root)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def root_check_kernel(num_wrong, BLOCK: tl.constexpr):
    """num_wrong[i] = inputs among a >> 8 = i BLOCK, i BLOCK + 1, ... for which FAST_ROOT would change a bit of the root."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = _half_log_uniform(k.to(tl.uint32) << 8)
    wrong = _root(x, True).to(tl.int32, bitcast=True) != _root(x, False).to(tl.int32, bitcast=True)
    tl.store(num_wrong + tl.program_id(0), tl.sum(wrong.to(tl.int32), 0))


@triton.jit
def _normals(a, b, FAST_ROOT: tl.constexpr):
    """(xi1, xi2, w) of one element from its two words: two fp32 blocks and the 16 rounding bits as uint32."""
    radius = _root(_half_log_uniform(a), FAST_ROOT)
    # b >> 8 counts 2**-24 turns. After adding an eighth of a turn, the top two bits are the quadrant and the next 22 bits, as
    # the low bits of a number in [0.5, 0.75), are the distance to it plus 0.625.
    turn = b + 0x20000000
    x = (((turn >> 8) & 0x3FFFFF) | 0x3F000000).to(tl.float32, bitcast=True) - 0.625
    z = x * x
    s = _SIN3 * z + _SIN2
    s = s * z + _SIN1
    s = s * z + _SIN0
    s = x * s
    c = _COS2 * z + _COS1
    c = c * z + _COS0
    c = z * c + 2.0
    swap = (turn & 0x40000000) != 0
    sin = tl.where(swap, c, s).to(tl.uint32, bitcast=True) ^ (turn & 0x80000000)
    cos = tl.where(swap, s, c).to(tl.uint32, bitcast=True) ^ ((turn + 0x40000000) & 0x80000000)
    w = ((a & 0xFF) << 8) | (b & 0xFF)
    return radius * cos.to(tl.float32, bitcast=True), radius * sin.to(tl.float32, bitcast=True), w


@triton.jit
def _recur(m, xi1, xi2, sqrt_alpha, sqrt_rest, beta1, history_weight):
    """One step of ALGORITHM section 1: (m_t, centred, history)."""
    centred = xi1 * sqrt_alpha
    history = m + xi2 * sqrt_rest
    return centred * beta1 + history * history_weight, centred, history


# ---------------------------------------------------------------- memory


@triton.jit
def _load_one(pointers, mask):
    """Elements as fp32; int8 unscaled."""
    kind: tl.constexpr = pointers.dtype.element_ty
    if kind == tl.bfloat16:
        raw = tl.load(pointers.to(tl.pointer_type(tl.uint16), bitcast=True), mask=mask, other=0).to(tl.uint32)
        return (raw << 16).to(tl.float32, bitcast=True)
    else:
        return tl.load(pointers, mask=mask, other=0).to(tl.float32)


@triton.jit
def _load_pairs(base, lane, inside0, inside1, WORDS: tl.constexpr):
    """The two elements of each pair as fp32 blocks. base: pointer to a program's first pair; lane: pairs counted from it."""
    kind: tl.constexpr = base.dtype.element_ty
    if not WORDS:
        return _load_one(base + 2 * lane, inside0), _load_one(base + (2 * lane + 1), inside1)
    elif kind == tl.float32:
        word = tl.load(base.to(tl.pointer_type(tl.uint64), bitcast=True) + lane)
        return word.to(tl.uint32).to(tl.float32, bitcast=True), (word >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
    elif kind == tl.int8:
        word = tl.load(base.to(tl.pointer_type(tl.int16), bitcast=True) + lane).to(tl.int32)
        return ((word << 24) >> 24).to(tl.float32), (word >> 8).to(tl.float32)
    else:
        word = tl.load(base.to(tl.pointer_type(tl.uint32), bitcast=True) + lane)
        if kind == tl.bfloat16:
            return (word << 16).to(tl.float32, bitcast=True), (word & 0xFFFF0000).to(tl.float32, bitcast=True)
        else:
            low, high = word.to(tl.uint16), (word >> 16).to(tl.uint16)
            return low.to(tl.float16, bitcast=True).to(tl.float32), high.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _store_one(pointers, bits, mask):
    """bits: uint32 whose low 8, 16 or 32 bits are the element."""
    width: tl.constexpr = pointers.dtype.element_ty.primitive_bitwidth
    if width == 32:
        tl.store(pointers.to(tl.pointer_type(tl.uint32), bitcast=True), bits, mask=mask)
    elif width == 16:
        tl.store(pointers.to(tl.pointer_type(tl.uint16), bitcast=True), bits.to(tl.uint16), mask=mask)
    else:
        tl.store(pointers.to(tl.pointer_type(tl.uint8), bitcast=True), bits.to(tl.uint8), mask=mask)


@triton.jit
def _store_pairs(base, lane, bits0, bits1, inside0, inside1, WORDS: tl.constexpr):
    """The reverse of _load_pairs, from the elements' bits as uint32 with nothing above them."""
    width: tl.constexpr = base.dtype.element_ty.primitive_bitwidth
    if not WORDS:
        _store_one(base + 2 * lane, bits0, inside0)
        _store_one(base + (2 * lane + 1), bits1, inside1)
    elif width == 32:
        word = bits0.to(tl.uint64) | (bits1.to(tl.uint64) << 32)
        tl.store(base.to(tl.pointer_type(tl.uint64), bitcast=True) + lane, word)
    elif width == 16:
        tl.store(base.to(tl.pointer_type(tl.uint32), bitcast=True) + lane, bits0 | (bits1 << 16))
    else:
        tl.store(base.to(tl.pointer_type(tl.uint16), bitcast=True) + lane, (bits0 | (bits1 << 8)).to(tl.uint16))


# ---------------------------------------------------------------- rounding


@triton.jit
def _round(x, w, kind: tl.constexpr, STOCHASTIC: tl.constexpr):
    """fp32 to the bits of ``kind`` as uint32, as reference.round_to."""
    bits = x.to(tl.uint32, bitcast=True)
    if kind == tl.float32:
        return bits
    elif kind == tl.bfloat16:
        if not STOCHASTIC:
            w = 0x7FFF + ((bits >> 16) & 1)
        # The sum cannot reach the sign of a number or an infinity, only that of a NaN (a GPU's is 0x7fffffff).
        return tl.where(x != x, 0x7FC00000, bits + w) >> 16
    elif not STOCHASTIC:
        return x.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    else:
        magnitude = (bits & 0x7FFFFFFF).to(tl.int32)
        exponent = magnitude >> 23
        # Below 2**-14 the spacing of fp16 no longer shrinks. A subnormal x is shifted out whether or not it gets a leading one.
        drop = tl.minimum(tl.maximum(113 - exponent, 0), 31)
        fixed = ((((magnitude & 0x7FFFFF) | 0x800000) << 3) >> drop) + w.to(tl.int32)
        half = tl.minimum(((tl.maximum(exponent, 113) - 113) << 10) + (fixed >> 16), 0x7C00)
        half = tl.where(magnitude > 0x7F800000, 0x7E00, half)
        return half.to(tl.uint32) | ((bits >> 16) & 0x8000)


@triton.jit
def _round_momentum(m, w, encode, kind: tl.constexpr):
    """m_t to the bits that are stored, always stochastically. encode: units of int8 per value, times 2**16 (scaled)."""
    if kind == tl.int8:
        unit = tl.minimum((m.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.float32, bitcast=True) * encode, 127.0 * 65536.0)
        q = (unit.to(tl.int32) + w.to(tl.int32)) >> 16
        return tl.where(m < 0.0, 0 - q, q).to(tl.uint32) & 0xFF
    else:
        return _round(m, w, kind, True)


# ---------------------------------------------------------------- the direction m_t of one block


@triton.jit
def _advance(
    momentum, base, lane, inside0, inside1, pair, table, num_older, step, key0, key1,
    sqrt_alpha, sqrt_rest, beta1, history_weight, decode,
    WORDS: tl.constexpr, REPLAY: tl.constexpr, FAST_ROOT: tl.constexpr,
):  # fmt: skip
    """(m_t, centred, history, w) of both elements of each pair: reference.advance without v, which only an update needs.

    table: int32, ``num_older`` rows of 8 for the steps before the last one (step, then fp32 bits of sqrt_alpha,
    sqrt_one_minus_alpha, beta1, one_minus_beta1).
    """
    if momentum is None:
        m0 = tl.zeros_like(lane).to(tl.float32)
        m1 = m0
    else:
        m0, m1 = _load_pairs(momentum + base, lane, inside0, inside1, WORDS)
        if momentum.dtype.element_ty == tl.int8:
            m0, m1 = m0 * decode, m1 * decode
    if REPLAY:
        i = 0
        while i < num_older:  # not range(): with numpy >= 2.4 the interpreter cannot make an int of its scalars
            row = table + i * 8
            a0, b0, a1, b1 = _philox(pair, tl.load(row).to(tl.uint32, bitcast=True), key0, key1)
            old1 = tl.load(row + 1).to(tl.float32, bitcast=True)
            old2 = tl.load(row + 2).to(tl.float32, bitcast=True)
            old3 = tl.load(row + 3).to(tl.float32, bitcast=True)
            old4 = tl.load(row + 4).to(tl.float32, bitcast=True)
            xi1, xi2, _ = _normals(a0, b0, FAST_ROOT)
            m0, _, _ = _recur(m0, xi1, xi2, old1, old2, old3, old4)
            xi1, xi2, _ = _normals(a1, b1, FAST_ROOT)
            m1, _, _ = _recur(m1, xi1, xi2, old1, old2, old3, old4)
            i += 1
    a0, b0, a1, b1 = _philox(pair, step, key0, key1)
    xi1, xi2, w0 = _normals(a0, b0, FAST_ROOT)
    m0, c0, h0 = _recur(m0, xi1, xi2, sqrt_alpha, sqrt_rest, beta1, history_weight)
    xi1, xi2, w1 = _normals(a1, b1, FAST_ROOT)
    m1, c1, h1 = _recur(m1, xi1, xi2, sqrt_alpha, sqrt_rest, beta1, history_weight)
    return m0, c0, h0, w0, m1, c1, h1, w1


@triton.jit
def _noise_chunk(
    base, lane, inside0, inside1, pair, xi1, xi2, key0, key1, step, WORDS: tl.constexpr, FAST_ROOT: tl.constexpr,
):  # fmt: skip
    a0, b0, a1, b1 = _philox(pair, step.to(tl.uint32, bitcast=True), key0, key1)
    x0, y0, _ = _normals(a0, b0, FAST_ROOT)
    x1, y1, _ = _normals(a1, b1, FAST_ROOT)
    x0, x1 = x0.to(tl.uint32, bitcast=True), x1.to(tl.uint32, bitcast=True)
    y0, y1 = y0.to(tl.uint32, bitcast=True), y1.to(tl.uint32, bitcast=True)
    _store_pairs(xi1 + base, lane, x0, x1, inside0, inside1, WORDS)
    _store_pairs(xi2 + base, lane, y0, y1, inside0, inside1, WORDS)


@triton.jit
def _perturb_chunk(
    base, lane, inside0, inside1, pair, out, weight, momentum, table, key0, key1, num_older, step,
    sqrt_alpha, sqrt_rest, beta1, history_weight, decode, scale,
    WORDS: tl.constexpr, STOCHASTIC: tl.constexpr, FLIP: tl.constexpr, REPLAY: tl.constexpr, FAST_ROOT: tl.constexpr,
):  # fmt: skip
    x0, x1 = _load_pairs(weight + base, lane, inside0, inside1, WORDS)
    m0, _, _, w0, m1, _, _, w1 = _advance(
        momentum, base, lane, inside0, inside1, pair, table, num_older, step.to(tl.uint32, bitcast=True), key0, key1,
        sqrt_alpha, sqrt_rest, beta1, history_weight, decode, WORDS, REPLAY, FAST_ROOT,
    )  # fmt: skip
    if FLIP:  # the other sign's random bits, mirrored
        w0, w1 = w0 ^ 0xFFFF, w1 ^ 0xFFFF
    kind: tl.constexpr = out.dtype.element_ty
    y0 = _round(x0 + m0 * scale, w0, kind, STOCHASTIC)
    y1 = _round(x1 + m1 * scale, w1, kind, STOCHASTIC)
    _store_pairs(out + base, lane, y0, y1, inside0, inside1, WORDS)


@triton.jit
def _updated(x, m, centred, history, beta2, history2_weight, lr_grad, lr_decay, sigma, NORMALIZE: tl.constexpr):
    """The new weight in fp32."""
    g = m
    if NORMALIZE:
        v = (centred * centred) * beta2 + (history * history) * history2_weight
        g = tl.div_rn(m, tl.sqrt_rn(v + sigma))
    return x - (g * lr_grad + x * lr_decay)


@triton.jit
def _update_chunk(
    base, lane, inside0, inside1, pair, weight, momentum, table, key0, key1, num_older, step,
    sqrt_alpha, sqrt_rest, beta1, history_weight, beta2, history2_weight, decode, encode, lr_grad, lr_decay, sigma,
    WORDS: tl.constexpr, STOCHASTIC: tl.constexpr, NORMALIZE: tl.constexpr, WRITE_WEIGHT: tl.constexpr, REPLAY: tl.constexpr,
    FAST_ROOT: tl.constexpr,
):  # fmt: skip
    m0, c0, h0, w0, m1, c1, h1, w1 = _advance(
        momentum, base, lane, inside0, inside1, pair, table, num_older, step.to(tl.uint32, bitcast=True), key0, key1,
        sqrt_alpha, sqrt_rest, beta1, history_weight, decode, WORDS, REPLAY, FAST_ROOT,
    )  # fmt: skip
    if WRITE_WEIGHT:
        kind: tl.constexpr = weight.dtype.element_ty
        x0, x1 = _load_pairs(weight + base, lane, inside0, inside1, WORDS)
        x0 = _updated(x0, m0, c0, h0, beta2, history2_weight, lr_grad, lr_decay, sigma, NORMALIZE)
        x1 = _updated(x1, m1, c1, h1, beta2, history2_weight, lr_grad, lr_decay, sigma, NORMALIZE)
        x0, x1 = _round(x0, w0, kind, STOCHASTIC), _round(x1, w1, kind, STOCHASTIC)
        _store_pairs(weight + base, lane, x0, x1, inside0, inside1, WORDS)
    if momentum is not None:
        stored: tl.constexpr = momentum.dtype.element_ty
        q0, q1 = _round_momentum(m0, w0, encode * 65536.0, stored), _round_momentum(m1, w1, encode * 65536.0, stored)
        _store_pairs(momentum + base, lane, q0, q1, inside0, inside1, WORDS)


# ---------------------------------------------------------------- kernels
#
# A program takes CHUNKS chunks of BLOCK pairs, one pair a lane and chunk, in straight code, so that their arithmetic overlaps.
# WORDS: every pair of every program is inside and aligned. Else elements are masked: with an odd start (ODD = 1) the even
# element of the very first pair lies before the range, and the last program, number ``num_full``, has only ``tail`` elements,
# counted from the even one of its first pair.


@triton.jit
def _place(pair_low, pair_high, key0, key1, ODD: tl.constexpr, SPAN: tl.constexpr):
    """Where a program of SPAN pairs begins in the tensors and its first pair, both int64; the key as uint32."""
    program = tl.program_id(0).to(tl.int64)
    pair = (pair_low.to(tl.uint32, bitcast=True).to(tl.int64) | (pair_high.to(tl.int64) << 32)) + program * SPAN
    return program * (2 * SPAN) - ODD, pair, key0.to(tl.uint32, bitcast=True), key1.to(tl.uint32, bitcast=True)


@triton.jit
def _inside(lane, num_full, tail, ODD: tl.constexpr, WORDS: tl.constexpr, SPAN: tl.constexpr):
    """Which first and which second elements of pairs exist; ``lane`` counts pairs from the program's first one on."""
    if WORDS:
        return True, True
    else:
        program = tl.program_id(0)
        begin = tl.where(program == 0, ODD, 0)
        stop = tl.where(program < num_full, 2 * SPAN, tail)
        return (2 * lane >= begin) & (2 * lane < stop), 2 * lane + 1 < stop


_NOISE_SCALARS = ["num_full", "tail", "pair_low", "pair_high", "key0", "key1", "step"]
_SCALARS = [*_NOISE_SCALARS, "num_older"]  # they change from call to call and must not make new variants of a kernel


@triton.jit(do_not_specialize=_NOISE_SCALARS)
def noise_kernel(
    xi1, xi2, num_full, tail, pair_low, pair_high, key0, key1, step,
    ODD: tl.constexpr, WORDS: tl.constexpr, FAST_ROOT: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Fills xi1 and xi2 (fp32). For the arguments that all three kernels share see triton._parts and _direction_arguments."""
    base, pair, key0, key1 = _place(pair_low, pair_high, key0, key1, ODD, CHUNKS * BLOCK)
    for i in tl.static_range(CHUNKS):
        lane = i * BLOCK + tl.arange(0, BLOCK)
        inside0, inside1 = _inside(lane, num_full, tail, ODD, WORDS, CHUNKS * BLOCK)
        _noise_chunk(base, lane, inside0, inside1, pair + lane, xi1, xi2, key0, key1, step, WORDS, FAST_ROOT)


@triton.jit(do_not_specialize=_SCALARS)
def perturb_kernel(
    out, weight, momentum, table, num_full, tail, pair_low, pair_high, key0, key1, num_older, step,
    sqrt_alpha, sqrt_rest, beta1, history_weight, decode, scale,
    ODD: tl.constexpr, WORDS: tl.constexpr, STOCHASTIC: tl.constexpr, FLIP: tl.constexpr, REPLAY: tl.constexpr,
    FAST_ROOT: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """out = weight + scale * m_t, rounded once to the dtype of ``out``."""
    base, pair, key0, key1 = _place(pair_low, pair_high, key0, key1, ODD, CHUNKS * BLOCK)
    for i in tl.static_range(CHUNKS):
        lane = i * BLOCK + tl.arange(0, BLOCK)
        inside0, inside1 = _inside(lane, num_full, tail, ODD, WORDS, CHUNKS * BLOCK)
        _perturb_chunk(
            base, lane, inside0, inside1, pair + lane, out, weight, momentum, table, key0, key1, num_older, step,
            sqrt_alpha, sqrt_rest, beta1, history_weight, decode, scale, WORDS, STOCHASTIC, FLIP, REPLAY, FAST_ROOT,
        )  # fmt: skip


@triton.jit(do_not_specialize=_SCALARS)
def update_kernel(
    weight, momentum, table, num_full, tail, pair_low, pair_high, key0, key1, num_older, step,
    sqrt_alpha, sqrt_rest, beta1, history_weight, beta2, history2_weight, decode, encode, lr_grad, lr_decay, sigma,
    ODD: tl.constexpr, WORDS: tl.constexpr, STOCHASTIC: tl.constexpr, NORMALIZE: tl.constexpr, WRITE_WEIGHT: tl.constexpr,
    REPLAY: tl.constexpr, FAST_ROOT: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """weight -= lr_grad * d + lr_decay * weight where WRITE_WEIGHT, momentum = m_t where there is one; in place."""
    base, pair, key0, key1 = _place(pair_low, pair_high, key0, key1, ODD, CHUNKS * BLOCK)
    for i in tl.static_range(CHUNKS):
        lane = i * BLOCK + tl.arange(0, BLOCK)
        inside0, inside1 = _inside(lane, num_full, tail, ODD, WORDS, CHUNKS * BLOCK)
        _update_chunk(
            base, lane, inside0, inside1, pair + lane, weight, momentum, table, key0, key1, num_older, step,
            sqrt_alpha, sqrt_rest, beta1, history_weight, beta2, history2_weight, decode, encode, lr_grad, lr_decay, sigma,
            WORDS, STOCHASTIC, NORMALIZE, WRITE_WEIGHT, REPLAY, FAST_ROOT,
        )  # fmt: skip
