// Operations with signs for noise: one byte an element serves eight directions. The map is that of reference.sign_block.
#pragma once
#include "elements.h"
#include "noise.h"

namespace ZO_NAMESPACE {
namespace {

constexpr int SIGN_RUN = 256;  // elements of 16 counters, whose words follow each other in memory
constexpr int SIGN_TILE = TILE_BLOCKS * LANES * 16;

// All in the order of the elements.
struct SignTile {
    Tile words;
    alignas(64) char bytes[SIGN_TILE], rounding[SIGN_TILE];
    F d[SIGN_TILE / LANES];  // sums over the rows of the table: even and odd elements of each block
};

// The 16 bytes of one Philox call a counter: one for each of its elements.
void sign_bytes(Tile &words, char *bytes, int num_runs, uint32_t counter, const PhiloxKeys &keys, const PreparedStep &call) {
    philox(words, num_runs * 16 / LANES, counter, keys, call);
    for (int i = 0; i < num_runs * 16 / LANES; ++i) {
        char *const p = bytes + i * LANES / 16 * SIGN_RUN + i * LANES % 16 * 4;
        BOTH store(p + 128 * h, words.first[2 * i + h]);
        BOTH store(p + 128 * h + 64, words.second[2 * i + h]);
    }
}

// The bytes of a block: even elements in the lower halves of the lanes, odd ones in the upper.
INLINE U sign_pairs(const SignTile &tile, int block) {
    return (U)__builtin_convertvector(load<U8Pairs>(tile.bytes + block * BLOCK), U16Pairs);
}

// magnitude with the signs of one direction: + where bit k of an element's byte is set.
INLINE Floats signed_by(U pairs, int k, float magnitude) {
    const U x = (U)splat(magnitude);
    return {(F)(x ^ (~pairs << (31 - k) & SIGN)), (F)(x ^ (~pairs << (15 - k) & SIGN))};
}

// 16 random bits for the two elements of a lane.
INLINE U rounding_of(const SignTile &tile, int block) {
    return __builtin_convertvector(load<U16>(tile.rounding + block * BLOCK), U);
}

// The complement where x is negative.
INLINE U mirrored(U bits, F x) { return bits ^ ((U)((I)x >> 31) & 0xFFFFu); }

template <int WEIGHT, int OUT, bool STOCHASTICALLY>
void write_perturbed_by_signs(const SignTile &tile, int num_blocks, const char *weight, char *out, int k, float scale) {
    for (int i = 0; i < num_blocks; ++i) {
        Floats x = load_block<WEIGHT>(weight + i * BLOCK * size_of(WEIGHT));
        const Floats delta = signed_by(sign_pairs(tile, i), k, scale);
        x.even = x.even + delta.even;
        x.odd = x.odd + delta.odd;
        Words bits = no_bits();
        if constexpr (STOCHASTICALLY) {
            const U w = rounding_of(tile, i);
            bits = {mirrored(w, delta.even), mirrored(w, delta.odd)};
        }
        store_block<OUT, STOCHASTICALLY>(out + i * BLOCK * size_of(OUT), x, bits);
    }
}

// A row of the table at the elements' bytes: what the low four bits give, and what the high four add.
struct Row {
    Sixteen low, high;
};

INLINE Floats looked_up(const SignTile &tile, int block, const Row &row) {
    const U pairs = sign_pairs(tile, block);
    return {look_up(row.low, pairs) + look_up(row.high, pairs >> 4),
            look_up(row.low, pairs >> 16) + look_up(row.high, pairs >> 20)};
}

// Adds a row of the table to d; the first one takes its place.
void add_row(SignTile &tile, int num_blocks, const float *values, bool first) {
    const Row row = {load_sixteen(values), load_sixteen(values + 16)};
    for (int i = 0; i < num_blocks; ++i) {
        const Floats found = looked_up(tile, i, row);
        tile.d[2 * i] = first ? found.even : tile.d[2 * i] + found.even;
        tile.d[2 * i + 1] = first ? found.odd : tile.d[2 * i + 1] + found.odd;
    }
}

template <int WEIGHT, bool STOCHASTICALLY>
void write_updated_by_signs(const SignTile &tile, int num_blocks, char *weight, float lr_decay) {
    for (int i = 0; i < num_blocks; ++i) {
        char *const p = weight + i * BLOCK * size_of(WEIGHT);
        Floats x = load_block<WEIGHT>(p);
        x.even = x.even - (tile.d[2 * i] + x.even * lr_decay);
        x.odd = x.odd - (tile.d[2 * i + 1] + x.odd * lr_decay);
        Words bits = no_bits();
        if constexpr (STOCHASTICALLY) bits.even = bits.odd = rounding_of(tile, i);
        store_block<WEIGHT, STOCHASTICALLY>(p, x, bits);
    }
}

void run_sign_tile(SignTile &tile, int num_runs, uint32_t counter, const Job &job, const PhiloxKeys &keys,
                   const PreparedStep *calls, Pointers p) {
    const int num_blocks = num_runs * (SIGN_RUN / BLOCK), k = job.direction & 7;
    const int dtype = job.operation == UPDATE_SIGNS ? job.weight_dtype : job.out_dtype;
    const bool stochastic = job.rounding == STOCHASTIC && dtype != FP32;
    if (stochastic) sign_bytes(tile.words, tile.rounding, num_runs, counter, keys, calls[0]);
    if (job.operation == UPDATE_SIGNS) {
        for (int row = 0; row < job.num_rows; ++row) {
            sign_bytes(tile.words, tile.bytes, num_runs, counter, keys, calls[1 + row]);
            add_row(tile, num_blocks, job.table + 32 * row, row == 0);
        }
        return with_format(dtype, stochastic, [&](auto weight, auto stochastically) {
            write_updated_by_signs<weight.value, stochastically.value>(tile, num_blocks, p.weight, job.lr_decay);
        });
    }
    sign_bytes(tile.words, tile.bytes, num_runs, counter, keys, calls[1]);
    if (job.operation == SIGNS) {
        for (int i = 0; i < num_blocks; ++i)
            store_block<FP32, false>(p.out + i * BLOCK * 4, signed_by(sign_pairs(tile, i), k, 1.0f), no_bits());
        return;
    }
    with_dtype(job.weight_dtype, [&](auto weight) {
        with_format(dtype, stochastic, [&](auto out, auto stochastically) {
            write_perturbed_by_signs<weight.value, out.value, stochastically.value>(
                tile, num_blocks, p.weight, p.out, k, job.scale);
        });
    });
}

}  // namespace
}  // namespace ZO_NAMESPACE
