/* Quantized weights by two rows of activations or a few more: every code is read once, straight into
   the products. What is the same for all rows is found first; one row alone is faster without. */
#include "blocks.h"

#define AHEAD 8192 /* bytes of prefetch */

/* Some rows, one vector, one record. */
INLINE void record_few(const format *f, const blocks_weight *w, const uint8_t *record,
                       const activations *a, int64_t place, vfloat total[FEW], const int rows) {
    const uint8_t *run = record + header_bytes(f, w->span);
    const int8_t *x = a->codes + place;
    const float *scales = a->scales + place / RUN;
    const int32_t *sums = a->sums + place / 16;
    const int parts = RUN / f->group, wide = is_wide(f);
    for (int i = 0; i < record_columns(f) / RUN; i++, run += run_bytes(f), x += RUN, sums += 2) {
        vbytes codes[FOURS];
        for (int64_t p = 0; p < run_bytes(f); p += 64) __builtin_prefetch(run + AHEAD + p);
        codes_of(f, run, codes);
#pragma GCC unroll 2
        for (int part = 0; part < parts; part++) {
            const int g = i * parts + part;
            const vfloat scale = scale_of(f, w, record, g);
            const vfloat low = f->mins ? min_of(f, w, record, g) : vf_zero();
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                const int32_t sum = group_sum(sums + r * (a->columns / 16) + part, f->group);
                const float by = scales[r * (a->columns / RUN) + i];
                vint product = start_of(sum, f->zero, wide);
#pragma GCC unroll 8
                for (int four = part * FOURS / parts; four < (part + 1) * FOURS / parts; four++)
                    product = dot(product, codes[four], four_codes(x + r * a->columns + 4 * four), wide);
                total[r] = vf_fma(vf_from_int(product), vf_mul(scale, vf_set(by)), total[r]);
                if (f->mins) total[r] = vf_fnma(low, vf_set(by * (float)sum), total[r]);
            }
        }
    }
}

/* One panel for some rows. */
INLINE void panel_few(const format *f, const blocks_weight *w, int64_t panel, const activations *a,
                      int64_t first, float *sums, const int rows) {
    int64_t size = record_bytes(f, w->span), columns = record_columns(f);
    int64_t records = divide_up(w->columns, columns);
    const uint8_t *record = w->data + panel * records * VECTORS * size;
    memset(sums, 0, (size_t)(rows * PANEL) * sizeof *sums);
    for (int64_t i = 0; i < records; i++) {
        int64_t place = first * a->columns + i * columns;
#pragma GCC unroll 1
        for (int v = 0; v < VECTORS; v++, record += size) {
            vfloat total[FEW];
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) total[r] = vf_load(sums + r * PANEL + v * WIDTH);
            record_few(f, w, record, a, place, total, rows);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) vf_store(sums + r * PANEL + v * WIDTH, total[r]);
        }
    }
}

void blocks_few(const blocks_weight *w, int64_t panel, const activations *a, int64_t first,
                int64_t rows, float *sums) {
    switch (FEW * w->format + rows - 1) {
#define ROWS_CASE(name, number, rows) \
    case FEW * number + rows - 1: panel_few(&name, w, panel, a, first, sums, rows); break;
#if FEW == 4
#define CASE(name, number, ...) \
    ROWS_CASE(name, number, 2)  \
    ROWS_CASE(name, number, 3)  \
    ROWS_CASE(name, number, 4)
#else
#define CASE(name, number, ...)
#endif
        FORMATS(CASE)
    }
}
