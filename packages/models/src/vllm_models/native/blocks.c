/* y = x W^T + b with quantized weights (formats.h).

   Activations are quantized to int8 in groups of 32 columns, once per call for all weights that are
   multiplied by them. Products of codes are summed exactly as integers within a group; groups are
   added in float32, front to back. */
#include <math.h>

#include "blocks.h"
#include "segments.h"

/* Quantize one run. What is not finite makes the scale so, and with it every result of the row. */
static void quantize_run(const float *restrict x, int8_t *restrict codes, float *restrict scale,
                         int32_t *restrict sums, float *restrict low) {
    uint32_t largest = 0;
    for (int i = 0; i < RUN; i++) {
        uint32_t magnitude = float_bits(x[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    const float limit = float_of_bits(largest);
    const float inverse = limit > 1e-30f && limit < INFINITY ? 127.0f / limit : 0.0f;
    *scale = limit / 127.0f;
    int32_t rounded[RUN];
    for (int i = 0; i < RUN; i++) rounded[i] = (int32_t)rintf(x[i] * inverse);
    if (inverse == 0.0f) memset(rounded, 0, sizeof rounded);
    for (int i = 0; i < RUN; i++) codes[i] = (int8_t)rounded[i];
    for (int half = 0; half < 2; half++) {
        int32_t sum = 0;
        for (int i = 0; i < 16; i++) sum += rounded[half * 16 + i];
        sums[half] = sum;
    }
    *low = *scale * (float)(sums[0] + sums[1]);
}

/* One run of a row in float32, with zeros after its end. */
INLINE void load_run(const matrix *x, int64_t place, int64_t count, float *restrict to) {
    uint16_t halves[RUN] = {0}; /* zero is the same in both types */
    if (x->type == FLOAT32) {
        if (count < RUN) memset(to, 0, RUN * sizeof *to);
        memcpy(to, (const float *)x->data + place, (size_t)count * sizeof *to);
        return;
    }
    memcpy(halves, (const uint16_t *)x->data + place, (size_t)count * sizeof *halves);
    for (int i = 0; i < RUN; i++) to[i] = bf16_to_float(halves[i]);
}

/* One piece of a row of x, as part of a row of the activations. */
static void quantize_piece(const activations *a, const matrix *x, int64_t from, int64_t row,
                           int64_t first, int64_t columns) {
    for (int64_t run = first / RUN; run < (first + PIECE) / RUN; run++) {
        float values[RUN];
        int64_t place = from * x->stride + run * RUN, number = row * (a->columns / RUN) + run;
        int64_t count = smaller(RUN, columns - run * RUN);
        if (count == RUN) /* a known number, so that the compiler makes no loop of it */
            load_run(x, place, RUN, values);
        else
            load_run(x, place, count > 0 ? count : 0, values);
        quantize_run(values, a->codes + number * RUN, a->scales + number, a->sums + number * 2,
                     a->lows + number);
    }
}

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
    activations a = {NULL, NULL, NULL, NULL, divide_up(columns, PIECE) * PIECE};
    int64_t numbers = rows * a.columns;
    int8_t *memory = scratch(before + (size_t)(numbers + numbers / RUN * 8 + numbers / 16 * 4));
    if (memory != NULL) {
        a.scales = (float *)(memory + before);
        a.lows = a.scales + numbers / RUN;
        a.sums = (int32_t *)(a.lows + numbers / RUN);
        a.codes = (int8_t *)(a.sums + numbers / 16);
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
