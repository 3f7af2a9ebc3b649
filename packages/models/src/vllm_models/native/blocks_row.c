/* Quantized weights by one row of activations: every code is read once, straight into the product. */
#include "blocks.h"

#define AHEAD 8192 /* bytes of prefetch */

/* One row, one vector, one record. */
INLINE vfloat record_row(const format *f, const blocks_weight *w, const uint8_t *record,
                         const int8_t *x, const float *scales, const int32_t *sums, vfloat total) {
    const uint8_t *run = record + header_bytes(f, w->span);
    const int parts = RUN / f->group, wide = is_wide(f);
    for (int i = 0; i < record_columns(f) / RUN; i++, run += run_bytes(f), x += RUN, sums += 2) {
        vbytes codes[FOURS];
        for (int64_t p = 0; p < run_bytes(f); p += 64) __builtin_prefetch(run + AHEAD + p);
        codes_of(f, run, codes);
#pragma GCC unroll 2
        for (int part = 0; part < parts; part++) {
            int32_t sum = group_sum(sums + part, f->group);
            vint product = start_of(sum, f->zero, wide);
#pragma GCC unroll 8
            for (int four = part * FOURS / parts; four < (part + 1) * FOURS / parts; four++)
                product = dot(product, codes[four], four_codes(x + 4 * four), wide);
            int g = i * parts + part;
            vfloat scale = vf_mul(scale_of(f, w, record, g), vf_set(scales[i]));
            total = vf_fma(vf_from_int(product), scale, total);
            if (f->mins)
                total = vf_fnma(min_of(f, w, record, g), vf_set(scales[i] * (float)sum), total);
        }
    }
    return total;
}

/* One panel for one row. */
INLINE void panel_row(const format *f, const blocks_weight *w, int64_t panel, const activations *a,
                      int64_t row, float *sums) {
    int64_t size = record_bytes(f, w->span), columns = record_columns(f);
    int64_t records = divide_up(w->columns, columns);
    const uint8_t *record = w->data + panel * records * VECTORS * size;
    vfloat total[VECTORS] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
    for (int64_t i = 0; i < records; i++) {
        int64_t place = row * a->columns + i * columns;
#pragma GCC unroll 1
        for (int v = 0; v < VECTORS; v++, record += size)
            total[v] = record_row(f, w, record, a->codes + place, a->scales + place / RUN,
                                  a->sums + place / 16, total[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) vf_store(sums + v * WIDTH, total[v]);
}

void blocks_row(const blocks_weight *w, int64_t panel, const activations *a, int64_t row,
                float *sums) {
    switch (w->format) {
#define CASE(name, number, ...) \
    case number: panel_row(&name, w, panel, a, row, sums); break;
        FORMATS(CASE)
    }
}
