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
INLINE void vf_store_bf16(uint16_t *p, vfloat a) {
#if defined(CLASS_AVX512) /* in whole numbers: the instruction for it makes zeros of the smallest */
    const __m512i bits = _mm512_castps_si512(a), upper = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(upper, vi_set(1));
    const __m512i more = _mm512_add_epi32(_mm512_add_epi32(bits, vi_set(0x7fff)), odd);
    const __mmask16 none = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_mask_or_epi32(_mm512_srli_epi32(more, 16), none, upper, vi_set(0x40));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(rounded));
#else
    float numbers[WIDTH];
    vf_store(numbers, a);
    for (int i = 0; i < WIDTH; i++) p[i] = float_to_bf16(numbers[i]);
#endif
}

#endif
