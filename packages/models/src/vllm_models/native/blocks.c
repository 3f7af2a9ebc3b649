/* y = x W^T + b with quantized weights (formats.h).

   Activations are quantized to int8 in groups of 32 columns, once per call for all weights that are
   multiplied by them. Products of codes are summed exactly as integers within a group; groups are
   added in float32, front to back. */
#include <math.h>

#include "blocks.h"

/* Quantize one run. What is not finite makes the scale so, and with it every result of the row. */
static void quantize_run(const float *x, int8_t *codes, float *scale, int32_t *sums) {
    uint32_t bits[RUN], largest = 0;
    memcpy(bits, x, sizeof bits);
    for (int i = 0; i < RUN; i++) {
        uint32_t magnitude = bits[i] & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    float limit;
    memcpy(&limit, &largest, sizeof limit);
    float inverse = limit > 1e-30f && limit < INFINITY ? 127.0f / limit : 0.0f;
    *scale = limit / 127.0f;
    for (int i = 0; i < RUN; i++)
        codes[i] = inverse == 0.0f ? 0 : (int8_t)(int32_t)rintf(x[i] * inverse);
    for (int half = 0; half < 2; half++) {
        int32_t sum = 0;
        for (int i = 0; i < 16; i++) sum += codes[half * 16 + i];
        sums[half] = sum;
    }
}

static void quantize_piece(const activations *a, const matrix *x, int64_t row, int64_t first,
                           int64_t columns) {
    for (int64_t run = first / RUN; run < (first + PIECE) / RUN; run++) {
        float values[RUN] = {0};
        int64_t count = smaller(RUN, columns - run * RUN), place = row * x->stride + run * RUN;
        if (x->type == FLOAT32 && count > 0)
            memcpy(values, (float *)x->data + place, (size_t)count * sizeof *values);
        else
            for (int64_t i = 0; i < count; i++)
                values[i] = bf16_to_float(((uint16_t *)x->data)[place + i]);
        int64_t number = row * (a->columns / RUN) + run;
        quantize_run(values, a->codes + number * RUN, a->scales + number, a->sums + number * 2);
    }
}

/* Multiply one panel. */
static void panel_of(const blocks_weight *w, int64_t panel, const activations *a, int64_t first,
                     int64_t rows, const float *bias, const matrix *out) {
    float sums[MAX_ROWS * PANEL] __attribute__((aligned(64)));
    if (rows == 1)
        blocks_row(w, panel, a, first, sums);
    else
        blocks_rows(w, panel, a, first, rows, sums);
    int64_t column = panel * PANEL;
    write_panel(sums, bias, out, first, rows, w->offset + column,
                smaller(PANEL, w->outputs - column));
}

/* Memory for the activations of a call. */
static activations room_for(int64_t rows, int64_t columns) {
    activations a = {NULL, NULL, NULL, divide_up(columns, PIECE) * PIECE};
    int64_t numbers = rows * a.columns;
    a.codes = scratch((size_t)(numbers + numbers / RUN * 4 + numbers / 16 * 4));
    if (a.codes != NULL) {
        a.scales = (float *)(a.codes + numbers);
        a.sums = (int32_t *)(a.scales + numbers / RUN);
    }
    return a;
}

/* out[:, offset..] = x [rows, columns] W^T + b for each of the parts, which all have as many columns;
   b may be NULL. Returns 0, or 1 if memory is short. */
int blocks_linear(const blocks_weight *parts, int64_t num_parts, void *x_data, int64_t x_stride,
                  int64_t x_type, const float *bias, void *out_data, int64_t out_stride,
                  int64_t out_type, int64_t rows) {
    const matrix x = {x_data, x_stride, x_type}, out = {out_data, out_stride, out_type};
    activations a = room_for(rows, parts->columns);
    if (a.codes == NULL) return 1;
    int64_t pieces = a.columns / PIECE, groups = divide_up(rows, MAX_ROWS), panels = 0;
    for (int64_t part = 0; part < num_parts; part++) panels += divide_up(parts[part].outputs, PANEL);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * pieces; i++)
            quantize_piece(&a, &x, i / pieces, i % pieces * PIECE, parts->columns);
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < panels * groups; unit++) {
            int64_t group = unit / panels, panel = unit % panels, first = rows * group / groups;
            const blocks_weight *w = parts;
            while (panel >= divide_up(w->outputs, PANEL)) panel -= divide_up((w++)->outputs, PANEL);
            panel_of(w, panel, &a, first, rows * (group + 1) / groups - first, bias, &out);
        }
    }
    return 0;
}
