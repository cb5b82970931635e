/* GELU and SwiGLU of experts, forward and backward, in one pass over memory each: an optional speed-up on CPUs.

   activations.py loads it, and does the same with torch's own operations where it is absent.

   GELU is the exact one, x * cdf(x) with the normal distribution's cdf(x) = 1/2 + x P(x^2) / Q(x^2), which is 0 and 1
   beyond +-5.2. P and Q were fitted to the smallest largest error (4.3e-10, by iteratively reweighted least squares);
   in float32 the cdf is right to 2.2e-7. */

#include "activations.h"

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

/* A piece of a row. `has_bias` is known where they are called, so that no loop asks. */
INLINE float biased(const float *pre, const float *bias, int64_t i, int has_bias) {
    return has_bias ? pre[i] + bias[i] : pre[i];
}

INLINE void gelu_piece_float(const float *restrict pre, const float *restrict bias, float *restrict hidden, int64_t width,
                           int has_bias) {
    for (int64_t i = 0; i < width; i++) {
        float x = biased(pre, bias, i, has_bias);
        hidden[i] = x * normal_cdf(x);
    }
}

/* The gradient takes the place of dhidden. */
INLINE float gelu_backward_piece_float(const float *restrict pre, const float *restrict bias, float *restrict dhidden,
                                     float *restrict hidden, float *restrict dbias, float weight, int64_t width,
                                     int has_bias) {
    float product = 0.0f;
    SUM(product)
    for (int64_t i = 0; i < width; i++) {
        float x = biased(pre, bias, i, has_bias), d = dhidden[i], cdf = normal_cdf(x);
        float dx = weight * d * (cdf + x * normal_density(x));
        product += d * (x * cdf);
        hidden[i] = weight * (x * cdf);
        dhidden[i] = dx;
        if (has_bias) dbias[i] += dx;
    }
    return product;
}

INLINE void swiglu_piece_float(const float *restrict gate_pre, const float *restrict up_pre,
                             const float *restrict gate_bias, const float *restrict up_bias, float *restrict hidden,
                             int64_t width, int has_bias) {
    for (int64_t i = 0; i < width; i++) {
        float gate = biased(gate_pre, gate_bias, i, has_bias);
        hidden[i] = gate * sigmoid(gate) * biased(up_pre, up_bias, i, has_bias);
    }
}

INLINE float swiglu_backward_piece_float(const float *restrict gate_pre, const float *restrict up_pre,
                                       const float *restrict gate_bias, const float *restrict up_bias,
                                       const float *restrict dhidden, float *restrict hidden, float *restrict dgate,
                                       float *restrict dup, float *restrict dgate_bias, float *restrict dup_bias,
                                       float weight, int64_t width, int has_bias) {
    float product = 0.0f;
    SUM(product)
    for (int64_t i = 0; i < width; i++) {
        float gate = biased(gate_pre, gate_bias, i, has_bias), up = biased(up_pre, up_bias, i, has_bias);
        float d = dhidden[i], s = sigmoid(gate), silu = gate * s;
        float dg = weight * d * up * (s + silu * (1.0f - s)), du = weight * d * silu;
        product += d * (silu * up);
        hidden[i] = weight * (silu * up);
        dgate[i] = dg;
        dup[i] = du;
        if (has_bias) dgate_bias[i] += dg;
        if (has_bias) dup_bias[i] += du;
    }
    return product;
}

/* Pieces of rows in bfloat16 are widened to float, and results narrowed: loops over values of two sizes are slow. */
INLINE void widen(const uint16_t *restrict from, float *restrict to, int64_t num_values) {
    for (int64_t i = 0; i < num_values; i++) to[i] = load_bfloat16(from + i);
}

INLINE void narrow(const float *restrict from, uint16_t *restrict to, int64_t num_values) {
    for (int64_t i = 0; i < num_values; i++) store_bfloat16(to + i, from[i]);
}

INLINE void gelu_piece_bfloat16(const uint16_t *pre, const uint16_t *bias, uint16_t *hidden, int64_t n, int has_bias) {
    float x[PIECE], b[PIECE], h[PIECE];
    widen(pre, x, n);
    if (has_bias) widen(bias, b, n);
    gelu_piece_float(x, b, h, n, has_bias);
    narrow(h, hidden, n);
}

INLINE float gelu_backward_piece_bfloat16(const uint16_t *pre, const uint16_t *bias, uint16_t *dhidden,
                                          uint16_t *hidden, float *dbias, float weight, int64_t n, int has_bias) {
    float x[PIECE], b[PIECE], d[PIECE], h[PIECE];
    widen(pre, x, n);
    widen(dhidden, d, n);
    if (has_bias) widen(bias, b, n);
    float product = gelu_backward_piece_float(x, b, d, h, dbias, weight, n, has_bias);
    narrow(h, hidden, n);
    narrow(d, dhidden, n);
    return product;
}

INLINE void swiglu_piece_bfloat16(const uint16_t *gate, const uint16_t *up, const uint16_t *gate_bias,
                                  const uint16_t *up_bias, uint16_t *hidden, int64_t n, int has_bias) {
    float g[PIECE], u[PIECE], gb[PIECE], ub[PIECE], h[PIECE];
    widen(gate, g, n);
    widen(up, u, n);
    if (has_bias) widen(gate_bias, gb, n);
    if (has_bias) widen(up_bias, ub, n);
    swiglu_piece_float(g, u, gb, ub, h, n, has_bias);
    narrow(h, hidden, n);
}

INLINE float swiglu_backward_piece_bfloat16(const uint16_t *gate, const uint16_t *up, const uint16_t *gate_bias,
                                            const uint16_t *up_bias, const uint16_t *dhidden, uint16_t *hidden,
                                            uint16_t *dgate, uint16_t *dup, float *dgate_bias, float *dup_bias,
                                            float weight, int64_t n, int has_bias) {
    float g[PIECE], u[PIECE], gb[PIECE], ub[PIECE], d[PIECE], h[PIECE], dg[PIECE], du[PIECE];
    widen(gate, g, n);
    widen(up, u, n);
    widen(dhidden, d, n);
    if (has_bias) widen(gate_bias, gb, n);
    if (has_bias) widen(up_bias, ub, n);
    float product =
        swiglu_backward_piece_float(g, u, gb, ub, d, h, dg, du, dgate_bias, dup_bias, weight, n, has_bias);
    narrow(h, hidden, n);
    narrow(dg, dgate, n);
    narrow(du, dup, n);
    return product;
}

/* Rows `start` to `stop`; backward, groups of rows. */
#define DEFINE_ROWS(T, CPU, TARGET)                                                                                    \
    TARGET static void gelu_forward_##T##_##CPU(const void *work, int64_t start, int64_t stop) {                       \
        const work_t *w = (const work_t *)work;                                                                        \
        int64_t f = w->width, part = start * num_pieces(f);                                                            \
        for (int64_t r = start; r < stop; r++)                                                                         \
            for (int64_t i = 0; i < f; i += PIECE) {                                                                   \
                const T##_t *pre = (const T##_t *)w->pre + r * f + i, *bias = (const T##_t *)w->bias + i;              \
                T##_t *hidden = (T##_t *)w->hidden + r * f + i;                                                        \
                int64_t n = smaller(PIECE, f - i);                                                                     \
                fetch_part(&w->ahead, part++);                                                                         \
                if (w->bias)                                                                                           \
                    gelu_piece_##T(pre, bias, hidden, n, 1);                                                           \
                else                                                                                                   \
                    gelu_piece_##T(pre, bias, hidden, n, 0);                                                           \
            }                                                                                                          \
    }                                                                                                                  \
    TARGET static void swiglu_forward_##T##_##CPU(const void *work, int64_t start, int64_t stop) {                     \
        const work_t *w = (const work_t *)work;                                                                        \
        int64_t f = w->width, part = start * num_pieces(f);                                                            \
        for (int64_t r = start; r < stop; r++)                                                                         \
            for (int64_t i = 0; i < f; i += PIECE) {                                                                   \
                const T##_t *pre = (const T##_t *)w->pre + 2 * r * f + i, *bias = (const T##_t *)w->bias + i;          \
                T##_t *hidden = (T##_t *)w->hidden + r * f + i;                                                        \
                int64_t n = smaller(PIECE, f - i);                                                                     \
                fetch_part(&w->ahead, part++);                                                                         \
                if (w->bias)                                                                                           \
                    swiglu_piece_##T(pre, pre + f, bias, bias + f, hidden, n, 1);                                      \
                else                                                                                                   \
                    swiglu_piece_##T(pre, pre + f, bias, bias, hidden, n, 0);                                          \
            }                                                                                                          \
    }                                                                                                                  \
    TARGET static void gelu_backward_##T##_##CPU(const void *work, int64_t start, int64_t stop) {                      \
        const work_t *w = (const work_t *)work;                                                                        \
        int64_t f = w->width, part = start * GROUP_ROWS * num_pieces(f);                                               \
        for (int64_t group = start; group < stop; group++) {                                                           \
            if (w->bias) memset(w->dbias + group * f, 0, (size_t)f * sizeof *w->dbias);                                \
            for (int64_t r = group * GROUP_ROWS; r < smaller((group + 1) * GROUP_ROWS, w->num_rows); r++)              \
                for (int64_t i = 0; i < f; i += PIECE) {                                                               \
                    const T##_t *pre = (const T##_t *)w->pre + r * f + i, *bias = (const T##_t *)w->bias + i;          \
                    T##_t *dhidden = (T##_t *)w->dhidden + r * f + i, *hidden = (T##_t *)w->hidden + r * f + i;        \
                    float *dbias = w->dbias + group * f + i, weight = w->weight[r];                                    \
                    int64_t n = smaller(PIECE, f - i);                                                                 \
                    fetch_part(&w->ahead, part++);                                                                     \
                    w->product[r] += w->bias                                                                           \
                                         ? gelu_backward_piece_##T(pre, bias, dhidden, hidden, dbias, weight, n, 1)    \
                                         : gelu_backward_piece_##T(pre, bias, dhidden, hidden, dbias, weight, n, 0);   \
                }                                                                                                      \
        }                                                                                                              \
    }                                                                                                                  \
    TARGET static void swiglu_backward_##T##_##CPU(const void *work, int64_t start, int64_t stop) {                    \
        const work_t *w = (const work_t *)work;                                                                        \
        int64_t f = w->width, part = start * GROUP_ROWS * num_pieces(f);                                               \
        for (int64_t group = start; group < stop; group++) {                                                           \
            if (w->bias) memset(w->dbias + 2 * group * f, 0, (size_t)(2 * f) * sizeof *w->dbias);                      \
            for (int64_t r = group * GROUP_ROWS; r < smaller((group + 1) * GROUP_ROWS, w->num_rows); r++)              \
                for (int64_t i = 0; i < f; i += PIECE) {                                                               \
                    const T##_t *pre = (const T##_t *)w->pre + 2 * r * f + i, *bias = (const T##_t *)w->bias + i;      \
                    const T##_t *dhidden = (const T##_t *)w->dhidden + r * f + i;                                      \
                    T##_t *hidden = (T##_t *)w->hidden + r * f + i, *dpre = (T##_t *)w->dpre + 2 * r * f + i;          \
                    float *dbias = w->dbias + 2 * group * f + i, weight = w->weight[r];                                \
                    int64_t n = smaller(PIECE, f - i);                                                                 \
                    fetch_part(&w->ahead, part++);                                                                     \
                    w->product[r] +=                                                                                   \
                        w->bias ? swiglu_backward_piece_##T(pre, pre + f, bias, bias + f, dhidden, hidden, dpre,       \
                                                            dpre + f, dbias, dbias + f, weight, n, 1)                  \
                                : swiglu_backward_piece_##T(pre, pre + f, bias, bias, dhidden, hidden, dpre, dpre + f, \
                                                            dbias, dbias, weight, n, 0);                               \
                }                                                                                                      \
        }                                                                                                              \
    }

#define DEFINE_TYPES(CPU, TARGET) DEFINE_ROWS(float, CPU, TARGET) DEFINE_ROWS(bfloat16, CPU, TARGET)
DEFINE_FOR_CPUS(DEFINE_TYPES)

/* Of the sources that this was made of (setup.py). */
int mhmoe_checksum(void) { return CHECKSUM; }

/* An activation over [num_rows, width] hidden values. Meanwhile memory that is needed next is fetched. */
void mhmoe_activate(int is_glu, int is_bfloat16, const void *pre, const void *bias, void *hidden, int64_t num_rows,
                    int64_t width, const void *ahead, int64_t num_bytes_ahead, int num_threads, const openmp_t *openmp) {
    ahead_t in_pieces = in_parts(ahead, num_bytes_ahead, num_rows * num_pieces(width));
    work_t work = {pre, bias, 0, hidden, 0, 0, 0, 0, num_rows, width, in_pieces};
    rows_t rows = is_glu ? (is_bfloat16 ? OF_THIS_CPU(swiglu_forward_bfloat16) : OF_THIS_CPU(swiglu_forward_float))
                  : is_bfloat16 ? IF_AVX512_BF16(gelu_forward_avx512_bf16(), OF_THIS_CPU(gelu_forward_bfloat16))
                                : OF_THIS_CPU(gelu_forward_float);
    for_rows(rows, &work, num_rows, num_threads, openmp);
}

/* Its gradient, which for GELU takes the place of dhidden, and for SwiGLU goes to dpre. */
void mhmoe_activate_backward(int is_glu, int is_bfloat16, const void *pre, const void *bias, void *dhidden,
                             void *hidden, void *dpre, const float *weight, float *product, float *dbias,
                             int64_t num_rows, int64_t width, const void *ahead, int64_t num_bytes_ahead,
                             int num_threads, const openmp_t *openmp) {
    ahead_t in_pieces = in_parts(ahead, num_bytes_ahead, num_rows * num_pieces(width));
    work_t work = {pre, bias, dhidden, hidden, dpre, weight, product, dbias, num_rows, width, in_pieces};
    rows_t rows = is_glu ? (is_bfloat16 ? OF_THIS_CPU(swiglu_backward_bfloat16) : OF_THIS_CPU(swiglu_backward_float))
                  : is_bfloat16 ? IF_AVX512_BF16(gelu_backward_avx512_bf16(), OF_THIS_CPU(gelu_backward_bfloat16))
                                : OF_THIS_CPU(gelu_backward_float);
    for_rows(rows, &work, (num_rows + GROUP_ROWS - 1) / GROUP_ROWS, num_threads, openmp);
}
