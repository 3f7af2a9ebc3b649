/* Which token each row gets, in one read of its logits: the largest logit, or the first to arrive in
   an exponential race (runner/noise.py), as

       score = logit / temperature - log(-log(1 - u))      u in (0, 1) from a hash of the token id

   The arithmetic is written number by number in operations that every class rounds alike, so that a
   seed draws the same tokens on every processor. Rows are cut at fixed places into pieces, of which
   threads take one by one; the first of equal scores wins, in whatever order they were done. */
#include <math.h>

#include "linear.h"

#define PIECE 8192 /* tokens that one thread takes */
#define BLOCK 512  /* scores that are kept before it is asked whether any is the best so far */

typedef struct {
    const float *logits;       /* [..][stride] */
    const int64_t *rows;       /* [count] which of them */
    const float *temperatures; /* [count], 0 takes the largest logit */
    const int32_t *keys;       /* [count][2] */
    float *scores;             /* [count] of the winners; NaN if a score was */
    int64_t *tokens;           /* [count] */
    int64_t count, size, stride;
} choice;

typedef struct {
    float score;
    int64_t token;
} winner;

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

static winner best_of(const choice *c, int64_t row, int64_t begin, int64_t end) {
    const float *logits = c->logits + c->rows[row] * c->stride, temperature = c->temperatures[row];
    const uint32_t low = (uint32_t)c->keys[2 * row], high = (uint32_t)c->keys[2 * row + 1];
    winner best = {-INFINITY, begin};
    for (int64_t first = begin; first < end; first += BLOCK) {
        const int64_t count = smaller(BLOCK, end - first);
        float raced[BLOCK];
        for (int64_t i = 0; temperature > 0 && i < count; i++)
            raced[i] = logits[first + i] / temperature - log_time((uint32_t)(first + i), low, high);
        take_best(temperature > 0 ? raced : logits + first, first, count, &best);
    }
    return best;
}

/* Returns 0, or 1 if memory is short. */
int choose_tokens(const choice *c) {
    const int64_t pieces = divide_up(c->size, PIECE);
    winner *found = scratch((size_t)(c->count * pieces) * sizeof *found);
    if (found == NULL) return 1;
    /* One row's largest logit is found before a second thread has begun. */
    const int is_long = c->count > 1 || (c->count == 1 && c->temperatures[0] > 0);
#pragma omp parallel for schedule(dynamic) if (is_long)
    for (int64_t i = 0; i < c->count * pieces; i++) {
        const int64_t begin = i % pieces * PIECE;
        found[i] = best_of(c, i / pieces, begin, smaller(begin + PIECE, c->size));
    }
    for (int64_t row = 0; row < c->count; row++) {
        winner best = found[row * pieces];
        for (int64_t i = 1; i < pieces; i++) {
            const winner next = found[row * pieces + i];
            if (next.score > best.score || next.score != next.score) best = next;
        }
        c->scores[row] = best.score;
        c->tokens[row] = best.token;
    }
    return 0;
}
