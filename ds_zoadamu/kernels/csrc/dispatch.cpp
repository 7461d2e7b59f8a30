// Entry points of the shared library: chooses the instruction set, prepares the steps, and shares a job out among threads.
// Compiled for the machine's baseline only; nothing here touches the elements.
#include "job.h"

#include <fenv.h>
#include <pthread.h>
#include <stdlib.h>

#if defined(ZO_X86)
#include <cpuid.h>
#define VARIANT_ON_X86(name) \
    namespace zo_##name {    \
    void run_range(const Job &, const PhiloxKeys &, const PreparedStep *, uint64_t, uint64_t); \
    }
VARIANT_ON_X86(sse2)
VARIANT_ON_X86(avx2)
VARIANT_ON_X86(avx512)
#endif
namespace zo_generic {
void run_range(const Job &, const PhiloxKeys &, const PreparedStep *, uint64_t, uint64_t);
}

namespace {

bool always() { return true; }

#if defined(ZO_X86)
// Asks also whether the operating system saves the registers; "f16c" is not a name that every compiler knows here.
bool has_avx2() {
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx2") && __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

struct Variant {
    const char *name;
    bool (*supported)();
    RangeKernel run;
};

// Best first. Job.simd is an index into this table.
const Variant VARIANTS[] = {
#if defined(ZO_X86)
    {"avx512", has_avx512, zo_avx512::run_range},
    {"avx2", has_avx2, zo_avx2::run_range},
    {"sse2", always, zo_sse2::run_range},
#endif
    {"generic", always, zo_generic::run_range},
};
constexpr int NUM_VARIANTS = sizeof VARIANTS / sizeof VARIANTS[0];

PhiloxKeys expand(const uint32_t key[2]) {
    PhiloxKeys keys;
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        keys.k0[round] = key[0] + 0x9E3779B9u * round;
        keys.k1[round] = key[1] + 0xBB67AE85u * round;
    }
    return keys;
}

// What rounds 1 to 3 of Philox make of the counter words that all elements share: c1 = high, c2 = step, c3 = purpose.
PreparedStep prepare(const Step &step, uint32_t high, uint32_t purpose, const PhiloxKeys &keys) {
    const uint64_t p1 = (uint64_t)step.step * PHILOX_M1;
    const uint32_t c0 = (uint32_t)(p1 >> 32) ^ high ^ keys.k0[0], c1 = (uint32_t)p1;
    const uint64_t p0 = (uint64_t)c0 * PHILOX_M0;
    return {step, purpose ^ keys.k1[0], c1 ^ keys.k0[1], (uint32_t)(p0 >> 32) ^ keys.k1[1], (uint32_t)p0 ^ keys.k1[2]};
}

// The Philox calls of an operation on signs: one for rounding bits, then one for each byte that an element needs.
int64_t num_sign_calls(const Job &job) { return 1 + (job.operation == UPDATE_SIGNS ? job.num_rows : 1); }

void prepare_sign_calls(const Job &job, uint32_t high, const PhiloxKeys &keys, PreparedStep *calls) {
    const int first = job.operation == UPDATE_SIGNS ? 0 : job.direction >> 3;
    calls[0] = prepare(*job.steps, high, PURPOSE_SIGN_ROUNDING, keys);
    for (int n = 1; n < num_sign_calls(job); ++n) calls[n] = prepare(*job.steps, high, PURPOSE_SIGNS + first + n - 1, keys);
}

// A part of a job on which the upper half of the counter is constant, and the chunks of it that threads take in turns.
struct Region {
    const Job &job;
    const PhiloxKeys &keys;
    const PreparedStep *steps;
    RangeKernel run;
    uint64_t lo, hi, chunk;  // chunks are aligned in the flat index, so the blocks in them are whole
    uint64_t next;           // start of the next chunk to take
};

// One thread's work. Chunks are taken, not dealt: a thread that the machine holds up does not hold up the others.
void work(void *data) {
    Region &r = *(Region *)data;
    // Rounding to nearest and subnormal numbers whatever this thread's mode: some libraries switch it to flush-to-zero.
    fenv_t environment;
    fegetenv(&environment);
    fesetenv(FE_DFL_ENV);
    for (;;) {
        const uint64_t at = __atomic_fetch_add(&r.next, r.chunk, __ATOMIC_RELAXED);
        if (at >= r.hi) break;
        r.run(r.job, r.keys, r.steps, at < r.lo ? r.lo : at, r.hi - at < r.chunk ? r.hi : at + r.chunk);
    }
    fesetenv(&environment);
}

void *work_in_thread(void *data) {
    work(data);
    return nullptr;
}

// Where no OpenMP runtime was found: threads that live as long as the job. One that cannot be started is done without.
void run_in_own_threads(Region &region, unsigned num_threads) {
    pthread_t *threads = (pthread_t *)malloc(num_threads * sizeof(pthread_t));
    unsigned started = 0;
    while (threads && started + 1 < num_threads &&
           !pthread_create(&threads[started], nullptr, work_in_thread, &region))
        ++started;
    work(&region);
    for (unsigned i = 0; i < started; ++i) pthread_join(threads[i], nullptr);
    free(threads);
}

// In element-steps: some 50 us, so that neither taking a chunk nor waiting for the last one costs.
constexpr uint64_t CHUNK_WORK = 1 << 15;
constexpr uint64_t MIN_CHUNK = 1 << 9;

void run_region(Region &region) {
    const uint64_t steps = region.job.num_steps;
    region.chunk = CHUNK_WORK;
    while (region.chunk > MIN_CHUNK && region.chunk * steps > CHUNK_WORK) region.chunk /= 2;
    region.next = region.lo & ~(region.chunk - 1);
    const uint64_t useful = (region.hi - region.lo) / region.chunk;
    const uint64_t allowed = region.job.num_threads;
    const unsigned num_threads = useful < allowed ? useful : allowed;
    if (num_threads <= 1) {
        work(&region);
    } else if (region.job.parallel_region) {
        region.job.parallel_region(work, &region, num_threads, 0);
    } else {
        run_in_own_threads(region, num_threads);
    }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Size of a Job, for Python to compare with its own.
EXPORT int64_t zo_job_size() { return sizeof(Job); }

// Name of variant i, or null past the last.
EXPORT const char *zo_variant_name(int32_t i) { return i < NUM_VARIANTS ? VARIANTS[i].name : nullptr; }

// Whether this machine can run variant i.
EXPORT int32_t zo_variant_supported(int32_t i) { return VARIANTS[i].supported(); }

// Runs a job. Returns 0, or 1 if memory ran out.
EXPORT int32_t zo_run(const Job *job) {
    const PhiloxKeys keys = expand(job->key);
    const int64_t num_prepared = is_of_signs(job->operation) ? num_sign_calls(*job) : job->num_steps;
    PreparedStep *steps = (PreparedStep *)malloc(num_prepared * sizeof(PreparedStep));
    if (!steps) return 1;
    const uint64_t stop = job->start + job->numel;
    const int shift = 32 + counter_shift(job->operation);
    for (uint64_t lo = job->start; lo < stop;) {
        const uint64_t high = lo >> shift, boundary = (high + 1) << shift;
        const uint64_t hi = stop < boundary ? stop : boundary;
        if (is_of_signs(job->operation))
            prepare_sign_calls(*job, (uint32_t)high, keys, steps);
        else
            for (int64_t i = 0; i < job->num_steps; ++i) steps[i] = prepare(job->steps[i], (uint32_t)high, 0, keys);
        Region region = {*job, keys, steps, VARIANTS[job->simd].run, lo, hi, 0, 0};
        run_region(region);
        lo = hi;
    }
    free(steps);
    return 0;
}
