/* What every linear kernel shares: panels of outputs, numbers in and out, working memory.

   A panel is 64 outputs. Each of its four vectors holds 16 outputs, one in each place, so a sum over
   the columns never leaves its place: it is walked front to back in one accumulator whatever the
   number of rows or threads, and threads divide only rows and panels. */
#ifndef LINEAR_H
#define LINEAR_H

#include <stdlib.h>

#include "simd.h"

#define VECTORS 4
#define PANEL (VECTORS * WIDTH)
#define MAX_ROWS 128 /* rows whose sums are kept at once: 32 KB, beside the weights in the L2 cache */

enum { FLOAT32 = 0, BFLOAT16 = 1 };

/* Rows of activations or results. */
typedef struct {
    void *data;
    int64_t stride; /* numbers from one row to the next */
    int64_t type;
} matrix;

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Working memory of the calling thread; grows, and is kept for the next call. NULL if there is none. */
static inline void *scratch(size_t bytes) {
    static _Thread_local void *memory = NULL;
    static _Thread_local size_t size = 0;
    if (bytes >= size) {
        free(memory);
        size = (bytes + (1 << 16)) & ~(size_t)4095;
        memory = aligned_alloc(4096, size);
        if (memory == NULL) size = 0;
    }
    return memory;
}

/* Write the sums of one panel: count outputs of each row, from `column` on. The bias may be NULL. */
static inline void write_panel(float *restrict sums, const float *restrict bias, const matrix *out,
                               int64_t first_row, int64_t rows, int64_t column, int64_t count) {
    for (int64_t row = first_row; row < first_row + rows; row++, sums += PANEL) {
        int64_t place = row * out->stride + column;
        for (int64_t i = 0; bias != NULL && i < count; i++) sums[i] += bias[column + i];
        if (out->type == BFLOAT16) {
            uint16_t *restrict to = (uint16_t *)out->data + place;
            for (int64_t i = 0; i < count; i++) to[i] = float_to_bf16(sums[i]);
        } else {
            memcpy((float *)out->data + place, sums, (size_t)count * sizeof *sums);
        }
    }
}

#endif
