/* Plain C, for every other machine: the vectors of GCC and Clang, which become whatever the processor
   has. Products and sums are rounded separately (the build forbids contraction), so that all
   compilers agree. Little-endian only. */

#define TILE_ROWS 2
#define TILE_VECTORS 1

/* A register of most processors: a quarter of the sixteen. */
#define QUARTER(type) type __attribute__((vector_size(16)))
typedef QUARTER(float) float_quarter;
typedef QUARTER(int32_t) int_quarter;
typedef QUARTER(uint32_t) word_quarter;
typedef QUARTER(int16_t) short_quarter;
typedef QUARTER(uint8_t) byte_quarter;

typedef struct { float_quarter v[4]; } vfloat;
typedef struct { int_quarter v[4]; } vint;
typedef struct { byte_quarter v[4]; } vbytes; /* four bytes to each of the sixteen */

#define QUARTERS(type, expression)                                          \
    type each_;                                                             \
    _Pragma("GCC unroll 4") for (int q = 0; q < 4; q++) each_.v[q] = (expression); \
    return each_
/* Number i of the sixteen. */
#define AT(x, i) (x).v[(i) / 4][(i) % 4]
#define EACH(type, expression)                                         \
    type each_;                                                        \
    for (int i = 0; i < WIDTH; i++) AT(each_, i) = (expression);       \
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

INLINE vfloat vf_zero(void) { QUARTERS(vfloat, (float_quarter){0}); }
INLINE vfloat vf_set(float a) { QUARTERS(vfloat, (float_quarter){0} + a); }
INLINE vfloat vf_load(const float *p) {
    vfloat x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE void vf_store(float *p, vfloat x) { memcpy(p, &x, sizeof x); }
INLINE vfloat vf_add(vfloat x, vfloat y) { QUARTERS(vfloat, x.v[q] + y.v[q]); }
INLINE vfloat vf_mul(vfloat x, vfloat y) { QUARTERS(vfloat, x.v[q] * y.v[q]); }
INLINE vfloat vf_fma(vfloat x, vfloat y, vfloat c) { QUARTERS(vfloat, c.v[q] + x.v[q] * y.v[q]); }
INLINE vfloat vf_fnma(vfloat x, vfloat y, vfloat c) { QUARTERS(vfloat, c.v[q] - x.v[q] * y.v[q]); }
INLINE vfloat vf_from_int(vint x) {
    QUARTERS(vfloat, __builtin_convertvector(x.v[q], float_quarter));
}
INLINE vfloat vf_load_f16(const void *p) { EACH(vfloat, portable_f16(portable_u16(p, i))); }
INLINE vfloat vf_load_bf16(const void *p) {
    EACH(vfloat, from_bits((uint32_t)portable_u16(p, i) << 16));
}
INLINE vfloat vf_load_u8(const void *p) { EACH(vfloat, (float)((const uint8_t *)p)[i]); }
INLINE vfloat vf_load_i8(const void *p) { EACH(vfloat, (float)((const int8_t *)p)[i]); }

INLINE vint vi_set(int32_t a) { QUARTERS(vint, (int_quarter){0} + a); }

INLINE vbytes vb_load(const void *p) {
    vbytes x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE void vb_store(void *p, vbytes x) { memcpy(p, &x, sizeof x); }
INLINE vbytes vb_set(uint8_t a) { QUARTERS(vbytes, (byte_quarter){0} + a); }
INLINE vbytes vb_or(vbytes x, vbytes y) { QUARTERS(vbytes, x.v[q] | y.v[q]); }
/* The bits of each byte that `mask` keeps, after a shift to the right (left if negative). The shift
   is of words, so the mask has to leave out what comes from the neighbouring byte. */
INLINE word_quarter shifted(word_quarter x, const int shift) {
    return shift >= 0 ? x >> (shift & 31) : x << (-shift & 31);
}
INLINE vbytes vb_bits(vbytes x, const int shift, vbytes mask) {
    QUARTERS(vbytes, (byte_quarter)shifted((word_quarter)x.v[q], shift) & mask.v[q]);
}
INLINE vbytes vb_lookup(const uint8_t *table, vbytes x) {
    uint8_t bytes[4 * WIDTH];
    vb_store(bytes, x);
    for (int i = 0; i < 4 * WIDTH; i++) bytes[i] = table[bytes[i] & 15];
    return vb_load(bytes);
}

INLINE byte_quarter bf16_of_int8_quarter(const char *p) {
    uint16_t __attribute__((vector_size(8))) pairs;
    memcpy(&pairs, p, sizeof pairs);
    const int_quarter words = (int_quarter)__builtin_convertvector(pairs, word_quarter);
    const float_quarter even = __builtin_convertvector(
        (int_quarter)((word_quarter)words << 24) >> 24, float_quarter);
    const float_quarter odd = __builtin_convertvector(
        (int_quarter)((word_quarter)words << 16) >> 24, float_quarter);
    return (byte_quarter)((word_quarter)even >> 16 | ((word_quarter)odd & 0xffff0000));
}
/* 32 signed bytes as bf16, which holds each exactly. */
INLINE vbytes vb_bf16_of_int8(const void *p) {
    QUARTERS(vbytes, bf16_of_int8_quarter((const char *)p + 8 * q));
}
/* 16 signed bytes as floats. */
INLINE vbytes vb_f32_of_int8(const void *p) {
    const vfloat x = vf_load_i8(p);
    QUARTERS(vbytes, (byte_quarter)x.v[q]);
}

/* Two signed bytes, one to each half of every word. */
INLINE short_quarter pair_of(int8_t first, int8_t second) {
    return (short_quarter)((int_quarter){0} + (int32_t)((uint16_t)first | (uint32_t)second << 16));
}
/* The sum of both halves of every word. */
INLINE int_quarter halves_of(short_quarter x) {
    const int_quarter words = (int_quarter)x;
    return ((int_quarter)((word_quarter)words << 16) >> 16) + (words >> 16);
}
INLINE short_quarter even_products(byte_quarter w, short_quarter x) {
    return (short_quarter)((word_quarter)w & 0x00ff00ff) * x;
}
INLINE short_quarter odd_products(byte_quarter w, short_quarter x) {
    return (short_quarter)((word_quarter)w >> 8 & 0x00ff00ff) * x;
}

/* a + the four products of bytes of w, 0..127, with the four signed bytes in x. */
#define DOT_WIDE_OFFSET 0
INLINE vint vi_dot(vint a, vbytes w, int32_t x) {
    int8_t four[4];
    memcpy(four, &x, sizeof four);
    const short_quarter even = pair_of(four[0], four[2]), odd = pair_of(four[1], four[3]);
    QUARTERS(vint, a.v[q] + halves_of(even_products(w.v[q], even) + odd_products(w.v[q], odd)));
}
/* The same for 0..255, where a sum of two products would not fit 16 bits. */
INLINE vint vi_dot_wide(vint a, vbytes w, int32_t x) {
    int8_t four[4];
    memcpy(four, &x, sizeof four);
    const short_quarter even = pair_of(four[0], four[2]), odd = pair_of(four[1], four[3]);
    QUARTERS(vint, a.v[q] + halves_of(even_products(w.v[q], even)) +
                       halves_of(odd_products(w.v[q], odd)));
}

/* a + the two products of int16 pairs. */
INLINE vint vi_dot_pairs(vint a, vbytes w, int32_t x) {
    const int32_t low = (int16_t)x, high = x >> 16;
    QUARTERS(vint, a.v[q] + ((int_quarter)((word_quarter)w.v[q] << 16) >> 16) * low +
                       ((int_quarter)w.v[q] >> 16) * high);
}
/* Sixteen unsigned bytes beside sixteen others, as pairs of int16. */
INLINE vbytes vb_pairs_of_u8(const void *first, const void *second) {
    uint8_t pairs[4 * WIDTH] = {0};
    for (int i = 0; i < WIDTH; i++) {
        pairs[4 * i] = ((const uint8_t *)first)[i];
        pairs[4 * i + 2] = ((const uint8_t *)second)[i];
    }
    return vb_load(pairs);
}

/* a + the two products of bf16 pairs. */
INLINE float_quarter dot_bf16_quarter(float_quarter a, word_quarter pairs, float x, float y) {
    return (a + (float_quarter)(pairs << 16) * x) + (float_quarter)(pairs & 0xffff0000) * y;
}
INLINE vfloat vf_dot_bf16(vfloat a, vbytes w, uint32_t x) {
    const float first = from_bits(x << 16), second = from_bits(x & 0xffff0000);
    QUARTERS(vfloat, dot_bf16_quarter(a.v[q], (word_quarter)w.v[q], first, second));
}
INLINE vfloat vf_dot_f32(vfloat a, vbytes w, uint32_t x) {
    QUARTERS(vfloat, a.v[q] + (float_quarter)w.v[q] * from_bits(x));
}
