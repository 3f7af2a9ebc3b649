/* RMSNorm of rows, alone or after a residual was added. */
#include "elements.h"

struct norm {
    void *out;             /* [rows, width] */
    const void *x;         /* [rows, x_stride] */
    void *residual;        /* [rows, width], or none: becomes residual + x, which is normalised */
    const void *weight;    /* [width], or none */
    int64_t rows, width, x_stride, type;
    float eps, offset;     /* added to the variance, and to the weight */
};

INLINE void one_row(const struct norm *n, int64_t row, const int type) {
    const int64_t width = n->width, whole = width / WIDTH * WIDTH, size = type ? 2 : 4;
    const void *x = (const char *)n->x + row * n->x_stride * size;
    char *out = (char *)n->out + row * width * size;
    if (n->residual) {
        char *sum = (char *)n->residual + row * width * size;
        for (int64_t i = 0; i < whole; i += WIDTH)
            elements_store(sum, i, vf_add(elements_load(sum, i, type), elements_load(x, i, type)), type);
        for (int64_t i = whole; i < width; i++)
            element_store(sum, i, element_load(sum, i, type) + element_load(x, i, type), type);
        x = sum;
    }
    vfloat squares = vf_zero();
    float total = 0.0f;
    for (int64_t i = 0; i < whole; i += WIDTH) {
        vfloat a = elements_load(x, i, type);
        squares = vf_fma(a, a, squares);
    }
    for (int64_t i = whole; i < width; i++) total += element_load(x, i, type) * element_load(x, i, type);
    const float factor = 1.0f / sqrtf((vf_sum(squares) + total) / (float)width + n->eps);
    for (int64_t i = 0; i < whole; i += WIDTH) {
        vfloat a = vf_mul(elements_load(x, i, type), vf_set(factor));
        if (n->weight) a = vf_mul(a, vf_add(elements_load(n->weight, i, type), vf_set(n->offset)));
        elements_store(out, i, a, type);
    }
    for (int64_t i = whole; i < width; i++) {
        float scale = n->weight ? element_load(n->weight, i, type) + n->offset : 1.0f;
        element_store(out, i, element_load(x, i, type) * factor * scale, type);
    }
}

void rms_norm(const struct norm *n) {
#pragma omp parallel for schedule(static) if (n->rows * n->width > WORTH_THREADS)
    for (int64_t row = 0; row < n->rows; row++) {
        if (n->type == BFLOAT16_ELEMENTS) one_row(n, row, BFLOAT16_ELEMENTS);
        else one_row(n, row, FLOAT32_ELEMENTS);
    }
}
