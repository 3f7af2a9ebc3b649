/* Writes keys and values of a step to their slots, in the layout that attention.h reads. */
#include "simd.h"


struct kv_write {
    void *keys, *values;
    const void *k, *v;      /* [T, stride] elements, heads one after the other */
    const int64_t *slots;   /* [T]: block * block_size + offset */
    int64_t num_tokens, num_kv_heads, key_dim, value_dim, block_size, k_stride, v_stride;
};

INLINE void write_keys(uint32_t *keys, const uint32_t *k, int64_t units) {
    for (int64_t u = 0; u < units; u++) keys[u * WIDTH] = k[u];
}

#define WRITE(name, element, PER)                                                              \
    void name(const struct kv_write *w) {                                               \
        const int64_t units = w->key_dim / PER;                                                \
        for (int64_t t = 0; t < w->num_tokens; t++) {                                          \
            int64_t block = w->slots[t] / w->block_size, place = w->slots[t] % w->block_size;  \
            for (int64_t h = 0; h < w->num_kv_heads; h++) {                                    \
                int64_t head = block * w->num_kv_heads + h;                                    \
                uint32_t *keys = (uint32_t *)w->keys + head * w->block_size * units +          \
                                 place / WIDTH * WIDTH * units + place % WIDTH;                \
                const element *k = (const element *)w->k + t * w->k_stride + h * w->key_dim;   \
                write_keys(keys, (const uint32_t *)k, units);                                  \
                if (!w->v) continue;                                                           \
                element *values = (element *)w->values + head * w->block_size * w->value_dim + \
                                  place / PER * PER * w->value_dim + place % PER;              \
                const element *v = (const element *)w->v + t * w->v_stride + h * w->value_dim; \
                for (int64_t d = 0; d < w->value_dim; d++) values[d * PER] = v[d];             \
            }                                                                                  \
        }                                                                                      \
    }

WRITE(kv_write_bf16, uint16_t, 2)
WRITE(kv_write_f32, float, 1)
