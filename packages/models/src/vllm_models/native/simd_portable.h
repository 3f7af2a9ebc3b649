/* Plain C, for every other machine: the vectors of GCC and Clang, which become whatever the processor
   has. Products and sums are rounded separately (the build forbids contraction), so that all
   compilers agree. Little-endian only. */

#define TILE_ROWS 2
#define TILE_VECTORS 1

#define VECTOR(type) type __attribute__((vector_size(4 * WIDTH * sizeof(uint8_t))))
typedef VECTOR(float) float16x;
typedef VECTOR(int32_t) int16x;
typedef VECTOR(uint32_t) unsigned16x;

typedef struct { float16x v; } vfloat;
typedef struct { int16x v; } vint;
typedef struct { VECTOR(uint8_t) v; } vbytes; /* four to each of the sixteen */

#define WHOLE(type, expression)    \
    type each_ = {(expression)};   \
    return each_
#define EACH(type, expression)                                       \
    type each_;                                                      \
    for (int i = 0; i < WIDTH; i++) each_.v[i] = (expression);       \
    return each_
#define EACH_BYTE(expression)                                                 \
    vbytes each_;                                                             \
    for (int i = 0; i < 4 * WIDTH; i++) each_.v[i] = (uint8_t)(expression);   \
    return each_

INLINE float portable_f16(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7fff;
    uint32_t wide = rest >= 0x7c00 ? 0x7f800000 | (rest & 0x3ff) << 13 : (rest << 13) + 0x38000000;
    float value;
    if (rest < 0x400) { /* subnormal: a multiple of 2^-24 */
        value = (float)rest * 0x1p-24f;
        memcpy(&wide, &value, sizeof wide);
    }
    wide |= sign;
    memcpy(&value, &wide, sizeof value);
    return value;
}
INLINE float from_bits(uint32_t upper) {
    float value;
    memcpy(&value, &upper, sizeof value);
    return value;
}
INLINE uint16_t portable_u16(const void *p, int i) {
    uint16_t value;
    memcpy(&value, (const char *)p + 2 * i, sizeof value);
    return value;
}

INLINE vfloat vf_zero(void) { WHOLE(vfloat, (float16x){0}); }
INLINE vfloat vf_set(float a) { WHOLE(vfloat, (float16x){0} + a); }
INLINE vfloat vf_load(const float *p) {
    vfloat x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE void vf_store(float *p, vfloat x) { memcpy(p, &x, sizeof x); }
INLINE vfloat vf_add(vfloat x, vfloat y) { WHOLE(vfloat, x.v + y.v); }
INLINE vfloat vf_mul(vfloat x, vfloat y) { WHOLE(vfloat, x.v * y.v); }
INLINE vfloat vf_fma(vfloat x, vfloat y, vfloat c) { WHOLE(vfloat, c.v + x.v * y.v); }
INLINE vfloat vf_fnma(vfloat x, vfloat y, vfloat c) { WHOLE(vfloat, c.v - x.v * y.v); }
INLINE vfloat vf_from_int(vint x) { WHOLE(vfloat, __builtin_convertvector(x.v, float16x)); }
INLINE vfloat vf_load_f16(const void *p) { EACH(vfloat, portable_f16(portable_u16(p, i))); }
INLINE vfloat vf_load_bf16(const void *p) {
    EACH(vfloat, from_bits((uint32_t)portable_u16(p, i) << 16));
}
INLINE vfloat vf_load_u8(const void *p) { EACH(vfloat, (float)((const uint8_t *)p)[i]); }
INLINE vfloat vf_load_i8(const void *p) { EACH(vfloat, (float)((const int8_t *)p)[i]); }

INLINE vint vi_set(int32_t a) { WHOLE(vint, (int16x){0} + a); }

INLINE vbytes vb_load(const void *p) {
    vbytes x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE void vb_store(void *p, vbytes x) { memcpy(p, &x, sizeof x); }
INLINE vbytes vb_set(uint8_t a) { WHOLE(vbytes, (VECTOR(uint8_t)){0} + a); }
INLINE vbytes vb_or(vbytes x, vbytes y) { WHOLE(vbytes, x.v | y.v); }
/* The bits of each byte that `mask` keeps, after a shift to the right (left if negative). */
INLINE vbytes vb_bits(vbytes x, const int shift, vbytes mask) {
    if (shift > 0) x.v = x.v >> (uint8_t)shift;
    if (shift < 0) x.v = x.v << (uint8_t)-shift;
    WHOLE(vbytes, x.v & mask.v);
}
INLINE vbytes vb_lookup(const uint8_t *table, vbytes x) { EACH_BYTE(table[x.v[i] & 15]); }

/* a + the four products of bytes of w, 0..255, with the four signed bytes in x. */
#define DOT_WIDE_OFFSET 0
INLINE int16x signed_words(unsigned16x w) { return (int16x)w; }
INLINE vint vi_dot(vint a, vbytes w, int32_t x) {
    const unsigned16x words = (unsigned16x)w.v;
    int8_t four[4];
    memcpy(four, &x, sizeof four);
    int16x sum = a.v + signed_words(words & 255) * four[0];
    sum += signed_words(words >> 8 & 255) * four[1];
    sum += signed_words(words >> 16 & 255) * four[2];
    WHOLE(vint, sum + signed_words(words >> 24) * four[3]);
}
INLINE vint vi_dot_wide(vint a, vbytes w, int32_t x) { return vi_dot(a, w, x); }

/* a + the two products of bf16 pairs. */
INLINE vfloat vf_dot_bf16(vfloat a, vbytes w, uint32_t x) {
    const unsigned16x pairs = (unsigned16x)w.v;
    const float first = from_bits(x << 16), second = from_bits(x & 0xffff0000);
    WHOLE(vfloat, (a.v + (float16x)(pairs << 16) * first) + (float16x)(pairs & 0xffff0000) * second);
}
INLINE vfloat vf_dot_f32(vfloat a, vbytes w, uint32_t x) {
    WHOLE(vfloat, a.v + (float16x)w.v * from_bits(x));
}
