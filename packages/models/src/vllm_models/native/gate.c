/* The gate of a feed-forward layer: activation(gate) * up, where gate and up are the halves of a row. */
#include "elements.h"

enum { SILU = 0, GELU_TANH = 1 };

struct gate {
    void *out;           /* [rows, width] */
    const void *x;       /* [rows, x_stride], of which 2 * width are used */
    int64_t rows, width, x_stride, type, activation;
};

INLINE vfloat activate(vfloat a, const int activation) {
    vfloat one = vf_set(1.0f), minus = vf_set(-1.0f);
    if (activation == SILU) return vf_div(a, vf_add(one, vf_exp(vf_mul(a, minus))));
    vfloat cube = vf_mul(vf_mul(a, a), a);
    vfloat inner = vf_mul(vf_fma(cube, vf_set(0.044715f), a), vf_set(0.79788456f));
    return vf_mul(vf_mul(a, vf_set(0.5f)), vf_add(one, vf_tanh(inner)));
}

INLINE void one_row(const struct gate *g, int64_t row, const int type, const int activation) {
    const int64_t width = g->width, size = type ? 2 : 4;
    const char *gate = (const char *)g->x + row * g->x_stride * size, *up = gate + width * size;
    char *out = (char *)g->out + row * width * size;
    int64_t i = 0;
    for (; i + WIDTH <= width; i += WIDTH) {
        vfloat a = activate(elements_load(gate, i, type), activation);
        elements_store(out, i, vf_mul(a, elements_load(up, i, type)), type);
    }
    for (; i < width; i++) {
        float lanes[WIDTH];
        vf_store(lanes, activate(vf_set(element_load(gate, i, type)), activation));
        element_store(out, i, lanes[0] * element_load(up, i, type), type);
    }
}

void gate_rows(const struct gate *g) {
#pragma omp parallel for schedule(static) if (g->rows * g->width > WORTH_THREADS)
    for (int64_t row = 0; row < g->rows; row++) {
        if (g->type == BFLOAT16_ELEMENTS && g->activation == SILU) one_row(g, row, 1, SILU);
        else if (g->type == BFLOAT16_ELEMENTS) one_row(g, row, 1, GELU_TANH);
        else if (g->activation == SILU) one_row(g, row, 0, SILU);
        else one_row(g, row, 0, GELU_TANH);
    }
}
