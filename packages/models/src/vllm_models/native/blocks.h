/* What the kernels for one row, few and many rows share: the activations, and how a group's products
   start and end. All do the same operations in the same order, so a row's bits are the same. */
#ifndef BLOCKS_H
#define BLOCKS_H

#include "formats.h"

#define PIECE 256 /* columns that are quantized or unpacked at a time */

/* Quantized activations; rows follow each other. A number is code * scale * 2^-n: a scale for every
   piece, and for every run how often it is halved. So a run of small numbers beside large ones keeps
   its precision, and what differs from run to run multiplies without rounding. */
typedef struct {
    int8_t *codes;   /* [rows][columns] */
    float *scales;   /* [rows][columns / PIECE] */
    float *powers;   /* 2^-n, or with AVX-512 -n: [rows][columns / RUN] */
    int32_t *sums[2]; /* of 32 codes and of 16: [rows][columns / 32] and [rows][columns / 16] */
    float *lows;     /* of 32 codes times 2^-n, for minimums: [rows][columns / 32] */
    int16_t *whole_lows[2]; /* the same in parts of WHOLE_LOW, of 32 codes and of 16, for whole minimums */
    int64_t columns; /* padded with zeros to whole pieces */
} activations;

/* a * 2^-n. AVX-512 has an instruction for it, which leaves the multipliers to the products. */
#if defined(CLASS_AVX512)
INLINE vfloat times_power(vfloat a, float power) { return _mm512_scalef_ps(a, vf_set(power)); }
#else
INLINE vfloat times_power(vfloat a, float power) { return vf_mul(a, vf_set(power)); }
#endif

INLINE int32_t four_codes(const int8_t *codes) {
    int32_t four;
    memcpy(&four, codes, sizeof four);
    return four;
}

/* The products of a group start from this times the sum of its activations, so that zero is
   subtracted from every code. */
INLINE int start_factor(const int zero, const int wide) {
    return (wide ? DOT_WIDE_OFFSET : 0) - zero;
}
/* The start itself, for several rows. With AVX-512 a vector is shifted: sums of many rows would wait on
   their way from other registers. Zeros are powers of two. */
INLINE vint start_of(int32_t sum, const int zero, const int wide) {
    const int factor = start_factor(zero, wide);
    if (factor == 0) return vi_set(0);
#if defined(CLASS_AVX512)
    const unsigned shift = (unsigned)__builtin_ctz(-factor);
    return _mm512_sub_epi32(vi_set(0), _mm512_slli_epi32(vi_set(sum), shift));
#else
    return vi_set(factor * sum);
#endif
}
/* The sums of groups of so many columns, from column `place` on. */
INLINE const int32_t *group_sums(const activations *a, int64_t place, const int group) {
    return a->sums[group == 16] + place / group;
}

#define WHOLE_LOW 0.125f /* so that the largest sum of 32 codes, not halved, fits 16 bits */

/* What whole minimums of groups of so many columns are multiplied by, from column `place` on. */
INLINE const int16_t *whole_lows(const activations *a, int64_t place, const int group) {
    return a->whole_lows[group == 16] + place / group;
}
INLINE int32_t two_lows(const int16_t *lows) {
    int32_t two;
    memcpy(&two, lows, sizeof two);
    return two;
}

INLINE vint dot(vint sum, vbytes codes, int32_t x, const int wide) {
    return wide ? vi_dot_wide(sum, codes, x) : vi_dot(sum, codes, x);
}

/* Ask for memory before it is needed. */
INLINE void ask_for(const uint8_t *from, int64_t bytes) {
    for (int64_t p = 0; p < bytes; p += 64) __builtin_prefetch(from + p);
}

/* Rows that are multiplied by codes on their way from memory; for more it pays to unpack them first. */
#if defined(CLASS_AVX512)
#define FEW 4
#else
#define FEW 1
#endif

/* One piece of row `from` of x, from column `first` of `columns`, as part of a row of the activations.
   What is not finite makes the scale so, and with it every result of the row. */
void quantize_piece(const activations *a, const matrix *x, int64_t from, int64_t row, int64_t first,
                    int64_t columns);

/* Some rows by one panel of a weight; sums [rows][PANEL]. */
void blocks_row(const blocks_weight *w, int64_t panel, const activations *a, int64_t row, float *sums);
void blocks_few(const blocks_weight *w, int64_t panel, const activations *a, int64_t first,
                int64_t rows, float *sums);
void blocks_rows(const blocks_weight *w, int64_t panel, const activations *a, int64_t first,
                 int64_t rows, float *sums);

#endif
