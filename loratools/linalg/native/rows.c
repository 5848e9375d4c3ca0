/* One pass over rows of a bfloat16 matrix: out = g∘(W + left·right), rounded once, to nearest even.
 *
 * It does what `engine/arithmetic/numpy.py` does in ten passes of NumPy, on rows that stay in the core's cache: products are
 * summed by fused multiply-adds in the order of the rank, W is added to the sum, the rows are rescaled where there is a
 * magnitude (DoRA: g = m / ‖W + left·right‖, its squares summed in float64), and results so near zero that float32's
 * error shows in them are computed again in float64. C for its speed alone: a merge that has this waits for the disk.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Compilers handle vectors badly that are wider than the processor's, so x86 code is made for the processors of the last
 * ten years, and others are told to use NumPy. */
#if defined(__x86_64__) && defined(__linux__) && !defined(ONE_CPU)
#define FOR_EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define SERVED (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
enum { WIDTH = 8 };
#else
#define FOR_EVERY_CPU
#define SERVED 1
enum { WIDTH = 4 };
#endif
#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16, VECTORS = LANES / WIDTH, TOGETHER = 4 }; /* columns of a panel, its vectors; rows of a block */
typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4)));

/* The same fields, in the same order, as `_Rows` in __init__.py. */
typedef struct {
    const uint16_t *W; /* (rows, columns), `stride` elements from row to row, as `out` */
    uint16_t *out;
    size_t stride, rows, columns, rank;
    const float *left;   /* (rows, rank): factor·diag(scale), rounded */
    const float *right;  /* (rank, columns) in panels of LANES columns, the last filled up with zeros */
    const float *factor; /* (rows, rank) */
    const double *scale; /* (rank) */
    const double *magnitude; /* (rows), or NULL */
    double *gains;           /* (rows): g, filled in where there is a magnitude */
    double bound;            /* magnitudes of W + left·right below it are computed again */
    float *sums;             /* memory for (TOGETHER, columns rounded up to LANES) */
    size_t measured;         /* the first so many rows are compared with W */
    /* found: */
    double retained, total, changed; /* ⟨out − W, Δ⟩, ⟨Δ, Δ⟩ and the count of out ≠ W over the measured rows */
    int64_t zero_row;                /* a row that has no direction, −1 if all have one */
    uint32_t largest;                /* the bits of the largest magnitude of out */
} Rows;

/* Whoever calls checks that it means the same fields; 0 says that NumPy is faster on this processor. */
size_t loratools_rows_size(void) { return SERVED ? sizeof(Rows) : 0; }

INLINE float number(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
INLINE float widened(uint16_t stored) { return number((uint32_t)stored << 16); }

INLINE uint16_t rounded(float x)
{
    uint32_t bits = bits_of(x);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* sums = left·right for `count` rows, a constant where this is inlined. */
INLINE void multiply(const float *left, const float *right, size_t rank, size_t panels, float *sums, int count)
{
    for (size_t p = 0; p < panels; p++, right += rank * LANES) {
        Vector sum[TOGETHER][VECTORS] = {{{0}}}; /* these stay in registers */
        for (size_t k = 0; k < rank; k++)
            for (int n = 0; n < VECTORS; n++) {
                Vector of_right = *(const Vector *)(right + k * LANES + n * WIDTH);
                for (int i = 0; i < count; i++) sum[i][n] += left[i * rank + k] * of_right;
            }
        for (int i = 0; i < count; i++)
            for (int n = 0; n < VECTORS; n++) *(Vector *)(sums + (i * panels + p) * LANES + n * WIDTH) = sum[i][n];
    }
}

INLINE double sum_of_squares(const uint16_t *W, const float *sums, size_t columns)
{
    double parts[LANES] = {0}, total = 0;
    size_t j = 0;
    for (; j + LANES <= columns; j += LANES)
        for (int n = 0; n < LANES; n++) {
            double x = widened(W[j + n]) + sums[j + n];
            parts[n] += x * x;
        }
    for (int n = 0; n < LANES; n++) total += parts[n];
    for (; j < columns; j++) {
        double x = widened(W[j]) + sums[j];
        total += x * x;
    }
    return total;
}

/* Compute the results of a row below the limit again, in float64; there are few. */
static void refine(const Rows *at, size_t i, double gain, uint16_t limit)
{
    const uint16_t *W = at->W + i * at->stride;
    uint16_t *out = at->out + i * at->stride;
    for (size_t j = 0; j < at->columns; j++) {
        if ((out[j] & 0x7fff) >= limit) continue;
        const float *right = at->right + j / LANES * LANES * at->rank + j % LANES;
        double change = 0;
        for (size_t k = 0; k < at->rank; k++)
            change += at->factor[i * at->rank + k] * at->scale[k] * right[k * LANES];
        out[j] = rounded((float)(gain * (widened(W[j]) + change)));
    }
}

INLINE void measure(Rows *at, size_t i, const float *sums, float gain)
{
    const uint16_t *W = at->W + i * at->stride, *out = at->out + i * at->stride;
    double retained[LANES] = {0}, total[LANES] = {0};
    size_t unchanged = 0;
    for (size_t j = 0; j < at->columns; j++) {
        double base = widened(W[j]), delta = (widened(W[j]) + sums[j]) * gain - base, kept = widened(out[j]) - base;
        retained[j % LANES] += kept * delta;
        total[j % LANES] += delta * delta;
        unchanged += widened(W[j]) == widened(out[j]);
    }
    for (int n = 0; n < LANES; n++) {
        at->retained += retained[n];
        at->total += total[n];
    }
    at->changed += (double)(at->columns - unchanged);
}

INLINE void finish(Rows *at, size_t i, const float *sums)
{
    const uint16_t *W = at->W + i * at->stride;
    uint16_t *out = at->out + i * at->stride, least = 0x7fff, largest = 0;
    double gain = 1;
    if (at->magnitude) {
        double squares = sum_of_squares(W, sums, at->columns);
        if (squares == 0 && at->zero_row < 0) at->zero_row = (int64_t)i;
        at->gains[i] = gain = at->magnitude[i] / sqrt(squares);
    }
    float by = (float)gain;
    for (size_t j = 0; j < at->columns; j++) {
        uint16_t found = rounded((widened(W[j]) + sums[j]) * by), magnitude = found & 0x7fff;
        least = magnitude < least ? magnitude : least;
        largest = magnitude > largest ? magnitude : largest;
        out[j] = found;
    }
    at->largest = largest > at->largest ? largest : at->largest;
    uint16_t limit = (uint16_t)((bits_of((float)(at->bound * fabs(gain))) >> 16) + 1);
    if (least < limit) refine(at, i, gain, limit);
    if (i < at->measured) measure(at, i, sums, by);
}

FOR_EVERY_CPU
void loratools_add_products(Rows *at)
{
    size_t panels = (at->columns + LANES - 1) / LANES, i = 0;
    at->zero_row = -1;
    for (; i + TOGETHER <= at->rows; i += TOGETHER) {
        multiply(at->left + i * at->rank, at->right, at->rank, panels, at->sums, TOGETHER);
        for (size_t n = 0; n < TOGETHER; n++) finish(at, i + n, at->sums + n * panels * LANES);
    }
    for (; i < at->rows; i++) {
        multiply(at->left + i * at->rank, at->right, at->rank, panels, at->sums, 1);
        finish(at, i, at->sums);
    }
}
