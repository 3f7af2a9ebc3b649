/* Vectors of activations in either type, read and written as floats. A width that is no multiple of
   16 ends with single numbers. */
#ifndef ELEMENTS_H
#define ELEMENTS_H

#include "simd_math.h"

enum { FLOAT32_ELEMENTS = 0, BFLOAT16_ELEMENTS = 1 };

INLINE vfloat elements_load(const void *p, int64_t i, const int type) {
    return type == BFLOAT16_ELEMENTS ? vf_load_bf16((const uint16_t *)p + i)
                                     : vf_load((const float *)p + i);
}
INLINE float element_load(const void *p, int64_t i, const int type) {
    return type == BFLOAT16_ELEMENTS ? bf16_to_float(((const uint16_t *)p)[i])
                                     : ((const float *)p)[i];
}
INLINE void element_store(void *p, int64_t i, float value, const int type) {
    if (type == BFLOAT16_ELEMENTS) ((uint16_t *)p)[i] = float_to_bf16(value);
    else ((float *)p)[i] = value;
}
INLINE void elements_store(void *p, int64_t i, vfloat a, const int type) {
    if (type == BFLOAT16_ELEMENTS) vf_store_bf16((uint16_t *)p + i, a);
    else vf_store((float *)p + i, a);
}

/* Below this many numbers a second thread costs more than it does. */
#define WORTH_THREADS 32768

#endif
