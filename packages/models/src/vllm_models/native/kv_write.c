/* Writes keys and values of a step to their slots, in the layout that attention.h reads. */
#include "elements.h"

struct kv_write {
    void *keys, *values;
    float *key_scales, *value_scales; /* [B, K, P] of int8, or none */
    const void *k, *v;      /* [T, stride] elements, heads one after the other */
    const int64_t *slots;   /* [T]: block * block_size + offset */
    int64_t num_tokens, num_kv_heads, key_dim, value_dim, block_size, k_stride, v_stride;
};

/* Every `per` numbers of a head stand together, `step` numbers behind those before them. */
struct order {
    int64_t per, step;
};

INLINE void copy_head(char *to, const char *from, int64_t width, struct order order, const int bytes) {
    for (int64_t i = 0; i < width; i += order.per)
        memcpy(to + i / order.per * order.step * bytes, from + i * bytes, (size_t)(order.per * bytes));
}

/* A head in int8: its largest number becomes 127. Returns the scale. One that is no number is left to
   say so to whoever multiplies by it. */
INLINE float quantize_head(int8_t *to, const char *from, int64_t width, struct order order,
                           const int type) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < width; i++) {
        uint32_t bits = float_bits(element_load(from, i, type)) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float scale = float_of_bits(largest) / 127.0f;
    float inverse = scale > 1e-36f && scale < INFINITY ? 1.0f / scale : 0.0f;
    for (int64_t i = 0; i < width; i++) {
        float scaled = inverse == 0.0f ? 0.0f : element_load(from, i, type) * inverse;
        float whole = (scaled + 12582912.0f) - 12582912.0f; /* to the nearest, ties to even */
        to[i / order.per * order.step + i % order.per] = (int8_t)whole;
    }
    return scale;
}

INLINE void write_head(char *data, float *scales, int64_t place, int64_t offset, const char *from,
                       int64_t width, struct order order, const int type) {
    const int bytes = type == BFLOAT16_ELEMENTS ? 2 : 4;
    if (scales) scales[place] = quantize_head((int8_t *)data + offset, from, width, order, type);
    else copy_head(data + offset * bytes, from, width, order, bytes);
}

INLINE void write_token(const struct kv_write *w, int64_t t, const int type) {
    const int64_t per = type == BFLOAT16_ELEMENTS ? 2 : 1, bytes = 4 / per;
    const struct order key_order = {per, WIDTH * per}, value_order = {1, per};
    int64_t block = w->slots[t] / w->block_size, inside = w->slots[t] % w->block_size;
    for (int64_t h = 0; h < w->num_kv_heads; h++) {
        int64_t head = (block * w->num_kv_heads + h) * w->block_size;
        const char *k = (const char *)w->k + (t * w->k_stride + h * w->key_dim) * bytes;
        int64_t offset = (head + inside / WIDTH * WIDTH) * w->key_dim + inside % WIDTH * per;
        write_head(w->keys, w->key_scales, head + inside, offset, k, w->key_dim, key_order, type);
        if (!w->v) continue;
        const char *v = (const char *)w->v + (t * w->v_stride + h * w->value_dim) * bytes;
        offset = (head + inside / per * per) * w->value_dim + inside % per;
        write_head(w->values, w->value_scales, head + inside, offset, v, w->value_dim,
                   value_order, type);
    }
}

/* Whether threads are worth it: the units of a key go to a cache line each. */
INLINE int is_long(const struct kv_write *w) {
    return w->num_tokens * w->num_kv_heads * w->key_dim >= WORTH_THREADS / 2;
}

void kv_write_bf16(const struct kv_write *w) {
#pragma omp parallel for schedule(static) if (is_long(w))
    for (int64_t t = 0; t < w->num_tokens; t++) write_token(w, t, BFLOAT16_ELEMENTS);
}

void kv_write_f32(const struct kv_write *w) {
#pragma omp parallel for schedule(static) if (is_long(w))
    for (int64_t t = 0; t < w->num_tokens; t++) write_token(w, t, FLOAT32_ELEMENTS);
}
