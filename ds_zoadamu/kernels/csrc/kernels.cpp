// The kernels on one range of flat indices. Compiled once for each instruction set, with ZO_NAMESPACE and its flags.
//
// Same bits as kernels/reference.py: the same fp32 operations in the same order, each rounded once (-ffp-contract=off). What is
// done differently is exact: integer steps, and powers of two that are moved into constants. Nothing may overflow or become
// subnormal through such a move; the comments say which power.
//
// A range is worked on tile by tile, and each stage (Philox; Box-Muller and the recurrence; reading and writing of each tensor)
// is a short loop over the tile, whose arrays stay in the first-level cache. The arithmetic units are what limits the speed,
// and loads and stores between the stages do not need them. In one long loop over everything they would wait for results: the
// processor looks only some hundred instructions ahead.
#include "noise.h"

namespace ZO_NAMESPACE {
namespace {

// ---------------------------------------------------------------- elements in memory

constexpr int size_of(int dtype) { return dtype == FP32 ? 4 : dtype == INT8 ? 1 : dtype == NONE ? 0 : 2; }

#if !defined(ZO_AVX512) && !defined(ZO_AVX2)
INLINE F fp16_to_float(U h) {
    const U magnitude = h & 0x7FFFu;
    const F finite = (F)(magnitude << 13) * 0x1p112f;  // exact, and right for subnormal numbers
    const U special = (U)((I)magnitude >= 0x7C00) & 0x7F800000u;
    return (F)((U)finite | special | (h & 0x8000u) << 16);
}

INLINE U fp16_nearest(F x) {
    const U bits = (U)x, magnitude = bits & ~SIGN;
    const U normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    const U subnormal = (U)((F)magnitude + 0.5f) - (U)splat(0.5f);  // the sum's last bit is worth 2**-24
    U half = (I)magnitude < (113 << 23) ? subnormal : normal;
    half = (I)half > 0x7C00 ? splat(0x7C00u) : half;
    half = (I)magnitude > 0x7F800000 ? splat(0x7E00u) : half;
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
template <int DTYPE>
INLINE Floats load_block(const char *p) {
    if constexpr (DTYPE == FP32) {
        return deinterleave(load<F>(p), load<F>(p + 4 * LANES));
    } else if constexpr (DTYPE == BF16) {
        const U v = load<U>(p);
        return {(F)(v << 16), (F)(v & 0xFFFF0000u)};
    } else if constexpr (DTYPE == FP16) {
        return load_fp16(p);
    } else {
        const I v = (I)__builtin_convertvector(load<U16>(p), U);
        return {to_float((v << 24) >> 24), to_float((v << 16) >> 24)};
    }
}

// 16 random bits an element, for rounding: the low 8 of its two words. flip: 0, or 0xFFFF for the complement.
INLINE U rounding_bits(U first, U second, U flip) {
    return and_xor(select_bits(splat(0xFFu), second, first << 8), splat(0xFFFFu), flip);
}

// The stochastic rounding of reference.round_to, as bits in the lower half: floor(|x| in spacings, in 16-bit fixed point, + w).
INLINE U fp16_stochastic(F x, U w) {
    const U bits = (U)x, magnitude = bits & ~SIGN;
    // Normal numbers drop 13 bits, so the lowest 3 of w cannot matter.
    const U normal = (magnitude - (112u << 23) + (w >> 3)) >> 13;
    // Below 2**-14 the spacing is 2**-24. The lanes above it are not used: their conversion may be out of range.
    const U subnormal = ((U)truncate((F)magnitude * 0x1p40f) + w) >> 16;
    U half = (I)magnitude < (113 << 23) ? subnormal : normal;
    half = (I)half > 0x7C00 ? splat(0x7C00u) : half;
    half = (I)magnitude > 0x7F800000 ? splat(0x7E00u) : half;
    return half | ((bits >> 16) & 0x8000u);
}

// Adding w to the bits cannot carry into the sign unless x is NaN. A NaN out of an operation is quiet, so it outlives the cut.
INLINE U bf16_stochastic(F x, U w) { return (U)x + (x == x ? w : U{}); }
INLINE U bf16_nearest(F x) { return (U)x + (x == x ? (((U)x >> 16) & 1u) + 0x7FFFu : U{}); }

INLINE void store_bf16(char *p, U even, U odd) { store(p, (even >> 16) | (odd & 0xFFFF0000u)); }

// Rounds a block of results of operations (so its NaNs are quiet) to DTYPE, as reference.round_to does.
template <int DTYPE, bool STOCHASTICALLY>
INLINE void store_block(char *p, Floats x, const U *first, const U *second, U flip) {
    if constexpr (DTYPE == FP32) {
        const LowHigh y = interleave(x);
        store(p, y.low);
        store(p + 4 * LANES, y.high);
    } else if constexpr (STOCHASTICALLY) {
        const U even = rounding_bits(first[0], second[0], flip), odd = rounding_bits(first[1], second[1], flip);
        if constexpr (DTYPE == BF16)
            store_bf16(p, bf16_stochastic(x.even, even), bf16_stochastic(x.odd, odd));
        else
            store(p, fp16_stochastic(x.even, even) | fp16_stochastic(x.odd, odd) << 16);
    } else if constexpr (DTYPE == BF16) {
        store_bf16(p, bf16_nearest(x.even), bf16_nearest(x.odd));
    } else {
        store_fp16_nearest(p, x);
    }
}

INLINE I int8_stochastic(F m, U w, float encode_scale) {
    const F magnitude = (F)((U)m & ~SIGN) * encode_scale;
    const F clamped = magnitude > 127.0f ? splat(127.0f) : magnitude;
    I q = (I)((U)truncate(clamped * 65536.0f) + w) >> 16;
    q = q < -127 ? (I)splat((uint32_t)-127) : q;  // out of a NaN
    return m < 0.0f ? -q : q;
}

// ---------------------------------------------------------------- tensors and tiles

// A value known at compile time, passed as an argument.
template <int N>
struct Constant {
    static constexpr int value = N;
};

// Calls function(Constant<dtype>, Constant<whether to round stochastically>).
template <typename Function>
INLINE void with_format(int dtype, bool stochastic, Function function) {
    if (dtype == FP32) return function(Constant<FP32>(), Constant<0>());
    if (dtype == BF16 && stochastic) return function(Constant<BF16>(), Constant<1>());
    if (dtype == BF16) return function(Constant<BF16>(), Constant<0>());
    if (stochastic) return function(Constant<FP16>(), Constant<1>());
    return function(Constant<FP16>(), Constant<0>());
}

template <typename Function>
INLINE void with_dtype(int dtype, Function function) {
    if (dtype == FP32) return function(Constant<FP32>());
    if (dtype == BF16) return function(Constant<BF16>());
    if (dtype == FP16) return function(Constant<FP16>());
    return function(Constant<INT8>());
}

template <int DTYPE>
void read_momentum(Tile &tile, int num_blocks, const char *momentum, float decode_scale) {
    for (int i = 0; i < num_blocks; ++i) {
        Floats m = load_block<DTYPE>(momentum + i * BLOCK * size_of(DTYPE));
        tile.m[2 * i] = DTYPE == INT8 ? m.even * decode_scale : m.even;
        tile.m[2 * i + 1] = DTYPE == INT8 ? m.odd * decode_scale : m.odd;
    }
}

template <int DTYPE>
void write_momentum(const Tile &tile, int num_blocks, char *momentum, float encode_scale) {
    for (int i = 0; i < num_blocks; ++i) {
        const F *const m = tile.m + 2 * i;
        const U *const first = tile.first + 2 * i, *const second = tile.second + 2 * i;
        char *const p = momentum + i * BLOCK * size_of(DTYPE);
        if constexpr (DTYPE == INT8) {
            const I even = int8_stochastic(m[0], rounding_bits(first[0], second[0], U{}), encode_scale);
            const I odd = int8_stochastic(m[1], rounding_bits(first[1], second[1], U{}), encode_scale);
            store(p, __builtin_convertvector(((U)even & 0xFFu) | ((U)odd & 0xFFu) << 8, U16));
        } else {
            store_block<DTYPE, true>(p, {m[0], m[1]}, first, second, U{});
        }
    }
}

// out = weight + scale * m
template <int WEIGHT, int OUT, bool STOCHASTICALLY>
void write_perturbed(const Tile &tile, int num_blocks, const char *weight, char *out, float scale, uint32_t flip) {
    for (int i = 0; i < num_blocks; ++i) {
        Floats x = load_block<WEIGHT>(weight + i * BLOCK * size_of(WEIGHT));
        x.even = x.even + tile.m[2 * i] * scale;
        x.odd = x.odd + tile.m[2 * i + 1] * scale;
        store_block<OUT, STOCHASTICALLY>(
            out + i * BLOCK * size_of(OUT), x, tile.first + 2 * i, tile.second + 2 * i, splat(flip));
    }
}

// weight = weight - (d * lr_grad + weight * lr_decay)
template <int WEIGHT, bool STOCHASTICALLY>
void write_updated(const Tile &tile, const F *d, int num_blocks, char *weight, float lr_grad, float lr_decay) {
    for (int i = 0; i < num_blocks; ++i) {
        char *const p = weight + i * BLOCK * size_of(WEIGHT);
        Floats x = load_block<WEIGHT>(p);
        x.even = x.even - (d[2 * i] * lr_grad + x.even * lr_decay);
        x.odd = x.odd - (d[2 * i + 1] * lr_grad + x.odd * lr_decay);
        store_block<WEIGHT, STOCHASTICALLY>(p, x, tile.first + 2 * i, tile.second + 2 * i, U{});
    }
}

void write_noise(const Tile &tile, int num_blocks, char *xi1, char *xi2) {
    for (int i = 0; i < num_blocks; ++i) {
        const U *const no_bits = nullptr;
        store_block<FP32, false>(xi1 + i * BLOCK * 4, {tile.m[2 * i], tile.m[2 * i + 1]}, no_bits, no_bits, U{});
        store_block<FP32, false>(xi2 + i * BLOCK * 4, {tile.d[2 * i], tile.d[2 * i + 1]}, no_bits, no_bits, U{});
    }
}

// ---------------------------------------------------------------- a range

struct Pointers {
    char *out, *weight, *momentum;
};

// The whole work on the blocks of one tile, all of which may be read and written.
void run_tile(Tile &tile, int num_blocks, uint32_t pair, const Job &job, const PhiloxKeys &keys, const PreparedStep *steps,
              Pointers p) {
    if (job.operation == NOISE) {
        philox(tile, num_blocks, pair, keys, *steps);
        noise(tile, num_blocks);
        return write_noise(tile, num_blocks, p.out, p.weight);
    }
    if (job.momentum_dtype == NONE) {
        for (int i = 0; i < 2 * num_blocks; ++i) tile.m[i] = F{};
    } else {
        with_dtype(job.momentum_dtype, [&](auto dtype) {
            read_momentum<dtype.value>(tile, num_blocks, p.momentum, job.decode_scale);
        });
    }
    all_steps(tile, num_blocks, pair, job, keys, steps);
    const bool stochastic = job.rounding == STOCHASTIC;
    if (job.operation == PERTURB) {
        with_dtype(job.weight_dtype, [&](auto weight) {
            with_format(job.out_dtype, stochastic, [&](auto out, auto stochastically) {
                write_perturbed<weight.value, out.value, stochastically.value>(
                    tile, num_blocks, p.weight, p.out, job.scale, job.flip_bits ? 0xFFFFu : 0u);
            });
        });
        return;
    }
    if (job.write_weight) {
        with_format(job.weight_dtype, stochastic, [&](auto weight, auto stochastically) {
            write_updated<weight.value, stochastically.value>(
                tile, job.normalize ? tile.d : tile.m, num_blocks, p.weight, job.lr_grad, job.lr_decay);
        });
    }
    if (job.momentum_dtype != NONE) {
        with_dtype(job.momentum_dtype, [&](auto dtype) {
            write_momentum<dtype.value>(tile, num_blocks, p.momentum, job.encode_scale);
        });
    }
}

// Copies of a tile's elements, for a tile that sticks out of the range: whole vectors may be read and written here.
struct Stage {
    alignas(64) char out[4 * TILE], weight[4 * TILE], momentum[4 * TILE];
};

}  // namespace

void run_range(const Job &job, const PhiloxKeys &keys, const PreparedStep *steps, uint64_t lo, uint64_t hi) {
    const int out_size = size_of(job.out_dtype), weight_size = size_of(job.weight_dtype);
    const int momentum_size = size_of(job.momentum_dtype);
    const bool writes_weight = job.operation == NOISE || (job.operation == UPDATE && job.write_weight);
    Tile tile;
    Stage stage;
    // Tiles are whole blocks that are aligned in the flat index: none has pairs on both sides of a multiple of 2**32.
    for (uint64_t start = lo & ~(uint64_t)(BLOCK - 1); start < hi; start += TILE) {
        const uint64_t first = start < lo ? lo : start, last = hi - start < TILE ? hi : start + TILE;
        const uint64_t at = first - job.start, n = last - first;
        const int num_blocks = (last - start + BLOCK - 1) / BLOCK;
        const uint32_t pair = (uint32_t)(start >> 1);
        const Pointers p = {job.out + at * out_size, job.weight + at * weight_size, job.momentum + at * momentum_size};
        if (n == (uint64_t)num_blocks * BLOCK) {
            run_tile(tile, num_blocks, pair, job, keys, steps, p);
            continue;
        }
        const uint64_t skip = first - start;
        const Pointers q = {
            stage.out + skip * out_size, stage.weight + skip * weight_size, stage.momentum + skip * momentum_size};
        __builtin_memset(&stage, 0, sizeof stage);
        __builtin_memcpy(q.weight, p.weight, n * weight_size);
        if (momentum_size) __builtin_memcpy(q.momentum, p.momentum, n * momentum_size);
        run_tile(tile, num_blocks, pair, job, keys, steps, {stage.out, stage.weight, stage.momentum});
        if (out_size) __builtin_memcpy(p.out, q.out, n * out_size);
        if (writes_weight) __builtin_memcpy(p.weight, q.weight, n * weight_size);
        if (momentum_size && job.operation == UPDATE) __builtin_memcpy(p.momentum, q.momentum, n * momentum_size);
    }
}

}  // namespace ZO_NAMESPACE
