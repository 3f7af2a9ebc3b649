/* From the blocks of a GGUF file, or plain codes with scales, to records (formats.h). */
#include "formats.h"

/* One output's share of a record, before it is put among the other fifteen. */
typedef struct {
    uint8_t codes[256];
    uint16_t outer[16];     /* scales then minimums: of 16 bits */
    uint8_t scales[16];     /* NESTED: of 8 bits */
    uint8_t mins[16];
} share;

INLINE uint16_t half_at(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }

/* Low nibbles are the first sixteen columns, high ones the last. */
INLINE void nibbles(const uint8_t *p, uint8_t *codes) {
    for (int i = 0; i < 16; i++) {
        codes[i] = p[i] & 15;
        codes[16 + i] = p[i] >> 4;
    }
}

/* The fifth bits of 32 codes. */
INLINE void fifth_bits(const uint8_t *p, uint8_t *codes) {
    for (int i = 0; i < RUN; i++) codes[i] |= (uint8_t)((p[i / 8] >> i % 8 & 1) << 4);
}

/* The eight scales and minimums of six bits that Q4_K and Q5_K share. */
INLINE void six_bits(const uint8_t *p, share *to) {
    for (int i = 0; i < 4; i++) {
        to->scales[i] = p[i] & 63;
        to->mins[i] = p[4 + i] & 63;
        to->scales[4 + i] = (uint8_t)((p[8 + i] & 15) | (p[i] >> 6) << 4);
        to->mins[4 + i] = (uint8_t)(p[8 + i] >> 4 | (p[4 + i] >> 6) << 4);
    }
}

/* Block number i of a FLAT record of two: [scale][minimum][codes]. */
static void take_q4_0(const uint8_t *p, int i, share *to) {
    to->outer[i] = half_at(p);
    nibbles(p + 2, to->codes + RUN * i);
}
static void take_q4_1(const uint8_t *p, int i, share *to) {
    to->outer[i] = half_at(p);
    to->outer[2 + i] = half_at(p + 2) ^ 0x8000; /* the file adds its minimum */
    nibbles(p + 4, to->codes + RUN * i);
}
static void take_q5_0(const uint8_t *p, int i, share *to) {
    to->outer[i] = half_at(p);
    nibbles(p + 6, to->codes + RUN * i);
    fifth_bits(p + 2, to->codes + RUN * i);
}
static void take_q5_1(const uint8_t *p, int i, share *to) {
    to->outer[i] = half_at(p);
    to->outer[2 + i] = half_at(p + 2) ^ 0x8000;
    nibbles(p + 8, to->codes + RUN * i);
    fifth_bits(p + 4, to->codes + RUN * i);
}
static void take_q8_0(const uint8_t *p, int i, share *to) {
    to->outer[i] = half_at(p);
    for (int c = 0; c < RUN; c++) to->codes[RUN * i + c] = p[2 + c] ^ 0x80;
}
static void take_mxfp4(const uint8_t *p, int i, share *to) { /* the scale is half of 2^(p - 127) */
    to->outer[i] = (uint16_t)(p[0] < 2 ? 0x20 << p[0] : (p[0] - 1) << 7);
    nibbles(p + 1, to->codes + RUN * i);
}

static void take_q2_k(const uint8_t *p, int i, share *to) {
    (void)i;
    for (int g = 0; g < 16; g++) {
        to->scales[g] = p[g] & 15;
        to->mins[g] = p[g] >> 4;
    }
    for (int c = 0; c < 256; c++) to->codes[c] = p[16 + c / 128 * 32 + c % 32] >> c / 32 % 4 * 2 & 3;
    to->outer[0] = half_at(p + 80);
    to->outer[1] = half_at(p + 82);
}
static void take_q3_k(const uint8_t *p, int i, share *to) {
    (void)i;
    const uint8_t *low = p + 32, *scales = p + 96;
    for (int c = 0; c < 256; c++)
        to->codes[c] = (uint8_t)((low[c / 128 * 32 + c % 32] >> c / 32 % 4 * 2 & 3) |
                                 (p[c % 32] >> c / 32 & 1) << 2);
    for (int g = 0; g < 16; g++) {
        int upper = scales[8 + g % 4] >> g / 4 * 2 & 3;
        to->scales[g] = (uint8_t)((scales[g % 8] >> g / 8 * 4 & 15) + upper * 16 - 32);
    }
    to->outer[0] = half_at(p + 108);
}
static void take_q4_k(const uint8_t *p, int i, share *to) {
    (void)i;
    to->outer[0] = half_at(p);
    to->outer[1] = half_at(p + 2);
    six_bits(p + 4, to);
    for (int c = 0; c < 256; c++) to->codes[c] = p[16 + c / 64 * 32 + c % 32] >> c / 32 % 2 * 4 & 15;
}
static void take_q5_k(const uint8_t *p, int i, share *to) {
    (void)i;
    to->outer[0] = half_at(p);
    to->outer[1] = half_at(p + 2);
    six_bits(p + 4, to);
    for (int c = 0; c < 256; c++)
        to->codes[c] = (uint8_t)((p[48 + c / 64 * 32 + c % 32] >> c / 32 % 2 * 4 & 15) |
                                 (p[16 + c % 32] >> c / 32 & 1) << 4);
}
static void take_q6_k(const uint8_t *p, int i, share *to) {
    (void)i;
    for (int c = 0; c < 256; c++)
        to->codes[c] = (uint8_t)((p[c / 128 * 64 + c % 64] >> c / 64 % 2 * 4 & 15) |
                                 (p[128 + c / 128 * 32 + c % 32] >> c / 32 % 4 * 2 & 3) << 4);
    memcpy(to->scales, p + 192, 16);
    to->outer[0] = half_at(p + 208);
}
static void take_iq4_xs(const uint8_t *p, int i, share *to) {
    (void)i;
    to->outer[0] = half_at(p);
    for (int g = 0; g < 8; g++) {
        int low = p[4 + g / 2] >> g % 2 * 4 & 15, upper = half_at(p + 2) >> 2 * g & 3;
        to->scales[g] = (uint8_t)(low + upper * 16 - 32);
        nibbles(p + 8 + 16 * g, to->codes + RUN * g);
    }
}

typedef void take_function(const uint8_t *block, int i, share *to);
typedef struct {
    const format *format;
    take_function *take; /* NULL: not from a file */
    int64_t columns, bytes; /* of a block */
} source;

static source source_of(int64_t number) {
    switch (number) {
        case 2: return (source){&Q4_0, take_q4_0, 32, 18};
        case 3: return (source){&Q4_1, take_q4_1, 32, 20};
        case 6: return (source){&Q5_0, take_q5_0, 32, 22};
        case 7: return (source){&Q5_1, take_q5_1, 32, 24};
        case 8: return (source){&Q8_0, take_q8_0, 32, 34};
        case 10: return (source){&Q2_K, take_q2_k, 256, 84};
        case 11: return (source){&Q3_K, take_q3_k, 256, 110};
        case 12: return (source){&Q4_K, take_q4_k, 256, 144};
        case 13: return (source){&Q5_K, take_q5_k, 256, 176};
        case 14: return (source){&Q6_K, take_q6_k, 256, 210};
        case 20: return (source){&IQ4_NL, take_q4_0, 32, 18};
        case 23: return (source){&IQ4_XS, take_iq4_xs, 256, 136};
        case 39: return (source){&MXFP4, take_mxfp4, 32, 17};
        case 104: return (source){&INT4, NULL, 0, 0};
        case 108: return (source){&INT8, NULL, 0, 0};
        default: return (source){NULL, NULL, 0, 0};
    }
}

/* Bits of the codes of some fours, in the planes of one run. */
INLINE void put_codes(const int low, const int high, const uint8_t tile[FOURS][64],
                      uint8_t *restrict run) {
    uint8_t *restrict upper = run + 64 * low;
    for (int i = 0; i < FOURS; i++) {
        const uint8_t *restrict codes = tile[i];
        uint8_t *restrict to = run + 64 * (low == 8 ? i : low == 4 ? i % 4 : i / 4);
        const int shift = low == 8 ? 0 : low == 4 ? i / 4 * 4 : i % 4 * 2;
        for (int k = 0; k < 64; k++) to[k] |= (uint8_t)((codes[k] & ((1 << low) - 1)) << shift);
        for (int k = 0; high == 1 && k < 64; k++) upper[k] |= (uint8_t)(codes[k] >> low << i);
        for (int k = 0; high == 2 && k < 64; k++)
            upper[64 * (i / 4) + k] |= (uint8_t)(codes[k] >> low << i % 4 * 2);
    }
}

/* Sixteen shares make a record; `to` is zero. */
static void put_record(const format *f, int64_t span, const share *shares, uint8_t *to) {
    const int runs = (int)(record_columns(f) / RUN);
    const int groups = (int)(record_columns(f) / f->group);
    const int outer = nested(f) ? 2 : (int)(header_bytes(f, span) / 32);
    for (int place = 0; place < WIDTH; place++) {
        for (int i = 0; i < outer; i++)
            memcpy(to + 32 * i + 2 * place, &shares[place].outer[i], sizeof(uint16_t));
        for (int g = 0; nested(f) && g < groups; g++) {
            to[64 + 16 * g + place] = shares[place].scales[g];
            if (f->mins) to[64 + 16 * (groups + g) + place] = shares[place].mins[g];
        }
    }
    for (int run = 0; run < runs; run++) {
        uint8_t tile[FOURS][64];
        for (int i = 0; i < FOURS; i++)
            for (int place = 0; place < WIDTH; place++)
                memcpy(tile[i] + 4 * place, shares[place].codes + RUN * run + 4 * i, 4);
        uint8_t *place = to + header_bytes(f, span) + run * run_bytes(f);
        switch (10 * f->low + f->high) {
            case 80: put_codes(8, 0, tile, place); break;
            case 40: put_codes(4, 0, tile, place); break;
            case 41: put_codes(4, 1, tile, place); break;
            case 42: put_codes(4, 2, tile, place); break;
            case 20: put_codes(2, 0, tile, place); break;
            case 21: put_codes(2, 1, tile, place); break;
        }
    }
}

/* Bytes of a packed weight, or -1 if the format is unknown. */
int64_t blocks_bytes(const blocks_weight *w) {
    const format *f = source_of(w->format).format;
    if (f == NULL) return -1;
    int64_t records = divide_up(w->columns, record_columns(f));
    return divide_up(w->outputs, PANEL) * VECTORS * records * record_bytes(f, w->span);
}

/* Where a record of sixteen outputs stands. */
INLINE uint8_t *record_at(const blocks_weight *w, const format *f, int64_t sixteen, int64_t i) {
    int64_t records = divide_up(w->columns, record_columns(f));
    int64_t place = (sixteen / VECTORS * records + i) * VECTORS + sixteen % VECTORS;
    return (uint8_t *)w->data + place * record_bytes(f, w->span);
}

/* Fill w->data, which is zero, from the blocks of a file: [outputs][blocks of a row]. */
void blocks_pack(const blocks_weight *w, const uint8_t *from) {
    source s = source_of(w->format);
    int64_t row_blocks = w->columns / s.columns, per_record = record_columns(s.format) / s.columns;
#pragma omp parallel for schedule(static)
    for (int64_t sixteen = 0; sixteen < divide_up(w->outputs, WIDTH); sixteen++) {
        for (int64_t i = 0; i < divide_up(row_blocks, per_record); i++) {
            share shares[WIDTH];
            memset(shares, 0, sizeof shares);
            for (int64_t place = 0; place < smaller(WIDTH, w->outputs - sixteen * WIDTH); place++) {
                int64_t first = i * per_record;
                const uint8_t *row = from + (sixteen * WIDTH + place) * row_blocks * s.bytes;
                for (int64_t b = first; b < smaller(first + per_record, row_blocks); b++)
                    s.take(row + b * s.bytes, (int)(b - first), shares + place);
            }
            put_record(s.format, w->span, shares, record_at(w, s.format, sixteen, i));
        }
    }
}

/* The same from codes [outputs][columns], a byte each or of 4 bits with even columns in the low
   halves, and 16-bit scales and f16 zeros [outputs][columns / span]. */
void grouped_pack(const blocks_weight *w, const uint8_t *codes, const uint16_t *scales,
                  const uint16_t *zeros) {
    const format *f = source_of(w->format).format;
    int64_t groups = divide_up(w->columns, w->span), columns = record_columns(f);
    int64_t per_record = columns / w->span;
#pragma omp parallel for schedule(static)
    for (int64_t sixteen = 0; sixteen < divide_up(w->outputs, WIDTH); sixteen++) {
        for (int64_t i = 0; i < divide_up(w->columns, columns); i++) {
            share shares[WIDTH];
            memset(shares, 0, sizeof shares);
            for (int64_t place = 0; place < smaller(WIDTH, w->outputs - sixteen * WIDTH); place++) {
                int64_t row = sixteen * WIDTH + place, first = i * per_record;
                int64_t count = smaller(columns, w->columns - i * columns);
                const uint8_t *from = codes + (row * w->columns + i * columns) * f->low / 8;
                for (int64_t c = 0; f->low == 8 && c < count; c++) shares[place].codes[c] = from[c];
                for (int64_t c = 0; f->low == 4 && c < count; c += 2) {
                    shares[place].codes[c] = from[c / 2] & 15;
                    shares[place].codes[c + 1] = from[c / 2] >> 4;
                }
                for (int64_t g = first; g < smaller(first + per_record, groups); g++) {
                    shares[place].outer[2 * (g - first)] = scales[row * groups + g];
                    shares[place].outer[2 * (g - first) + 1] = zeros[row * groups + g];
                }
            }
            put_record(f, w->span, shares, record_at(w, f, sixteen, i));
        }
    }
}
