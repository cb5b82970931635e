/* What the compiled loops of the CPU engine share: bits of floats, an exponential, instruction sets, threads.

   Plain C without Python or torch, so that it builds in a second wherever there is a compiler. No branches in the
   functions below: loops over them become vector instructions. */

#ifndef MHMOE_VECTOR_H
#define MHMOE_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* In front of a loop: it adds up, or finds the largest or smallest, in any order. A compiler that knows no OpenMP
   ignores them, and its loops are slower. */
#define SUM(variable) _Pragma(TEXT(omp simd reduction(+ : variable)))
#define MAXIMUM(variable) _Pragma(TEXT(omp simd reduction(max : variable)))
#define MINIMUM(variable) _Pragma(TEXT(omp simd reduction(min : variable)))
#define TEXT(...) #__VA_ARGS__

INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* exp(x) for x <= 88, as 2^n exp(r) with |r| <= ln(2) / 2; 0 below -87. Right to 2 units in the last place. */
INLINE float exponential(float x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    float y = x < -87.0f ? -87.0f : x;
    float shifted = y * 1.44269504f + magic;
    float n = shifted - magic;
    float r = y - n * 0.693359375f + n * 2.12194440e-4f; /* ln(2) in two parts */
    float series = 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    series *= from_bits((to_bits(shifted) << 23) + 0x3f800000);
    return x < -87.0f ? 0.0f : series;
}

/* DEFINE(cpu, target) once for every instruction set that this compiler can aim at; OF_THIS_CPU(name) is the best
   `name_cpu` that this processor runs. */
#if defined(__x86_64__) && defined(__GNUC__)
#define DEFINE_FOR_CPUS(DEFINE)                                                                                        \
    DEFINE(any, )                                                                                                      \
    DEFINE(avx2, __attribute__((target("avx2,fma"))))                                                                  \
    DEFINE(avx512, __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))))
#define OF_THIS_CPU(name)                                                                                              \
    (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&  \
             __builtin_cpu_supports("avx512vl")                                                                        \
         ? name##_avx512                                                                                               \
     : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? name##_avx2                                   \
                                                                       : name##_any)
#else
#define DEFINE_FOR_CPUS(DEFINE) DEFINE(any, )
#define OF_THIS_CPU(name) name##_any
#endif

/* Rows on the threads of torch's own OpenMP runtime, which are handed over by address: a second runtime would compete
   with it. */
typedef void (*rows_t)(const void *work, int64_t start, int64_t stop);
typedef void (*parallel_t)(void (*)(void *), void *, unsigned, unsigned);
typedef int (*number_t)(void);

typedef struct {
    parallel_t parallel;
    number_t thread, num_team_threads;
} openmp_t;

typedef struct {
    const void *work;
    rows_t rows;
    int64_t num_rows;
    const openmp_t *openmp;
} team_t;

static void run_member(void *argument) {
    const team_t *team = (const team_t *)argument;
    int64_t number = team->openmp->thread(), total = team->openmp->num_team_threads();
    team->rows(team->work, team->num_rows * number / total, team->num_rows * (number + 1) / total);
}

static void for_rows(rows_t rows, const void *work, int64_t num_rows, int num_threads, const openmp_t *openmp) {
    team_t team = {work, rows, num_rows, openmp};
    if (num_threads > 1)
        openmp->parallel(run_member, &team, (unsigned)num_threads, 0);
    else
        rows(work, 0, num_rows);
}

#endif
