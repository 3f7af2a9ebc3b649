/* Sixteen numbers at a time, the same words for every instruction-set class. A kernel is written
   once against these; which class it becomes is a flag of the compiler. Every operation rounds
   the same way wherever in a kernel it stands, so equal inputs in equal order give equal bits. */
#ifndef SIMD_H
#define SIMD_H

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define WIDTH 16 /* numbers in a vector */

#if defined(CLASS_AVX512)
#include "simd_avx512.h"
#elif defined(CLASS_AVX2)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

INLINE float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
INLINE uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
INLINE float bf16_to_float(uint16_t bits) { return float_of_bits((uint32_t)bits << 16); }

/* Round to the nearest, ties to even; a NaN stays one. */
INLINE uint16_t float_to_bf16(float value) {
    uint32_t bits = float_bits(value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

#endif
