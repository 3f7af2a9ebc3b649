/* Quantized weights by one row of activations: every code is read once, straight into the product. */
#include "blocks.h"

#define AHEAD 8192 /* bytes from what is multiplied to what is asked for */

/* One row, one vector, one record. */
INLINE vfloat record_row(const format *f, const blocks_weight *w, const uint8_t *record,
                         const activations *a, int64_t place, vfloat total) {
    const uint8_t *run = record + header_bytes(f, w->span);
    const int8_t *x = a->codes + place;
    const int32_t *sums = group_sums(a, place, f->group);
    const int parts = RUN / f->group, wide = is_wide(f);
    ask_for(record + AHEAD, header_bytes(f, w->span));
    for (int i = 0; i < record_columns(f) / RUN; i++, run += run_bytes(f), x += RUN) {
        const float power = a->powers[place / RUN + i];
        vbytes codes[FOURS];
        ask_for(run + AHEAD, run_bytes(f));
        codes_of(f, run, codes);
#pragma GCC unroll 2
        for (int part = 0; part < parts; part++) {
            const int g = i * parts + part;
            vint product = vi_set(start_factor(f->zero, wide) * sums[g]);
#pragma GCC unroll 8
            for (int four = part * FOURS / parts; four < (part + 1) * FOURS / parts; four++)
                product = dot(product, codes[four], four_codes(x + 4 * four), wide);
            vfloat scale = times_power(scale_of(f, w, record, g), power);
            total = vf_fma(vf_from_int(product), scale, total);
            if (flat_mins(f))
                total = vf_fnma(min_of(f, w, record, g), vf_set(a->lows[place / RUN + i]), total);
        }
    }
    if (whole_mins(f)) {
        const int16_t *lows = whole_lows(a, place, f->group);
        vint less = vi_set(0);
#pragma GCC unroll 8
        for (int pair = 0; pair < PIECE / f->group / 2; pair++)
            less = vi_dot_pairs(less, min_pair_of(f, record, pair), two_lows(lows + 2 * pair));
        vfloat factor = vf_mul(min_factor_of(record), vf_set(WHOLE_LOW));
        total = vf_fnma(vf_from_int(less), factor, total);
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
    for (int64_t i = 0; i < records;) {
        vfloat sum[VECTORS] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
        int64_t place = row * a->columns + i * columns, end = smaller(i + PIECE / columns, records);
        const vfloat scale = vf_set(a->scales[place / PIECE]);
        for (; i < end; i++, place += columns)
#pragma GCC unroll 1
            for (int v = 0; v < VECTORS; v++, record += size)
                sum[v] = record_row(f, w, record, a, place, sum[v]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) total[v] = vf_fma(sum[v], scale, total[v]);
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
