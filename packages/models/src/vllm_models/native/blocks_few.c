/* Quantized weights by two rows of activations or a few more: every code is read once, straight into
   the products. What is the same for all rows is found first; one row alone is faster without. */
#include "blocks.h"

#define AHEAD 12288 /* bytes from what is multiplied to what is asked for */

/* Some rows, one vector, one record. */
INLINE void record_few(const format *f, const blocks_weight *w, const uint8_t *record,
                       const activations *a, int64_t place, vfloat total[FEW], const int rows) {
    const uint8_t *run = record + header_bytes(f, w->span);
    const int8_t *x = a->codes + place;
    const float *powers = a->powers + place / RUN, *lows = a->lows + place / RUN;
    const size_t width = (size_t)a->columns, groups = width / (size_t)f->group;
    const int32_t *sums = group_sums(a, place, f->group);
    const int parts = RUN / f->group, wide = is_wide(f);
    ask_for(record + AHEAD, header_bytes(f, w->span));
    for (int i = 0; i < record_columns(f) / RUN; i++) {
        vbytes codes[FOURS];
        ask_for(run + AHEAD, run_bytes(f));
        codes_of(f, run, codes);
#pragma GCC unroll 2
        for (int part = 0; part < parts; part++) {
            const int g = i * parts + part;
            const vfloat scale = scale_of(f, w, record, g);
            const vfloat low = flat_mins(f) ? min_of(f, w, record, g) : vf_zero();
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                vint product = start_of(sums[r * groups + (size_t)part], f->zero, wide);
#pragma GCC unroll 8
                for (int four = part * FOURS / parts; four < (part + 1) * FOURS / parts; four++)
                    product = dot(product, codes[four], four_codes(x + r * width + 4 * four), wide);
                const vfloat by = times_power(scale, powers[r * (width / RUN)]);
                total[r] = vf_fma(vf_from_int(product), by, total[r]);
                if (flat_mins(f))
                    total[r] = vf_fnma(low, vf_set(lows[r * (width / RUN)]), total[r]);
            }
        }
        run += run_bytes(f), x += RUN, sums += parts, powers++, lows++;
    }
    if (whole_mins(f)) {
        const vfloat factor = vf_mul(min_factor_of(record), vf_set(WHOLE_LOW));
        const int16_t *by = whole_lows(a, place, f->group);
        vint less[FEW];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) less[r] = vi_set(0);
#pragma GCC unroll 8
        for (int pair = 0; pair < PIECE / f->group / 2; pair++) {
            const vbytes mins = min_pair_of(f, record, pair);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                less[r] = vi_dot_pairs(less[r], mins, two_lows(by + r * groups + 2 * pair));
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) total[r] = vf_fnma(vf_from_int(less[r]), factor, total[r]);
    }
}

/* One panel for some rows. */
INLINE void panel_few(const format *f, const blocks_weight *w, int64_t panel, const activations *a,
                      int64_t first, float *sums, const int rows) {
    int64_t size = record_bytes(f, w->span), columns = record_columns(f);
    int64_t records = divide_up(w->columns, columns);
    const uint8_t *record = w->data + panel * records * VECTORS * size;
    memset(sums, 0, (size_t)(rows * PANEL) * sizeof *sums);
    for (int64_t i = 0; i < records;) {
        vfloat sum[VECTORS][FEW];
        int64_t place = first * a->columns + i * columns, end = smaller(i + PIECE / columns, records);
        const float *scales = a->scales + place / PIECE;
        memset(sum, 0, sizeof sum);
        for (; i < end; i++, place += columns)
#pragma GCC unroll 1
            for (int v = 0; v < VECTORS; v++, record += size)
                record_few(f, w, record, a, place, sum[v], rows);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const vfloat scale = vf_set(scales[r * (a->columns / PIECE)]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                float *to = sums + r * PANEL + v * WIDTH;
                vf_store(to, vf_fma(sum[v][r], scale, vf_load(to)));
            }
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
