/* Rows of which only some tokens can win: those that top-k, then top-p of the rest, then min-p leave.
   Each is a threshold on the score, so tokens of equal score stay or go together, and nothing is sorted:

       above(t)  = number (top-k) or weight (top-p) of the scores greater than t
       threshold = the smallest score t with above(t) < k, or < p of the whole weight

   The largest logit of every SPAN of tokens is found first. From there on only spans are looked at
   that have a score near enough to the best. */
#include "choose.h"

#define SPAN 64

/* A row on its way, and its candidates in the order of the tokens. */
typedef struct {
    const float *logits;
    int64_t size, spans;
    float temperature, best; /* the largest score */
    int32_t *tops;           /* [spans] the largest logit of each, as `order_of` */
    int32_t *tokens;         /* [size] of the candidates */
    float *scores;           /* [size] */
    float *weights;          /* [size]; the best one's is 1 */
    uint32_t *keys;          /* [size] in the order of the scores */
} race;

size_t room_of_cut(const choice *c) {
    const size_t size = (size_t)c->size, spans = (size_t)divide_up(c->size, SPAN);
    return ((4 * size + spans) * sizeof(int32_t) + 63) & ~(size_t)63;
}

/* e^x for x up to 0, with a relative error near 1e-7; below -87, e^-87. */
INLINE float exp_of(float x) {
    x = x > -87.0f ? x : -87.0f;
    const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * (r * r) + r) + 1.0f;
    return p * float_of_bits((uint32_t)((int32_t)n + 127) << 23);
}

/* Zeros of both signs are equal. */
INLINE uint32_t key_of(float score) { return (uint32_t)order_of(score + 0.0f) ^ 0x80000000u; }

/* The largest logit, NaN if there is one; fills the tops. */
static winner find_tops(race *r) {
    winner best = {-INFINITY, 0};
    for (int64_t i = 0; i < r->spans; i++) {
        winner top = {-INFINITY, 0};
        take_best(r->logits + i * SPAN, i * SPAN, smaller(SPAN, r->size - i * SPAN), &top);
        r->tops[i] = order_of(top.score);
        if (top.score > best.score || top.score != top.score) best = top;
    }
    return best;
}

/* The smallest key above which there is less than `wanted`: by weight, or by number without weights.
   Bits are decided eleven at a time, from the top. */
static uint32_t smallest_kept(const uint32_t *keys, const float *weights, int64_t count, double wanted) {
    uint32_t known = 0;
    double above = 0.0;
    for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
        const int bits = shift ? 11 : 10;
        double bins[2048] = {0};
        for (int64_t i = 0; i < count; i++)
            if (shift == 21 || keys[i] >> (shift + bits) == known)
                bins[keys[i] >> shift & ((1u << bits) - 1)] += weights ? (double)weights[i] : 1.0;
        double reached = above;
        uint32_t lowest = 0;
        for (uint32_t bin = 1u << bits; bin-- > 0 && reached < wanted;) {
            if (bins[bin] == 0.0) continue;
            lowest = bin;
            above = reached;
            reached += bins[bin];
        }
        known = known << bits | lowest;
    }
    return known;
}

/* The weights of all tokens. */
static double whole_weight(const race *r) {
    double total = 0.0;
    for (int64_t first = 0; first < r->size; first += BLOCK) {
        const int64_t count = smaller(BLOCK, r->size - first);
        float weights[BLOCK] = {0}, lanes[WIDTH] = {0};
        for (int64_t i = 0; i < count; i++)
            weights[i] = exp_of(r->logits[first + i] / r->temperature - r->best);
        for (int64_t i = 0; i < BLOCK; i += WIDTH)
            for (int64_t lane = 0; lane < WIDTH; lane++) lanes[lane] += weights[i + lane];
        for (int64_t lane = 0; lane < WIDTH; lane++) total += (double)lanes[lane];
    }
    return total;
}

/* The tokens with at least some score; returns how many. */
static int64_t collect(race *r, float least) {
    int64_t found = 0;
    for (int64_t i = 0; i < r->spans; i++) {
        if (number_at(r->tops[i]) / r->temperature < least) continue;
        for (int64_t at = i * SPAN; at < smaller((i + 1) * SPAN, r->size); at++) {
            const float score = r->logits[at] / r->temperature;
            r->tokens[found] = (int32_t)at;
            r->scores[found] = score;
            found += score >= least;
        }
    }
    return found;
}

/* The weights of the candidates, and their sum. */
static double weigh(race *r, int64_t count) {
    double total = 0.0;
    for (int64_t i = 0; i < count; i++) r->weights[i] = exp_of(r->scores[i] - r->best);
    for (int64_t i = 0; i < count; i++) total += (double)r->weights[i];
    return total;
}

/* Drop the candidates below the threshold; returns how many are left. */
static int64_t cut(race *r, int64_t count, const float *weights, double wanted) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i++) r->keys[i] = key_of(r->scores[i]);
    const uint32_t least = smallest_kept(r->keys, weights, count, wanted);
    for (int64_t i = 0; i < count; i++) {
        r->tokens[kept] = r->tokens[i];
        r->scores[kept] = r->scores[i];
        kept += r->keys[i] >= least;
    }
    return kept;
}

/* The k candidates of the largest scores. Of as many spans each has one that is at least its top. */
static int64_t collect_number(race *r, int64_t k) {
    float least = -INFINITY;
    if (k <= r->spans) {
        for (int64_t i = 0; i < r->spans; i++) r->keys[i] = key_of(number_at(r->tops[i]));
        const uint32_t key = smallest_kept(r->keys, NULL, r->spans, (double)k);
        least = number_at((int32_t)(key ^ 0x80000000u)) / r->temperature;
    }
    return cut(r, collect(r, least), NULL, (double)k);
}

/* At least the candidates of the largest scores that have some weight together. */
static int64_t collect_weight(race *r, double wanted) {
    int64_t count = 0;
    for (float near = 4.0f; near < 100.0f; near *= 2.0f) {
        count = collect(r, r->best - near);
        if (weigh(r, count) >= wanted) return count;
    }
    count = collect(r, -INFINITY);
    weigh(r, count);
    return count;
}

/* What top-k and top-p leave, in the order of the tokens; returns how many. */
static int64_t remaining(race *r, int64_t k, double top_p, float floor) {
    if (k == 0 && top_p == 1.0) return collect(r, floor);
    int64_t count = 0;
    double wanted = 0.0;
    if (k) {
        count = collect_number(r, k);
        wanted = weigh(r, count) * top_p;
    } else {
        wanted = whole_weight(r) * top_p;
        count = collect_weight(r, wanted);
    }
    return top_p < 1.0 ? cut(r, count, r->weights, wanted) : count;
}

/* Who arrives first of the candidates that min-p leaves. */
static winner first_of(const race *r, int64_t count, float floor, uint32_t low, uint32_t high) {
    winner first = {-INFINITY, 0};
    for (int64_t at = 0; at < count; at += BLOCK) {
        const int64_t some = smaller(BLOCK, count - at), before = first.token;
        float raced[BLOCK];
        for (int64_t i = 0; i < some; i++) {
            const float score = r->scores[at + i];
            const float arrived = score - log_time((uint32_t)r->tokens[at + i], low, high);
            raced[i] = score >= floor ? arrived : -INFINITY;
        }
        first.token = -1;
        take_best(raced, at, some, &first);
        first.token = first.token < 0 ? before : r->tokens[first.token];
    }
    return first;
}

winner race_of_cut(const choice *c, int64_t row, void *room) {
    const draw *d = c->draws + row;
    const int64_t k = d->top_k < c->size ? d->top_k : 0;
    race r = {.logits = c->logits + row * c->stride,
              .size = c->size,
              .spans = divide_up(c->size, SPAN),
              .temperature = d->temperature,
              .tokens = room};
    r.scores = (float *)(r.tokens + r.size);
    r.weights = r.scores + r.size;
    r.keys = (uint32_t *)(r.weights + r.size);
    r.tops = (int32_t *)(r.keys + r.size);
    const winner most = find_tops(&r);
    if (!(most.score - most.score == 0.0f)) return most; /* no number, or nothing allowed */
    r.best = most.score / r.temperature;
    const float floor = r.best + logf(d->min_p); /* -inf without */
    const int64_t count = remaining(&r, k, (double)d->top_p, floor);
    return first_of(&r, count, floor, (uint32_t)d->key[0], (uint32_t)d->key[1]);
}
