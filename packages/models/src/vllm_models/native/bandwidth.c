/* How fast this machine reads and copies memory, with the threads that the kernels use. */
#include "linear.h"

#define PIECE (1 << 18) /* bytes of one turn */

/* Read all of it; the result only keeps the compiler from leaving the reads out. */
float read_memory(const uint8_t *data, int64_t bytes) {
    float total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total)
    for (int64_t start = 0; start < bytes - bytes % PIECE; start += PIECE) {
        vfloat sums[8];
        for (int v = 0; v < 8; v++) sums[v] = vf_zero();
        for (const uint8_t *p = data + start; p < data + start + PIECE; p += 512) {
#pragma GCC unroll 8
            for (int v = 0; v < 8; v++) {
                __builtin_prefetch(p + 4096 + v * 64);
                sums[v] = vf_add(sums[v], vf_load((const float *)(p + v * 64)));
            }
        }
        float parts[WIDTH];
        for (int v = 1; v < 8; v++) sums[0] = vf_add(sums[0], sums[v]);
        vf_store(parts, sums[0]);
        total += parts[0];
    }
    return total;
}

void copy_memory(const uint8_t *from, uint8_t *to, int64_t bytes) {
#pragma omp parallel for schedule(static)
    for (int64_t start = 0; start < bytes; start += PIECE)
        memcpy(to + start, from + start, (size_t)smaller(PIECE, bytes - start));
}
