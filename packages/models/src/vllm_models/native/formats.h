/* The formats of quantized weights, all of one family: a code of 2 to 8 bits for every weight, and
   for a group of columns a scale, and in some formats a minimum, so that

       weight = scale * (code - zero) - minimum

   Sixteen outputs share a record of some columns, so that one vector instruction does the same
   column of each:

       FLAT     64 columns   [group][16 scales] [group][16 minimums]      16 bits each
       NESTED  256 columns   [16 scales][16 minimums]                     16 bits each, multiplied by
                             [group][16 scales] [group][16 minimums]      8 bits each
       GROUPED 128 columns   [span][16 scales][16 zeros]                  16 bits each
       then, for every 32 columns, [plane of codes][16 outputs][4 columns]

   A plane is 64 bytes: the byte for an output and four columns holds one code of 8 bits, or the
   low bits of the codes of two or four such fours; planes of high bits follow. */
#ifndef FORMATS_H
#define FORMATS_H

#include "linear.h"

#define RUN 32 /* columns whose codes stand together, and share one scale of the activations */
#define FOURS (RUN / 4)

enum { FLAT_F16, FLAT_BF16, NESTED_U8, NESTED_I8, GROUPED };

typedef struct {
    int low, high;        /* bits of a code */
    int group;            /* columns per scale */
    int zero;             /* subtracted from every code */
    int scales;           /* how they are stored */
    int mins;             /* whether there are minimums */
    const uint8_t *table; /* what a code stands for, or NULL */
} format;

static const uint8_t IQ4_TABLE[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                      129, 141, 153, 166, 181, 197, 217, 241};
static const uint8_t MXFP4_TABLE[16] = {128, 129, 130, 131, 132, 134, 136, 140,
                                        128, 127, 126, 125, 124, 122, 120, 116};

/* name, number, low, high, group, zero, scales, mins, table */
#define FORMATS(F)                                      \
    F(Q4_0, 2, 4, 0, 32, 8, FLAT_F16, 0, NULL)          \
    F(Q4_1, 3, 4, 0, 32, 0, FLAT_F16, 1, NULL)          \
    F(Q5_0, 6, 4, 1, 32, 16, FLAT_F16, 0, NULL)         \
    F(Q5_1, 7, 4, 1, 32, 0, FLAT_F16, 1, NULL)          \
    F(Q8_0, 8, 8, 0, 32, 128, FLAT_F16, 0, NULL)        \
    F(Q2_K, 10, 2, 0, 16, 0, NESTED_U8, 1, NULL)        \
    F(Q3_K, 11, 2, 1, 16, 4, NESTED_I8, 0, NULL)        \
    F(Q4_K, 12, 4, 0, 32, 0, NESTED_U8, 1, NULL)        \
    F(Q5_K, 13, 4, 1, 32, 0, NESTED_U8, 1, NULL)        \
    F(Q6_K, 14, 4, 2, 16, 32, NESTED_I8, 0, NULL)       \
    F(IQ4_NL, 20, 4, 0, 32, 128, FLAT_F16, 0, IQ4_TABLE)   \
    F(IQ4_XS, 23, 4, 0, 32, 128, NESTED_I8, 0, IQ4_TABLE)  \
    F(MXFP4, 39, 4, 0, 32, 128, FLAT_BF16, 0, MXFP4_TABLE) \
    F(INT4, 104, 4, 0, 32, 0, GROUPED, 1, NULL)         \
    F(INT8, 108, 8, 0, 32, 0, GROUPED, 1, NULL)

#define DEFINE(name, number, low, high, group, zero, scales, mins, table) \
    static const format name = {low, high, group, zero, scales, mins, table};
FORMATS(DEFINE)
#undef DEFINE

typedef struct {
    const uint8_t *data;
    int64_t outputs, columns;
    int64_t format; /* a number of the table */
    int64_t offset; /* its first column in the results */
    int64_t span;   /* GROUPED: columns per scale, 32, 64 or 128 */
    int64_t type;   /* GROUPED: of the scales; 0 is f16 */
} blocks_weight;

/* Codes above 127, which the AVX2 class multiplies in another way. */
INLINE int is_wide(const format *f) { return f->low == 8 || f->table != NULL; }
INLINE int nested(const format *f) { return f->scales == NESTED_U8 || f->scales == NESTED_I8; }
INLINE int64_t record_columns(const format *f) {
    return nested(f) ? 256 : f->scales == GROUPED ? 128 : 64;
}
INLINE int64_t run_bytes(const format *f) { return 64 * (f->low + f->high); }
INLINE int64_t header_bytes(const format *f, int64_t span) {
    int64_t groups = record_columns(f) / f->group;
    if (f->scales == GROUPED) return 64 * (128 / span);
    return nested(f) ? 64 + 16 * groups * (1 + f->mins) : 32 * groups * (1 + f->mins);
}
INLINE int64_t record_bytes(const format *f, int64_t span) {
    return header_bytes(f, span) + record_columns(f) / RUN * run_bytes(f);
}

/* The scales of one group of a record. */
INLINE vfloat scale_of(const format *f, const blocks_weight *w, const uint8_t *record, int g) {
    if (f->scales == FLAT_F16) return vf_load_f16(record + 32 * g);
    if (f->scales == FLAT_BF16) return vf_load_bf16(record + 32 * g);
    if (f->scales == NESTED_U8) return vf_mul(vf_load_f16(record), vf_load_u8(record + 64 + 16 * g));
    if (f->scales == NESTED_I8) return vf_mul(vf_load_f16(record), vf_load_i8(record + 64 + 16 * g));
    const uint8_t *place = record + 64 * (g * RUN / w->span);
    return w->type == BFLOAT16 ? vf_load_bf16(place) : vf_load_f16(place);
}

/* Whether minimums are small whole numbers times one factor for the record. */
INLINE int whole_mins(const format *f) { return f->mins && nested(f); }
INLINE int flat_mins(const format *f) { return f->mins && !nested(f); }
/* Those of two neighbouring groups side by side, and the factor. */
INLINE vbytes min_pair_of(const format *f, const uint8_t *record, int pair) {
    const uint8_t *mins = record + 64 + 16 * (record_columns(f) / f->group + 2 * pair);
    return vb_pairs_of_u8(mins, mins + 16);
}
INLINE vfloat min_factor_of(const uint8_t *record) { return vf_load_f16(record + 32); }

/* The minimums of one group, of a format that has them. */
INLINE vfloat min_of(const format *f, const blocks_weight *w, const uint8_t *record, int g) {
    int64_t groups = record_columns(f) / f->group;
    if (f->scales == GROUPED) {
        const uint8_t *place = record + 64 * (g * RUN / w->span) + 32;
        return vf_mul(scale_of(f, w, record, g), vf_load_f16(place));
    }
    if (nested(f))
        return vf_mul(min_factor_of(record), vf_load_u8(record + 64 + 16 * (groups + g)));
    return vf_load_f16(record + 32 * (groups + g));
}

/* The codes of one run, a byte each: [four columns][16 outputs][column]. */
INLINE void codes_of(const format *f, const uint8_t *run, vbytes codes[FOURS]) {
    const uint8_t *upper = run + 64 * f->low;
#pragma GCC unroll 8
    for (int i = 0; i < FOURS; i++) {
        if (f->low == 8) codes[i] = vb_load(run + 64 * i);
        if (f->low == 4) codes[i] = vb_bits(vb_load(run + 64 * (i % 4)), i / 4 * 4, vb_set(15));
        if (f->low == 2) codes[i] = vb_bits(vb_load(run + 64 * (i / 4)), i % 4 * 2, vb_set(3));
        if (f->high == 1)
            codes[i] = vb_or(codes[i],
                             vb_bits(vb_load(upper), i - f->low, vb_set((uint8_t)(1 << f->low))));
        if (f->high == 2)
            codes[i] = vb_or(codes[i], vb_bits(vb_load(upper + 64 * (i / 4)), i % 4 * 2 - f->low,
                                               vb_set((uint8_t)(3 << f->low))));
        if (f->table) codes[i] = vb_lookup(f->table, codes[i]);
    }
}

#endif
