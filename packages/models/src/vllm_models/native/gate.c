/* The gate of a feed-forward layer: activation(gate) * up, where gate and up are the halves of a row. */
#include "elements.h"

enum { SILU = 0, GELU_TANH = 1, CLAMPED = 2 };

struct gate {
    void *out;           /* [rows, width] */
    const void *x;       /* [rows, x_stride], of which 2 * width are used */
    int64_t rows, width, x_stride, type, activation;
    float alpha, limit; /* of CLAMPED: g * sigmoid(alpha * g) * (u + 1), g <= limit, |u| <= limit */
};

INLINE vfloat activate(vfloat a, const int activation) {
    vfloat one = vf_set(1.0f), minus = vf_set(-1.0f);
    if (activation == SILU) return vf_div(a, vf_add(one, vf_exp(vf_mul(a, minus))));
    vfloat cube = vf_mul(vf_mul(a, a), a);
    vfloat inner = vf_mul(vf_fma(cube, vf_set(0.044715f), a), vf_set(0.79788456f));
    return vf_mul(vf_mul(a, vf_set(0.5f)), vf_add(one, vf_tanh(inner)));
}

INLINE vfloat gated(const struct gate *g, vfloat a, vfloat up, const int activation) {
    if (activation != CLAMPED) return vf_mul(activate(a, activation), up);
    vfloat one = vf_set(1.0f), limit = vf_set(g->limit);
    a = vf_min(a, limit);
    up = vf_min(vf_max(up, vf_set(-g->limit)), limit);
    vfloat swish = vf_div(a, vf_add(one, vf_exp(vf_mul(a, vf_set(-g->alpha)))));
    return vf_mul(swish, vf_add(up, one));
}

INLINE void one_row(const struct gate *g, int64_t row, const int type, const int activation) {
    const int64_t width = g->width, size = type ? 2 : 4;
    const char *gate = (const char *)g->x + row * g->x_stride * size, *up = gate + width * size;
    char *out = (char *)g->out + row * width * size;
    int64_t i = 0;
    for (; i + WIDTH <= width; i += WIDTH) {
        vfloat a = elements_load(gate, i, type), b = elements_load(up, i, type);
        elements_store(out, i, gated(g, a, b, activation), type);
    }
    for (; i < width; i++) {
        float lanes[WIDTH];
        vfloat a = vf_set(element_load(gate, i, type)), b = vf_set(element_load(up, i, type));
        vf_store(lanes, gated(g, a, b, activation));
        element_store(out, i, lanes[0], type);
    }
}

INLINE void any_row(const struct gate *g, int64_t row, const int type) {
    if (g->activation == SILU) one_row(g, row, type, SILU);
    else if (g->activation == GELU_TANH) one_row(g, row, type, GELU_TANH);
    else one_row(g, row, type, CLAMPED);
}

void gate_rows(const struct gate *g) {
#pragma omp parallel for schedule(static) if (g->rows * g->width > WORTH_THREADS)
    for (int64_t row = 0; row < g->rows; row++) {
        if (g->type == BFLOAT16_ELEMENTS) any_row(g, row, 1);
        else any_row(g, row, 0);
    }
}
