// Vectors of LANES 32-bit numbers, by GCC's vector extension (also in clang), and the few operations that need an instruction
// set's own functions. Every floating-point operation rounds once, to nearest even, and is the same on every instruction set.
//
// Elements travel as two vectors, `even` and `odd`: lane j holds the elements 2 j and 2 j + 1 of a block of 2 * LANES. So the
// two 16-bit elements of a 32-bit word need no shuffles, and one Philox counter makes one lane of both.
#pragma once

#include <stdint.h>

#if defined(ZO_AVX512) || defined(ZO_AVX2) || defined(ZO_SSE2)
#include <immintrin.h>
#endif

namespace ZO_NAMESPACE {
namespace {

#define INLINE inline __attribute__((always_inline))

#if defined(ZO_AVX512)
constexpr int LANES = 16;
#elif defined(ZO_AVX2)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int BLOCK = 2 * LANES;

typedef float F __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint64_t U64 __attribute__((vector_size(4 * LANES)));
typedef uint16_t U16 __attribute__((vector_size(2 * LANES)));
typedef uint16_t U16Pairs __attribute__((vector_size(4 * LANES)));
typedef uint8_t U8Pairs __attribute__((vector_size(2 * LANES)));

struct Floats {
    F even, odd;
};
struct Words {
    U even, odd;
};

INLINE F splat(float x) { return x - F{}; }  // not x + F{}: that turns -0 into +0
INLINE U splat(uint32_t x) { return x - U{}; }
INLINE U64 splat64(uint64_t x) { return x - U64{}; }

INLINE F to_float(I x) { return __builtin_convertvector(x, F); }
INLINE I truncate(F x) { return __builtin_convertvector(x, I); }

template <typename V>
INLINE V load(const char *p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <typename V>
INLINE void store(char *p, V v) {
    __builtin_memcpy(p, &v, sizeof v);
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (I){__VA_ARGS__})
#endif

// Between memory order (low, high: the first and the last LANES elements of a block) and (even, odd).
INLINE Floats deinterleave(F low, F high) {
#if defined(ZO_AVX512)
    return {SHUFFLE(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
            SHUFFLE(low, high, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
#elif defined(ZO_AVX2)
    return {SHUFFLE(low, high, 0, 2, 4, 6, 8, 10, 12, 14), SHUFFLE(low, high, 1, 3, 5, 7, 9, 11, 13, 15)};
#else
    return {SHUFFLE(low, high, 0, 2, 4, 6), SHUFFLE(low, high, 1, 3, 5, 7)};
#endif
}

struct LowHigh {
    F low, high;
};

INLINE LowHigh interleave(Floats x) {
#if defined(ZO_AVX512)
    return {SHUFFLE(x.even, x.odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
            SHUFFLE(x.even, x.odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)};
#elif defined(ZO_AVX2)
    return {SHUFFLE(x.even, x.odd, 0, 8, 1, 9, 2, 10, 3, 11), SHUFFLE(x.even, x.odd, 4, 12, 5, 13, 6, 14, 7, 15)};
#else
    return {SHUFFLE(x.even, x.odd, 0, 4, 1, 5), SHUFFLE(x.even, x.odd, 2, 6, 3, 7)};
#endif
}

INLINE F square_root(F x) {
#if defined(ZO_AVX512)
    return (F)_mm512_sqrt_ps((__m512)x);
#elif defined(ZO_AVX2)
    return (F)_mm256_sqrt_ps((__m256)x);
#elif defined(ZO_SSE2)
    return (F)_mm_sqrt_ps((__m128)x);
#else
    for (int lane = 0; lane < LANES; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
    return x;
#endif
}

// A table of 16 numbers, looked up lane by lane by the low four bits of an index.
#if defined(ZO_AVX512)
struct Sixteen {
    F values;
};
INLINE Sixteen load_sixteen(const float *p) { return {load<F>((const char *)p)}; }
INLINE F look_up(Sixteen table, U index) { return (F)_mm512_permutexvar_ps((__m512i)index, (__m512)table.values); }
#elif defined(ZO_AVX2)
struct Sixteen {
    F low, high;
};
INLINE Sixteen load_sixteen(const float *p) { return {load<F>((const char *)p), load<F>((const char *)(p + 8))}; }
INLINE F look_up(Sixteen table, U index) {
    const __m256 low = _mm256_permutevar8x32_ps((__m256)table.low, (__m256i)index);
    const __m256 high = _mm256_permutevar8x32_ps((__m256)table.high, (__m256i)index);
    return (F)_mm256_blendv_ps(low, high, (__m256)(index << 28));
}
#else
struct Sixteen {
    const float *values;
};
INLINE Sixteen load_sixteen(const float *p) { return {p}; }
INLINE F look_up(Sixteen table, U index) {
    F x;
    for (int lane = 0; lane < LANES; ++lane) x[lane] = table.values[index[lane] & 15];
    return x;
}
#endif

// The 64-bit products of the lower halves of the 64-bit lanes; their upper halves are not read.
INLINE U64 multiply_low_halves(U64 a, U64 b) {
#if defined(ZO_AVX512)
    return (U64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(ZO_AVX2)
    return (U64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(ZO_SSE2)
    return (U64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xFFFFFFFFull) * (b & 0xFFFFFFFFull);
#endif
}

// 32-bit lanes 2 j and 2 j + 1: the lower halves of the 64-bit lanes j of a and b.
INLINE U merge_low_halves(U64 a, U64 b) {
#if defined(ZO_AVX512)
    return (U)_mm512_mask_shuffle_epi32((__m512i)a, 0xAAAA, (__m512i)b, _MM_PERM_CCAA);
#elif defined(ZO_AVX2)
    return (U)_mm256_blend_epi32((__m256i)a, _mm256_slli_epi64((__m256i)b, 32), 0xAA);
#else
    return (U)((a & 0xFFFFFFFFull) | (b << 32));
#endif
}

// The same for the upper halves.
INLINE U merge_high_halves(U64 a, U64 b) {
#if defined(ZO_AVX512)
    return (U)_mm512_mask_shuffle_epi32((__m512i)b, 0x5555, (__m512i)a, _MM_PERM_DDBB);
#elif defined(ZO_AVX2)
    return (U)_mm256_blend_epi32(_mm256_srli_epi64((__m256i)a, 32), (__m256i)b, 0xAA);
#else
    return (U)((a >> 32) | (b & 0xFFFFFFFF00000000ull));
#endif
}

template <typename V>
INLINE V xor3(V a, V b, V c) {
#if defined(ZO_AVX512)
    return (V)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
    return a ^ b ^ c;
#endif
}

// (a & mask) ^ b
template <typename V>
INLINE V and_xor(V a, V mask, V b) {
#if defined(ZO_AVX512)
    return (V)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)mask, (__m512i)b, 0x6A);
#else
    return (a & mask) ^ b;
#endif
}

// The bits of a where mask is set, else those of b.
INLINE U select_bits(U mask, U a, U b) {
#if defined(ZO_AVX512)
    return (U)_mm512_ternarylogic_epi64((__m512i)mask, (__m512i)a, (__m512i)b, 0xCA);
#else
    return (mask & a) | (~mask & b);
#endif
}

}  // namespace
}  // namespace ZO_NAMESPACE
