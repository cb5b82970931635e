/* GELU and SwiGLU of experts, forward and backward, in one pass over memory each: an optional speed-up on CPUs.

   Plain C without Python or torch, so that it builds in a second wherever there is a compiler; activations.py loads it,
   and does the same with torch's own operations where it is absent.

   GELU is the exact one, x * cdf(x) with the normal distribution's cdf(x) = 1/2 + x P(x^2) / Q(x^2), which is 0 and 1
   beyond +-5.2. P and Q were fitted to the smallest largest error (4.3e-10, by iteratively reweighted least squares);
   in float32 the cdf is right to 2.2e-7. */

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* No branches anywhere below: loops over these become vector instructions. */
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

INLINE float normal_cdf(float x) {
    float y = x < -5.2f ? -5.2f : x;
    y = y > 5.2f ? 5.2f : y;
    float s = y * y;
    float p = -6.298221407e-11f;
    p = p * s + 4.827018003e-08f;
    p = p * s + 8.118181197e-06f;
    p = p * s + 1.667961798e-04f;
    p = p * s + 4.765785484e-03f;
    p = p * s + 3.255317813e-02f;
    p = p * s + 3.989422835e-01f;
    float q = 1.880628072e-06f;
    q = q * s + 7.975564445e-05f;
    q = q * s + 1.908399369e-03f;
    q = q * s + 2.832347354e-02f;
    q = q * s + 2.482654474e-01f;
    q = q * s + 1.0f;
    float cdf = 0.5f + y * (p / q);
    /* Exactly: what rounding leaves would be multiplied by a large x. */
    cdf = x < -5.2f ? 0.0f : cdf;
    return x > 5.2f ? 1.0f : cdf;
}

INLINE float normal_density(float x) { return 0.39894228f * exponential(-0.5f * x * x); }

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(x < -87.0f ? 87.0f : -x)); }

/* Rows of an expert: pre-activations [num_rows, width], or [num_rows, 2 width] with gate and up side by side. */
typedef struct {
    const void *pre;
    void *dhidden, *hidden, *dpre;
    int64_t num_rows, width;
    int kind;
} work_t;

#define DEFINE(T, CPU, TARGET)                                                                                         \
    TARGET static void gelu_##T##_##CPU(const T##_t *restrict pre, T##_t *restrict hidden, int64_t n) {                \
        for (int64_t i = 0; i < n; i++) {                                                                              \
            float x = load_##T(pre + i);                                                                               \
            store_##T(hidden + i, x * normal_cdf(x));                                                                  \
        }                                                                                                              \
    }                                                                                                                  \
    TARGET static void gelu_backward_##T##_##CPU(const T##_t *restrict pre, T##_t *restrict dhidden,                   \
                                                 T##_t *restrict hidden, int64_t n) {                                  \
        for (int64_t i = 0; i < n; i++) {                                                                              \
            float x = load_##T(pre + i), cdf = normal_cdf(x);                                                          \
            store_##T(hidden + i, x * cdf);                                                                            \
            store_##T(dhidden + i, load_##T(dhidden + i) * (cdf + x * normal_density(x)));                             \
        }                                                                                                              \
    }                                                                                                                  \
    TARGET static void swiglu_##T##_##CPU(const T##_t *restrict pre, T##_t *restrict hidden, int64_t width) {          \
        for (int64_t i = 0; i < width; i++) {                                                                          \
            float gate = load_##T(pre + i);                                                                            \
            store_##T(hidden + i, gate * sigmoid(gate) * load_##T(pre + width + i));                                   \
        }                                                                                                              \
    }                                                                                                                  \
    TARGET static void swiglu_backward_##T##_##CPU(const T##_t *restrict pre, const T##_t *restrict dhidden,           \
                                                   T##_t *restrict hidden, T##_t *restrict dpre, int64_t width) {      \
        for (int64_t i = 0; i < width; i++) {                                                                          \
            float gate = load_##T(pre + i), up = load_##T(pre + width + i), d = load_##T(dhidden + i);                 \
            float s = sigmoid(gate), silu = gate * s;                                                                  \
            store_##T(hidden + i, silu * up);                                                                          \
            store_##T(dpre + i, d * up * (s + silu * (1.0f - s)));                                                     \
            store_##T(dpre + width + i, d * silu);                                                                     \
        }                                                                                                              \
    }                                                                                                                  \
    static void rows_##T##_##CPU(const work_t *w, int64_t start, int64_t stop) {                                       \
        int64_t f = w->width, n = (stop - start) * f;                                                                  \
        const T##_t *pre = (const T##_t *)w->pre;                                                                      \
        T##_t *hidden = (T##_t *)w->hidden, *dhidden = (T##_t *)w->dhidden, *dpre = (T##_t *)w->dpre;                  \
        if (w->kind == 0) gelu_##T##_##CPU(pre + start * f, hidden + start * f, n);                                    \
        if (w->kind == 1) gelu_backward_##T##_##CPU(pre + start * f, dhidden + start * f, hidden + start * f, n);      \
        for (int64_t r = start; r < stop && w->kind == 2; r++) swiglu_##T##_##CPU(pre + 2 * r * f, hidden + r * f, f); \
        for (int64_t r = start; r < stop && w->kind == 3; r++)                                                         \
            swiglu_backward_##T##_##CPU(pre + 2 * r * f, dhidden + r * f, hidden + r * f, dpre + 2 * r * f, f);        \
    }

typedef float float_t;
typedef uint16_t bfloat16_t;

DEFINE(float, any, )
DEFINE(bfloat16, any, )
#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
DEFINE(float, avx2, AVX2)
DEFINE(bfloat16, avx2, AVX2)
DEFINE(float, avx512, AVX512)
DEFINE(bfloat16, avx512, AVX512)
#endif

typedef void (*rows_t)(const work_t *, int64_t, int64_t);

static rows_t rows_of_this_cpu(int is_bfloat16) {
#ifdef X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return is_bfloat16 ? rows_bfloat16_avx512 : rows_float_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return is_bfloat16 ? rows_bfloat16_avx2 : rows_float_avx2;
#endif
    return is_bfloat16 ? rows_bfloat16_any : rows_float_any;
}

/* The threads are those of torch's own OpenMP runtime, handed over by address: a second runtime would compete with it. */
typedef void (*parallel_t)(void (*)(void *), void *, unsigned, unsigned);
typedef int (*number_t)(void);

typedef struct {
    const work_t *work;
    rows_t rows;
    number_t thread, num_threads;
} team_t;

static void run_member(void *argument) {
    const team_t *team = (const team_t *)argument;
    int64_t number = team->thread(), total = team->num_threads(), rows = team->work->num_rows;
    team->rows(team->work, rows * number / total, rows * (number + 1) / total);
}

/* One activation over [num_rows, width] hidden values. kind: 0 GELU, 1 its gradient (in place of dhidden), 2 SwiGLU,
   3 its gradient. Gradients fill hidden as well. parallel may be null: then this thread does all. */
void mhmoe_activation(int kind, int is_bfloat16, const void *pre, void *dhidden, void *hidden, void *dpre,
                      int64_t num_rows, int64_t width, int num_threads, parallel_t parallel, number_t thread,
                      number_t num_team_threads) {
    work_t work = {pre, dhidden, hidden, dpre, num_rows, width, kind};
    team_t team = {&work, rows_of_this_cpu(is_bfloat16), thread, num_team_threads};
    if (parallel && num_threads > 1)
        parallel(run_member, &team, (unsigned)num_threads, 0);
    else
        team.rows(&work, 0, num_rows);
}
