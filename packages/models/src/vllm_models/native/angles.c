/* Cosine and signed sine of a step's positions, arranged as rope.c reads them. */
#include "elements.h"

struct angles {
    void *cos, *sin; /* [T, 2 * pairs] */
    const int64_t *positions;
    const float *frequencies; /* [pairs] angle per position */
    int64_t num_tokens, pairs, interleaved, type;
    float amplitude;
};

INLINE void angles_of(const struct angles *a, int64_t token, const int type) {
    const float position = (float)a->positions[token];
    const int64_t row = token * a->pairs * 2;
    for (int64_t i = 0; i < a->pairs; i++) {
        const float angle = position * a->frequencies[i];
        const float cosine = cosf(angle) * a->amplitude, sine = sinf(angle) * a->amplitude;
        const int64_t first = row + (a->interleaved ? 2 * i : i);
        const int64_t second = first + (a->interleaved ? 1 : a->pairs);
        element_store(a->cos, first, cosine, type);
        element_store(a->cos, second, cosine, type);
        element_store(a->sin, first, -sine, type);
        element_store(a->sin, second, sine, type);
    }
}

void turn_angles(const struct angles *a) {
#pragma omp parallel for schedule(static) if (a->num_tokens * a->pairs > WORTH_THREADS / 16)
    for (int64_t token = 0; token < a->num_tokens; token++) {
        if (a->type == BFLOAT16_ELEMENTS) angles_of(a, token, BFLOAT16_ELEMENTS);
        else angles_of(a, token, FLOAT32_ELEMENTS);
    }
}
