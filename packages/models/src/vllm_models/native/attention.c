/* Attention of a ragged batch over paged KV, and the writing of KV in the layout it reads; the layout
   and the order of sums are told in attention.h. */
#include <stdlib.h>

#include "simd.h"
#include "simd_math.h"

#define ROWS 16     /* rows computed together */
#define CHUNK 256   /* positions */
#define MAX_DIM 576 /* of a key or value head */
#define ENOUGH 4    /* tasks per thread, below which contexts are split */
#define SUMS 16     /* vectors of scores or values summed at once */
#define COMING 8    /* tiles known ahead of those that are read */
/* How far ahead tiles are asked for: memory takes so long to answer that fewer come late. */
#define AHEAD(is_int8) ((is_int8) ? COMING : COMING / 2)

/* What is the same for a whole call. */
struct attention {
    void *out;               /* [T, H, value_dim] */
    const void *q;           /* [T, q_stride] units of 32 bits, heads of key_dim one after the other */
    const void *keys, *values;
    const float *key_scales, *value_scales; /* [B, K, P] of int8, or none */
    const int64_t *tables;   /* [rows, table_width] */
    const float *sinks;      /* [H], or none */
    int64_t q_stride, table_width, num_heads, num_kv_heads, group, key_dim, value_dim, block_size;
    int64_t window;          /* positions, 0 is all */
    int64_t num_threads;
    float scale, soft_cap;   /* no cap if 0 */
};

/* Rows of one sequence that share a KV head. */
struct task {
    const int64_t *table;
    int64_t place, position; /* of the sequence's first query: in T, and in its context */
    int64_t kv_head, row;    /* row = query * group + head within the group */
    int64_t begin, end;      /* positions that any of the rows sees */
    int64_t first_item, memory;
    int rows, is_last;
};

struct plan {
    struct task *tasks;
    int64_t *items; /* the task of each chunk, if contexts are split */
    float *memory;
    int64_t num_tasks, num_items;
    int is_split;
};

/* What a chunk says of its rows: largest score, sum of weights, weighted values. */
struct partial {
    float *top, *sum, *value;
};

/* Where the keys or values of a chunk are, by tile. */
struct tiles {
    const char *data[CHUNK / WIDTH + COMING]; /* and those that are read next */
    const float *scales[CHUNK / WIDTH]; /* if they are int8 */
    int is_int8;
};

/* Where the token at a position stands among those of all blocks and heads. */
INLINE int64_t place_of(const struct attention *a, const struct task *t, int64_t position) {
    int64_t block = t->table[position / a->block_size] * a->num_kv_heads + t->kv_head;
    return block * a->block_size + position % a->block_size;
}

/* The tiles of a chunk that begins at `origin`. Behind its keys its values are read, and behind these
   the keys of the next chunk, or of the next task. */
static void find_tiles(const struct attention *a, const struct task *t, int64_t origin, int first,
                       int last, int64_t bytes, struct tiles *keys, struct tiles *values) {
    const int64_t key_bytes = a->key_dim * bytes, value_bytes = a->value_dim * bytes;
    const char *all_keys = a->keys, *all_values = a->values;
    keys->is_int8 = values->is_int8 = a->key_scales != 0;
    for (int tile = first; tile < last; tile++) {
        const int64_t place = place_of(a, t, origin + tile * WIDTH);
        keys->data[tile] = all_keys + place * key_bytes;
        values->data[tile] = all_values + place * value_bytes;
        if (!keys->is_int8) continue;
        keys->scales[tile] = a->key_scales + place;
        values->scales[tile] = a->value_scales + place;
    }
    int64_t next = origin + CHUNK;
    if (next >= t->end && !t->is_last) t++, next = t->begin / WIDTH * WIDTH;
    for (int i = 0; i < COMING; i++, next += WIDTH) {
        const int64_t place = place_of(a, t, next < t->end ? next : (t->end - 1) / WIDTH * WIDTH);
        keys->data[last + i] = values->data[first + i < last ? first + i : last - 1];
        values->data[last + i] = all_keys + place * key_bytes;
    }
}

/* Rows computed at once of those that are left. */
INLINE int rows_at_once(int left) { return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1; }

/* Units of work that a thread takes at once: what follows is asked for ahead. */
static int in_a_row(const struct attention *a, int64_t units) {
    const int64_t share = units / (ENOUGH * a->num_threads);
    return share > 8 ? 8 : share > 1 ? (int)share : 1;
}

INLINE struct partial partial_in(float *memory, int rows) {
    struct partial part = {memory, memory + rows, memory + 2 * rows};
    return part;
}

static void clear(struct partial *whole, int rows, int64_t width) {
    for (int r = 0; r < rows; r++) {
        whole->top[r] = -INFINITY, whole->sum[r] = 0.0f;
        memset(whole->value + r * width, 0, (size_t)width * sizeof(float));
    }
}

/* whole = whole and next, in this order. */
static void merge(struct partial *whole, const struct partial *next, int rows, int64_t width) {
    for (int r = 0; r < rows; r++) {
        if (next->sum[r] == 0.0f) continue;
        float top = next->top[r] > whole->top[r] ? next->top[r] : whole->top[r];
        float old = whole->sum[r] == 0.0f ? 0.0f : float_exp(whole->top[r] - top);
        float fresh = float_exp(next->top[r] - top);
        float *value = whole->value + r * width;
        const float *more = next->value + r * width;
        whole->top[r] = top;
        whole->sum[r] = whole->sum[r] * old + next->sum[r] * fresh;
        for (int64_t d = 0; d < width; d += WIDTH) {
            vfloat kept = vf_mul(vf_load(value + d), vf_set(old));
            vf_store(value + d, vf_fma(vf_load(more + d), vf_set(fresh), kept));
        }
    }
}

/* Tasks of a batch, sequence by sequence; a span is row of the tables, number of queries, context. */
static int make_plan(const struct attention *a, const int64_t *spans, int64_t num_spans,
                     struct plan *plan) {
    int64_t num_tasks = 0, num_items = 0, memory = 0, place = 0;
    for (int64_t s = 0; s < num_spans; s++)
        num_tasks += a->num_kv_heads * ((spans[3 * s + 1] * a->group + ROWS - 1) / ROWS);
    struct task *tasks = malloc((size_t)(num_tasks ? num_tasks : 1) * sizeof *tasks), *t = tasks;
    if (!tasks) return 0;
    for (int64_t s = 0; s < num_spans; s++) {
        int64_t queries = spans[3 * s + 1], context = spans[3 * s + 2], rows = queries * a->group;
        for (int64_t kv_head = 0; kv_head < a->num_kv_heads; kv_head++)
            for (int64_t row = 0; row < rows; row += ROWS, t++) {
                int64_t last = row + ROWS < rows ? row + ROWS : rows;
                t->table = a->tables + spans[3 * s] * a->table_width;
                t->place = place, t->position = context - queries;
                t->kv_head = kv_head, t->row = row, t->rows = (int)(last - row), t->is_last = 0;
                int64_t first = t->position + row / a->group + 1;
                t->begin = a->window && first > a->window ? first - a->window : 0;
                t->end = t->position + (last - 1) / a->group + 1;
                int64_t chunks = (t->end + CHUNK - 1) / CHUNK - t->begin / CHUNK;
                t->first_item = num_items, t->memory = memory;
                num_items += chunks;
                memory += chunks * t->rows * (a->value_dim + 2);
            }
        place += queries;
    }
    if (num_tasks) t[-1].is_last = 1;
    plan->tasks = tasks, plan->num_tasks = num_tasks, plan->num_items = num_items;
    plan->is_split = num_tasks < ENOUGH * a->num_threads && num_items > num_tasks;
    if (!plan->is_split) return 1;
    size_t head = (size_t)num_tasks * sizeof *tasks;
    size_t list = (size_t)num_items * sizeof(int64_t);
    tasks = realloc(plan->tasks, head + list + (size_t)memory * sizeof(float));
    if (!tasks) return free(plan->tasks), 0;
    plan->tasks = tasks;
    plan->items = (int64_t *)((char *)tasks + head);
    plan->memory = (float *)((char *)tasks + head + list);
    for (int64_t i = 0; i < num_tasks; i++) {
        int64_t next = i + 1 < num_tasks ? tasks[i + 1].first_item : num_items;
        for (int64_t k = tasks[i].first_item; k < next; k++) plan->items[k] = i;
    }
    return 1;
}

#define SUFFIX bf16
#define PER 2
#define DOT vf_dot_bf16
#define element uint16_t
#define FROM_FLOAT float_to_bf16
#define STORE vf_store_bf16
#define LOAD_INT8 vb_bf16_of_int8
#include "attention.h"

#define SUFFIX f32
#define PER 1
#define DOT vf_dot_f32
#define element float
#define FROM_FLOAT(x) (x)
#define STORE vf_store
#define LOAD_INT8 vb_f32_of_int8
#include "attention.h"
