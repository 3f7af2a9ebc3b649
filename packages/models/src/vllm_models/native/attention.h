/* Paged attention for one element type. The file that includes this defines

     SUFFIX   of the exported names
     PER      elements in a unit of 32 bits: 2 for bf16, 1 for float
     DOT      a + unit products, see simd.h
     element  the type of queries, keys, values and answers
     FROM_FLOAT  float to element
     STORE    a vector of floats to elements
     LOAD_INT8  a vector of units from int8, which elements hold exactly

   KV of a block, with D and W the widths of key and value and units of PER elements:

     keys    [K, P/16, D/PER, 16] units: one vector holds the same PER components of 16 tokens
     values  [K, P/PER, W] units: one vector holds PER neighbouring tokens of 16 components

   so neither product needs a sum across lanes. KV of int8 is in the same order with a byte in the
   place of an element, beside scales [K, P]: a vector becomes elements on its way from memory, scores
   are multiplied by the scales of their keys, and weights by those of their values. A row is one
   query of one head; rows that share a KV head are computed together, up to ROWS of them. Every row
   walks its context in chunks of CHUNK absolute positions; each chunk gives a maximum, a sum and a
   weighted value, and these are merged in the order of the chunks. Which rows stand beside a row,
   and whether its chunks are computed by one thread or by several, changes no bit. */

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(name) JOIN(name, SUFFIX)

/* A vector of a tile's units. */
INLINE vbytes NAME(load)(const char *tile, int64_t vector, const int is_int8) {
    return is_int8 ? LOAD_INT8(tile + vector * WIDTH * PER) : vb_load(tile + vector * WIDTH * 4);
}

/* Ask for a vector of a tile that comes later. Most are read once, so the larger caches are spared. */
INLINE void NAME(prefetch)(const char *tile, int64_t vector, const int is_int8) {
    __builtin_prefetch(tile + vector * WIDTH * (is_int8 ? PER : 4), 0, 0);
}

/* Scores of 16 tokens in each of `side` tiles for `rows` rows: sums enough that none is waited for. */
INLINE void NAME(score)(const char *const *tiles, const uint32_t *q, int64_t units, const int rows,
                        const int side, const int is_int8, float *scores) {
    vfloat a[8][4];
    for (int r = 0; r < rows; r++)
        for (int s = 0; s < side; s++) a[r][s] = vf_zero();
    for (int64_t u = 0; u < units; u++) {
        vbytes k[4];
#pragma GCC unroll 4
        for (int s = 0; s < side; s++) {
            k[s] = NAME(load)(tiles[s], u, is_int8);
            NAME(prefetch)(tiles[s + AHEAD(is_int8)], u, is_int8);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int s = 0; s < side; s++) a[r][s] = DOT(a[r][s], k[s], q[r * units + u]);
    }
    for (int r = 0; r < rows; r++)
        for (int s = 0; s < side; s++) vf_store(scores + r * CHUNK + s * WIDTH, a[r][s]);
}

/* value[r] += weights[r] * values, for `vectors` vectors of components from `begin` on. */
INLINE void NAME(weigh)(const char *const *values, const uint32_t *weights, int first, int last,
                        int64_t width, int64_t begin, const int rows, const int vectors,
                        const int is_int8, float *value) {
    vfloat a[8][8];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) a[r][v] = vf_load(value + r * width + v * WIDTH);
    for (int tile = first; tile < last; tile++) {
        for (int u = 0; u < WIDTH / PER; u++) {
            const int64_t token = u * (width / WIDTH) + begin;
            for (int v = 0; v < vectors; v++) {
                vbytes w = NAME(load)(values[tile], token + v, is_int8);
                NAME(prefetch)(values[tile + AHEAD(is_int8)], token + v, is_int8);
                for (int r = 0; r < rows; r++)
                    a[r][v] = DOT(a[r][v], w, weights[r * (CHUNK / PER) + tile * (WIDTH / PER) + u]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) vf_store(value + r * width + v * WIDTH, a[r][v]);
}

/* Scores of the rows and tiles that are left, `rows` rows at once. */
INLINE void NAME(score_tiles)(const struct tiles *keys, const uint32_t *q, int first, int last,
                              int64_t units, const int rows, const int is_int8, float *scores) {
    const int side = rows * 4 <= SUMS ? 4 : SUMS / rows;
    int tile = first;
    for (; tile + side <= last; tile += side)
        NAME(score)(keys->data + tile, q, units, rows, side, is_int8, scores + tile * WIDTH);
    for (; tile < last; tile++)
        NAME(score)(keys->data + tile, q, units, rows, 1, is_int8, scores + tile * WIDTH);
}

INLINE void NAME(all_scores)(const struct tiles *keys, const uint32_t *q, int first, int last,
                             int64_t units, int rows, const int is_int8, float *scores) {
    for (int r = 0, step; r < rows; r += step) {
        const uint32_t *rest = q + r * units;
        float *out = scores + r * CHUNK;
        step = rows_at_once(rows - r);
        if (step == 8) NAME(score_tiles)(keys, rest, first, last, units, 8, is_int8, out);
        else if (step == 4) NAME(score_tiles)(keys, rest, first, last, units, 4, is_int8, out);
        else if (step == 2) NAME(score_tiles)(keys, rest, first, last, units, 2, is_int8, out);
        else NAME(score_tiles)(keys, rest, first, last, units, 1, is_int8, out);
    }
}

/* Values of `rows` rows, as many components at once as there are registers for their sums. */
INLINE void NAME(weigh_tiles)(const struct tiles *values, const uint32_t *weights, int first, int last,
                              int64_t width, const int rows, const int is_int8, float *value) {
    const int most = rows * 8 <= SUMS ? 8 : SUMS / rows;
    for (int64_t v = 0, vectors; v < width / WIDTH; v += vectors) {
        const int64_t left = width / WIDTH - v;
        float *out = value + v * WIDTH;
        vectors = left >= most ? most : most == 8 && left >= 4 ? 4 : 1;
        if (vectors == most)
            NAME(weigh)(values->data, weights, first, last, width, v, rows, most, is_int8, out);
        else if (most == 8 && vectors == 4)
            NAME(weigh)(values->data, weights, first, last, width, v, rows, 4, is_int8, out);
        else
            NAME(weigh)(values->data, weights, first, last, width, v, rows, 1, is_int8, out);
    }
}

INLINE void NAME(all_weighted)(const struct tiles *values, const uint32_t *weights, int first,
                               int last, int64_t width, int rows, const int is_int8, float *value) {
    for (int r = 0, step; r < rows; r += step) {
        const uint32_t *rest = weights + r * (CHUNK / PER);
        float *out = value + r * width;
        step = rows_at_once(rows - r);
        if (step == 8) NAME(weigh_tiles)(values, rest, first, last, width, 8, is_int8, out);
        else if (step == 4) NAME(weigh_tiles)(values, rest, first, last, width, 4, is_int8, out);
        else if (step == 2) NAME(weigh_tiles)(values, rest, first, last, width, 2, is_int8, out);
        else NAME(weigh_tiles)(values, rest, first, last, width, 1, is_int8, out);
    }
}

/* Scores of a chunk's keys, whatever they are stored as. */
static void NAME(score_chunk)(const struct attention *a, const struct tiles *keys, const uint32_t *q,
                              int first, int last, int rows, float *scores) {
    const int64_t units = a->key_dim / PER;
    if (!keys->is_int8) {
        NAME(all_scores)(keys, q, first, last, units, rows, 0, scores);
        return;
    }
    NAME(all_scores)(keys, q, first, last, units, rows, 1, scores);
    for (int r = 0; r < rows; r++)
        for (int tile = first; tile < last; tile++) {
            float *some = scores + r * CHUNK + tile * WIDTH;
            vf_store(some, vf_mul(vf_load(some), vf_load(keys->scales[tile])));
        }
}

/* value += weights * values of a chunk, whatever they are stored as. */
static void NAME(weigh_chunk)(const struct attention *a, const struct tiles *values,
                              const uint32_t *weights, int first, int last, int rows, float *value) {
    const int64_t width = a->value_dim;
    if (values->is_int8) NAME(all_weighted)(values, weights, first, last, width, rows, 1, value);
    else NAME(all_weighted)(values, weights, first, last, width, rows, 0, value);
}

/* Scores to weights: what one row sees of a chunk is [begin, end). */
static void NAME(soften)(const struct attention *a, const struct tiles *values, float *scores,
                         uint32_t *weights, int first, int last, int begin, int end, float *top,
                         float *sum) {
    if (begin >= end) { /* a row beside it sees something here, this one nothing */
        *top = -INFINITY, *sum = 0.0f;
        memset(weights + first * (WIDTH / PER), 0, (size_t)(last - first) * (WIDTH / PER) * 4);
        return;
    }
    vfloat scale = vf_set(a->scale), most = vf_set(-INFINITY);
    for (int tile = first; tile < last; tile++) {
        vfloat s = vf_mul(vf_load(scores + tile * WIDTH), scale);
        if (a->soft_cap > 0.0f)
            s = vf_mul(vf_tanh(vf_div(s, vf_set(a->soft_cap))), vf_set(a->soft_cap));
        vf_store(scores + tile * WIDTH, s);
    }
    for (int i = first * WIDTH; i < begin; i++) scores[i] = -INFINITY;
    for (int i = end; i < last * WIDTH; i++) scores[i] = -INFINITY;
    for (int tile = first; tile < last; tile++) most = vf_max(most, vf_load(scores + tile * WIDTH));
    *top = vf_largest(most);
    vfloat minus = vf_set(-*top), total = vf_zero();
    for (int tile = first; tile < last; tile++)
        vf_store(scores + tile * WIDTH, vf_exp(vf_add(vf_load(scores + tile * WIDTH), minus)));
    for (int i = first * WIDTH; i < begin; i++) scores[i] = 0.0f;
    for (int i = end; i < last * WIDTH; i++) scores[i] = 0.0f;
    for (int tile = first; tile < last; tile++) {
        vfloat weight = vf_load(scores + tile * WIDTH);
        total = vf_add(total, weight);
        if (values->is_int8) weight = vf_mul(weight, vf_load(values->scales[tile]));
        STORE((element *)weights + tile * WIDTH, weight);
    }
    *sum = vf_sum(total);
}

static void NAME(chunk)(const struct attention *a, const struct task *t, int64_t chunk,
                        const uint32_t *q, struct partial *out) {
    const int64_t origin = chunk * CHUNK;
    const int64_t from = t->begin > origin ? t->begin - origin : 0;
    const int64_t to = t->end - origin < CHUNK ? t->end - origin : CHUNK;
    const int first = (int)(from / WIDTH), last = (int)((to + WIDTH - 1) / WIDTH);
    struct tiles keys, values;
    float scores[ROWS * CHUNK];
    uint32_t weights[ROWS * CHUNK / PER];
    find_tiles(a, t, origin, first, last, a->key_scales ? 1 : sizeof(element), &keys, &values);
    NAME(score_chunk)(a, &keys, q, first, last, t->rows, scores);
    for (int r = 0; r < t->rows; r++) {
        int64_t position = t->position + (t->row + r) / a->group;
        int64_t begin = a->window && position + 1 > a->window ? position + 1 - a->window : 0;
        begin = begin > origin + first * WIDTH ? begin - origin : first * WIDTH;
        int64_t end = position + 1 - origin < last * WIDTH ? position + 1 - origin : last * WIDTH;
        NAME(soften)(a, &values, scores + r * CHUNK, weights + r * (CHUNK / PER), first, last,
                     (int)begin, (int)end, out->top + r, out->sum + r);
        memset(out->value + r * a->value_dim, 0, (size_t)a->value_dim * sizeof(float));
    }
    NAME(weigh_chunk)(a, &values, weights, first, last, t->rows, out->value);
}

static void NAME(answer)(const struct attention *a, const struct task *t,
                         const struct partial *whole) {
    for (int r = 0; r < t->rows; r++) {
        int64_t head = t->kv_head * a->group + (t->row + r) % a->group;
        int64_t place = t->place + (t->row + r) / a->group;
        element *out = (element *)a->out + (place * a->num_heads + head) * a->value_dim;
        float sum = whole->sum[r], factor = 1.0f;
        if (a->sinks) {
            float sink = a->sinks[head], top = sink > whole->top[r] ? sink : whole->top[r];
            factor = float_exp(whole->top[r] - top);
            sum = sum * factor + float_exp(sink - top);
        }
        factor /= sum;
        for (int64_t d = 0; d < a->value_dim; d++)
            out[d] = FROM_FLOAT(whole->value[r * a->value_dim + d] * factor);
    }
}

static void NAME(gather)(const struct attention *a, const struct task *t, uint32_t *q) {
    const int64_t units = a->key_dim / PER;
    for (int r = 0; r < t->rows; r++) {
        int64_t head = t->kv_head * a->group + (t->row + r) % a->group;
        int64_t place = t->place + (t->row + r) / a->group;
        memcpy(q + r * units, (const uint32_t *)a->q + place * a->q_stride + head * units,
               (size_t)units * 4);
    }
}

/* A task's chunks one after the other. */
static void NAME(run_task)(const struct attention *a, const struct task *t) {
    uint32_t q[ROWS * MAX_DIM];
    float memory[2 * ROWS * (MAX_DIM + 2)];
    struct partial whole = partial_in(memory, ROWS), next = partial_in(memory + ROWS * (MAX_DIM + 2), ROWS);
    NAME(gather)(a, t, q);
    clear(&whole, t->rows, a->value_dim);
    for (int64_t chunk = t->begin / CHUNK; chunk * CHUNK < t->end; chunk++) {
        NAME(chunk)(a, t, chunk, q, &next);
        merge(&whole, &next, t->rows, a->value_dim);
    }
    NAME(answer)(a, t, &whole);
}

/* One chunk of a task into its place. */
static void NAME(run_chunk)(const struct attention *a, const struct task *t, int64_t chunk,
                            float *memory) {
    uint32_t q[ROWS * MAX_DIM];
    struct partial part = partial_in(memory, t->rows);
    NAME(gather)(a, t, q);
    NAME(chunk)(a, t, chunk, q, &part);
}

/* Join the chunks of a task, which stand one after the other. */
static void NAME(finish)(const struct attention *a, const struct task *t, float *memory) {
    float start[ROWS * (MAX_DIM + 2)];
    struct partial whole = partial_in(start, ROWS);
    clear(&whole, t->rows, a->value_dim);
    for (int64_t chunk = t->begin / CHUNK; chunk * CHUNK < t->end; chunk++) {
        struct partial part = partial_in(memory, t->rows);
        merge(&whole, &part, t->rows, a->value_dim);
        memory += t->rows * (a->value_dim + 2);
    }
    NAME(answer)(a, t, &whole);
}

int NAME(attention_)(const struct attention *a, const int64_t *spans, int64_t num_spans) {
    struct plan plan;
    if (!make_plan(a, spans, num_spans, &plan)) return 0;
#pragma omp parallel
    if (plan.is_split) {
#pragma omp for schedule(dynamic, in_a_row(a, plan.num_items))
        for (int64_t i = 0; i < plan.num_items; i++) {
            struct task *t = plan.tasks + plan.items[i];
            int64_t number = i - t->first_item;
            NAME(run_chunk)(a, t, t->begin / CHUNK + number,
                            plan.memory + t->memory + number * t->rows * (a->value_dim + 2));
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < plan.num_tasks; i++)
            NAME(finish)(a, plan.tasks + i, plan.memory + plan.tasks[i].memory);
    } else {
#pragma omp for schedule(dynamic, in_a_row(a, plan.num_tasks))
        for (int64_t i = 0; i < plan.num_tasks; i++) NAME(run_task)(a, plan.tasks + i);
    }
    free(plan.tasks);
    return 1;
}

#undef SUFFIX
#undef PER
#undef DOT
#undef element
#undef FROM_FLOAT
#undef STORE
#undef LOAD_INT8
#undef NAME
#undef JOIN
#undef JOIN_
