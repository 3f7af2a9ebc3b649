/* The work of a call: rows that share a weight, cut into units that threads take one by one.

   A plain linear layer is one segment. In a mixture of experts the rows of one expert follow each
   other, and every expert that has some is a segment. */
#ifndef SEGMENTS_H
#define SEGMENTS_H

#include <omp.h>

#include "linear.h"

#define MAX_THREADS 256

typedef struct {
    int64_t expert;
    int64_t first, rows;
    int64_t unit; /* its first */
} segment;

/* One panel of one expert, for up to MAX_ROWS rows. */
typedef struct {
    int64_t expert, panel;
    int64_t first, rows;
} unit;

/* Write a segment for each expert that has rows; expert e has those from starts[e] to starts[e + 1].
   Returns the number of segments; one more stands behind them to bound the last. */
static inline int64_t find_segments(const int64_t *starts, int64_t num_experts, int64_t panels,
                                    segment *to) {
    int64_t count = 0, units = 0;
    for (int64_t e = 0; e < num_experts; e++) {
        int64_t rows = starts[e + 1] - starts[e];
        if (rows == 0) continue;
        to[count++] = (segment){e, starts[e], rows, units};
        units += panels * divide_up(rows, MAX_ROWS);
    }
    to[count] = (segment){0, 0, 0, units};
    return count;
}

static inline unit find_unit(const segment *segments, int64_t count, int64_t panels, int64_t number) {
    int64_t low = 0;
    for (int64_t high = count; high - low > 1;) {
        int64_t middle = (low + high) / 2;
        if (segments[middle].unit <= number)
            low = middle;
        else
            high = middle;
    }
    const segment *s = segments + low;
    int64_t groups = divide_up(s->rows, MAX_ROWS), inside = number - s->unit, group = inside / panels;
    int64_t first = s->rows * group / groups, end = s->rows * (group + 1) / groups;
    return (unit){s->expert, inside % panels, s->first + first, end - first};
}

/* The units that one thread does first. It walks them in order, so that it reads memory without a
   break, and then takes what others have left, so that nobody waits for a thread that was stopped. */
typedef struct {
    int64_t next, end;
    char apart[48]; /* from the cache line of another thread's */
} range;

/* Divide the units; returns the number of threads. */
static inline int divide_units(int64_t units, range ranges[MAX_THREADS]) {
    int64_t threads = smaller(omp_get_max_threads(), MAX_THREADS);
    for (int64_t t = 0; t < threads; t++) {
        ranges[t].next = units * t / threads;
        ranges[t].end = units * (t + 1) / threads;
    }
    return (int)threads;
}

/* The next unit of the calling thread, or -1. */
static inline int64_t take_unit(range *ranges, int threads) {
    for (int i = 0; i < threads; i++) {
        range *r = ranges + (omp_get_thread_num() + i) % threads;
        if (__atomic_load_n(&r->next, __ATOMIC_RELAXED) >= r->end) continue;
        int64_t number = __atomic_fetch_add(&r->next, 1, __ATOMIC_RELAXED);
        if (number < r->end) return number;
    }
    return -1;
}

#endif
