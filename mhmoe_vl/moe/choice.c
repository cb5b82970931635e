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

/* best_ finds the first score behind `last`, that of `last_expert`, in the order of falling scores and, among equals,
   rising numbers. NaN is never chosen; expert 0 is, if nothing is left. */
#define DEFINE_CHOICE(CPU, TARGET)                                                                                     \
    TARGET static void softmax_##CPU(const float *restrict logits, float *restrict probs, int64_t n) {                 \
        float top = logits[0], sum = 0.0f;                                                                             \
        MAXIMUM(top)                                                                                                   \
        for (int64_t i = 0; i < n; i++) top = logits[i] > top ? logits[i] : top;                                       \
        SUM(sum)                                                                                                       \
        for (int64_t i = 0; i < n; i++) sum += probs[i] = exponential(logits[i] - top);                                \
        float scale = 1.0f / sum;                                                                                      \
        for (int64_t i = 0; i < n; i++) probs[i] *= scale;                                                             \
    }                                                                                                                  \
    TARGET static int32_t best_##CPU(const float *restrict probs, const float *restrict bias, int32_t n, float last,   \
                                     int32_t last_expert, float *value) {                                              \
        float best = -INFINITY;                                                                                        \
        int32_t expert = n;                                                                                            \
        MAXIMUM(best)                                                                                                  \
        for (int32_t i = 0; i < n; i++) {                                                                              \
            float score = probs[i] + bias[i];                                                                          \
            int is_left = (score < last) | ((score == last) & (i > last_expert));                                      \
            score = is_left ? score : -INFINITY;                                                                       \
            best = score > best ? score : best;                                                                        \
        }                                                                                                              \
        MINIMUM(expert)                                                                                                \
        for (int32_t i = 0; i < n; i++) {                                                                              \
            int is_best = (probs[i] + bias[i] == best) & ((best < last) | (i > last_expert));                          \
            int32_t number = is_best ? i : n;                                                                          \
            expert = number < expert ? number : expert;                                                                \
        }                                                                                                              \
        *value = best;                                                                                                 \
        return expert < n ? expert : 0;                                                                                \
    }                                                                                                                  \
    static void choose_##CPU(const void *work, int64_t start, int64_t stop) {                                          \
        const choice_t *w = (const choice_t *)work;                                                                    \
        for (int64_t r = start, n = w->num_experts; r < stop; r++) {                                                   \
            float *probs = w->probs + r * n, last = INFINITY;                                                          \
            int32_t expert = -1;                                                                                       \
            softmax_##CPU(w->logits + r * n, probs, n);                                                                \
            for (int64_t k = 0; k < w->top_k; k++) {                                                                   \
                expert = best_##CPU(probs, w->bias + r % w->num_pools * n, (int32_t)n, last, expert, &last);           \
                w->experts[r * w->top_k + k] = expert;                                                                 \
                w->weights[r * w->top_k + k] = probs[expert];                                                          \
            }                                                                                                          \
        }                                                                                                              \
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
    for_rows(OF_THIS_CPU(choose), &work, num_rows, num_threads, openmp);
}

void mhmoe_choose_backward(const float *probs, const float *dprobs, int64_t dprobs_stride,
                                  const float *dweights, const int64_t *experts, float *dlogits, int64_t num_rows,
                                  int64_t num_experts, int64_t top_k, int num_threads, const openmp_t *openmp) {
    gradient_t work = {probs, dprobs, dweights, experts, dlogits, num_experts, top_k, dprobs_stride};
    for_rows(OF_THIS_CPU(choose_backward), &work, num_rows, num_threads, openmp);
}
