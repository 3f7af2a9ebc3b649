/* Which token each row gets, in one read of its logits: the largest logit, or the first to arrive in
   an exponential race (runner/noise.py), as

       score = logit / temperature - log(-log(1 - u))      u in (0, 1) from a hash of the token id

   Whole rows are cut at fixed places into pieces, of which threads take one by one; the first of equal
   scores wins, in whatever order they were done. */
#include <omp.h>

#include "choose.h"

#define PIECE 8192 /* tokens that one thread takes */

static winner best_of(const choice *c, int64_t row, int64_t begin, int64_t end) {
    const float *logits = c->logits + row * c->stride, temperature = c->draws[row].temperature;
    const uint32_t low = (uint32_t)c->draws[row].key[0], high = (uint32_t)c->draws[row].key[1];
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
    int64_t num_cut = 0;
    for (int64_t row = 0; row < c->count; row++) num_cut += is_cut(c, row);
    const size_t room = num_cut ? room_of_cut(c) : 0;
    const size_t places = (size_t)(c->count * pieces) * sizeof(winner);
    winner *found = scratch(places + room * (size_t)omp_get_max_threads());
    if (found == NULL) return 1;
    char *rooms = (char *)found + places;
    /* One row's largest logit is found before a second thread has begun. */
    const int is_long = c->count > 1 || (c->count == 1 && c->draws[0].temperature > 0);
#pragma omp parallel for schedule(dynamic) if (is_long && num_cut < c->count)
    for (int64_t i = 0; i < c->count * pieces; i++) {
        const int64_t row = i / pieces, begin = i % pieces * PIECE;
        if (!is_cut(c, row)) found[i] = best_of(c, row, begin, smaller(begin + PIECE, c->size));
    }
#pragma omp parallel for schedule(dynamic) if (num_cut > 1)
    for (int64_t row = 0; row < c->count; row++)
        if (is_cut(c, row))
            found[row * pieces] = race_of_cut(c, row, rooms + room * (size_t)omp_get_thread_num());
    for (int64_t row = 0; row < c->count; row++) {
        winner best = found[row * pieces];
        for (int64_t i = 1; i < pieces && !is_cut(c, row); i++) {
            const winner next = found[row * pieces + i];
            if (next.score > best.score || next.score != next.score) best = next;
        }
        c->winners[row] = best;
    }
    return 0;
}
