/* Who goes to which expert, and what becomes of the answers. */
#include <string.h>

#include "elements.h"

struct choices {
    const int64_t *chosen;  /* [tokens, num_chosen] experts */
    int64_t *starts;        /* [num_experts + 1]: expert e has the rows starts[e] .. starts[e + 1] - 1 */
    int64_t *row_tokens;    /* [tokens * num_chosen] token of each row */
    int64_t *rows;          /* [tokens, num_chosen] row of each choice */
    int64_t tokens, num_chosen, num_experts;
};

/* Rows in the order of their experts, and within one in the order of the tokens. */
void sort_choices(const struct choices *c) {
    int64_t count = c->tokens * c->num_chosen, *starts = c->starts;
    memset(starts, 0, (size_t)(c->num_experts + 1) * sizeof *starts);
    for (int64_t i = 0; i < count; i++) starts[c->chosen[i] + 1]++;
    for (int64_t e = 0; e < c->num_experts; e++) starts[e + 1] += starts[e];
    for (int64_t i = 0; i < count; i++) {
        int64_t row = starts[c->chosen[i]]++;
        c->rows[i] = row;
        c->row_tokens[row] = i / c->num_chosen;
    }
    /* Each start has moved to the next expert's. */
    memmove(starts + 1, starts, (size_t)c->num_experts * sizeof *starts);
    starts[0] = 0;
}

struct answers {
    void *out;            /* [tokens, width] */
    const void *answers;  /* [tokens * num_chosen, width] */
    const float *weights; /* [tokens, num_chosen] */
    const int64_t *rows;  /* [tokens, num_chosen] row of each choice */
    int64_t tokens, num_chosen, width, type;
};

/* A token's answers by their weights, added in the order of its choices. */
static void add_row(const struct answers *a, int64_t token) {
    const int type = (int)a->type;
    const int64_t size = type == BFLOAT16_ELEMENTS ? 2 : 4, *rows = a->rows + token * a->num_chosen;
    const float *weights = a->weights + token * a->num_chosen;
    const char *from = a->answers;
    char *out = (char *)a->out + token * a->width * size;
    int64_t i = 0;
    for (; i + WIDTH <= a->width; i += WIDTH) {
        vfloat sum = vf_set(0.0f);
        for (int64_t j = 0; j < a->num_chosen; j++) {
            vfloat answer = elements_load(from + rows[j] * a->width * size, i, type);
            sum = vf_fma(answer, vf_set(weights[j]), sum);
        }
        elements_store(out, i, sum, type);
    }
    for (; i < a->width; i++) {
        float sum = 0.0f;
        for (int64_t j = 0; j < a->num_chosen; j++)
            sum += element_load(from + rows[j] * a->width * size, i, type) * weights[j];
        element_store(out, i, sum, type);
    }
}

void add_answers(const struct answers *a) {
#pragma omp parallel for schedule(static) if (a->tokens * a->num_chosen * a->width > WORTH_THREADS)
    for (int64_t token = 0; token < a->tokens; token++) add_row(a, token);
}
