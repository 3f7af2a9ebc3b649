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

/* One piece of a panel, ready to multiply. */
typedef struct {
    uint8_t codes[PIECE / 4][VECTORS][64];
    float scales[PIECE / 16][PANEL];
    float mins[PIECE / 16][PANEL];
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
            if (f->mins) vf_store(to->mins[first * groups + g] + v * WIDTH, min_of(f, w, record, g));
        }
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

/* Sums of a tile, from or to memory. */
typedef vfloat tile_sums[ROWS][ABREAST];
INLINE void load_sums(tile_sums sum, const float *from, const int rows) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < ABREAST; v++) sum[r][v] = vf_load(from + r * PANEL + v * WIDTH);
}
INLINE void store_sums(tile_sums sum, float *to, const int rows) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < ABREAST; v++) vf_store(to + r * PANEL + v * WIDTH, sum[r][v]);
}

/* A few rows by some vectors of one piece: their sums in, their sums out. */
INLINE void tile(unpacked *u, int64_t runs, const activations *a, int64_t place, int first,
                 float *sums, const int rows, const int group, const int zero, const int wide,
                 const int mins) {
    const int parts = RUN / group;
    const size_t width = (size_t)a->columns;
    const int8_t *x = a->codes + place;
    const float *scales = a->scales + place / RUN, *lows = a->lows + place / RUN;
    const int32_t *halves = a->sums + place / 16;
    const uint8_t *ahead = u->ahead;
    tile_sums sum;
    load_sums(sum, sums + first * WIDTH, rows);
#pragma GCC unroll 1
    for (int64_t g = 0; g < runs * parts; g++) {
        vint product[ROWS][ABREAST];
        for (int64_t p = 0; p < u->step; p += 64) __builtin_prefetch(ahead + p);
        ahead += u->step;
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const int32_t total = group_sum(halves + r * (width / 16), group);
#pragma GCC unroll 4
            for (int v = 0; v < ABREAST; v++) product[r][v] = start_of(total, zero, wide);
        }
        const uint8_t *codes = u->codes[g * group / 4][first];
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
            const vfloat weight = vf_load(u->scales[g] + (first + v) * WIDTH);
            const vfloat low = mins ? vf_load(u->mins[g] + (first + v) * WIDTH) : vf_zero();
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                const float scale = scales[r * (width / RUN)];
                const vfloat by = vf_mul(weight, vf_set(scale));
                sum[r][v] = vf_fma(vf_from_int(product[r][v]), by, sum[r][v]);
                const float less = parts == 1 ? lows[r * (width / RUN)]
                                              : scale * (float)halves[r * (width / 16)];
                if (mins) sum[r][v] = vf_fnma(low, vf_set(less), sum[r][v]);
            }
        }
        x += group;
        halves += group / 16;
        scales += parts == 1 ? 1 : g % 2;
        lows += parts == 1 ? 1 : g % 2;
    }
    store_sums(sum, sums + first * WIDTH, rows);
    u->ahead = ahead;
}

INLINE void tile_rows(unpacked *u, int64_t runs, const activations *a, int64_t place,
                      float *sums, const int rows, const int group, const int zero, const int wide,
                      const int mins) {
    for (int v = 0; v < VECTORS; v += ABREAST)
        tile(u, runs, a, place, v, sums, rows, group, zero, wide, mins);
}

/* The tiles that formats need; each is compiled once. */
typedef void tile_function(unpacked *, int64_t, const activations *, int64_t, float *, int, int);
#if ROWS == 6
#define MORE_ROWS(group, wide, mins)                                                  \
    case 3: tile_rows(u, runs, a, place, sums, 3, group, zero, wide, mins); break; \
    case 4: tile_rows(u, runs, a, place, sums, 4, group, zero, wide, mins); break; \
    case 5: tile_rows(u, runs, a, place, sums, 5, group, zero, wide, mins); break; \
    case 6: tile_rows(u, runs, a, place, sums, 6, group, zero, wide, mins); break;
#else
#define MORE_ROWS(group, wide, mins)
#endif
#define TILE(name, group, wide, mins)                                                              \
    static void name(unpacked *u, int64_t runs, const activations *a, int64_t place,               \
                     float *sums, int rows, int zero) {                                            \
        switch (rows) {                                                                            \
            case 1: tile_rows(u, runs, a, place, sums, 1, group, zero, wide, mins); break;         \
            case 2: tile_rows(u, runs, a, place, sums, 2, group, zero, wide, mins); break;         \
            MORE_ROWS(group, wide, mins)                                                           \
        }                                                                                          \
    }
TILE(tile_32, 32, 0, 0)
TILE(tile_32_min, 32, 0, 1)
TILE(tile_32_wide, 32, 1, 0)
TILE(tile_32_wide_min, 32, 1, 1)
TILE(tile_16, 16, 0, 0)
TILE(tile_16_min, 16, 0, 1)

static tile_function *tile_for(const format *f) {
    if (f->group == 16) return f->mins ? tile_16_min : tile_16;
    if (is_wide(f)) return f->mins ? tile_32_wide_min : tile_32_wide;
    return f->mins ? tile_32_min : tile_32;
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
        int64_t runs = unpack(f, w, data + i * size, count, &u);
        int64_t groups = tiles * (VECTORS / ABREAST) * runs * (RUN / f->group);
        u.ahead = data + (i + count) * size;
        u.step = divide_up(count * size, 64 * groups) * 64;
        for (int64_t t = 0; t < tiles; t++) {
            int64_t row = rows * t / tiles, end = rows * (t + 1) / tiles;
            tile_for(f)(&u, runs, a, (first + row) * a->columns + i * columns, sums + row * PANEL,
                        (int)(end - row), f->zero);
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
