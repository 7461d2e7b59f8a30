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
#include "elements.h"
#include "noise.h"
#include "signs.h"

namespace ZO_NAMESPACE {
namespace {

// ---------------------------------------------------------------- tensors and tiles

// 16 random bits an element, for rounding: the low 8 of its two words. flip: 0, or 0xFFFF for the complement.
INLINE U rounding_bits(U first, U second, U flip) {
    return and_xor(select_bits(splat(0xFFu), second, first << 8), splat(0xFFFFu), flip);
}

// Those of block i of a tile.
INLINE Words rounding_bits(const Tile &tile, int i, U flip) {
    const U *const first = tile.first + 2 * i, *const second = tile.second + 2 * i;
    return {rounding_bits(first[0], second[0], flip), rounding_bits(first[1], second[1], flip)};
}

INLINE I int8_stochastic(F m, U w, float encode_scale) {
    const F magnitude = (F)((U)m & ~SIGN) * encode_scale;
    const F clamped = magnitude > 127.0f ? splat(127.0f) : magnitude;
    I q = (I)((U)truncate(clamped * 65536.0f) + w) >> 16;
    q = q < -127 ? (I)splat((uint32_t)-127) : q;  // out of a NaN
    return m < 0.0f ? -q : q;
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
        const Words bits = rounding_bits(tile, i, U{});
        char *const p = momentum + i * BLOCK * size_of(DTYPE);
        if constexpr (DTYPE == INT8) {
            const I even = int8_stochastic(m[0], bits.even, encode_scale), odd = int8_stochastic(m[1], bits.odd, encode_scale);
            store(p, __builtin_convertvector(((U)even & 0xFFu) | ((U)odd & 0xFFu) << 8, U16));
        } else {
            store_block<DTYPE, true>(p, {m[0], m[1]}, bits);
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
        store_block<OUT, STOCHASTICALLY>(out + i * BLOCK * size_of(OUT), x, rounding_bits(tile, i, splat(flip)));
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
        store_block<WEIGHT, STOCHASTICALLY>(p, x, rounding_bits(tile, i, U{}));
    }
}

void write_noise(const Tile &tile, int num_blocks, char *xi1, char *xi2) {
    for (int i = 0; i < num_blocks; ++i) {
        store_block<FP32, false>(xi1 + i * BLOCK * 4, {tile.m[2 * i], tile.m[2 * i + 1]}, no_bits());
        store_block<FP32, false>(xi2 + i * BLOCK * 4, {tile.d[2 * i], tile.d[2 * i + 1]}, no_bits());
    }
}

// ---------------------------------------------------------------- a range

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
template <int SPAN>
struct Stage {
    alignas(64) char out[4 * SPAN], weight[4 * SPAN], momentum[4 * SPAN];
};

// Calls run(grains, first element, pointers) for the elements lo <= i < hi by tiles of up to SPAN elements: whole grains of GRAIN,
// aligned in the flat index, so that the lower half of the counter does not overflow within one.
template <int GRAIN, int SPAN, typename Run>
INLINE void over_tiles(const Job &job, uint64_t lo, uint64_t hi, Run run) {
    const int out_size = size_of(job.out_dtype), weight_size = size_of(job.weight_dtype);
    const int momentum_size = size_of(job.momentum_dtype);
    const bool updates = job.operation == UPDATE || job.operation == UPDATE_SIGNS;
    const bool writes_weight = job.operation == NOISE || (updates && job.write_weight);
    Stage<SPAN> stage;
    for (uint64_t start = lo & ~(uint64_t)(GRAIN - 1); start < hi; start += SPAN) {
        const uint64_t first = start < lo ? lo : start, last = hi - start < SPAN ? hi : start + SPAN;
        const uint64_t at = first - job.start, n = last - first;
        const int grains = (last - start + GRAIN - 1) / GRAIN;
        const Pointers p = {job.out + at * out_size, job.weight + at * weight_size, job.momentum + at * momentum_size};
        if (n == (uint64_t)grains * GRAIN) {
            run(grains, start, p);
            continue;
        }
        const uint64_t skip = first - start;
        const Pointers q = {
            stage.out + skip * out_size, stage.weight + skip * weight_size, stage.momentum + skip * momentum_size};
        __builtin_memset(&stage, 0, sizeof stage);
        __builtin_memcpy(q.weight, p.weight, n * weight_size);
        if (momentum_size) __builtin_memcpy(q.momentum, p.momentum, n * momentum_size);
        run(grains, start, Pointers{stage.out, stage.weight, stage.momentum});
        if (out_size) __builtin_memcpy(p.out, q.out, n * out_size);
        if (writes_weight) __builtin_memcpy(p.weight, q.weight, n * weight_size);
        if (momentum_size && updates) __builtin_memcpy(p.momentum, q.momentum, n * momentum_size);
    }
}

}  // namespace

void run_range(const Job &job, const PhiloxKeys &keys, const PreparedStep *steps, uint64_t lo, uint64_t hi) {
    const int shift = counter_shift(job.operation);
    if (is_of_signs(job.operation)) {
        SignTile tile;
        over_tiles<SIGN_RUN, SIGN_TILE>(job, lo, hi, [&](int num_runs, uint64_t start, Pointers p) {
            run_sign_tile(tile, num_runs, (uint32_t)(start >> shift), job, keys, steps, p);
        });
    } else {
        Tile tile;
        over_tiles<BLOCK, TILE>(job, lo, hi, [&](int num_blocks, uint64_t start, Pointers p) {
            run_tile(tile, num_blocks, (uint32_t)(start >> shift), job, keys, steps, p);
        });
    }
}

}  // namespace ZO_NAMESPACE
