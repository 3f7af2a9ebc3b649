/* Paged attention for one element type. The file that includes this defines

     SUFFIX   of the exported names
     PER      elements in a unit of 32 bits: 2 for bf16, 1 for float
     DOT      a + unit products, see simd.h
     element  the type of queries, keys, values and answers
     FROM_FLOAT  float to element
     STORE_INT8  a vector of int8 to elements, which hold them exactly

   KV of a block, with D and W the widths of key and value and units of PER elements:

     keys    [K, P/16, D/PER, 16] units: one vector holds the same PER components of 16 tokens
     values  [K, P/PER, W] units: one vector holds PER neighbouring tokens of 16 components

   so neither product needs a sum across lanes. KV of int8 is in the same order with a byte in the
   place of an element, beside scales [K, P]: a few tiles at a time become elements, scores are
   multiplied by the scales of their keys, and weights by those of their values. A row is one query of one head; rows that share a
   KV head are computed together, up to ROWS of them. Every row walks its context in chunks of CHUNK
   absolute positions; each chunk gives a maximum, a sum and a weighted value, and these are merged
   in the order of the chunks. Which rows stand beside a row, and whether its chunks are computed
   by one thread or by several, changes no bit. */

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(name) JOIN(name, SUFFIX)

/* Scores of 16 tokens for `rows` rows. */
INLINE void NAME(score)(const uint32_t *keys, const uint32_t *q, int64_t units, const int rows,
                        float *scores) {
    vfloat a[8];
    for (int r = 0; r < rows; r++) a[r] = vf_zero();
    for (int64_t u = 0; u < units; u++) {
        vbytes k = vb_load(keys + u * WIDTH);
        for (int r = 0; r < rows; r++) a[r] = DOT(a[r], k, q[r * units + u]);
    }
    for (int r = 0; r < rows; r++) vf_store(scores + r * CHUNK, a[r]);
}

/* Two tiles at once, so that few rows do not wait for their own sums. */
INLINE void NAME(score_pair)(const uint32_t *const *tiles, int left, const uint32_t *q, int64_t units,
                             const int rows, float *scores) {
    const uint32_t *first = tiles[0], *second = tiles[1];
    const uint32_t *third = tiles[left > 2 ? 2 : 0], *fourth = tiles[left > 3 ? 3 : 0];
    vfloat a[4], b[4];
    for (int r = 0; r < rows; r++) a[r] = b[r] = vf_zero();
    for (int64_t u = 0; u < units; u++) {
        vbytes k = vb_load(first + u * WIDTH), l = vb_load(second + u * WIDTH);
        __builtin_prefetch(third + u * WIDTH);
        __builtin_prefetch(fourth + u * WIDTH);
        for (int r = 0; r < rows; r++) {
            a[r] = DOT(a[r], k, q[r * units + u]);
            b[r] = DOT(b[r], l, q[r * units + u]);
        }
    }
    for (int r = 0; r < rows; r++) {
        vf_store(scores + r * CHUNK, a[r]);
        vf_store(scores + r * CHUNK + WIDTH, b[r]);
    }
}

/* value[r] += weights[r] * values, for `vectors` vectors of components and `rows` rows. */
INLINE void NAME(weigh)(const uint32_t *const *values, const uint32_t *weights, int first, int last,
                        int64_t width, const int rows, const int vectors, float *value) {
    vfloat a[4][4];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) a[r][v] = vf_load(value + r * width + v * WIDTH);
    for (int tile = first; tile < last; tile++) {
        const uint32_t *next = values[tile + (tile + 1 < last)];
        for (int u = 0; u < WIDTH / PER; u++) {
            const uint32_t *token = values[tile] + u * width;
            for (int v = 0; v < vectors; v++) {
                vbytes w = vb_load(token + v * WIDTH);
                __builtin_prefetch(next + u * width + v * WIDTH);
                for (int r = 0; r < rows; r++)
                    a[r][v] = DOT(a[r][v], w, weights[r * (CHUNK / PER) + tile * (WIDTH / PER) + u]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) vf_store(value + r * width + v * WIDTH, a[r][v]);
}

/* Tiles of int8 as elements at `to`: their places are `expanded`. Those up to `end` come next. */
static void NAME(expand)(const struct tiles *tiles, int first, int last, int end, int64_t count,
                         element *to, const uint32_t **expanded) {
    for (int tile = first; tile < last; tile++, to += count) {
        const char *from = tiles->data[tile];
        const char *next = tiles->data[tile + EXPANDED < end ? tile + EXPANDED : tile];
        for (int64_t i = 0; i < count; i += WIDTH * PER) {
            __builtin_prefetch(next + i);
            STORE_INT8(to + i, from + i);
        }
        expanded[tile] = (const uint32_t *)to;
    }
}

static void NAME(all_scores)(const uint32_t *const *keys, const uint32_t *q, int first, int last,
                             int64_t units, int rows, float *scores) {
    for (int r = 0; r < rows;) {
        const uint32_t *rest = q + r * units;
        float *out = scores + r * CHUNK;
        int left = rows - r, tile = first;
        if (left >= 8) {
            for (; tile < last; tile++) NAME(score)(keys[tile], rest, units, 8, out + tile * WIDTH);
            r += 8;
        } else if (left >= 4) {
            for (; tile + 1 < last; tile += 2)
                NAME(score_pair)(keys + tile, last - tile, rest, units, 4, out + tile * WIDTH);
            if (tile < last) NAME(score)(keys[tile], rest, units, 4, out + tile * WIDTH);
            r += 4;
        } else if (left >= 2) {
            for (; tile + 1 < last; tile += 2)
                NAME(score_pair)(keys + tile, last - tile, rest, units, 2, out + tile * WIDTH);
            if (tile < last) NAME(score)(keys[tile], rest, units, 2, out + tile * WIDTH);
            r += 2;
        } else {
            for (; tile + 1 < last; tile += 2)
                NAME(score_pair)(keys + tile, last - tile, rest, units, 1, out + tile * WIDTH);
            if (tile < last) NAME(score)(keys[tile], rest, units, 1, out + tile * WIDTH);
            r += 1;
        }
    }
}

static void NAME(all_weighted)(const uint32_t *const *values, const uint32_t *weights, int first,
                               int last, int64_t width, int rows, float *value) {
    for (int r = 0; r < rows;) {
        const uint32_t *rest = weights + r * (CHUNK / PER);
        float *out = value + r * width;
        int step = rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
        for (int64_t d = 0; d < width;) {
            const uint32_t *shifted[CHUNK / WIDTH];
            for (int tile = first; tile < last; tile++) shifted[tile] = values[tile] + d;
            int wide = width - d >= 4 * WIDTH;
            if (step == 4 && wide) NAME(weigh)(shifted, rest, first, last, width, 4, 4, out + d);
            else if (step == 4) NAME(weigh)(shifted, rest, first, last, width, 4, 1, out + d);
            else if (step == 2 && wide) NAME(weigh)(shifted, rest, first, last, width, 2, 4, out + d);
            else if (step == 2) NAME(weigh)(shifted, rest, first, last, width, 2, 1, out + d);
            else if (wide) NAME(weigh)(shifted, rest, first, last, width, 1, 4, out + d);
            else NAME(weigh)(shifted, rest, first, last, width, 1, 1, out + d);
            d += wide ? 4 * WIDTH : WIDTH;
        }
        r += step;
    }
}

/* Scores of a chunk's keys, whatever they are stored as. */
static void NAME(score_chunk)(const struct attention *a, const struct tiles *keys, const uint32_t *q,
                              int first, int last, int rows, float *scores) {
    const uint32_t *places[CHUNK / WIDTH];
    const int64_t units = a->key_dim / PER;
    for (int tile = first; tile < last; tile++) places[tile] = (const uint32_t *)keys->data[tile];
    if (!keys->is_int8) {
        NAME(all_scores)(places, q, first, last, units, rows, scores);
        return;
    }
    element __attribute__((aligned(64))) numbers[EXPANDED * WIDTH * MAX_DIM];
    for (int tile = first, next; tile < last; tile = next) {
        next = tile + EXPANDED < last ? tile + EXPANDED : last;
        NAME(expand)(keys, tile, next, last, WIDTH * a->key_dim, numbers, places);
        NAME(all_scores)(places, q, tile, next, units, rows, scores);
        for (int i = tile; i < next; i++)
            for (int r = 0; r < rows; r++) {
                float *some = scores + r * CHUNK + i * WIDTH;
                vf_store(some, vf_mul(vf_load(some), vf_load(keys->scales[i])));
            }
    }
}

/* value += weights * values of a chunk, whatever they are stored as. */
static void NAME(weigh_chunk)(const struct attention *a, const struct tiles *values,
                              const uint32_t *weights, int first, int last, int rows, float *value) {
    const uint32_t *places[CHUNK / WIDTH];
    for (int tile = first; tile < last; tile++) places[tile] = (const uint32_t *)values->data[tile];
    if (!values->is_int8) {
        NAME(all_weighted)(places, weights, first, last, a->value_dim, rows, value);
        return;
    }
    element __attribute__((aligned(64))) numbers[EXPANDED * WIDTH * MAX_DIM];
    for (int tile = first, next; tile < last; tile = next) {
        next = tile + EXPANDED < last ? tile + EXPANDED : last;
        NAME(expand)(values, tile, next, last, WIDTH * a->value_dim, numbers, places);
        NAME(all_weighted)(places, weights, tile, next, a->value_dim, rows, value);
    }
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
    for (int tile = first; tile < last; tile++)
        total = vf_add(total, vf_load(scores + tile * WIDTH));
    *sum = vf_sum(total);
    for (int tile = first; values->is_int8 && tile < last; tile++) {
        vfloat kept = vf_load(scores + tile * WIDTH);
        vf_store(scores + tile * WIDTH, vf_mul(kept, vf_load(values->scales[tile])));
    }
    element *pieces = (element *)weights;
    for (int i = first * WIDTH; i < last * WIDTH; i++) pieces[i] = FROM_FLOAT(scores[i]);
}

static void NAME(chunk)(const struct attention *a, const struct task *t, int64_t chunk,
                        const uint32_t *q, struct partial *out) {
    const int64_t origin = chunk * CHUNK, bytes = a->key_scales ? 1 : sizeof(element);
    const int64_t from = t->begin > origin ? t->begin - origin : 0;
    const int64_t to = t->end - origin < CHUNK ? t->end - origin : CHUNK;
    const int first = (int)(from / WIDTH), last = (int)((to + WIDTH - 1) / WIDTH);
    struct tiles keys, values;
    float scores[ROWS * CHUNK];
    uint32_t weights[ROWS * CHUNK / PER];
    for (int tile = first; tile < last; tile++) {
        int64_t position = origin + tile * WIDTH;
        int64_t block = t->table[position / a->block_size] * a->num_kv_heads + t->kv_head;
        int64_t place = block * a->block_size + position % a->block_size;
        find_tile(&keys, tile, a->keys, a->key_scales, place, a->key_dim * bytes);
        find_tile(&values, tile, a->values, a->value_scales, place, a->value_dim * bytes);
    }
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
#pragma omp for schedule(dynamic)
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
#pragma omp for schedule(dynamic)
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
#undef STORE_INT8
#undef NAME
#undef JOIN
#undef JOIN_
