/* Softmax over router scores and the best experts of each row, forward and backward, in one pass over memory: an
   optional speed-up on CPUs. choice.py loads it, and does the same with torch's own operations where it is absent. */

#include "vector.h"

/* Scores [num_rows, num_experts]; row r adds row r % num_pools of bias to its probabilities when it chooses. */
typedef struct {
    const float *logits, *bias;
    float *probs, *weights;
    int64_t *experts;
    int64_t num_experts, num_pools, top_k;
} choice_t;

/* Gradients of probabilities (their rows dprobs_stride apart: 0 if all are the same) and of weights; either may be
   absent. */
typedef struct {
    const float *probs, *dprobs, *dweights;
    const int64_t *experts;
    float *dlogits;
    int64_t num_experts, top_k, dprobs_stride;
} gradient_t;

INLINE void softmax(const float *restrict logits, float *restrict probs, int64_t n) {
    float top = logits[0], sum = 0.0f;
    MAXIMUM(top)
    for (int64_t i = 0; i < n; i++) top = logits[i] > top ? logits[i] : top;
    SUM(sum)
    for (int64_t i = 0; i < n; i++) sum += probs[i] = exponential(logits[i] - top);
    float scale = 1.0f / sum;
    for (int64_t i = 0; i < n; i++) probs[i] *= scale;
}

/* The first score behind `last`, that of `last_expert`, in the order of falling scores and, among equals, rising
   numbers; n if there is none, as NaN is never chosen. */
INLINE int32_t best(const float *restrict probs, const float *restrict bias, int32_t n, float last, int32_t last_expert,
                    float *value) {
    float best = -INFINITY;
    int32_t expert = n;
    MAXIMUM(best)
    for (int32_t i = 0; i < n; i++) {
        float score = probs[i] + bias[i];
        int is_left = (score < last) | ((score == last) & (i > last_expert));
        score = is_left ? score : -INFINITY;
        best = score > best ? score : best;
    }
    MINIMUM(expert)
    for (int32_t i = 0; i < n; i++) {
        int is_best = (probs[i] + bias[i] == best) & ((best < last) | (i > last_expert));
        int32_t number = is_best ? i : n;
        expert = number < expert ? number : expert;
    }
    *value = best;
    return expert;
}

/* Expert 0 is chosen where nothing is left. */
INLINE void choose_rows(const choice_t *w, int64_t start, int64_t stop) {
    for (int64_t r = start, n = w->num_experts; r < stop; r++) {
        float *probs = w->probs + r * n, last = INFINITY;
        int32_t expert = -1;
        softmax(w->logits + r * n, probs, n);
        for (int64_t k = 0; k < w->top_k; k++) {
            expert = best(probs, w->bias + r % w->num_pools * n, (int32_t)n, last, expert, &last);
            expert = expert < n ? expert : 0;
            w->experts[r * w->top_k + k] = expert;
            w->weights[r * w->top_k + k] = probs[expert];
        }
    }
}

/* The same for few experts, so many rows side by side: to look for the largest of eight numbers in one row takes longer
   than in sixteen rows. */
#define FEW_EXPERTS 64
#define LANES 16

INLINE void choose_side_by_side(const choice_t *w, int64_t start, int64_t stop) {
    float probs[FEW_EXPERTS][LANES] = {{0}}, scores[FEW_EXPERTS][LANES] = {{0}};
    int32_t n = (int32_t)w->num_experts;
    for (int64_t first = start; first < stop; first += LANES) {
        int64_t num_rows = smaller(LANES, stop - first);
        float top[LANES], sum[LANES] = {0}, last[LANES], best[LANES], weight[LANES];
        int32_t last_expert[LANES], expert[LANES];
        for (int64_t r = 0; r < num_rows; r++)
            for (int32_t e = 0; e < n; e++) probs[e][r] = w->logits[(first + r) * n + e];
        for (int r = 0; r < LANES; r++) top[r] = probs[0][r];
        for (int32_t e = 1; e < n; e++)
            for (int r = 0; r < LANES; r++) top[r] = probs[e][r] > top[r] ? probs[e][r] : top[r];
        for (int32_t e = 0; e < n; e++)
            for (int r = 0; r < LANES; r++) sum[r] += probs[e][r] = exponential(probs[e][r] - top[r]);
        for (int r = 0; r < LANES; r++) sum[r] = 1.0f / sum[r];
        for (int32_t e = 0; e < n; e++)
            for (int r = 0; r < LANES; r++) probs[e][r] *= sum[r];
        for (int64_t r = 0; r < num_rows; r++) {
            const float *bias = w->bias + (first + r) % w->num_pools * n;
            for (int32_t e = 0; e < n; e++) w->probs[(first + r) * n + e] = probs[e][r];
            for (int32_t e = 0; e < n; e++) scores[e][r] = probs[e][r] + bias[e];
        }
        for (int r = 0; r < LANES; r++) last[r] = INFINITY, last_expert[r] = -1;
        for (int64_t k = 0; k < w->top_k; k++) {
            for (int r = 0; r < LANES; r++) best[r] = -INFINITY, expert[r] = n, weight[r] = probs[0][r];
            for (int32_t e = 0; e < n; e++)
                for (int r = 0; r < LANES; r++) {
                    float score = scores[e][r];
                    int is_left = (score < last[r]) | ((score == last[r]) & (e > last_expert[r]));
                    int is_best = is_left & ((score > best[r]) | ((score == best[r]) & (expert[r] == n)));
                    best[r] = is_best ? score : best[r];
                    expert[r] = is_best ? e : expert[r];
                    weight[r] = is_best ? probs[e][r] : weight[r];
                }
            for (int r = 0; r < LANES; r++) expert[r] = expert[r] < n ? expert[r] : 0;
            for (int r = 0; r < LANES; r++) last[r] = best[r], last_expert[r] = expert[r];
            for (int64_t r = 0; r < num_rows; r++) {
                w->experts[(first + r) * w->top_k + k] = expert[r];
                w->weights[(first + r) * w->top_k + k] = weight[r];
            }
        }
    }
}

#define DEFINE_CHOICE(CPU, TARGET)                                                                                     \
    TARGET static void choose_few_##CPU(const void *work, int64_t start, int64_t stop) {                               \
        choose_side_by_side((const choice_t *)work, start, stop);                                                      \
    }                                                                                                                  \
    TARGET static void choose_many_##CPU(const void *work, int64_t start, int64_t stop) {                              \
        choose_rows((const choice_t *)work, start, stop);                                                              \
    }                                                                                                                  \
    TARGET static float dot_##CPU(const float *restrict a, const float *restrict b, int64_t n) {                       \
        float sum = 0.0f;                                                                                              \
        SUM(sum)                                                                                                       \
        for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];                                                            \
        return sum;                                                                                                    \
    }                                                                                                                  \
    TARGET static void scaled_##CPU(const float *restrict probs, const float *restrict dprobs, float shift,            \
                                    float *restrict dlogits, int64_t n) {                                              \
        if (dprobs)                                                                                                    \
            for (int64_t i = 0; i < n; i++) dlogits[i] = probs[i] * (dprobs[i] - shift);                               \
        else                                                                                                           \
            for (int64_t i = 0; i < n; i++) dlogits[i] = probs[i] * -shift;                                            \
    }                                                                                                                  \
    static void choose_backward_##CPU(const void *work, int64_t start, int64_t stop) {                                 \
        const gradient_t *w = (const gradient_t *)work;                                                                \
        for (int64_t r = start, n = w->num_experts; r < stop; r++) {                                                   \
            const float *probs = w->probs + r * n, *dprobs = w->dprobs ? w->dprobs + r * w->dprobs_stride : 0;         \
            const float *dweights = w->dweights ? w->dweights + r * w->top_k : 0;                                      \
            const int64_t *experts = w->experts + r * w->top_k;                                                        \
            float *dlogits = w->dlogits + r * n, shift = dprobs ? dot_##CPU(probs, dprobs, n) : 0.0f;                  \
            for (int64_t k = 0; dweights && k < w->top_k; k++) shift += probs[experts[k]] * dweights[k];               \
            scaled_##CPU(probs, dprobs, shift, dlogits, n);                                                            \
            for (int64_t k = 0; dweights && k < w->top_k; k++) dlogits[experts[k]] += probs[experts[k]] * dweights[k]; \
        }                                                                                                              \
    }

DEFINE_FOR_CPUS(DEFINE_CHOICE)

void mhmoe_choose(const float *logits, const float *bias, float *probs, float *weights, int64_t *experts,
                  int64_t num_rows, int64_t num_experts, int64_t num_pools, int64_t top_k, int num_threads,
                         const openmp_t *openmp) {
    choice_t work = {logits, bias, probs, weights, experts, num_experts, num_pools, top_k};
    rows_t rows = num_experts > FEW_EXPERTS ? OF_THIS_CPU(choose_many) : OF_THIS_CPU(choose_few);
    for_rows(rows, &work, num_rows, num_threads, openmp);
}

void mhmoe_choose_backward(const float *probs, const float *dprobs, int64_t dprobs_stride,
                                  const float *dweights, const int64_t *experts, float *dlogits, int64_t num_rows,
                                  int64_t num_experts, int64_t top_k, int num_threads, const openmp_t *openmp) {
    gradient_t work = {probs, dprobs, dweights, experts, dlogits, num_experts, top_k, dprobs_stride};
    for_rows(OF_THIS_CPU(choose_backward), &work, num_rows, num_threads, openmp);
}
