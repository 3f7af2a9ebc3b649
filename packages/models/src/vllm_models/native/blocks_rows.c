/* Quantized weights by several rows of activations: some columns of a panel are unpacked to bytes,
   which then stay in the nearest caches while every row is multiplied by them. Meanwhile the columns
   that come next arrive from memory, a little with every group: asked for at once, they would be
   waited for. */
#include "blocks.h"

#if defined(CLASS_AVX512)
#define ROWS 6 /* of a tile: products and sums of 12 vectors, with codes and scales, fill the registers */
#define ABREAST 2
#else
#define ROWS TILE_ROWS
#define ABREAST TILE_VECTORS
#endif

enum { NO_MINS, FLAT_MINS, WHOLE_MINS };

/* One piece of a panel, ready to multiply, and what the rows bring to each of its groups. */
typedef struct {
    uint8_t codes[PIECE / 4][VECTORS][64];
    float scales[PIECE / 16][PANEL];
    float mins[PIECE / RUN][PANEL];
    uint8_t min_pairs[PIECE / 32][VECTORS][64];
    float min_factors[PANEL];
    int32_t starts[MAX_ROWS][PIECE / 16];
    const uint8_t *ahead; /* what comes next, of which each group of a tile asks for `step` bytes */
    int64_t step;
} unpacked __attribute__((aligned(64)));

/* Unpack the records of one piece; returns its runs. */
INLINE int64_t unpack(const format *f, const blocks_weight *w, const uint8_t *record,
                      int64_t records, unpacked *to) {
    int64_t size = record_bytes(f, w->span), runs = record_columns(f) / RUN;
    const int groups = (int)(record_columns(f) / f->group);
    for (int64_t i = 0; i < records * VECTORS; i++, record += size) {
        int64_t v = i % VECTORS, first = i / VECTORS;
        for (int g = 0; g < groups; g++) {
            vf_store(to->scales[first * groups + g] + v * WIDTH, scale_of(f, w, record, g));
            if (flat_mins(f))
                vf_store(to->mins[first * groups + g] + v * WIDTH, min_of(f, w, record, g));
            if (whole_mins(f) && g % 2 == 0)
                vb_store(to->min_pairs[g / 2][v], min_pair_of(f, record, g / 2));
        }
        if (whole_mins(f))
            vf_store(to->min_factors + v * WIDTH, vf_mul(min_factor_of(record), vf_set(WHOLE_LOW)));
        for (int64_t run = 0; run < runs; run++) {
            vbytes codes[FOURS];
            codes_of(f, record + header_bytes(f, w->span) + run * run_bytes(f), codes);
#pragma GCC unroll 8
            for (int four = 0; four < FOURS; four++)
                vb_store(to->codes[(first * runs + run) * FOURS + four][v], codes[four]);
        }
    }
    return records * runs;
}

/* Formats with minimums have no zero, but what the product of wide codes leaves out. */
INLINE int has_starts(const int mins, const int wide) { return wide || !mins; }

/* What the products of every row start from. */
INLINE void find_starts(const format *f, const activations *a, int64_t place, int64_t rows,
                        unpacked *to) {
    const int32_t *sums = group_sums(a, place, f->group);
    for (int64_t r = 0; r < rows; r++, sums += a->columns / f->group)
        for (int g = 0; g < PIECE / f->group; g++)
            to->starts[r][g] = start_factor(f->zero, is_wide(f)) * sums[g];
}

/* The whole minimums of a piece by what the rows bring to them, less from the sums. */
INLINE void take_minimums(const unpacked *u, const activations *a, int64_t place, const int first,
                          vfloat sum[ROWS][ABREAST], const int rows, const int group) {
    const int16_t *lows = whole_lows(a, place, group);
    const int64_t width = a->columns / group;
    vint less[ROWS][ABREAST];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < ABREAST; v++) less[r][v] = vi_set(0);
#pragma GCC unroll 4
    for (int pair = 0; pair < PIECE / group / 2; pair++)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const int32_t two = two_lows(lows + r * width + 2 * pair);
#pragma GCC unroll 4
            for (int v = 0; v < ABREAST; v++)
                less[r][v] = vi_dot_pairs(less[r][v], vb_load(u->min_pairs[pair][first + v]), two);
        }
#pragma GCC unroll 4
    for (int v = 0; v < ABREAST; v++) {
        const vfloat factor = vf_load(u->min_factors + (first + v) * WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            sum[r][v] = vf_fnma(vf_from_int(less[r][v]), factor, sum[r][v]);
    }
}

/* A few rows by some vectors of one piece, added to their sums. */
INLINE void tile(unpacked *u, int64_t groups, const activations *a, int64_t place, int64_t row,
                 int first, float *sums, const int rows, const int group, const int wide,
                 const int mins) {
    const size_t width = (size_t)a->columns;
    const int8_t *x = a->codes + place;
    const float *powers = a->powers + place / RUN, *lows = a->lows + place / RUN;
    const int32_t *starts = u->starts[row];
    const uint8_t *ahead = u->ahead, *codes = u->codes[0][first];
    vfloat sum[ROWS][ABREAST];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < ABREAST; v++) sum[r][v] = vf_zero();
#pragma GCC unroll 1
    for (int64_t g = 0; g < groups; g++) {
        vint product[ROWS][ABREAST];
        ask_for(ahead, u->step);
        ahead += u->step;
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < ABREAST; v++)
                product[r][v] = vi_set(!has_starts(mins, wide) ? 0 : starts[g + r * (PIECE / 16)]);
#pragma GCC unroll 8
        for (int four = 0; four < group / 4; four++, codes += PANEL * 4) {
            vbytes w[ABREAST];
#pragma GCC unroll 4
            for (int v = 0; v < ABREAST; v++) w[v] = vb_load(codes + v * 64);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                int32_t one = four_codes(x + r * width + four * 4);
#pragma GCC unroll 4
                for (int v = 0; v < ABREAST; v++)
                    product[r][v] = dot(product[r][v], w[v], one, wide);
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < ABREAST; v++) {
            const vfloat scale = vf_load(u->scales[g] + (first + v) * WIDTH);
            const vfloat low = mins == FLAT_MINS ? vf_load(u->mins[g] + (first + v) * WIDTH) : vf_zero();
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                const vfloat by = times_power(scale, powers[r * (width / RUN)]);
                sum[r][v] = vf_fma(vf_from_int(product[r][v]), by, sum[r][v]);
                if (mins == FLAT_MINS)
                    sum[r][v] = vf_fnma(low, vf_set(lows[g + r * (width / RUN)]), sum[r][v]);
            }
        }
        x += group;
        powers += group == RUN ? 1 : g % 2;
    }
    if (mins == WHOLE_MINS) take_minimums(u, a, place, first, sum, rows, group);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        const vfloat scale = vf_set(a->scales[((size_t)place + r * width) / PIECE]);
#pragma GCC unroll 4
        for (int v = 0; v < ABREAST; v++) {
            float *to = sums + r * PANEL + (first + v) * WIDTH;
            vf_store(to, vf_fma(sum[r][v], scale, vf_load(to)));
        }
    }
    u->ahead = ahead;
}

INLINE void tile_rows(unpacked *u, int64_t groups, const activations *a, int64_t place, int64_t row,
                      float *sums, const int rows, const int group, const int wide, const int mins) {
    for (int v = 0; v < VECTORS; v += ABREAST)
        tile(u, groups, a, place, row, v, sums, rows, group, wide, mins);
}

/* The tiles that formats need; each is compiled once. */
typedef void tile_function(unpacked *, int64_t, const activations *, int64_t, int64_t, float *, int);
#if ROWS == 6
#define MORE_ROWS(group, wide, mins)                                                  \
    case 3: tile_rows(u, groups, a, place, row, sums, 3, group, wide, mins); break; \
    case 4: tile_rows(u, groups, a, place, row, sums, 4, group, wide, mins); break; \
    case 5: tile_rows(u, groups, a, place, row, sums, 5, group, wide, mins); break; \
    case 6: tile_rows(u, groups, a, place, row, sums, 6, group, wide, mins); break;
#else
#define MORE_ROWS(group, wide, mins)
#endif
#define TILE(name, group, wide, mins)                                                              \
    static void name(unpacked *u, int64_t groups, const activations *a, int64_t place, int64_t row, \
                     float *sums, int rows) {                                                      \
        switch (rows) {                                                                            \
            case 1: tile_rows(u, groups, a, place, row, sums, 1, group, wide, mins); break;        \
            case 2: tile_rows(u, groups, a, place, row, sums, 2, group, wide, mins); break;        \
            MORE_ROWS(group, wide, mins)                                                           \
        }                                                                                          \
    }
TILE(tile_32, 32, 0, NO_MINS)
TILE(tile_32_flat, 32, 0, FLAT_MINS)
TILE(tile_32_whole, 32, 0, WHOLE_MINS)
TILE(tile_32_wide, 32, 1, NO_MINS)
TILE(tile_32_wide_flat, 32, 1, FLAT_MINS)
TILE(tile_16, 16, 0, NO_MINS)
TILE(tile_16_whole, 16, 0, WHOLE_MINS)

static tile_function *tile_for(const format *f) {
    if (f->group == 16) return f->mins ? tile_16_whole : tile_16;
    if (is_wide(f)) return f->mins ? tile_32_wide_flat : tile_32_wide;
    if (whole_mins(f)) return tile_32_whole;
    return f->mins ? tile_32_flat : tile_32;
}

/* One panel for up to MAX_ROWS rows. */
INLINE void panel_rows(const format *f, const blocks_weight *w, int64_t panel, const activations *a,
                       int64_t first, int64_t rows, float *sums) {
    unpacked u;
    int64_t size = record_bytes(f, w->span) * VECTORS, columns = record_columns(f);
    int64_t records = divide_up(w->columns, columns), tiles = divide_up(rows, ROWS);
    const uint8_t *data = w->data + panel * records * size;
    memset(sums, 0, (size_t)(rows * PANEL) * sizeof *sums);
    for (int64_t i = 0; i < records; i += PIECE / columns) {
        int64_t count = smaller(PIECE / columns, records - i);
        int64_t groups = unpack(f, w, data + i * size, count, &u) * (RUN / f->group);
        int64_t place = first * a->columns + i * columns;
        if (has_starts(f->mins, is_wide(f))) find_starts(f, a, place, rows, &u);
        u.ahead = data + (i + count) * size;
        u.step = divide_up(count * size, 64 * tiles * (VECTORS / ABREAST) * groups) * 64;
        for (int64_t t = 0; t < tiles; t++) {
            int64_t row = rows * t / tiles, end = rows * (t + 1) / tiles;
            tile_for(f)(&u, groups, a, place + row * a->columns, row, sums + row * PANEL,
                        (int)(end - row));
        }
    }
}

void blocks_rows(const blocks_weight *w, int64_t panel, const activations *a, int64_t first,
                 int64_t rows, float *sums) {
    switch (w->format) {
#define CASE(name, number, ...) \
    case number: panel_rows(&name, w, panel, a, first, rows, sums); break;
        FORMATS(CASE)
    }
}
