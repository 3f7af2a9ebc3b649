/* AVX-512 with VNNI and BF16: one register holds the sixteen. */
#include <immintrin.h>

/* Sums of a tile of rows and vectors, which fill the 32 registers. */
#define TILE_ROWS 6
#define TILE_VECTORS 4

typedef __m512 vfloat;
typedef __m512i vint;
typedef __m512i vbytes; /* 64 bytes, four to each of the sixteen */

INLINE vfloat vf_zero(void) { return _mm512_setzero_ps(); }
INLINE vfloat vf_set(float a) { return _mm512_set1_ps(a); }
INLINE vfloat vf_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vf_store(float *p, vfloat a) { _mm512_storeu_ps(p, a); }
INLINE vfloat vf_add(vfloat a, vfloat b) { return _mm512_add_ps(a, b); }
INLINE vfloat vf_mul(vfloat a, vfloat b) { return _mm512_mul_ps(a, b); }
INLINE vfloat vf_fma(vfloat a, vfloat b, vfloat c) { return _mm512_fmadd_ps(a, b, c); }   /* c + ab */
INLINE vfloat vf_fnma(vfloat a, vfloat b, vfloat c) { return _mm512_fnmadd_ps(a, b, c); } /* c - ab */
INLINE vfloat vf_from_int(vint a) { return _mm512_cvtepi32_ps(a); }
INLINE vfloat vf_load_f16(const void *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
INLINE vfloat vf_load_bf16(const void *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE vfloat vf_load_u8(const void *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
INLINE vfloat vf_load_i8(const void *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

INLINE vint vi_set(int32_t a) { return _mm512_set1_epi32(a); }

INLINE vbytes vb_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE void vb_store(void *p, vbytes a) { _mm512_storeu_si512(p, a); }
INLINE vbytes vb_set(uint8_t a) { return _mm512_set1_epi8((char)a); }
INLINE vbytes vb_or(vbytes a, vbytes b) { return _mm512_or_si512(a, b); }
/* The bits of each byte that `mask` keeps, after a shift to the right (left if negative). */
INLINE vbytes vb_bits(vbytes a, const int shift, vbytes mask) {
    if (shift > 0) a = _mm512_srli_epi16(a, shift);
    if (shift < 0) a = _mm512_slli_epi16(a, -shift);
    return _mm512_and_si512(a, mask);
}
INLINE vbytes vb_lookup(const uint8_t *table, vbytes a) {
    __m128i row = _mm_loadu_si128((const __m128i *)table);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(row), a);
}

/* 32 signed bytes as bf16, which holds each exactly. */
INLINE vbytes vb_bf16_of_int8(const void *p) {
    return (vbytes)_mm512_cvtne2ps_pbh(vf_load_i8((const char *)p + 16), vf_load_i8(p));
}
/* 16 signed bytes as floats. */
INLINE vbytes vb_f32_of_int8(const void *p) { return _mm512_castps_si512(vf_load_i8(p)); }

/* a + the four products of bytes of w, 0..255, with the four signed bytes in x. */
#define DOT_WIDE_OFFSET 0
INLINE vint vi_dot(vint a, vbytes w, int32_t x) {
    return _mm512_dpbusd_epi32(a, w, _mm512_set1_epi32(x));
}
INLINE vint vi_dot_wide(vint a, vbytes w, int32_t x) { return vi_dot(a, w, x); }
/* a + the two products of int16 pairs. */
INLINE vint vi_dot_pairs(vint a, vbytes w, int32_t x) {
    return _mm512_dpwssd_epi32(a, w, _mm512_set1_epi32(x));
}
/* Sixteen unsigned bytes beside sixteen others, as pairs of int16. */
INLINE vbytes vb_pairs_of_u8(const void *first, const void *second) {
    __m512i low = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)first));
    __m512i high = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)second));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* a + the two products of bf16 pairs. */
INLINE vfloat vf_dot_bf16(vfloat a, vbytes w, uint32_t x) {
    return _mm512_dpbf16_ps(a, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int32_t)x));
}
INLINE vfloat vf_dot_f32(vfloat a, vbytes w, uint32_t x) {
    __m512 single = _mm512_castsi512_ps(_mm512_set1_epi32((int32_t)x));
    return _mm512_fmadd_ps(_mm512_castsi512_ps(w), single, a);
}
