/* GELU and SwiGLU of experts, forward and backward, in one pass over memory each: an optional speed-up on CPUs.

   activations.py loads it, and does the same with torch's own operations where it is absent.

   GELU is the exact one, x * cdf(x) with the normal distribution's cdf(x) = 1/2 + x P(x^2) / Q(x^2), which is 0 and 1
   beyond +-5.2. P and Q were fitted to the smallest largest error (4.3e-10, by iteratively reweighted least squares);
   in float32 the cdf is right to 2.2e-7. */

#include "vector.h"

INLINE float load_float(const float *p) { return *p; }
INLINE void store_float(float *p, float value) { *p = value; }
INLINE float load_bfloat16(const uint16_t *p) { return from_bits((uint32_t)*p << 16); }
INLINE void store_bfloat16(uint16_t *p, float value) {
    uint32_t bits = to_bits(value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; /* to nearest, ties to even */
    *p = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
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

/* Rows of an expert: pre-activations [num_rows, width], or [num_rows, 2 width] with gate and up side by side. Backward,
   every row has a weight, and <dhidden, hidden> of every row goes to product. */
typedef struct {
    const void *pre;
    void *dhidden, *hidden, *dpre;
    const float *weight;
    float *product;
    int64_t width;
} work_t;

/* One hidden value. Backward: hidden again, the gradient times weight, and what it adds to product. */
#define DEFINE_VALUE(T)                                                                                                \
    INLINE void gelu_##T(const T##_t *pre, T##_t *hidden) {                                                            \
        float x = load_##T(pre);                                                                                       \
        store_##T(hidden, x * normal_cdf(x));                                                                          \
    }                                                                                                                  \
    INLINE float gelu_backward_##T(const T##_t *pre, T##_t *dhidden, T##_t *hidden, float weight) {                    \
        float x = load_##T(pre), d = load_##T(dhidden), cdf = normal_cdf(x);                                           \
        store_##T(hidden, x * cdf);                                                                                    \
        store_##T(dhidden, weight * d * (cdf + x * normal_density(x)));                                                \
        return d * (x * cdf);                                                                                          \
    }                                                                                                                  \
    INLINE void swiglu_##T(const T##_t *gate_p, const T##_t *up, T##_t *hidden) {                                      \
        float gate = load_##T(gate_p);                                                                                 \
        store_##T(hidden, gate * sigmoid(gate) * load_##T(up));                                                        \
    }                                                                                                                  \
    INLINE float swiglu_backward_##T(const T##_t *gate_p, const T##_t *up_p, const T##_t *dhidden, T##_t *hidden,      \
                                     T##_t *dgate, T##_t *dup, float weight) {                                         \
        float gate = load_##T(gate_p), up = load_##T(up_p), d = load_##T(dhidden);                                     \
        float s = sigmoid(gate), silu = gate * s;                                                                      \
        store_##T(hidden, silu * up);                                                                                  \
        store_##T(dgate, weight * d * up * (s + silu * (1.0f - s)));                                                   \
        store_##T(dup, weight * d * silu);                                                                             \
        return d * (silu * up);                                                                                        \
    }

#define DEFINE_ROWS(T, CPU, TARGET)                                                                                    \
    TARGET static void gelu_row_##T##_##CPU(const T##_t *restrict pre, T##_t *restrict hidden, int64_t width) {        \
        for (int64_t i = 0; i < width; i++) gelu_##T(pre + i, hidden + i);                                             \
    }                                                                                                                  \
    TARGET static float gelu_backward_row_##T##_##CPU(const T##_t *restrict pre, T##_t *restrict dhidden,              \
                                                      T##_t *restrict hidden, float weight, int64_t width) {           \
        float product = 0.0f;                                                                                          \
        SUM(product)                                                                                                   \
        for (int64_t i = 0; i < width; i++)                                                                            \
            product += gelu_backward_##T(pre + i, dhidden + i, hidden + i, weight);                                    \
        return product;                                                                                                \
    }                                                                                                                  \
    TARGET static void swiglu_row_##T##_##CPU(const T##_t *restrict gate, const T##_t *restrict up,                    \
                                              T##_t *restrict hidden, int64_t width) {                                 \
        for (int64_t i = 0; i < width; i++) swiglu_##T(gate + i, up + i, hidden + i);                                  \
    }                                                                                                                  \
    TARGET static float swiglu_backward_row_##T##_##CPU(                                                               \
        const T##_t *restrict gate, const T##_t *restrict up, const T##_t *restrict dhidden, T##_t *restrict hidden,   \
        T##_t *restrict dgate, T##_t *restrict dup, float weight, int64_t width) {                                     \
        float product = 0.0f;                                                                                          \
        SUM(product)                                                                                                   \
        for (int64_t i = 0; i < width; i++)                                                                            \
            product += swiglu_backward_##T(gate + i, up + i, dhidden + i, hidden + i, dgate + i, dup + i, weight);     \
        return product;                                                                                                \
    }                                                                                                                  \
    static void gelu_forward_##T##_##CPU(const void *work, int64_t start, int64_t stop) {                              \
        const work_t *w = (const work_t *)work;                                                                        \
        int64_t f = w->width, n = (stop - start) * f;                                                                  \
        gelu_row_##T##_##CPU((const T##_t *)w->pre + start * f, (T##_t *)w->hidden + start * f, n);                    \
    }                                                                                                                  \
    static void gelu_backward_##T##_##CPU(const void *work, int64_t start, int64_t stop) {                             \
        const work_t *w = (const work_t *)work;                                                                        \
        for (int64_t r = start, f = w->width; r < stop; r++)                                                           \
            w->product[r] = gelu_backward_row_##T##_##CPU((const T##_t *)w->pre + r * f, (T##_t *)w->dhidden + r * f,  \
                                                          (T##_t *)w->hidden + r * f, w->weight[r], f);                \
    }                                                                                                                  \
    static void swiglu_forward_##T##_##CPU(const void *work, int64_t start, int64_t stop) {                            \
        const work_t *w = (const work_t *)work;                                                                        \
        for (int64_t r = start, f = w->width; r < stop; r++) {                                                         \
            const T##_t *gate = (const T##_t *)w->pre + 2 * r * f;                                                     \
            swiglu_row_##T##_##CPU(gate, gate + f, (T##_t *)w->hidden + r * f, f);                                     \
        }                                                                                                              \
    }                                                                                                                  \
    static void swiglu_backward_##T##_##CPU(const void *work, int64_t start, int64_t stop) {                           \
        const work_t *w = (const work_t *)work;                                                                        \
        for (int64_t r = start, f = w->width; r < stop; r++) {                                                         \
            const T##_t *gate = (const T##_t *)w->pre + 2 * r * f;                                                     \
            T##_t *dgate = (T##_t *)w->dpre + 2 * r * f;                                                               \
            w->product[r] =                                                                                            \
                swiglu_backward_row_##T##_##CPU(gate, gate + f, (const T##_t *)w->dhidden + r * f,                     \
                                                (T##_t *)w->hidden + r * f, dgate, dgate + f, w->weight[r], f);        \
        }                                                                                                              \
    }

typedef float float_t;
typedef uint16_t bfloat16_t;

DEFINE_VALUE(float)
DEFINE_VALUE(bfloat16)
#define DEFINE_TYPES(CPU, TARGET) DEFINE_ROWS(float, CPU, TARGET) DEFINE_ROWS(bfloat16, CPU, TARGET)
DEFINE_FOR_CPUS(DEFINE_TYPES)

/* Of the sources that this was made of (setup.py). */
int mhmoe_checksum(void) { return CHECKSUM; }

/* An activation over [num_rows, width] hidden values. */
void mhmoe_activate(int is_glu, int is_bfloat16, const void *pre, void *hidden, int64_t num_rows, int64_t width,
                           int num_threads, const openmp_t *openmp) {
    work_t work = {pre, 0, hidden, 0, 0, 0, width};
    rows_t rows = is_glu ? (is_bfloat16 ? OF_THIS_CPU(swiglu_forward_bfloat16) : OF_THIS_CPU(swiglu_forward_float))
                         : (is_bfloat16 ? OF_THIS_CPU(gelu_forward_bfloat16) : OF_THIS_CPU(gelu_forward_float));
    for_rows(rows, &work, num_rows, num_threads, openmp);
}

/* Its gradient, which for GELU takes the place of dhidden, and for SwiGLU goes to dpre; fills hidden and product. */
void mhmoe_activate_backward(int is_glu, int is_bfloat16, const void *pre, void *dhidden, void *hidden,
                                    void *dpre, const float *weight, float *product, int64_t num_rows, int64_t width,
                                    int num_threads, const openmp_t *openmp) {
    work_t work = {pre, dhidden, hidden, dpre, weight, product, width};
    rows_t rows = is_glu ? (is_bfloat16 ? OF_THIS_CPU(swiglu_backward_bfloat16) : OF_THIS_CPU(swiglu_backward_float))
                         : (is_bfloat16 ? OF_THIS_CPU(gelu_backward_bfloat16) : OF_THIS_CPU(gelu_backward_float));
    for_rows(rows, &work, num_rows, num_threads, openmp);
}
