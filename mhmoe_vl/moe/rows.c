/* How rows get to their expert and back, with what happens to them on the way: an optional speed-up on CPUs. rows.py
   loads it, and does the same with torch's own operations where it is absent. */

#include "vector.h"

/* Rows lie anywhere: they are fetched this many ahead. */
#define ROWS_AHEAD 4

/* Rows `number[0..num_numbers)` of from, one after the other in to, and zeros behind them up to num_rows. Then, if there
   is a bias: <row, bias> is added to product, and every group of rows has a row of dbias, the sum of weight * row. */
typedef struct {
    const void *from;
    const int64_t *number;
    void *to;
    const void *bias;
    const float *weight;
    float *product, *dbias;
    int64_t num_numbers, num_rows, width;
    ahead_t ahead;
} gather_t;

/* to[number[r]] = weight[r] * (from[r] + bias); weight and bias may be absent. */
typedef struct {
    const void *from, *bias;
    const float *weight;
    const int64_t *number;
    void *to;
    int64_t width;
} scatter_t;

/* to[r] = the sum of num_parts rows that follow each other. */
typedef struct {
    const void *from;
    void *to;
    int64_t num_parts, width;
} sum_t;

#define DEFINE_ROWS(T, CPU, TARGET)                                                                                    \
    TARGET static void gather_##T##_##CPU(const void *work, int64_t start, int64_t stop) {                             \
        const gather_t *w = (const gather_t *)work;                                                                    \
        int64_t num_bytes = w->width * (int64_t)sizeof(T##_t), last = smaller(stop, w->num_numbers);                   \
        for (int64_t r = start; r < stop; r++) {                                                                       \
            char *to = (char *)w->to + r * num_bytes;                                                                  \
            const char *from = (const char *)w->from;                                                                  \
            for (int64_t i = 0; r + ROWS_AHEAD < last && i < num_bytes; i += CACHE_LINE)                               \
                fetch(from + w->number[r + ROWS_AHEAD] * num_bytes + i);                                               \
            fetch_part(&w->ahead, r);                                                                                  \
            if (r < last)                                                                                              \
                memcpy(to, from + w->number[r] * num_bytes, (size_t)num_bytes);                                        \
            else                                                                                                       \
                memset(to, 0, (size_t)num_bytes);                                                                      \
        }                                                                                                              \
    }                                                                                                                  \
    TARGET static float weighted_##T##_##CPU(const T##_t *restrict row, const T##_t *restrict bias, float weight,      \
                                             float *restrict dbias, int64_t width) {                                   \
        float product = 0.0f;                                                                                          \
        SUM(product)                                                                                                   \
        for (int64_t i = 0; i < width; i++) {                                                                          \
            product += load_##T(row + i) * load_##T(bias + i);                                                         \
            dbias[i] += weight * load_##T(row + i);                                                                    \
        }                                                                                                              \
        return product;                                                                                                \
    }                                                                                                                  \
    TARGET static void gather_gradient_##T##_##CPU(const void *work, int64_t start, int64_t stop) {                    \
        const gather_t *w = (const gather_t *)work;                                                                    \
        for (int64_t group = start; group < stop; group++) {                                                           \
            int64_t first = group * GROUP_ROWS, end = smaller(first + GROUP_ROWS, w->num_rows);                        \
            gather_##T##_##CPU(work, first, end);                                                                      \
            if (!w->bias) continue;                                                                                    \
            float *dbias = w->dbias + group * w->width;                                                                \
            memset(dbias, 0, (size_t)w->width * sizeof *dbias);                                                        \
            for (int64_t r = first; r < smaller(end, w->num_numbers); r++)                                             \
                w->product[r] += weighted_##T##_##CPU((const T##_t *)w->to + r * w->width, (const T##_t *)w->bias,     \
                                                      w->weight[r], dbias, w->width);                                  \
        }                                                                                                              \
    }                                                                                                                  \
    TARGET static void scatter_##T##_##CPU(const void *work, int64_t start, int64_t stop) {                            \
        const scatter_t *w = (const scatter_t *)work;                                                                  \
        const T##_t *bias = (const T##_t *)w->bias;                                                                    \
        for (int64_t r = start, width = w->width; r < stop; r++) {                                                     \
            const T##_t *restrict from = (const T##_t *)w->from + r * width;                                           \
            T##_t *restrict to = (T##_t *)w->to + w->number[r] * width;                                                \
            float weight = w->weight ? w->weight[r] : 1.0f;                                                            \
            if (bias)                                                                                                  \
                for (int64_t i = 0; i < width; i++)                                                                    \
                    store_##T(to + i, weight * (load_##T(from + i) + load_##T(bias + i)));                             \
            else                                                                                                       \
                for (int64_t i = 0; i < width; i++) store_##T(to + i, weight * load_##T(from + i));                    \
        }                                                                                                              \
    }                                                                                                                  \
    TARGET static void sum_##T##_##CPU(const void *work, int64_t start, int64_t stop) {                                \
        const sum_t *w = (const sum_t *)work;                                                                          \
        for (int64_t r = start, width = w->width; r < stop; r++) {                                                     \
            const T##_t *restrict from = (const T##_t *)w->from + r * w->num_parts * width;                            \
            T##_t *restrict to = (T##_t *)w->to + r * width;                                                           \
            for (int64_t i = 0; i < width; i++) {                                                                      \
                float sum = load_##T(from + i);                                                                        \
                for (int64_t part = 1; part < w->num_parts; part++) sum += load_##T(from + part * width + i);          \
                store_##T(to + i, sum);                                                                                \
            }                                                                                                          \
        }                                                                                                              \
    }

#define DEFINE_TYPES(CPU, TARGET) DEFINE_ROWS(float, CPU, TARGET) DEFINE_ROWS(bfloat16, CPU, TARGET)
DEFINE_FOR_CPUS(DEFINE_TYPES)

void mhmoe_gather(int is_bfloat16, const void *from, const int64_t *number, void *to, const void *bias,
                  const float *weight, float *product, float *dbias, int64_t num_numbers, int64_t num_rows,
                  int64_t width, const void *ahead, int64_t num_bytes_ahead, int num_threads, const openmp_t *openmp) {
    gather_t work = {from,        number,   to,    bias, weight, product, dbias,
                     num_numbers, num_rows, width, in_parts(ahead, num_bytes_ahead, num_rows)};
    rows_t rows = is_bfloat16 ? OF_THIS_CPU(gather_gradient_bfloat16) : OF_THIS_CPU(gather_gradient_float);
    for_rows(rows, &work, (num_rows + GROUP_ROWS - 1) / GROUP_ROWS, num_threads, openmp);
}

void mhmoe_scatter(int is_bfloat16, const void *from, const void *bias, const float *weight, const int64_t *number,
                   void *to, int64_t num_rows, int64_t width, int num_threads, const openmp_t *openmp) {
    scatter_t work = {from, bias, weight, number, to, width};
    for_rows(is_bfloat16 ? OF_THIS_CPU(scatter_bfloat16) : OF_THIS_CPU(scatter_float), &work, num_rows, num_threads,
             openmp);
}

void mhmoe_sum_parts(int is_bfloat16, const void *from, void *to, int64_t num_rows, int64_t num_parts, int64_t width,
                     int num_threads, const openmp_t *openmp) {
    sum_t work = {from, to, num_parts, width};
    for_rows(is_bfloat16 ? OF_THIS_CPU(sum_bfloat16) : OF_THIS_CPU(sum_float), &work, num_rows, num_threads, openmp);
}
