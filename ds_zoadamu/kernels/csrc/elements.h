// Elements of tensors in memory: reading them as fp32, rounding and writing them, by blocks of even and odd elements.
#pragma once
#include "job.h"
#include "simd.h"

namespace ZO_NAMESPACE {
namespace {

constexpr uint32_t SIGN = 0x80000000u;

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

// For what is not rounded stochastically.
INLINE Words no_bits() { return {U{}, U{}}; }

// Rounds a block of results of operations (so its NaNs are quiet) to DTYPE, as reference.round_to does.
template <int DTYPE, bool STOCHASTICALLY>
INLINE void store_block(char *p, Floats x, Words bits) {
    if constexpr (DTYPE == FP32) {
        const LowHigh y = interleave(x);
        store(p, y.low);
        store(p + 4 * LANES, y.high);
    } else if constexpr (STOCHASTICALLY) {
        if constexpr (DTYPE == BF16)
            store_bf16(p, bf16_stochastic(x.even, bits.even), bf16_stochastic(x.odd, bits.odd));
        else
            store(p, fp16_stochastic(x.even, bits.even) | fp16_stochastic(x.odd, bits.odd) << 16);
    } else if constexpr (DTYPE == BF16) {
        store_bf16(p, bf16_nearest(x.even), bf16_nearest(x.odd));
    } else {
        store_fp16_nearest(p, x);
    }
}

// Where the elements of a tile are in a job's tensors.
struct Pointers {
    char *out, *weight, *momentum;
};

// ---------------------------------------------------------------- formats at compile time

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

}  // namespace
}  // namespace ZO_NAMESPACE
