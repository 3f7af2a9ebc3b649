/* Activations as int8 codes (blocks.h says what they stand for). */
#include <math.h>

#include "blocks.h"

#define MOST_HALVINGS 20 /* what is smaller yet is lost beside the largest in float32 */
#define RUNS (PIECE / RUN)

/* What codes are multiples of in one piece, and the factors that make codes of numbers. */
typedef struct {
    float scale, factors[RUNS];
    float powers[RUNS]; /* 2^-n */
} steps;

/* The scale fits the largest number of the piece. It is halved as often as the largest of a run still
   fits: the bits of two floats differ by 2^23 for every doubling. */
INLINE void find_steps(const uint32_t largest[RUNS], steps *to) {
    uint32_t most = 0;
    for (int r = 0; r < RUNS; r++) most = largest[r] > most ? largest[r] : most;
    const float limit = float_of_bits(most);
    const float inverse = limit > 1e-30f && limit < INFINITY ? 127.0f / limit : 0.0f;
    to->scale = limit / 127.0f;
    for (int r = 0; r < RUNS; r++) {
        const uint32_t doublings = (most - largest[r]) >> 23;
        const uint32_t n = doublings < MOST_HALVINGS ? doublings : MOST_HALVINGS;
        to->factors[r] = inverse * float_of_bits((127 + n) << 23);
        to->powers[r] = float_of_bits((127 - n) << 23);
    }
}

#if defined(CLASS_AVX512)

/* The bits of the largest magnitude of each run. Vectors are folded into halves of one another, so
   that the last holds all runs. */
INLINE void find_largest(const float *x, uint32_t largest[RUNS]) {
    __m512i all[RUNS];
    for (int r = 0; r < RUNS; r++) {
        const __m512i first = _mm512_loadu_si512(x + r * RUN);
        const __m512i second = _mm512_loadu_si512(x + r * RUN + WIDTH);
        const __m512i mask = _mm512_set1_epi32(0x7fffffff);
        all[r] = _mm512_max_epu32(_mm512_and_si512(first, mask), _mm512_and_si512(second, mask));
    }
    for (int r = 0; r < 4; r++)
        all[r] = _mm512_max_epu32(_mm512_shuffle_i64x2(all[r], all[r + 4], 0x44),
                                  _mm512_shuffle_i64x2(all[r], all[r + 4], 0xee));
    for (int r = 0; r < 2; r++)
        all[r] = _mm512_max_epu32(_mm512_shuffle_i64x2(all[r], all[r + 2], 0x88),
                                  _mm512_shuffle_i64x2(all[r], all[r + 2], 0xdd));
    __m512i last = _mm512_max_epu32(_mm512_unpacklo_epi32(all[0], all[1]),
                                    _mm512_unpackhi_epi32(all[0], all[1]));
    last = _mm512_max_epu32(last, _mm512_shuffle_epi32(last, _MM_PERM_BADC));
    const __m512i order = _mm512_setr_epi32(0, 1, 8, 9, 4, 5, 12, 13, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm256_storeu_si256((__m256i *)largest,
                        _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, last)));
}

INLINE __m512i rounded_to_int(vfloat x, float factor) {
    return _mm512_cvtps_epi32(vf_mul(x, vf_set(factor)));
}

/* The codes of a piece, and the sums of sixteen of them each. */
INLINE __m512i make_codes(const float *x, const steps *s, int8_t *codes) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i sums[4];
    for (int i = 0; i < 4; i++) {
        __m512i rounded[4];
        for (int v = 0; v < 4; v++)
            rounded[v] = rounded_to_int(vf_load(x + 64 * i + 16 * v), s->factors[2 * i + v / 2]);
        __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(rounded[0], rounded[1]),
                                           _mm512_packs_epi32(rounded[2], rounded[3]));
        bytes = _mm512_permutexvar_epi32(order, bytes);
        _mm512_storeu_si512(codes + 64 * i, bytes);
        sums[i] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), bytes);
    }
    for (int i = 0; i < 4; i += 2)
        sums[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(sums[i], sums[i + 1]),
                                   _mm512_unpackhi_epi32(sums[i], sums[i + 1]));
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(sums[0], sums[2]),
                                         _mm512_unpackhi_epi64(sums[0], sums[2]));
    return _mm512_permutexvar_epi32(order, all);
}

/* Codes and what follows from their sums, to the columns from `to` on. */
INLINE void quantize(const float *x, const activations *a, int64_t to) {
    uint32_t largest[RUNS];
    steps s;
    find_largest(x, largest);
    find_steps(largest, &s);
    a->scales[to / PIECE] = s.scale;
    const __m512i sums = make_codes(x, &s, a->codes + to);
    const __m256i pairs = _mm512_cvtepi64_epi32(_mm512_add_epi32(sums, _mm512_srli_epi64(sums, 32)));
    const __m256 power = _mm256_loadu_ps(s.powers);
    const __m256 low = _mm256_mul_ps(_mm256_cvtepi32_ps(pairs), power);
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m512 powers = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(power));
    const __m512i whole = rounded_to_int(vf_mul(vf_from_int(sums), powers), 1 / WHOLE_LOW);
    _mm256_storeu_si256((__m256i *)(a->sums[0] + to / RUN), pairs);
    _mm512_storeu_si512(a->sums[1] + to / 16, sums);
    _mm256_storeu_ps(a->lows + to / RUN, low);
    const __m256i whole_pairs = _mm256_cvtps_epi32(_mm256_mul_ps(low, _mm256_set1_ps(1 / WHOLE_LOW)));
    _mm_storeu_si128((__m128i *)(a->whole_lows[0] + to / RUN), _mm256_cvtepi32_epi16(whole_pairs));
    _mm256_storeu_si256((__m256i *)(a->whole_lows[1] + to / 16), _mm512_cvtepi32_epi16(whole));
    _mm256_storeu_ps(a->powers + to / RUN, _mm256_getexp_ps(power));
}

#else

INLINE int16_t whole_low(float low) { return (int16_t)rintf(low * (1 / WHOLE_LOW)); }

INLINE uint32_t largest_of(const float *x) {
    uint32_t largest = 0;
    for (int i = 0; i < RUN; i++) {
        uint32_t magnitude = float_bits(x[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

static void quantize_run(const float *restrict x, float factor, float power, const activations *a,
                         int64_t to) {
    int32_t rounded[RUN], *sums = a->sums[1] + to / 16;
    for (int i = 0; i < RUN; i++) rounded[i] = (int32_t)rintf(x[i] * factor);
    if (factor == 0.0f) memset(rounded, 0, sizeof rounded);
    for (int i = 0; i < RUN; i++) a->codes[to + i] = (int8_t)rounded[i];
    for (int half = 0; half < 2; half++) {
        sums[half] = 0;
        for (int i = 0; i < 16; i++) sums[half] += rounded[half * 16 + i];
        a->whole_lows[1][to / 16 + half] = whole_low((float)sums[half] * power);
    }
    a->sums[0][to / RUN] = sums[0] + sums[1];
    a->powers[to / RUN] = power;
    a->lows[to / RUN] = (float)a->sums[0][to / RUN] * power;
    a->whole_lows[0][to / RUN] = whole_low(a->lows[to / RUN]);
}

/* Codes and what follows from their sums, to the columns from `to` on. */
static void quantize(const float *x, const activations *a, int64_t to) {
    uint32_t largest[RUNS];
    steps s;
    for (int r = 0; r < RUNS; r++) largest[r] = largest_of(x + r * RUN);
    find_steps(largest, &s);
    a->scales[to / PIECE] = s.scale;
    for (int r = 0; r < RUNS; r++)
        quantize_run(x + r * RUN, s.factors[r], s.powers[r], a, to + r * RUN);
}

#endif

/* One piece of a row in float32, with zeros after its end. */
INLINE void load_piece(const matrix *x, int64_t place, int64_t count, float *restrict to) {
    uint16_t halves[PIECE] = {0}; /* zero is the same in both types */
    if (x->type == FLOAT32) {
        if (count < PIECE) memset(to, 0, PIECE * sizeof *to);
        memcpy(to, (const float *)x->data + place, (size_t)count * sizeof *to);
        return;
    }
    memcpy(halves, (const uint16_t *)x->data + place, (size_t)count * sizeof *halves);
    for (int i = 0; i < PIECE; i++) to[i] = bf16_to_float(halves[i]);
}

void quantize_piece(const activations *a, const matrix *x, int64_t from, int64_t row, int64_t first,
                    int64_t columns) {
    float values[PIECE];
    const int64_t place = from * x->stride + first;
    if (columns - first >= PIECE) /* a known number, so that the compiler makes no loop of it */
        load_piece(x, place, PIECE, values);
    else
        load_piece(x, place, columns - first, values);
    quantize(values, a, row * a->columns + first);
}
