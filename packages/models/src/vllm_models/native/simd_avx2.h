/* AVX2 with FMA: two registers of eight. */
#include <immintrin.h>

/* Sums of a tile of rows and vectors, which fit the 16 registers. */
#define TILE_ROWS 2
#define TILE_VECTORS 2

typedef struct { __m256 a, b; } vfloat;
typedef struct { __m256i a, b; } vint;
typedef struct { __m256i a, b; } vbytes; /* 64 bytes, four to each of the sixteen */

#define BOTH(type, one, two) \
    type both_ = {one, two};  \
    return both_

INLINE vfloat vf_zero(void) { BOTH(vfloat, _mm256_setzero_ps(), _mm256_setzero_ps()); }
INLINE vfloat vf_set(float a) { BOTH(vfloat, _mm256_set1_ps(a), _mm256_set1_ps(a)); }
INLINE vfloat vf_load(const float *p) { BOTH(vfloat, _mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
INLINE void vf_store(float *p, vfloat x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
INLINE vfloat vf_add(vfloat x, vfloat y) {
    BOTH(vfloat, _mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b));
}
INLINE vfloat vf_mul(vfloat x, vfloat y) {
    BOTH(vfloat, _mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b));
}
INLINE vfloat vf_fma(vfloat x, vfloat y, vfloat c) { /* c + xy */
    BOTH(vfloat, _mm256_fmadd_ps(x.a, y.a, c.a), _mm256_fmadd_ps(x.b, y.b, c.b));
}
INLINE vfloat vf_fnma(vfloat x, vfloat y, vfloat c) { /* c - xy */
    BOTH(vfloat, _mm256_fnmadd_ps(x.a, y.a, c.a), _mm256_fnmadd_ps(x.b, y.b, c.b));
}
INLINE vfloat vf_from_int(vint x) {
    BOTH(vfloat, _mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b));
}
INLINE vfloat vf_load_f16(const void *p) {
    const __m128i *halves = (const __m128i *)p;
    BOTH(vfloat, _mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1)));
}
INLINE __m256 bf16_half(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
INLINE vfloat vf_load_bf16(const void *p) {
    const __m128i *halves = (const __m128i *)p;
    BOTH(vfloat, bf16_half(_mm_loadu_si128(halves)), bf16_half(_mm_loadu_si128(halves + 1)));
}
INLINE vfloat vf_load_u8(const void *p) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    vint wide = {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
    return vf_from_int(wide);
}
INLINE vfloat vf_load_i8(const void *p) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    vint wide = {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
    return vf_from_int(wide);
}

INLINE vint vi_set(int32_t a) { BOTH(vint, _mm256_set1_epi32(a), _mm256_set1_epi32(a)); }

INLINE vbytes vb_load(const void *p) {
    const __m256i *halves = (const __m256i *)p;
    BOTH(vbytes, _mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1));
}
INLINE void vb_store(void *p, vbytes x) {
    _mm256_storeu_si256((__m256i *)p, x.a);
    _mm256_storeu_si256((__m256i *)p + 1, x.b);
}
INLINE vbytes vb_set(uint8_t a) {
    BOTH(vbytes, _mm256_set1_epi8((char)a), _mm256_set1_epi8((char)a));
}
INLINE vbytes vb_or(vbytes x, vbytes y) {
    BOTH(vbytes, _mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b));
}
INLINE __m256i shifted(__m256i a, const int shift) {
    if (shift > 0) return _mm256_srli_epi16(a, shift);
    return shift < 0 ? _mm256_slli_epi16(a, -shift) : a;
}
/* The bits of each byte that `mask` keeps, after a shift to the right (left if negative). */
INLINE vbytes vb_bits(vbytes x, const int shift, vbytes mask) {
    BOTH(vbytes, _mm256_and_si256(shifted(x.a, shift), mask.a),
         _mm256_and_si256(shifted(x.b, shift), mask.b));
}
INLINE vbytes vb_lookup(const uint8_t *table, vbytes x) {
    __m256i row = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    BOTH(vbytes, _mm256_shuffle_epi8(row, x.a), _mm256_shuffle_epi8(row, x.b));
}

INLINE __m256i bf16_of_int8_half(const __m128i *p) {
    __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(p));
    __m256i even = _mm256_srai_epi32(_mm256_slli_epi32(wide, 16), 16);
    __m256i low = _mm256_castps_si256(_mm256_cvtepi32_ps(even));
    __m256i high = _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_srai_epi32(wide, 16)));
    return _mm256_blend_epi16(_mm256_srli_epi32(low, 16), high, 0xaa);
}
/* 32 signed bytes as bf16, which holds each exactly. */
INLINE vbytes vb_bf16_of_int8(const void *p) {
    BOTH(vbytes, bf16_of_int8_half(p), bf16_of_int8_half((const __m128i *)p + 1));
}
/* 16 signed bytes as floats. */
INLINE vbytes vb_f32_of_int8(const void *p) {
    const vfloat x = vf_load_i8(p);
    BOTH(vbytes, _mm256_castps_si256(x.a), _mm256_castps_si256(x.b));
}

INLINE __m256i dot_half(__m256i a, __m256i w, __m256i x) {
    __m256i pairs = _mm256_maddubs_epi16(w, x);
    return _mm256_add_epi32(a, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
/* a + the four products of bytes of w, 0..127, with the four signed bytes in x. */
INLINE vint vi_dot(vint a, vbytes w, int32_t x) {
    __m256i four = _mm256_set1_epi32(x);
    BOTH(vint, dot_half(a.a, w.a, four), dot_half(a.b, w.b, four));
}
/* The same for 0..255, less DOT_WIDE_OFFSET times the sum of x: products of larger bytes would not
   fit the 16 bits that the instruction sums in, so w - 128 is multiplied. */
#define DOT_WIDE_OFFSET 128
INLINE __m256i dot_signed_half(__m256i a, __m256i w, __m256i x) {
    __m256i centred = _mm256_xor_si256(w, _mm256_set1_epi8((char)0x80));
    return dot_half(a, _mm256_abs_epi8(centred), _mm256_sign_epi8(x, centred));
}
INLINE vint vi_dot_wide(vint a, vbytes w, int32_t x) {
    __m256i four = _mm256_set1_epi32(x);
    BOTH(vint, dot_signed_half(a.a, w.a, four), dot_signed_half(a.b, w.b, four));
}

/* a + the two products of int16 pairs. */
INLINE vint vi_dot_pairs(vint a, vbytes w, int32_t x) {
    __m256i pair = _mm256_set1_epi32(x);
    BOTH(vint, _mm256_add_epi32(a.a, _mm256_madd_epi16(w.a, pair)),
         _mm256_add_epi32(a.b, _mm256_madd_epi16(w.b, pair)));
}
/* Sixteen unsigned bytes beside sixteen others, as pairs of int16. */
INLINE vbytes vb_pairs_of_u8(const void *first, const void *second) {
    __m128i low = _mm_loadu_si128((const __m128i *)first);
    __m128i high = _mm_loadu_si128((const __m128i *)second);
    BOTH(vbytes, _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(low, high)),
         _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(low, high)));
}

INLINE __m256 dot_bf16_half(__m256 a, __m256i w, uint32_t x) {
    const __m256i upper = _mm256_set1_epi32((int32_t)0xffff0000);
    __m256i pair = _mm256_set1_epi32((int32_t)x);
    __m256 first_w = _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
    __m256 first_x = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
    __m256 second_w = _mm256_castsi256_ps(_mm256_and_si256(w, upper));
    __m256 second_x = _mm256_castsi256_ps(_mm256_and_si256(pair, upper));
    return _mm256_fmadd_ps(second_w, second_x, _mm256_fmadd_ps(first_w, first_x, a));
}
/* a + the two products of bf16 pairs. */
INLINE vfloat vf_dot_bf16(vfloat a, vbytes w, uint32_t x) {
    BOTH(vfloat, dot_bf16_half(a.a, w.a, x), dot_bf16_half(a.b, w.b, x));
}
INLINE vfloat vf_dot_f32(vfloat a, vbytes w, uint32_t x) {
    __m256 single = _mm256_castsi256_ps(_mm256_set1_epi32((int32_t)x));
    BOTH(vfloat, _mm256_fmadd_ps(_mm256_castsi256_ps(w.a), single, a.a),
         _mm256_fmadd_ps(_mm256_castsi256_ps(w.b), single, a.b));
}
