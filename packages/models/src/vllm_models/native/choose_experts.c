/* Which experts each token goes to, and with what weights. */
#include "elements.h"
#include "linear.h"

struct routing {
    void *weights;      /* [tokens, num_chosen] elements */
    int64_t *chosen;    /* [tokens, num_chosen], the best first */
    const void *logits; /* [tokens, stride], of which num_experts are used */
    const float *bias;  /* [num_experts], or none: then scores are a softmax, else sigmoids */
    int64_t tokens, num_experts, num_chosen, stride, logits_type, type, renormalize;
    float scale;
};

static void find_scores(const struct routing *r, int64_t token, float *scores) {
    const int64_t place = token * r->stride, count = r->num_experts;
    float most = -INFINITY, sum = 0.0f;
    for (int64_t e = 0; e < count; e++) {
        scores[e] = element_load(r->logits, place + e, (int)r->logits_type);
        most = scores[e] > most ? scores[e] : most;
    }
    if (r->bias) {
        for (int64_t e = 0; e < count; e++) scores[e] = 1.0f / (1.0f + expf(-scores[e]));
        return;
    }
    for (int64_t e = 0; e < count; e++) sum += scores[e] = expf(scores[e] - most);
    for (int64_t e = 0; e < count; e++) scores[e] /= sum;
}

/* The best of the experts that are left; the first of equal ones, and of those that are no numbers. */
static int64_t take_best(const float *choice, uint8_t *taken, int64_t count) {
    int64_t best = -1;
    for (int64_t e = 0; e < count; e++)
        if (!taken[e] && (best < 0 || choice[e] > choice[best])) best = e;
    taken[best] = 1;
    return best;
}

static void route(const struct routing *r, int64_t token, float *scores) {
    float *choice = scores + r->num_experts, sum = 0.0f;
    uint8_t *taken = (uint8_t *)(choice + r->num_experts);
    int64_t *chosen = r->chosen + token * r->num_chosen;
    find_scores(r, token, scores);
    for (int64_t e = 0; e < r->num_experts; e++) choice[e] = scores[e] + (r->bias ? r->bias[e] : 0.0f);
    memset(taken, 0, (size_t)r->num_experts);
    for (int64_t i = 0; i < r->num_chosen; i++) {
        chosen[i] = take_best(choice, taken, r->num_experts);
        sum += scores[chosen[i]];
    }
    const float whole = r->renormalize ? (sum > 1e-20f ? sum : 1e-20f) : 1.0f;
    for (int64_t i = 0; i < r->num_chosen; i++)
        element_store(r->weights, token * r->num_chosen + i, scores[chosen[i]] / whole * r->scale,
                      (int)r->type);
}

/* Returns 0, or 1 if memory is short. */
int choose_experts(const struct routing *r) {
    int failed = 0;
#pragma omp parallel for schedule(static) reduction(| : failed) \
    if (r->tokens * r->num_experts * r->num_chosen > WORTH_THREADS)
    for (int64_t token = 0; token < r->tokens; token++) {
        float *scores = scratch((size_t)r->num_experts * (2 * sizeof *scores + 1));
        if (scores == NULL) failed = 1;
        else route(r, token, scores);
    }
    return failed;
}
