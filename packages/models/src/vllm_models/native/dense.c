/* y = x W^T + b with weights in bf16 or f32.

   A panel's weights stand in the order in which they are multiplied:

       [panel][step][vector 0..3][output 0..15][4 bytes]

   where a step is two columns of bf16 or one of f32. Activations are rounded to the weights' type. */
#include "segments.h"

#define STEP_BYTES (VECTORS * 64)
#define STEPS_AT_ONCE 64 /* of one panel: 16 KB, stays in the nearest cache while every row uses it */
#define AHEAD (STEPS_AT_ONCE * STEP_BYTES) /* bytes of prefetch: the next steps arrive meanwhile */

typedef struct {
    const uint8_t *data;
    int64_t outputs, columns, type;
} dense_weight;

INLINE int64_t steps_of(const dense_weight *w) {
    return w->type == BFLOAT16 ? (w->columns + 1) / 2 : w->columns;
}

INLINE vfloat multiply(vfloat sum, vbytes weights, uint32_t x, const int type) {
    return type == BFLOAT16 ? vf_dot_bf16(sum, weights, x) : vf_dot_f32(sum, weights, x);
}

/* Some steps of some vectors of a panel, for `rows` rows: their sums in, their sums out. */
INLINE void tile(const uint8_t *w, const uint32_t *x, int64_t stride, int64_t steps, float *sums,
                 const int rows, const int vectors, const int type) {
    vfloat sum[TILE_ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[r][v] = vf_load(sums + r * PANEL + v * WIDTH);
    for (int64_t step = 0; step < steps; step++, w += STEP_BYTES) {
        vbytes weights[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            __builtin_prefetch(w + AHEAD + v * 64);
            weights[v] = vb_load(w + v * 64);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                sum[r][v] = multiply(sum[r][v], weights[v], x[r * stride + step], type);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) vf_store(sums + r * PANEL + v * WIDTH, sum[r][v]);
}

/* All vectors of a panel; one row has registers enough to do them together. */
INLINE void tile_panel(const uint8_t *w, const uint32_t *x, int64_t stride, int64_t steps,
                       float *sums, const int rows, const int type) {
    const int vectors = rows == 1 ? VECTORS : TILE_VECTORS;
    for (int v = 0; v < VECTORS; v += vectors)
        tile(w + v * 64, x, stride, steps, sums + v * WIDTH, rows, vectors, type);
}

INLINE void tile_of_type(const uint8_t *w, const uint32_t *x, int64_t stride, int64_t steps,
                         float *sums, int rows, const int type) {
    switch (rows) {
        case 1: tile_panel(w, x, stride, steps, sums, 1, type); break;
        case 2: tile_panel(w, x, stride, steps, sums, 2, type); break;
#if TILE_ROWS == 6
        case 3: tile_panel(w, x, stride, steps, sums, 3, type); break;
        case 4: tile_panel(w, x, stride, steps, sums, 4, type); break;
        case 5: tile_panel(w, x, stride, steps, sums, 5, type); break;
        case 6: tile_panel(w, x, stride, steps, sums, 6, type); break;
#endif
    }
}

static void tile_bf16(const uint8_t *w, const uint32_t *x, int64_t stride, int64_t steps,
                      float *sums, int rows) {
    tile_of_type(w, x, stride, steps, sums, rows, BFLOAT16);
}

static void tile_f32(const uint8_t *w, const uint32_t *x, int64_t stride, int64_t steps,
                     float *sums, int rows) {
    tile_of_type(w, x, stride, steps, sums, rows, FLOAT32);
}

/* One panel for up to MAX_ROWS rows. */
static void panel_rows(const dense_weight *w, int64_t panel, const uint32_t *x, int64_t stride,
                       int64_t first, int64_t rows, const float *bias, const matrix *out) {
    float sums[MAX_ROWS * PANEL] __attribute__((aligned(64)));
    int64_t steps = steps_of(w), tiles = divide_up(rows, TILE_ROWS);
    const uint8_t *data = w->data + panel * steps * STEP_BYTES;
    memset(sums, 0, (size_t)(rows * PANEL) * sizeof *sums);
    for (int64_t step = 0; step < steps; step += STEPS_AT_ONCE) {
        int64_t count = tiles > 1 ? smaller(STEPS_AT_ONCE, steps - step) : steps;
        for (int64_t t = 0; t < tiles; t++) {
            int64_t row = rows * t / tiles, end = rows * (t + 1) / tiles;
            (w->type == BFLOAT16 ? tile_bf16 : tile_f32)(
                data + step * STEP_BYTES, x + (first + row) * stride + step, stride, count,
                sums + row * PANEL, (int)(end - row));
        }
        if (tiles == 1) break;
    }
    int64_t column = panel * PANEL;
    write_panel(sums, bias, out, first, rows, column, smaller(PANEL, w->outputs - column));
}

/* A row of x in the weights' type, padded to whole steps. */
static void convert_row(const dense_weight *w, const matrix *x, int64_t row, uint32_t *to) {
    const float *singles = (const float *)x->data + row * x->stride;
    const uint16_t *halves = (const uint16_t *)x->data + row * x->stride;
    to[steps_of(w) - 1] = 0;
    if (x->type == w->type)
        memcpy(to, x->type == FLOAT32 ? (const void *)singles : halves,
               (size_t)w->columns * (x->type == FLOAT32 ? 4 : 2));
    else if (w->type == FLOAT32)
        for (int64_t i = 0; i < w->columns; i++) to[i] = (uint32_t)halves[i] << 16;
    else
        for (int64_t i = 0; i < w->columns; i++) ((uint16_t *)to)[i] = float_to_bf16(singles[i]);
}

/* Whether x can be read as it is. */
static int is_ready(const dense_weight *w, const matrix *x) {
    if (w->type != x->type) return 0;
    return w->type == FLOAT32 || (w->columns % 2 == 0 && x->stride % 2 == 0);
}

/* out [rows, outputs] = x [rows, columns] W^T + b, where rows starts[e] to starts[e + 1] are multiplied
   by weights[e], of the same shape and type, and get the bias at e * outputs. The bias may be NULL.
   Row i of x is x[index[i]] if there is an index. Returns 0, or 1 if memory is short. */
int dense_experts(const dense_weight *weights, int64_t num_experts, const int64_t *starts,
                  const int64_t *index, void *x_data, int64_t x_stride, int64_t x_type,
                  const float *bias, void *out_data, int64_t out_stride, int64_t out_type) {
    const matrix x = {x_data, x_stride, x_type}, out = {out_data, out_stride, out_type};
    int64_t rows = starts[num_experts], steps = steps_of(weights);
    int64_t panels = divide_up(weights->outputs, PANEL);
    int is_copied = index != NULL || !is_ready(weights, &x);
    int64_t stride = is_copied ? steps : weights->type == BFLOAT16 ? x.stride / 2 : x.stride;
    size_t room = (size_t)(num_experts + 1) * sizeof(segment);
    segment *segments = scratch(room + (is_copied ? (size_t)(rows * steps) * 4 : 0));
    if (segments == NULL) return 1;
    uint32_t *copied = (uint32_t *)(segments + num_experts + 1);
    const uint32_t *ready = is_copied ? copied : x.data;
    int64_t count = find_segments(starts, num_experts, panels, segments);
    range ranges[MAX_THREADS];
    int threads = divide_units(segments[count].unit, ranges);
#pragma omp parallel num_threads(threads)
    {
        if (is_copied) {
#pragma omp for
            for (int64_t row = 0; row < rows; row++)
                convert_row(weights, &x, index ? index[row] : row, copied + row * steps);
        }
        for (int64_t number; (number = take_unit(ranges, threads)) >= 0;) {
            unit u = find_unit(segments, count, panels, number);
            panel_rows(weights + u.expert, u.panel, ready, stride, u.first, u.rows,
                       bias ? bias + u.expert * weights->outputs : NULL, &out);
        }
    }
    return 0;
}

/* The same with one weight for all rows. */
int dense_linear(const dense_weight *w, void *x_data, int64_t x_stride, int64_t x_type,
                 const float *bias, void *out_data, int64_t out_stride, int64_t out_type,
                 int64_t rows) {
    const int64_t starts[2] = {0, rows};
    return dense_experts(w, 1, starts, NULL, x_data, x_stride, x_type, bias, out_data, out_stride,
                         out_type);
}

/* Put [outputs, columns] row-major weights into w->data, which is whole panels long. */
void dense_pack(const dense_weight *w, const void *from) {
    int64_t steps = steps_of(w), width = w->columns * (w->type == BFLOAT16 ? 2 : 4);
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < divide_up(w->outputs, PANEL); panel++) {
        for (int64_t step = 0; step < steps; step += 16) {
            int64_t bytes = smaller(64, width - step * 4);
            uint32_t block[PANEL][16] __attribute__((aligned(64)));
            memset(block, 0, sizeof block);
            for (int64_t i = 0; i < smaller(PANEL, w->outputs - panel * PANEL); i++)
                memcpy(block[i], (const char *)from + (panel * PANEL + i) * width + step * 4,
                       (size_t)bytes);
            uint32_t *place = (uint32_t *)(w->data + (panel * steps + step) * STEP_BYTES);
            for (int64_t s = 0; s < smaller(16, steps - step); s++)
                for (int64_t i = 0; i < PANEL; i++) place[s * PANEL + i] = block[i][s];
        }
    }
}
