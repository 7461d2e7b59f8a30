// A tile's noise and its m_t: Philox, Box-Muller, the recurrence. See kernels.cpp.
#pragma once
#include "elements.h"

namespace ZO_NAMESPACE {
namespace {

// ---------------------------------------------------------------- tiles

constexpr int TILE_BLOCKS = 16;
constexpr int TILE = TILE_BLOCKS * BLOCK;

// Vectors 2 i and 2 i + 1 are the even and the odd elements of block i.
struct Tile {
    U first[2 * TILE_BLOCKS], second[2 * TILE_BLOCKS];  // the two random words of each element, for the newest step
    F m[2 * TILE_BLOCKS];                               // m_t;  NOISE: xi1
    F d[2 * TILE_BLOCKS];                               // the direction of the update;  NOISE: xi2
};

// Both vectors of a block, statement by statement: neighbouring instructions then do not depend on each other.
#define BOTH _Pragma("GCC unroll 2") for (int h = 0; h < 2; ++h)

// ---------------------------------------------------------------- noise

// Philox-4x32-10 for the counters (pair, high, step, purpose). All but pair is the same for all elements, so in rounds 1 and 2
// one product of two is a scalar, which was prepared. Half h of a block has its pairs 2 j + h in the lower halves of 64-bit
// lanes; the upper halves may hold anything.
void philox(Tile &tile, int num_blocks, uint32_t pair, const PhiloxKeys &keys, const PreparedStep &step) {
    const U64 m0 = splat64(PHILOX_M0), m1 = splat64(PHILOX_M1);
    const U64 round1_k1 = splat64(step.round1_k1);
    const U64 round2_c0 = splat64(step.round2_c0), round2_c2 = splat64(step.round2_c2), round3_c2 = splat64(step.round3_c2);
    const int last = PHILOX_ROUNDS - 1;
    const U last_k0 = splat(keys.k0[last]), last_k1 = splat(keys.k1[last]);
    U64 k0[PHILOX_ROUNDS], k1[PHILOX_ROUNDS], counter[2];
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        k0[round] = splat64(keys.k0[round]);
        k1[round] = splat64(keys.k1[round]);
    }
    BOTH for (int lane = 0; lane < LANES / 2; ++lane) counter[h][lane] = pair + 2 * lane + h;
    for (int i = 0; i < 2 * num_blocks; i += 2) {
        U64 c0[2], c1[2], c2[2], c3[2], p0[2], p1[2];
        BOTH p0[h] = multiply_low_halves(counter[h], m0);
        BOTH counter[h] += LANES;
        BOTH p1[h] = multiply_low_halves((p0[h] >> 32) ^ round1_k1, m1);
        BOTH c3[h] = multiply_low_halves((p1[h] >> 32) ^ round2_c0, m0);
        BOTH c1[h] = multiply_low_halves(p0[h] ^ round2_c2, m1);
        BOTH c0[h] = xor3(c1[h] >> 32, p1[h], k0[2]);
        BOTH c2[h] = (c3[h] >> 32) ^ round3_c2;
        _Pragma("GCC unroll 8") for (int round = 3; round < last; ++round) {
            BOTH p0[h] = multiply_low_halves(c0[h], m0);
            BOTH p1[h] = multiply_low_halves(c2[h], m1);
            BOTH c0[h] = xor3(p1[h] >> 32, c1[h], k0[round]);
            BOTH c2[h] = xor3(p0[h] >> 32, c3[h], k1[round]);
            BOTH c1[h] = p1[h];
            BOTH c3[h] = p0[h];
        }
        // The last round brings the halves together, to vectors of 32-bit lanes.
        BOTH p0[h] = multiply_low_halves(c0[h], m0);
        BOTH p1[h] = multiply_low_halves(c2[h], m1);
        tile.first[i] = xor3(merge_high_halves(p1[0], p1[1]), merge_low_halves(c1[0], c1[1]), last_k0);
        tile.second[i] = merge_low_halves(p1[0], p1[1]);
        tile.first[i + 1] = xor3(merge_high_halves(p0[0], p0[1]), merge_low_halves(c3[0], c3[1]), last_k1);
        tile.second[i + 1] = merge_low_halves(p0[0], p0[1]);
    }
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

struct Noise {
    F xi1[2], xi2[2];
};

// The noise of a block out of its words: first -> u, second -> phi.
INLINE Noise box_muller(const U *first, const U *second) {
    // ln u: with the mantissa in [sqrt(1/2), sqrt(2)), x is half the reference's, y half and r a quarter of its -2 ln u.
    F exponent[2], x[2], x2[2], y[2], r[2];
    BOTH {
        const I u = (I)to_float((I)(first[h] >> 8) + 1);
        const I t = u - (0x3F3504F3 + (24 << 23));
        exponent[h] = to_float(t >> 23);
        x[h] = (F)((t & 0x7FFFFF) + (0x3F3504F3 - (1 << 23))) - 0.5f;
    }
    // Bits 8 to 29 of the word are the signed distance from the nearest quarter turn: a mantissa, offset by half its range.
    F z[2], z2[2], s[2], c[2];
    BOTH z[h] = (F)and_xor(second[h] >> 7, splat(0x7FFFFEu), splat(0x3EC00000u)) - 0.375f;
    BOTH x2[h] = x[h] * x[h];
    BOTH z2[h] = z[h] * z[h];
    BOTH y[h] = splat(LN[6]);
    BOTH s[h] = splat(SIN[3]);
    BOTH c[h] = splat(COS[2]);
    BOTH y[h] = y[h] * x[h] + LN[5];
    BOTH s[h] = s[h] * z2[h] + SIN[2];
    BOTH y[h] = y[h] * x[h] + LN[4];
    BOTH c[h] = c[h] * z2[h] + COS[1];
    BOTH y[h] = y[h] * x[h] + LN[3];
    BOTH s[h] = s[h] * z2[h] + SIN[1];
    BOTH y[h] = y[h] * x[h] + LN[2];
    BOTH c[h] = c[h] * z2[h] + COS[0];
    BOTH y[h] = y[h] * x[h] + LN[1];
    BOTH s[h] = s[h] * z2[h] + SIN[0];
    BOTH y[h] = y[h] * x[h] + LN[0];
    BOTH c[h] = c[h] * z2[h] + 2.0f;
    BOTH s[h] = s[h] * z[h];
    BOTH y[h] = (x2[h] * x[h]) * y[h] - x2[h];
    BOTH y[h] = x[h] + y[h];
    // u = 1 gives -0 - 0 = -0, as the reference's 0 * -2.
    BOTH r[h] = square_root(exponent[h] * (-0.5f * LN2) - y[h]);
    // The quadrant, bits 30 and 31 of the rounded word, exchanges sin and cos and sets their signs.
    Noise noise;
    BOTH {
        const U quadrant = second[h] + 0x20000000u;
        const I swap = (quadrant & 0x40000000u) != 0;
        const F sin = (F)and_xor(quadrant, splat(SIGN), (U)(swap ? c[h] : s[h]));
        const F cos = (F)and_xor(second[h] + 0x60000000u, splat(SIGN), (U)(swap ? s[h] : c[h]));
        noise.xi1[h] = r[h] * cos;
        noise.xi2[h] = r[h] * sin;
    }
    return noise;
}

void noise(Tile &tile, int num_blocks) {
    for (int i = 0; i < 2 * num_blocks; i += 2) {
        const Noise xi = box_muller(tile.first + i, tile.second + i);
        BOTH tile.m[i + h] = xi.xi1[h];
        BOTH tile.d[i + h] = xi.xi2[h];
    }
}

// ---------------------------------------------------------------- the recurrence

// m <- m_t, and with NORMALIZE d = m_t / sqrt(v + sigma).
template <bool NORMALIZE>
INLINE void advance(Tile &tile, int num_blocks, const Step &scalars, float sigma) {
    const Step c = scalars;
    for (int i = 0; i < 2 * num_blocks; i += 2) {
        const Noise xi = box_muller(tile.first + i, tile.second + i);
        F centred[2], history[2], m[2];
        BOTH centred[h] = xi.xi1[h] * c.sqrt_alpha;
        BOTH history[h] = tile.m[i + h] + xi.xi2[h] * c.sqrt_one_minus_alpha;
        BOTH m[h] = centred[h] * c.beta1 + history[h] * c.one_minus_beta1;
        BOTH tile.m[i + h] = m[h];
        if (!NORMALIZE) continue;
        BOTH {
            const F v = (centred[h] * centred[h]) * c.beta2 + (history[h] * history[h]) * c.one_minus_beta2;
            tile.d[i + h] = m[h] / square_root(v + sigma);
        }
    }
}

// Takes m through all steps; philox's words are left as the last step's.
void all_steps(Tile &tile, int num_blocks, uint32_t pair, const Job &job, const PhiloxKeys &keys, const PreparedStep *steps) {
    const PreparedStep *const last = steps + job.num_steps - 1;
    for (const PreparedStep *step = steps; step < last; ++step) {
        philox(tile, num_blocks, pair, keys, *step);
        advance<false>(tile, num_blocks, step->scalars, 0);
    }
    philox(tile, num_blocks, pair, keys, *last);
    if (job.operation == UPDATE && job.write_weight && job.normalize)
        advance<true>(tile, num_blocks, last->scalars, job.sigma);
    else
        advance<false>(tile, num_blocks, last->scalars, 0);
}

} // namespace
} // namespace ZO_NAMESPACE
