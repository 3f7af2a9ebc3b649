/* The work of a call: rows that share a weight, cut into units that threads take one by one.

   A plain linear layer is one segment. In a mixture of experts the rows of one expert follow each
   other, and every expert that has some is a segment. */
#ifndef SEGMENTS_H
#define SEGMENTS_H

#include "linear.h"

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

#endif
