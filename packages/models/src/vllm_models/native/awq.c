/* Words of an AWQ checkpoint, which pack along the outputs, to bytes that pack along the columns. */
#include "linear.h"

#define PLACES 8 /* codes of a word */
#define LINE 64  /* bytes; a square of so many outputs and bytes is turned in the nearest cache */

/* words [columns][outputs / 8]; out [outputs][columns / 2]: column 2i in the low half of byte i. */
void awq_turn(const uint32_t *words, int64_t columns, int64_t outputs, uint8_t *out) {
    static const int output_at[PLACES] = {0, 2, 4, 6, 1, 3, 5, 7}; /* from the lowest bits up */
    const int64_t width = outputs / PLACES, bytes = columns / 2;
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < outputs; first += LINE)
        for (int64_t begin = 0; begin < bytes; begin += LINE) {
            const int64_t rows = smaller(LINE, outputs - first), count = smaller(LINE, bytes - begin);
            uint8_t square[LINE][LINE];
            for (int64_t i = 0; i < count; i++) {
                const uint32_t *even = words + 2 * (begin + i) * width + first / PLACES;
                for (int64_t w = 0; w < rows / PLACES; w++) {
                    const uint32_t a = even[w], b = even[width + w];
                    const uint32_t low = (a & 0x0f0f0f0f) | (b & 0x0f0f0f0f) << 4;
                    const uint32_t high = (a >> 4 & 0x0f0f0f0f) | (b & 0xf0f0f0f0);
#pragma GCC unroll 8
                    for (int p = 0; p < PLACES; p++)
                        square[PLACES * w + output_at[p]][i] =
                            (uint8_t)((p % 2 ? high : low) >> 8 * (p / 2));
                }
            }
            for (int64_t row = 0; row < rows; row++)
                memcpy(out + (first + row) * bytes + begin, square[row], (size_t)count);
        }
}
