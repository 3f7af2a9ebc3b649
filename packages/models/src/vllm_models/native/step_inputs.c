/* What a decode step reads of its sequences: of each, one token and where its key and value go. */
#include <stdint.h>

typedef struct {
    const int64_t *tokens, *tables; /* [rows][capacity] and [rows][width] */
    int64_t capacity, width, block_size, count;
    const int64_t *places; /* [count][2]: row and position */
    int64_t *token_ids, *positions, *slots; /* [count] */
    int64_t *spans; /* [count][3]: row, one query, context length */
} step;

void step_inputs(const step *s) {
    for (int64_t i = 0; i < s->count; i++) {
        const int64_t row = s->places[2 * i], position = s->places[2 * i + 1];
        const int64_t block = s->tables[row * s->width + position / s->block_size];
        s->token_ids[i] = s->tokens[row * s->capacity + position];
        s->positions[i] = position;
        s->slots[i] = block * s->block_size + position % s->block_size;
        s->spans[3 * i] = row;
        s->spans[3 * i + 1] = 1;
        s->spans[3 * i + 2] = position + 1;
    }
}
