/* What the C files of activations share. */

#ifndef MHMOE_ACTIVATIONS_H
#define MHMOE_ACTIVATIONS_H

#include "vector.h"

/* Rows of an expert: pre-activations [num_rows, width], or [num_rows, 2 width] with gate and up side by side, without
   the bias that all rows share, if there is one. Backward, every row has a weight, by which hidden and dpre are
   multiplied; <dhidden, hidden>, hidden not weighted, is added to product; and dbias has a row for every group of rows,
   the sum of their dpre. */
typedef struct {
    const void *pre, *bias;
    void *dhidden, *hidden, *dpre;
    const float *weight;
    float *product, *dbias;
    int64_t num_rows, width;
    ahead_t ahead;
} work_t;

/* Rows are worked off in pieces of so many values: in the first cache, and so that memory that is needed next is fetched
   evenly. */
#define PIECE 256

INLINE int64_t num_pieces(int64_t width) { return (width + PIECE - 1) / PIECE; }

#if defined(__x86_64__) && defined(__GNUC__) && (__GNUC__ >= 10 || __clang_major__ >= 9)
#define HAS_AVX512_BF16
/* GELU of bfloat16, forward over rows, backward over groups of rows. */
rows_t gelu_forward_avx512_bf16(void), gelu_backward_avx512_bf16(void);
#define IF_AVX512_BF16(rows, others) (__builtin_cpu_supports("avx512bf16") ? (rows) : (others))
#else
#define IF_AVX512_BF16(rows, others) (others)
#endif

#endif
