// The C ABI of the CPU kernels: what Python passes, and what the dispatcher passes to one vector width's kernels.
// Field order and types are mirrored by ctypes structures in cpu.py.
#pragma once

#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the kernels read 16-bit and 8-bit elements out of 32-bit lanes: little endian only"
#endif

enum Operation : int32_t { NOISE = 0, PERTURB = 1, UPDATE = 2, SIGNS = 3, PERTURB_SIGNS = 4, UPDATE_SIGNS = 5 };
enum Dtype : int32_t { NONE = -1, FP32 = 0, BF16 = 1, FP16 = 2, INT8 = 3 };
enum Rounding : int32_t { NEAREST = 0, STOCHASTIC = 1 };

// types.StepScalars
struct Step {
    uint32_t step;
    float sqrt_alpha, sqrt_one_minus_alpha, beta1, one_minus_beta1, beta2, one_minus_beta2;
};

// void GOMP_parallel(void (*function)(void *), void *data, unsigned num_threads, unsigned flags)
typedef void (*ParallelRegion)(void (*)(void *), void *, unsigned, unsigned);

struct Job {
    char *out;       // PERTURB: the result;  NOISE: xi1;  SIGNS: the signs
    char *weight;    // PERTURB, UPDATE;      NOISE: xi2
    char *momentum;  // null where none is stored
    const Step *steps;
    const float *table;              // UPDATE_SIGNS: num_rows rows of 32
    ParallelRegion parallel_region;  // of the OpenMP runtime that the process has loaded, or null
    uint64_t start;                  // flat index of the first element
    int64_t numel;
    int64_t num_steps;
    uint32_t key[2];
    int32_t operation, out_dtype, weight_dtype, momentum_dtype, rounding;
    int32_t simd;         // index into the dispatcher's table
    int32_t num_threads;  // at most
    int32_t flip_bits;    // PERTURB: use the complement of the rounding bits
    int32_t normalize, write_weight;
    int32_t direction;  // SIGNS, PERTURB_SIGNS
    int32_t num_rows;
    float scale, decode_scale, encode_scale;
    float lr_grad, lr_decay, sigma;
};

// A step ready for use: its scalars and its constants of Philox (see philox() in kernels.cpp), which hold for all elements
// that share the upper half of the counter.
struct PreparedStep {
    Step scalars;
    uint32_t round1_k1, round2_c0, round2_c2, round3_c2;
};

constexpr uint32_t PHILOX_M0 = 0xD2511F53, PHILOX_M1 = 0xCD9E8D57;
constexpr int PHILOX_ROUNDS = 10;

// The last word of the counter, see reference.py; noise's is 0.
constexpr uint32_t PURPOSE_SIGNS = 1, PURPOSE_SIGN_ROUNDING = 0x100;

constexpr int is_of_signs(int operation) { return operation >= SIGNS; }
// Elements that share a counter, by its power of two.
constexpr int counter_shift(int operation) { return is_of_signs(operation) ? 4 : 1; }

struct PhiloxKeys {
    uint32_t k0[PHILOX_ROUNDS], k1[PHILOX_ROUNDS];
};

// Runs the job on the elements with flat indices lo <= i < hi; the upper half of the counter is the same for all of them.
typedef void (*RangeKernel)(const Job &, const PhiloxKeys &, const PreparedStep *, uint64_t lo, uint64_t hi);
