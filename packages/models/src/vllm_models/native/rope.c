/* Rotary positions of heads, after an optional RMSNorm of each head.

   A token's heads stand side by side. Of each head the first `rotated` numbers are turned in pairs: (i, i + rotated / 2), or neighbours if interleaved. cos and sin have the
   width `rotated`; the sign of the rotation is in sin. */
#include "elements.h"

#define MAX_DIM 576

struct rotate {
    void *out;              /* [T, num_heads, dim] */
    const void *x;          /* [T, stride], of which num_heads * dim are used */
    const void *cos, *sin;  /* [T, rotated] */
    const void *weight;     /* [dim] of the norm, or none */
    int64_t num_tokens, stride, num_heads, dim, rotated, interleaved, type;
    float eps;              /* of the norm */
};

INLINE void normalise(const struct rotate *r, float *head, const int type) {
    float total = 0.0f;
    vfloat squares = vf_zero();
    const int64_t whole = r->dim / WIDTH * WIDTH;
    for (int64_t i = 0; i < whole; i += WIDTH) squares = vf_fma(vf_load(head + i), vf_load(head + i), squares);
    for (int64_t i = whole; i < r->dim; i++) total += head[i] * head[i];
    const float factor = 1.0f / sqrtf((vf_sum(squares) + total) / (float)r->dim + r->eps);
    for (int64_t i = 0; i < r->dim; i++)
        head[i] = head[i] * factor * element_load(r->weight, i, type);
}

INLINE void one_token(const struct rotate *r, int64_t token, const int type) {
    const int64_t half = r->rotated / 2, size = type ? 2 : 4;
    float cos[MAX_DIM], sin[MAX_DIM], head[MAX_DIM], turned[MAX_DIM];
    const char *cosines = (const char *)r->cos + token * r->rotated * size;
    const char *sines = (const char *)r->sin + token * r->rotated * size;
    for (int64_t i = 0; i < r->rotated; i++) {
        cos[i] = element_load(cosines, i, type);
        sin[i] = element_load(sines, i, type);
    }
    for (int64_t h = 0; h < r->num_heads; h++) {
        const char *x = (const char *)r->x + (token * r->stride + h * r->dim) * size;
        char *out = (char *)r->out + (token * r->num_heads + h) * r->dim * size;
        for (int64_t i = 0; i < r->dim; i++) head[i] = element_load(x, i, type);
        if (r->weight) normalise(r, head, type);
        if (r->interleaved)
            for (int64_t i = 0; i < r->rotated; i++) turned[i] = head[i ^ 1];
        else
            for (int64_t i = 0; i < half; i++) turned[i] = head[i + half], turned[i + half] = head[i];
        for (int64_t i = 0; i < r->rotated; i++) head[i] = head[i] * cos[i] + turned[i] * sin[i];
        for (int64_t i = 0; i < r->dim; i++) element_store(out, i, head[i], type);
    }
}

void rotate_heads(const struct rotate *r) {
    const int64_t numbers = r->num_tokens * r->num_heads * r->dim;
#pragma omp parallel for schedule(static) if (numbers > WORTH_THREADS)
    for (int64_t token = 0; token < r->num_tokens; token++) {
        if (r->type == BFLOAT16_ELEMENTS) one_token(r, token, BFLOAT16_ELEMENTS);
        else one_token(r, token, FLOAT32_ELEMENTS);
    }
}
