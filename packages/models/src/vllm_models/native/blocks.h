/* What the kernels for one row, few and many rows share: the activations, and how a group's products
   start and end. All do the same operations in the same order, so a row's bits are the same. */
#ifndef BLOCKS_H
#define BLOCKS_H

#include "formats.h"

#define PIECE 256 /* columns that are quantized or unpacked at a time */

/* Quantized activations; rows follow each other. */
typedef struct {
    int8_t *codes;   /* [rows][columns] */
    float *scales;   /* [rows][columns / 32] */
    int32_t *sums;   /* of 16 codes: [rows][columns / 16] */
    float *lows;     /* scale times the sum of 32 codes, for minimums: [rows][columns / 32] */
    int64_t columns; /* padded with zeros to whole records of every format */
} activations;

INLINE int32_t four_codes(const int8_t *codes) {
    int32_t four;
    memcpy(&four, codes, sizeof four);
    return four;
}

/* The sum of the activations of a group, from the sums of 16. */
INLINE int32_t group_sum(const int32_t *sums, const int group) {
    return group == 32 ? sums[0] + sums[1] : sums[0];
}

/* What the sum of the products starts from, so that zero is subtracted from every code. */
INLINE vint start_of(int32_t sum, const int zero, const int wide) {
    return vi_set(-(zero - (wide ? DOT_WIDE_OFFSET : 0)) * sum);
}

INLINE vint dot(vint sum, vbytes codes, int32_t x, const int wide) {
    return wide ? vi_dot_wide(sum, codes, x) : vi_dot(sum, codes, x);
}

/* Rows that are multiplied by codes on their way from memory; for more it pays to unpack them first. */
#if defined(CLASS_AVX512)
#define FEW 4
#else
#define FEW 1
#endif

/* Some rows by one panel of a weight; sums [rows][PANEL]. */
void blocks_row(const blocks_weight *w, int64_t panel, const activations *a, int64_t row, float *sums);
void blocks_few(const blocks_weight *w, int64_t panel, const activations *a, int64_t first,
                int64_t rows, float *sums);
void blocks_rows(const blocks_weight *w, int64_t panel, const activations *a, int64_t first,
                 int64_t rows, float *sums);

#endif
