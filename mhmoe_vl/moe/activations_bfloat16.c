/* GELU in bfloat16 on processors that multiply bfloat16 (AVX-512), where the plain loops of activations.c would take a
   tenth of a step: half of a matmul's time is twice as much of it.

   Two tables of 16 pieces, which fit into four registers each, in place of quotients and exponentials: for |x| up to 5,
   cdf(|x|) - 1/2 and the derivative of GELU at |x|, minus 1/2, as cubic polynomials of the distance u from the middle of
   a piece n, u = 3 |x| - n. The last piece is 1/2 exactly. Both are fitted to a small largest error (reweighted least
   squares): 2.2e-6 for the cdf, 1.6e-5 for the derivative, a hundredth of what rounding to bfloat16 leaves. */

#include "activations.h"

#ifdef HAS_AVX512_BF16

#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define LANES static inline __attribute__((always_inline)) TARGET

static const float CDF[4][16] = {
    {0.0f, 1.305572115e-01f, 2.475052880e-01f, 3.413428098e-01f, 4.087877089e-01f, 4.522095038e-01f,
     4.772502959e-01f, 4.901852691e-01f, 4.961701204e-01f, 4.986504228e-01f, 4.995711078e-01f, 4.998772080e-01f,
     4.999683570e-01f, 4.999926659e-01f, 4.999984720e-01f, 5.000000000e-01f},
    {1.329821961e-01f, 1.257934670e-01f, 1.064824863e-01f, 8.065742196e-02f, 5.467081152e-02f, 3.315966283e-02f,
     1.799727773e-02f, 8.740631867e-03f, 3.798530150e-03f, 1.477140882e-03f, 5.139942206e-04f, 1.600370163e-04f,
     4.458656095e-05f, 1.111485356e-05f, 2.479214747e-06f, 0.0f},
    {-1.243261577e-05f, -6.942070489e-03f, -1.176168964e-02f, -1.338075958e-02f, -1.211455071e-02f, -9.206082473e-03f,
     -6.012761373e-03f, -3.418296165e-03f, -1.704339566e-03f, -7.489077492e-04f, -2.909845852e-04f, -1.002098755e-04f,
     -3.064147950e-05f, -8.329986604e-06f, -2.015404473e-06f, 0.0f},
    {-2.433258317e-03f, -2.059354248e-03f, -1.093314483e-03f, -6.181858464e-06f, 7.779677740e-04f, 1.084123859e-03f,
     9.963596229e-04f, 7.193712712e-04f, 4.314760670e-04f, 2.205617463e-04f, 9.744585867e-05f, 3.753127977e-05f,
     1.267347690e-05f, 3.767073611e-06f, 9.885173924e-07f, 0.0f},
};
static const float DERIVATIVE[4][16] = {
    {0.0f, 2.563446676e-01f, 4.604614958e-01f, 5.833077369e-01f, 6.274675020e-01f, 6.180080501e-01f,
     5.852361093e-01f, 5.513720824e-01f, 5.265600985e-01f, 5.119456503e-01f, 5.047114777e-01f, 5.016377673e-01f,
     5.005034385e-01f, 5.001371678e-01f, 5.000331820e-01f, 5.000000000e-01f},
    {2.659701162e-01f, 2.376066370e-01f, 1.656402362e-01f, 8.066152841e-02f, 1.215365181e-02f, -2.578807118e-02f,
     -3.599430939e-02f, -3.010809424e-02f, -1.941665794e-02f, -1.034140174e-02f, -4.684051845e-03f, -1.832039509e-03f,
     -6.244271143e-04f, -1.865609232e-04f, -4.905798673e-05f, 0.0f},
    {-7.444588381e-05f, -2.690788264e-02f, -4.170458539e-02f, -4.008034707e-02f, -2.695235245e-02f, -1.135982915e-02f,
     -1.381971994e-04f, 4.813632663e-03f, 5.214585452e-03f, 3.693083253e-03f, 2.043586220e-03f, 9.354700308e-04f,
     3.636368532e-04f, 1.217853579e-04f, 3.545713208e-05f, 0.0f},
    {-9.674624274e-03f, -7.474527814e-03f, -2.148715333e-03f, 2.931676878e-03f, 5.291651010e-03f, 4.718020098e-03f,
     2.670245207e-03f, 7.412090444e-04f, -3.216467865e-04f, -5.955060499e-04f, -4.718409002e-04f, -2.699747768e-04f,
     -1.236336557e-04f, -4.720591430e-05f, -1.534470476e-05f, 0.0f},
};

typedef struct {
    __m512 coefficient[4];
} table_t;

LANES table_t load_table(const float table[4][16]) {
    table_t t;
    for (int k = 0; k < 4; k++) t.coefficient[k] = _mm512_loadu_ps(table[k]);
    return t;
}

/* Lanes of piece n and distance u from its middle. */
LANES __m512 look_up(const table_t *t, __m512i n, __m512 u) {
    __m512 y = _mm512_permutexvar_ps(n, t->coefficient[3]);
    for (int k = 2; k >= 0; k--) y = _mm512_fmadd_ps(y, u, _mm512_permutexvar_ps(n, t->coefficient[k]));
    return y;
}

/* 1/2 + y with the sign of x. */
LANES __m512 half_plus(__m512 y, __m512 x) {
    __m512i sign = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32((int)0x80000000));
    return _mm512_add_ps(_mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(y), sign)), _mm512_set1_ps(0.5f));
}

/* The piece of each lane, and the distance from its middle. NaN stays NaN in u. */
LANES __m512i piece(__m512 x, __m512 *u) {
    const __m512 magic = _mm512_set1_ps(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer, in the low bits */
    __m512 y = _mm512_min_ps(_mm512_set1_ps(5.0f), _mm512_abs_ps(x));
    __m512 shifted = _mm512_fmadd_ps(y, _mm512_set1_ps(3.0f), magic);
    *u = _mm512_fmsub_ps(y, _mm512_set1_ps(3.0f), _mm512_sub_ps(shifted, magic));
    return _mm512_castps_si512(shifted);
}

LANES __m512 load(const uint16_t *p, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

LANES void store(uint16_t *p, __mmask16 mask, __m512 value) {
    _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(value));
}

LANES __m512 load_biased(const uint16_t *pre, const uint16_t *bias, int64_t i, __mmask16 mask) {
    __m512 x = load(pre + i, mask);
    return bias ? _mm512_add_ps(x, load(bias + i, mask)) : x;
}

LANES void forward(const work_t *w, const table_t *cdf, int64_t row, int64_t i, __mmask16 mask) {
    __m512 x = load_biased((const uint16_t *)w->pre + row * w->width, (const uint16_t *)w->bias, i, mask), u;
    __m512i n = piece(x, &u);
    store((uint16_t *)w->hidden + row * w->width + i, mask, _mm512_mul_ps(x, half_plus(look_up(cdf, n, u), x)));
}

/* Returns the lanes' part of <dhidden, hidden>. */
LANES __m512 backward(const work_t *w, const table_t *cdf, const table_t *derivative, float *dbias, int64_t row,
                      int64_t i, __mmask16 mask) {
    uint16_t *dhidden = (uint16_t *)w->dhidden + row * w->width + i;
    __m512 x = load_biased((const uint16_t *)w->pre + row * w->width, (const uint16_t *)w->bias, i, mask), u;
    __m512i n = piece(x, &u);
    __m512 d = load(dhidden, mask), weight = _mm512_set1_ps(w->weight[row]);
    __m512 hidden = _mm512_mul_ps(x, half_plus(look_up(cdf, n, u), x));
    __m512 dx = _mm512_mul_ps(_mm512_mul_ps(weight, d), half_plus(look_up(derivative, n, u), x));
    store((uint16_t *)w->hidden + row * w->width + i, mask, _mm512_mul_ps(weight, hidden));
    store(dhidden, mask, dx);
    if (dbias)
        _mm512_mask_storeu_ps(dbias + i, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, dbias + i), dx));
    return _mm512_mul_ps(d, hidden);
}

LANES __mmask16 rest(int64_t width) { return (__mmask16)((1u << width % 16) - 1); }

TARGET static void forward_rows(const void *work, int64_t start, int64_t stop) {
    const work_t *w = (const work_t *)work;
    const table_t cdf = load_table(CDF);
    int64_t width = w->width, whole = width - width % 16, part = start * num_pieces(width);
    for (int64_t row = start; row < stop; row++) {
        for (int64_t first = 0; first < width; first += PIECE) {
            fetch_part(&w->ahead, part++);
            for (int64_t i = first; i < smaller(first + PIECE, whole); i += 16) forward(w, &cdf, row, i, 0xffff);
        }
        if (whole < width) forward(w, &cdf, row, whole, rest(width));
    }
}

TARGET static void backward_groups(const void *work, int64_t start, int64_t stop) {
    const work_t *w = (const work_t *)work;
    const table_t cdf = load_table(CDF), derivative = load_table(DERIVATIVE);
    int64_t width = w->width, whole = width - width % 16, part = start * GROUP_ROWS * num_pieces(width);
    for (int64_t group = start; group < stop; group++) {
        float *dbias = w->bias ? w->dbias + group * width : 0;
        if (dbias) memset(dbias, 0, (size_t)width * sizeof *dbias);
        for (int64_t row = group * GROUP_ROWS; row < smaller((group + 1) * GROUP_ROWS, w->num_rows); row++) {
            __m512 product = _mm512_setzero_ps();
            for (int64_t first = 0; first < width; first += PIECE) {
                fetch_part(&w->ahead, part++);
                for (int64_t i = first; i < smaller(first + PIECE, whole); i += 16)
                    product = _mm512_add_ps(product, backward(w, &cdf, &derivative, dbias, row, i, 0xffff));
            }
            if (whole < width)
                product = _mm512_add_ps(product, backward(w, &cdf, &derivative, dbias, row, whole, rest(width)));
            w->product[row] += _mm512_reduce_add_ps(product);
        }
    }
}

rows_t gelu_forward_avx512_bf16(void) { return forward_rows; }
rows_t gelu_backward_avx512_bf16(void) { return backward_groups; }

#endif
