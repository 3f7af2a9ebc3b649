/* What choosing a token needs, of whole rows (choose.c) and of rows that are cut (truncate.c).

   The arithmetic is written number by number in operations that every class rounds alike, so that a
   seed draws the same tokens on every processor. */
#ifndef CHOOSE_H
#define CHOOSE_H

#include <math.h>

#include "linear.h"

#define BLOCK 512 /* scores that are kept before it is asked whether any is the best so far */

/* How a row chooses. */
typedef struct {
    float temperature; /* 0 takes the largest logit */
    float top_p;       /* in (0, 1] */
    float min_p;       /* in [0, 1] */
    int32_t key[2];
    int64_t top_k; /* 0 keeps all */
} draw;

typedef struct {
    float score; /* NaN if one was */
    int64_t token;
} winner;

typedef struct {
    const float *logits; /* [count][stride], of which `size` are used */
    const draw *draws;   /* [count] */
    winner *winners;     /* [count] */
    int64_t count, size, stride;
} choice;

/* Whether some tokens of a row cannot win. */
INLINE int is_cut(const choice *c, int64_t row) {
    const draw *d = c->draws + row;
    return d->temperature > 0.0f && (d->top_k > 0 || d->top_p < 1.0f || d->min_p > 0.0f);
}

/* The winner of a row that is cut, with `room_of_cut` bytes to work in. */
winner race_of_cut(const choice *c, int64_t row, void *room);
size_t room_of_cut(const choice *c);

/* log(x) for normal x above 0, with a relative error near 1e-7: x = 2^n (1 + f), f within sqrt(2). */
INLINE float log_of(float x) {
    const int32_t n = (int32_t)(float_bits(x) - 0x3f3504f3u) >> 23;
    const float f = float_of_bits(float_bits(x) - ((uint32_t)n << 23)) - 1.0f, square = f * f;
    float p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    const float exponent = (float)n;
    const float tail = f * square * p - 2.12194440e-4f * exponent - 0.5f * square;
    return f + tail + 0.693359375f * exponent;
}

/* The logarithm of a draw of the exponential distribution. */
INLINE float log_time(uint32_t token, uint32_t low, uint32_t high) {
    uint32_t x = token * 0x9E3779B1u + low;
    x = (x ^ x >> 16) * 0x21F0AAADu;
    x = ((x ^ x >> 15) ^ high) * 0xD35A2D97u;
    x = (x ^ x >> 15) & 0x7FFFFFFF;
    float u = (float)(int32_t)x * 0x1p-31f + 0x1p-32f;
    u = u < 1.0f - 0x1p-24f ? u : 1.0f - 0x1p-24f;
    const float rest = 1.0f - u, lost = (1.0f - rest) - u; /* what rounding took from 1 - u */
    return log_of(-(log_of(rest) + lost / rest));
}

/* Integers in the order of the numbers; NaNs are beyond the infinities on both sides. */
INLINE int32_t order_of(float x) {
    const int32_t bits = (int32_t)float_bits(x);
    return bits ^ (bits >> 31 & 0x7fffffff);
}
INLINE float number_at(int32_t order) {
    return float_of_bits((uint32_t)(order ^ (order >> 31 & 0x7fffffff)));
}

/* The first of the largest of `count` scores, if it beats the best so far. */
INLINE void take_best(const float *restrict scores, int64_t first, int64_t count, winner *best) {
    int32_t most = INT32_MIN, least = INT32_MAX;
    for (int64_t i = 0; i < count; i++) {
        const int32_t order = order_of(scores[i]);
        most = order > most ? order : most;
        least = order < least ? order : least;
    }
    if (most > order_of(INFINITY) || least < order_of(-INFINITY)) best->score = NAN;
    const float score = number_at(most);
    if (!(score > best->score)) return;
    int64_t place = 0;
    while (scores[place] != score) place++;
    *best = (winner){score, first + place};
}

#endif
