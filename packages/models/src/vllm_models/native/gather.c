/* Some rows of a weight as numbers: embeddings, and a whole quantized weight for slow paths. */
#include "formats.h"

/* A scalar of sixteen, without the vector: the code of one output in one column of a run. */
INLINE int code_at(const format *f, const uint8_t *run, int output, int column) {
    int i = column / 4, k = 4 * output + column % 4, code = 0;
    const uint8_t *upper = run + 64 * f->low;
    if (f->low == 8) code = run[64 * i + k];
    if (f->low == 4) code = run[64 * (i % 4) + k] >> i / 4 * 4 & 15;
    if (f->low == 2) code = run[64 * (i / 4) + k] >> i % 4 * 2 & 3;
    if (f->high == 1) code |= (upper[k] >> i & 1) << f->low;
    if (f->high == 2) code |= (upper[64 * (i / 4) + k] >> i % 4 * 2 & 3) << f->low;
    return f->table ? f->table[code] : code;
}

INLINE void gather_record(const format *f, const blocks_weight *w, const uint8_t *record, int output,
                          int64_t columns, float *to) {
    const uint8_t *run = record + header_bytes(f, w->span);
    for (int64_t first = 0; first < columns; first += f->group) {
        float scales[WIDTH], mins[WIDTH];
        vf_store(scales, scale_of(f, w, record, (int)(first / f->group)));
        vf_store(mins, f->mins ? min_of(f, w, record, (int)(first / f->group)) : vf_zero());
        for (int64_t c = first; c < smaller(first + f->group, columns); c++) {
            int code = code_at(f, run + c / RUN * run_bytes(f), output, (int)(c % RUN));
            to[c] = scales[output] * (float)(code - f->zero) - mins[output];
        }
    }
}

INLINE void gather_row(const format *f, const blocks_weight *w, int64_t row, float *to) {
    int64_t size = record_bytes(f, w->span), columns = record_columns(f);
    int64_t records = divide_up(w->columns, columns), panel = row / PANEL;
    for (int64_t i = 0; i < records; i++) {
        int64_t place = (panel * records + i) * VECTORS + row % PANEL / WIDTH;
        gather_record(f, w, w->data + place * size, (int)(row % WIDTH),
                      smaller(columns, w->columns - i * columns), to + i * columns);
    }
}

/* out [num_rows][columns] float32. */
void blocks_gather(const blocks_weight *w, const int64_t *rows, int64_t num_rows, float *out) {
#pragma omp parallel for schedule(static) if (num_rows > 8)
    for (int64_t i = 0; i < num_rows; i++) switch (w->format) {
#define CASE(name, number, ...) \
    case number: gather_row(&name, w, rows[i], out + i * w->columns); break;
            FORMATS(CASE)
        }
}

/* The same of a dense weight, whose numbers stay what they are: out [num_rows][bytes]. */
void dense_gather(const uint8_t *data, int64_t bytes, const int64_t *rows, int64_t num_rows,
                  uint8_t *out) {
    const int64_t units = divide_up(bytes, 4);
    for (int64_t i = 0; i < num_rows; i++) {
        const uint8_t *from = data + (rows[i] / PANEL * units * PANEL + rows[i] % PANEL) * 4;
        for (int64_t u = 0; u < units; u++)
            memcpy(out + i * bytes + u * 4, from + u * PANEL * 4, (size_t)smaller(4, bytes - u * 4));
    }
}
