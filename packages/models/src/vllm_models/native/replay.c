/* Calls of other functions of this library, one after the other, and what torch does between them
   most: the sum of two tensors, and a tensor in the other type. */
#include "elements.h"

#define ARGUMENTS 12

typedef int64_t (*function)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                            int64_t, int64_t, int64_t, int64_t);

/* A function gets more arguments than it takes; the calling conventions let it ignore the rest. */
struct call {
    function run;
    int64_t arguments[ARGUMENTS];
    int64_t is_checked, expected; /* its result, if it has one */
};

/* Returns how many calls went well: all, unless one gave another result than expected. */
int64_t replay(const struct call *calls, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const int64_t *a = calls[i].arguments;
        int64_t result = calls[i].run(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9],
                                      a[10], a[11]);
        if (calls[i].is_checked && (int32_t)result != (int32_t)calls[i].expected) return i;
    }
    return count;
}

/* out = a + b, `count` numbers each. */
void add_numbers(void *out, const void *a, const void *b, int64_t count, int64_t type) {
    int64_t whole = count / WIDTH * WIDTH;
    for (int64_t i = 0; i < whole; i += WIDTH) {
        if (type == BFLOAT16_ELEMENTS)
            elements_store(out, i, vf_add(elements_load(a, i, 1), elements_load(b, i, 1)), 1);
        else
            elements_store(out, i, vf_add(elements_load(a, i, 0), elements_load(b, i, 0)), 0);
    }
    for (int64_t i = whole; i < count; i++)
        element_store(out, i, element_load(a, i, (int)type) + element_load(b, i, (int)type), (int)type);
}

/* out = a, `count` numbers, from one type to the other. */
void convert_numbers(void *out, const void *a, int64_t count, int64_t out_type, int64_t type) {
    int64_t whole = count / WIDTH * WIDTH;
    for (int64_t i = 0; i < whole; i += WIDTH)
        elements_store(out, i, elements_load(a, i, (int)type), (int)out_type);
    for (int64_t i = whole; i < count; i++)
        element_store(out, i, element_load(a, i, (int)type), (int)out_type);
}
