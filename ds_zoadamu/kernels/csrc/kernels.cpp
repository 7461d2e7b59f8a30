// The kernels on one range of flat indices. Compiled once for each instruction set, with ZO_NAMESPACE and its flags.
//
// Same bits as kernels/reference.py: the same fp32 operations in the same order, each rounded once (-ffp-contract=off). What is
// done differently is exact: integer steps, and powers of two that are moved into constants. Nothing here may overflow or become
// subnormal through such a move; the comments say which power.
#include "job.h"
#include "simd.h"

namespace ZO_NAMESPACE {
namespace {

constexpr uint32_t SIGN = 0x80000000u;

// ---------------------------------------------------------------- noise

struct NoiseWords {
    Words first, second;
};

// Philox-4x32-10 for the counters (pair, hi, step, 0) of LANES consecutive pairs, the first one in the lowest lane of `pair`, which
// holds every second of them in 64-bit lanes. hi, step and 0 are the same in all lanes, so in rounds 1 and 2 one product of
// two is a scalar and was prepared.
INLINE NoiseWords philox(U64 pair, const PhiloxKeys &keys, const PreparedStep &step) {
    const U64 m0 = splat64(PHILOX_M0), m1 = splat64(PHILOX_M1);
    U64 c0[2], c1[2], c2[2], c3[2];
    NoiseWords words;
    // Only the lower half of each 64-bit lane is a word; the upper one may hold anything.
    for (int half = 0; half < 2; ++half) {
        const U64 p0 = multiply_low_halves(pair + half, m0);
        const U64 p1 = multiply_low_halves((p0 >> 32) ^ keys.k1[0], m1);
        c0[half] = multiply_low_halves((p1 >> 32) ^ step.round2_c0, m0);
        c1[half] = p1;
        c2[half] = multiply_low_halves(p0 ^ step.round2_c2, m1);
        // Round 3, whose c3 is a scalar, inside round3_c2.
        const U64 q0 = c0[half], q1 = c2[half];
        c0[half] = xor3(q1 >> 32, c1[half], splat64(keys.k0[2]));
        c1[half] = q1;
        c2[half] = (q0 >> 32) ^ step.round3_c2;
        c3[half] = q0;
        for (int round = 3; round < PHILOX_ROUNDS - 1; ++round) {
            const U64 r0 = multiply_low_halves(c0[half], m0), r1 = multiply_low_halves(c2[half], m1);
            c0[half] = xor3(r1 >> 32, c1[half], splat64(keys.k0[round]));
            c1[half] = r1;
            c2[half] = xor3(r0 >> 32, c3[half], splat64(keys.k1[round]));
            c3[half] = r0;
        }
    }
    // The last round brings the two halves together: from here on LANES words of 32 bits.
    const int last = PHILOX_ROUNDS - 1;
    const U64 a0 = multiply_low_halves(c0[0], m0), a1 = multiply_low_halves(c2[0], m1);
    const U64 b0 = multiply_low_halves(c0[1], m0), b1 = multiply_low_halves(c2[1], m1);
    words.first.even = xor3(merge_high_halves(a1, b1), merge_low_halves(c1[0], c1[1]), splat(keys.k0[last]));
    words.second.even = merge_low_halves(a1, b1);
    words.first.odd = xor3(merge_high_halves(a0, b0), merge_low_halves(c3[0], c3[1]), splat(keys.k1[last]));
    words.second.odd = merge_low_halves(a0, b0);
    return words;
}

template <int N>
INLINE F horner(F x, const float (&coefficients)[N]) {
    F y = splat(coefficients[N - 1]);
    for (int i = N - 2; i >= 0; --i) y = y * x + coefficients[i];
    return y;
}

// reference.LN[i] * 4 * 2**i: the polynomial in X = x / 2, times 4.
constexpr float LN[] = {
    4 * (float)0.33333910739474715, -8 * (float)0.2500133703612675,  16 * (float)0.1996306369765443,
    -32 * (float)0.16577584768039144, 64 * (float)0.1491476922230497, -128 * (float)0.142674862162767,
    256 * (float)0.08700430572319383,
};
constexpr float LN2 = (float)0.6931471805599453;
// Twice reference.SIN and reference.COS.
constexpr float SIN[] = {2 * (float)6.283185286831602, -2 * (float)41.34166145180527, 2 * (float)81.59235285906625,
                         -2 * (float)75.39352615623254};
constexpr float COS[] = {-2 * (float)19.739167260427685, 2 * (float)64.92322781824248, -2 * (float)83.66587381045879};

// sqrt(-ln(u) / 2), half the radius, for u = ((a >> 8) + 1) / 2**24. All is a quarter of the reference's -2 ln u.
INLINE F half_radius(U a) {
    const I u = (I)to_float((I)(a >> 8) + 1);
    const I t = u - (0x3F3504F3 + (24 << 23));
    const F exponent = to_float(t >> 23);
    const F x = (F)((t & 0x7FFFFF) + (0x3F3504F3 - (1 << 23))) - 0.5f;
    const F z = x * x;
    const F half_y = x + ((z * x) * horner(x, LN) - z);
    return square_root(exponent * (-0.5f * LN2) - half_y);  // u = 1 gives -0 - 0 = -0, as the reference's 0 * -2
}

struct SinCos {
    F sin, cos;
};

// Twice the (sin, cos) of 2 pi (b >> 8) / 2**24.
INLINE SinCos twice_sincos(U b) {
    // Bits 8 to 29 of b are the signed distance from the nearest quarter turn: as a mantissa, offset by half its range.
    const F x = (F)and_xor(b >> 7, splat(0x7FFFFEu), splat(0x3EC00000u)) - 0.375f;
    const F z = x * x;
    const F s = x * horner(z, SIN), c = z * horner(z, COS) + 2.0f;
    const U quadrant = b + 0x20000000u;  // bits 30 and 31
    const I swap = (quadrant & 0x40000000u) != 0;
    const U sin = (U)(swap ? c : s), cos = (U)(swap ? s : c);
    return {(F)and_xor(quadrant, splat(SIGN), sin), (F)and_xor(b + 0x60000000u, splat(SIGN), cos)};
}

struct Noise {
    Floats xi1, xi2;
};

INLINE Noise box_muller(const NoiseWords &words) {
    const F radius_even = half_radius(words.first.even), radius_odd = half_radius(words.first.odd);
    const SinCos even = twice_sincos(words.second.even), odd = twice_sincos(words.second.odd);
    return {{radius_even * even.cos, radius_odd * odd.cos}, {radius_even * even.sin, radius_odd * odd.sin}};
}

// 16 random bits an element, for rounding.
INLINE Words rounding_bits(const NoiseWords &words, bool flip) {
    const U mask = splat(0xFFu), flip_mask = splat(flip ? 0xFFFFu : 0u);
    const U even = select_bits(mask, words.second.even, words.first.even << 8);
    const U odd = select_bits(mask, words.second.odd, words.first.odd << 8);
    return {and_xor(even, splat(0xFFFFu), flip_mask), and_xor(odd, splat(0xFFFFu), flip_mask)};
}

// ---------------------------------------------------------------- elements in memory

constexpr int size_of(int32_t dtype) { return dtype == FP32 ? 4 : dtype == INT8 ? 1 : dtype == NONE ? 0 : 2; }

#if !defined(ZO_AVX512) && !defined(ZO_AVX2)
INLINE F fp16_to_float(U h) {
    const U magnitude = h & 0x7FFFu;
    const F finite = (F)(magnitude << 13) * 0x1p112f;  // exact, and right for subnormal numbers
    const U special = (U)(magnitude >= 0x7C00u) & 0x7F800000u;
    return (F)((U)finite | special | (h & 0x8000u) << 16);
}

INLINE U fp16_nearest(F x) {
    const U bits = (U)x, magnitude = bits & ~SIGN;
    const U normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    const U subnormal = (U)((F)magnitude + 0.5f) - (U)splat(0.5f);  // the sum's last bit is worth 2**-24
    U half = magnitude < (113u << 23) ? subnormal : normal;
    half = half > 0x7C00u ? splat(0x7C00u) : half;
    half = magnitude > 0x7F800000u ? splat(0x7E00u) : half;
    return half | ((bits >> 16) & 0x8000u);
}
#endif

INLINE Floats load_fp16(const char *p) {
#if defined(ZO_AVX512)
    return deinterleave((F)_mm512_cvtph_ps(load<__m256i>(p)), (F)_mm512_cvtph_ps(load<__m256i>(p + 2 * LANES)));
#elif defined(ZO_AVX2)
    return deinterleave((F)_mm256_cvtph_ps(load<__m128i>(p)), (F)_mm256_cvtph_ps(load<__m128i>(p + 2 * LANES)));
#else
    const U v = load<U>(p);
    return {fp16_to_float(v & 0xFFFFu), fp16_to_float(v >> 16)};
#endif
}

INLINE void store_fp16_nearest(char *p, Floats x) {
#if defined(ZO_AVX512)
    const LowHigh y = interleave(x);
    store(p, _mm512_cvtps_ph((__m512)y.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    store(p + 2 * LANES, _mm512_cvtps_ph((__m512)y.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(ZO_AVX2)
    const LowHigh y = interleave(x);
    store(p, _mm256_cvtps_ph((__m256)y.low, _MM_FROUND_TO_NEAREST_INT));
    store(p + 2 * LANES, _mm256_cvtps_ph((__m256)y.high, _MM_FROUND_TO_NEAREST_INT));
#else
    store(p, fp16_nearest(x.even) | fp16_nearest(x.odd) << 16);
#endif
}

// Loads a block as fp32. INT8 gives the integers, not yet scaled.
INLINE Floats load_block(int32_t dtype, const char *p) {
    switch (dtype) {
        case FP32:
            return deinterleave(load<F>(p), load<F>(p + 4 * LANES));
        case BF16: {
            const U v = load<U>(p);
            return {(F)(v << 16), (F)(v & 0xFFFF0000u)};
        }
        case FP16:
            return load_fp16(p);
        case INT8: {
            const I v = (I)__builtin_convertvector(load<U16>(p), U);
            return {to_float((v << 24) >> 24), to_float((v << 16) >> 24)};
        }
        default:
            return {F{}, F{}};
    }
}

// The stochastic rounding of reference.round_to, as bits in the lower half: floor(|x| in spacings, in 16-bit fixed point, + w).
INLINE U fp16_stochastic(F x, U w) {
    const U bits = (U)x, magnitude = bits & ~SIGN;
    // Normal numbers drop 13 bits, so the lowest 3 of w cannot matter.
    const U normal = (magnitude - (112u << 23) + (w >> 3)) >> 13;
    // Below 2**-14 the spacing is 2**-24. The lanes above it are not used: their conversion may be out of range.
    const U subnormal = ((U)truncate((F)magnitude * 0x1p40f) + w) >> 16;
    U half = magnitude < (113u << 23) ? subnormal : normal;
    half = half > 0x7C00u ? splat(0x7C00u) : half;
    half = magnitude > 0x7F800000u ? splat(0x7E00u) : half;
    return half | ((bits >> 16) & 0x8000u);
}

// Adding w to the bits cannot carry into the sign unless x is NaN. A NaN out of an operation is quiet, so it outlives the cut.
INLINE U bf16_stochastic(F x, U w) { return (U)x + (x == x ? w : U{}); }
INLINE U bf16_nearest(F x) { return (U)x + (x == x ? (((U)x >> 16) & 1u) + 0x7FFFu : U{}); }

INLINE void store_bf16(char *p, U even, U odd) { store(p, (even >> 16) | (odd & 0xFFFF0000u)); }

// Rounds a block of results of operations (so its NaNs are quiet) to dtype, as reference.round_to does.
INLINE void store_block(int32_t dtype, bool stochastic, char *p, Floats x, const NoiseWords &words, bool flip) {
    if (dtype == FP32) {
        const LowHigh y = interleave(x);
        store(p, y.low);
        store(p + 4 * LANES, y.high);
    } else if (dtype == BF16) {
        if (stochastic) {
            const Words w = rounding_bits(words, flip);
            store_bf16(p, bf16_stochastic(x.even, w.even), bf16_stochastic(x.odd, w.odd));
        } else {
            store_bf16(p, bf16_nearest(x.even), bf16_nearest(x.odd));
        }
    } else {
        if (stochastic) {
            const Words w = rounding_bits(words, flip);
            store(p, fp16_stochastic(x.even, w.even) | fp16_stochastic(x.odd, w.odd) << 16);
        } else {
            store_fp16_nearest(p, x);
        }
    }
}

INLINE I int8_stochastic(F m, U w, float encode_scale) {
    const F magnitude = (F)((U)m & ~SIGN) * encode_scale;
    const F clamped = magnitude > 127.0f ? splat(127.0f) : magnitude;
    I q = (I)((U)truncate(clamped * 65536.0f) + w) >> 16;
    q = q < -127 ? (I)splat((uint32_t)-127) : q;  // out of a NaN
    return m < 0.0f ? -q : q;
}

INLINE void store_momentum(const Job &job, char *p, Floats m, const NoiseWords &words) {
    if (job.momentum_dtype != INT8) return store_block(job.momentum_dtype, true, p, m, words, false);
    const Words w = rounding_bits(words, false);
    const I even = int8_stochastic(m.even, w.even, job.encode_scale), odd = int8_stochastic(m.odd, w.odd, job.encode_scale);
    store(p, __builtin_convertvector(((U)even & 0xFFu) | ((U)odd & 0xFFu) << 8, U16));
}

// ---------------------------------------------------------------- the three operations on one block

struct Advanced {
    Floats m, centred, history;
    NoiseWords words;
};

INLINE Advanced advance(const Job &job, const PhiloxKeys &keys, const PreparedStep *steps, U64 pair, const char *momentum) {
    Advanced a;
    a.m = load_block(job.momentum_dtype, momentum);
    if (job.momentum_dtype == INT8) {
        a.m.even = a.m.even * job.decode_scale;
        a.m.odd = a.m.odd * job.decode_scale;
    }
    const PreparedStep *step = steps, *const end = steps + job.num_steps;
    do {
        const Step &c = step->scalars;
        a.words = philox(pair, keys, *step);
        const Noise xi = box_muller(a.words);
        a.centred.even = xi.xi1.even * c.sqrt_alpha;
        a.centred.odd = xi.xi1.odd * c.sqrt_alpha;
        a.history.even = a.m.even + xi.xi2.even * c.sqrt_one_minus_alpha;
        a.history.odd = a.m.odd + xi.xi2.odd * c.sqrt_one_minus_alpha;
        a.m.even = a.centred.even * c.beta1 + a.history.even * c.one_minus_beta1;
        a.m.odd = a.centred.odd * c.beta1 + a.history.odd * c.one_minus_beta1;
    } while (++step != end);
    return a;
}

INLINE F normalized(F m, F centred, F history, const Step &c, float sigma) {
    const F v = (centred * centred) * c.beta2 + (history * history) * c.one_minus_beta2;
    return m / square_root(v + sigma);
}

INLINE F updated(F x, F d, const Job &job) { return x - (d * job.lr_grad + x * job.lr_decay); }

struct Pointers {
    char *out, *weight, *momentum;
};

INLINE void noise_block(const PhiloxKeys &keys, const PreparedStep *steps, U64 pair, Pointers p) {
    const Noise xi = box_muller(philox(pair, keys, *steps));
    const LowHigh xi1 = interleave(xi.xi1), xi2 = interleave(xi.xi2);
    store(p.out, xi1.low);
    store(p.out + 4 * LANES, xi1.high);
    store(p.weight, xi2.low);
    store(p.weight + 4 * LANES, xi2.high);
}

INLINE void perturb_block(const Job &job, const PhiloxKeys &keys, const PreparedStep *steps, U64 pair, Pointers p) {
    const Advanced a = advance(job, keys, steps, pair, p.momentum);
    Floats x = load_block(job.weight_dtype, p.weight);
    x.even = x.even + a.m.even * job.scale;
    x.odd = x.odd + a.m.odd * job.scale;
    store_block(job.out_dtype, job.rounding == STOCHASTIC, p.out, x, a.words, job.flip_bits);
}

INLINE void update_block(const Job &job, const PhiloxKeys &keys, const PreparedStep *steps, U64 pair, Pointers p) {
    const Advanced a = advance(job, keys, steps, pair, p.momentum);
    if (job.write_weight) {
        const Step &c = steps[job.num_steps - 1].scalars;
        Floats d = a.m;
        if (job.normalize) {
            d.even = normalized(a.m.even, a.centred.even, a.history.even, c, job.sigma);
            d.odd = normalized(a.m.odd, a.centred.odd, a.history.odd, c, job.sigma);
        }
        Floats x = load_block(job.weight_dtype, p.weight);
        x.even = updated(x.even, d.even, job);
        x.odd = updated(x.odd, d.odd, job);
        store_block(job.weight_dtype, job.rounding == STOCHASTIC, p.weight, x, a.words, false);
    }
    if (job.momentum_dtype != NONE) store_momentum(job, p.momentum, a.m, a.words);
}

// ---------------------------------------------------------------- a range of blocks

// A block that sticks out of the range at its head or tail, copied to where whole vectors may be read and written.
struct Stage {
    alignas(64) char out[4 * BLOCK], weight[4 * BLOCK], momentum[4 * BLOCK];
};

template <void (*Block)(const Job &, const PhiloxKeys &, const PreparedStep *, U64, Pointers)>
INLINE void for_blocks(const Job &job, const PhiloxKeys &keys, const PreparedStep *steps, uint64_t lo, uint64_t hi) {
    const int out_size = size_of(job.out_dtype), weight_size = size_of(job.weight_dtype);
    const int momentum_size = size_of(job.momentum_dtype);
    U64 pair = {};
    for (int lane = 0; lane < LANES / 2; ++lane) pair[lane] = 2 * lane;
    Stage stage = {};
    // Blocks are aligned in the flat index: none has pairs on both sides of a multiple of 2**32.
    for (uint64_t block = lo & ~(uint64_t)(BLOCK - 1); block < hi; block += BLOCK) {
        const U64 counters = pair + splat64((block >> 1) & 0xFFFFFFFFu);
        const uint64_t first = block < lo ? lo : block, last = hi - block < BLOCK ? hi : block + BLOCK;
        const uint64_t at = first - job.start, n = last - first;
        const Pointers p = {job.out + at * out_size, job.weight + at * weight_size, job.momentum + at * momentum_size};
        if (__builtin_expect(n == BLOCK, 1)) {
            Block(job, keys, steps, counters, p);
            continue;
        }
        const uint64_t skip = first - block;
        const Pointers q = {stage.out + skip * out_size, stage.weight + skip * weight_size, stage.momentum + skip * momentum_size};
        __builtin_memcpy(q.weight, p.weight, n * weight_size);
        if (momentum_size) __builtin_memcpy(q.momentum, p.momentum, n * momentum_size);
        Block(job, keys, steps, counters, {stage.out, stage.weight, stage.momentum});
        if (out_size) __builtin_memcpy(p.out, q.out, n * out_size);
        if (job.operation == NOISE || (job.operation == UPDATE && job.write_weight)) __builtin_memcpy(p.weight, q.weight, n * weight_size);
        if (momentum_size && job.operation == UPDATE) __builtin_memcpy(p.momentum, q.momentum, n * momentum_size);
    }
}

INLINE void noise_block_of(const Job &, const PhiloxKeys &keys, const PreparedStep *steps, U64 pair, Pointers p) {
    noise_block(keys, steps, pair, p);
}

}  // namespace

void run_range(const Job &job, const PhiloxKeys &keys, const PreparedStep *steps, uint64_t lo, uint64_t hi) {
    if (job.operation == NOISE) return for_blocks<noise_block_of>(job, keys, steps, lo, hi);
    if (job.operation == PERTURB) return for_blocks<perturb_block>(job, keys, steps, lo, hi);
    for_blocks<update_block>(job, keys, steps, lo, hi);
}

}  // namespace ZO_NAMESPACE
