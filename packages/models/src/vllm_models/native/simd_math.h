/* Functions of sixteen numbers that no instruction computes. Polynomials after Cephes (Moshier). */
#ifndef SIMD_MATH_H
#define SIMD_MATH_H

#include <math.h>

#include "simd.h"

#if defined(CLASS_AVX512)
INLINE vfloat vf_max(vfloat a, vfloat b) { return _mm512_max_ps(a, b); }
INLINE vfloat vf_div(vfloat a, vfloat b) { return _mm512_div_ps(a, b); }
INLINE vfloat vf_round(vfloat a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
/* a * 2^n for whole n. */
INLINE vfloat vf_scale(vfloat a, vfloat n) { return _mm512_scalef_ps(a, n); }
#elif defined(CLASS_AVX2)
INLINE vfloat vf_max(vfloat x, vfloat y) {
    BOTH(vfloat, _mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b));
}
INLINE vfloat vf_div(vfloat x, vfloat y) {
    BOTH(vfloat, _mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b));
}
INLINE vfloat vf_round(vfloat x) {
    BOTH(vfloat, _mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
         _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE __m256 power_of_two(__m256 n) {
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
INLINE vfloat vf_scale(vfloat x, vfloat n) {
    BOTH(vfloat, _mm256_mul_ps(x.a, power_of_two(n.a)), _mm256_mul_ps(x.b, power_of_two(n.b)));
}
#else
INLINE vfloat vf_max(vfloat x, vfloat y) { EACH(vfloat, AT(x, i) > AT(y, i) ? AT(x, i) : AT(y, i)); }
INLINE vfloat vf_div(vfloat x, vfloat y) { EACH(vfloat, AT(x, i) / AT(y, i)); }
INLINE vfloat vf_round(vfloat x) { EACH(vfloat, nearbyintf(AT(x, i))); }
INLINE vfloat vf_scale(vfloat x, vfloat n) {
    EACH(vfloat, AT(x, i) * from_bits((uint32_t)((int32_t)AT(n, i) + 127) << 23));
}
#endif

INLINE vfloat vf_min(vfloat a, vfloat b) {
    vfloat minus = vf_set(-1.0f);
    return vf_mul(vf_max(vf_mul(a, minus), vf_mul(b, minus)), minus);
}

/* e^a with a relative error near 1e-7; a is held between -87 and 88, where floats end. */
INLINE vfloat vf_exp(vfloat a) {
    a = vf_min(vf_max(a, vf_set(-87.0f)), vf_set(88.0f));
    vfloat n = vf_round(vf_mul(a, vf_set(1.44269504f)));
    vfloat r = vf_fnma(n, vf_set(0.693359375f), a);
    r = vf_fnma(n, vf_set(-2.12194440e-4f), r);
    vfloat p = vf_set(1.9875691500e-4f);
    p = vf_fma(p, r, vf_set(1.3981999507e-3f));
    p = vf_fma(p, r, vf_set(8.3334519073e-3f));
    p = vf_fma(p, r, vf_set(4.1665795894e-2f));
    p = vf_fma(p, r, vf_set(1.6666665459e-1f));
    p = vf_fma(p, r, vf_set(5.0000001201e-1f));
    p = vf_add(vf_fma(p, vf_mul(r, r), r), vf_set(1.0f));
    return vf_scale(p, n);
}

INLINE vfloat vf_tanh(vfloat a) {
    vfloat e = vf_exp(vf_add(a, a));
    return vf_div(vf_add(e, vf_set(-1.0f)), vf_add(e, vf_set(1.0f)));
}

/* Lanes are joined in one order, whatever the class: each with the one half of the rest further on. */
#if defined(CLASS_AVX512)
INLINE vfloat half_on(vfloat a, const int half) {
    if (half == 8) return _mm512_shuffle_f32x4(a, a, 0xee);
    if (half == 4) return _mm512_shuffle_f32x4(a, a, 0x11);
    return half == 2 ? _mm512_permute_ps(a, 0xee) : _mm512_permute_ps(a, 0x11);
}
INLINE float vf_sum(vfloat a) {
#pragma GCC unroll 4
    for (int half = WIDTH / 2; half; half /= 2) a = vf_add(a, half_on(a, half));
    return _mm512_cvtss_f32(a);
}
INLINE float vf_largest(vfloat a) {
#pragma GCC unroll 4
    for (int half = WIDTH / 2; half; half /= 2) a = vf_max(a, half_on(a, half));
    return _mm512_cvtss_f32(a);
}
#else
INLINE float vf_sum(vfloat a) {
    float v[WIDTH];
    vf_store(v, a);
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
}
INLINE float vf_largest(vfloat a) {
    float v[WIDTH];
    vf_store(v, a);
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
    return v[0];
}
#endif
INLINE float float_exp(float a) {
    float v[WIDTH];
    vf_store(v, vf_exp(vf_set(a)));
    return v[0];
}

#endif
