/* y = x W^T + b with quantized weights (formats.h).

   Activations are quantized to int8, once per call for all weights that are multiplied by them.
   Products of codes are summed exactly as integers within a group; the groups of a piece, and then the
   pieces, are added in float32, front to back. */
#include "blocks.h"
#include "segments.h"

/* Multiply one panel. */
static void panel_of(const blocks_weight *w, int64_t panel, const activations *a, int64_t first,
                     int64_t rows, const float *bias, const matrix *out) {
    float sums[MAX_ROWS * PANEL] __attribute__((aligned(64)));
    if (rows == 1)
        blocks_row(w, panel, a, first, sums);
    else if (rows <= FEW)
        blocks_few(w, panel, a, first, rows, sums);
    else
        blocks_rows(w, panel, a, first, rows, sums);
    int64_t column = panel * PANEL;
    write_panel(sums, bias, out, first, rows, w->offset + column,
                smaller(PANEL, w->outputs - column));
}

/* Memory for the activations of a call, behind `before` bytes of something else. */
static activations room_for(int64_t rows, int64_t columns, size_t before) {
    activations a = {NULL, NULL, NULL, {NULL, NULL}, NULL, {NULL, NULL}, divide_up(columns, PIECE) * PIECE};
    int64_t runs = rows * a.columns / RUN, pieces = rows * a.columns / PIECE;
    int8_t *memory = scratch(before + (size_t)(runs * (4 + 12 + 4 + 6 + RUN) + pieces * 4));
    if (memory != NULL) {
        a.scales = (float *)(memory + before);
        a.powers = a.scales + pieces;
        a.lows = a.powers + runs;
        a.sums[0] = (int32_t *)(a.lows + runs);
        a.sums[1] = a.sums[0] + runs;
        a.whole_lows[0] = (int16_t *)(a.sums[1] + 2 * runs);
        a.whole_lows[1] = a.whole_lows[0] + runs;
        a.codes = (int8_t *)(a.whole_lows[1] + 2 * runs);
    }
    return a;
}

/* out [rows, ..] = x [rows, columns] W^T + b for each part of a weight at its offset; all parts have as
   many columns. Rows starts[e] to starts[e + 1] are multiplied by the parts of expert e, which are
   neighbours, and get the bias at e * width. The bias may be NULL. Row i of x is x[index[i]] if there
   is an index. Returns 0, or 1 if memory is short. */
int blocks_experts(const blocks_weight *weights, int64_t num_parts, int64_t num_experts,
                   const int64_t *starts, const int64_t *index, void *x_data, int64_t x_stride,
                   int64_t x_type, const float *bias, void *out_data, int64_t out_stride,
                   int64_t out_type) {
    const matrix x = {x_data, x_stride, x_type}, out = {out_data, out_stride, out_type};
    int64_t rows = starts[num_experts], panels = 0, width = 0;
    for (int64_t part = 0; part < num_parts; part++) {
        panels += divide_up(weights[part].outputs, PANEL);
        width += weights[part].outputs;
    }
    size_t room = (size_t)(num_experts + 1) * sizeof(segment);
    activations a = room_for(rows, weights->columns, room);
    if (a.codes == NULL) return 1;
    segment *segments = (segment *)((int8_t *)a.scales - room);
    int64_t count = find_segments(starts, num_experts, panels, segments);
    int64_t pieces = a.columns / PIECE;
    range ranges[MAX_THREADS];
    int threads = divide_units(segments[count].unit, ranges);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * pieces; i++) {
            int64_t row = i / pieces;
            quantize_piece(&a, &x, index ? index[row] : row, row, i % pieces * PIECE,
                           weights->columns);
        }
        for (int64_t number; (number = take_unit(ranges, threads)) >= 0;) {
            unit u = find_unit(segments, count, panels, number);
            const blocks_weight *w = weights + u.expert * num_parts;
            for (; u.panel >= divide_up(w->outputs, PANEL); w++)
                u.panel -= divide_up(w->outputs, PANEL);
            panel_of(w, u.panel, &a, u.first, u.rows, bias ? bias + u.expert * width : NULL, &out);
        }
    }
    return 0;
}

/* The same with one weight for all rows. */
int blocks_linear(const blocks_weight *parts, int64_t num_parts, void *x_data, int64_t x_stride,
                  int64_t x_type, const float *bias, void *out_data, int64_t out_stride,
                  int64_t out_type, int64_t rows) {
    const int64_t starts[2] = {0, rows};
    return blocks_experts(parts, num_parts, 1, starts, NULL, x_data, x_stride, x_type, bias,
                          out_data, out_stride, out_type);
}
