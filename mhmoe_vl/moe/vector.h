/* What the compiled loops of the CPU engine share: floats and their bits, an exponential, instruction sets, threads.

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

/* Values in memory are of type T_t; all calculate in float. */
typedef float float_t;
typedef uint16_t bfloat16_t;

INLINE float load_float(const float *p) { return *p; }
INLINE void store_float(float *p, float value) { *p = value; }
INLINE float load_bfloat16(const uint16_t *p) { return from_bits((uint32_t)*p << 16); }
INLINE void store_bfloat16(uint16_t *p, float value) {
    uint32_t bits = to_bits(value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; /* to nearest, ties to even */
    *p = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
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

/* Memory that is needed next, weights of an expert, is fetched from far away bit by bit while other work goes on: part
   by part, each of so many cache lines. */
#define CACHE_LINE 64

typedef struct {
    const char *start;
    int64_t num_lines, num_lines_per_part;
} ahead_t;

INLINE ahead_t in_parts(const void *start, int64_t num_bytes, int64_t num_parts) {
    int64_t num_lines = num_parts > 0 ? (num_bytes + CACHE_LINE - 1) / CACHE_LINE : 0;
    return (ahead_t){(const char *)start, num_lines, num_lines ? (num_lines + num_parts - 1) / num_parts : 0};
}

INLINE void fetch(const char *line) {
#ifdef __GNUC__
    __builtin_prefetch(line, 0, 2);
#else
    (void)line;
#endif
}

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE void fetch_part(const ahead_t *ahead, int64_t part) {
    int64_t first = part * ahead->num_lines_per_part, end = smaller(first + ahead->num_lines_per_part, ahead->num_lines);
    for (int64_t line = first; line < end; line++) fetch(ahead->start + line * CACHE_LINE);
}

/* Sums over rows are taken in groups of this many, whose sums are added up afterwards: so they do not depend on threads. */
#define GROUP_ROWS 32

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

static inline void run_member(void *argument) {
    const team_t *team = (const team_t *)argument;
    int64_t number = team->openmp->thread(), total = team->openmp->num_team_threads();
    team->rows(team->work, team->num_rows * number / total, team->num_rows * (number + 1) / total);
}

static inline void for_rows(rows_t rows, const void *work, int64_t num_rows, int num_threads, const openmp_t *openmp) {
    team_t team = {work, rows, num_rows, openmp};
    if (num_threads > 1)
        openmp->parallel(run_member, &team, (unsigned)num_threads, 0);
    else
        rows(work, 0, num_rows);
}

#endif
