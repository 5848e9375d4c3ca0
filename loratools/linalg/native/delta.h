/* Differences and Gram matrices of delta.c for vectors of WIDTH numbers, with the instructions of TARGET.
 *
 * SQUARE columns of a Gram matrix are summed at once, as many as registers hold.
 */
#include "floats.h"

#define HalfVector NAMED(HalfVector, WIDTH)
#define Doubles NAMED(Doubles, WIDTH)
#define VECTORS (LANES / WIDTH)
#define PIECES (2 * PARTS / WIDTH)

typedef float HalfVector __attribute__((vector_size(2 * WIDTH), aligned(4), may_alias));
typedef double Doubles __attribute__((vector_size(4 * WIDTH), aligned(8), may_alias));

/* sums += x² of PARTS numbers, in float64. */
INLINE void NAMED(squares, WIDTH)(const float *x, Doubles *sums)
{
    for (int n = 0; n < PIECES; n++) {
        Doubles wide = __builtin_convertvector(*(const HalfVector *)(x + n * WIDTH / 2), Doubles);
        sums[n] += wide * wide;
    }
}

INLINE double NAMED(total, WIDTH)(const Doubles *sums)
{
    double total = 0;
    for (int n = 0; n < PARTS; n++) total += sums[n / (WIDTH / 2)][n % (WIDTH / 2)];
    return total;
}

/* The sums of a pass: of W', W' − W, W, and what rounding W' − W leaves. */
typedef struct {
    Doubles norm[PIECES], old[PIECES], lost[PIECES];
} NAMED(Sums, WIDTH);

/* out = after − before of PARTS numbers, and low = that in BF16 where it is wanted. */
INLINE void NAMED(part, WIDTH)(
    const char *before, const char *after, size_t j, float *out, uint16_t *low, NAMED(Sums, WIDTH) * sums, int from,
    int to, int rounded)
{
    float W[PARTS], rest[PARTS];
    for (int n = 0; n < PARTS; n += WIDTH) {
        Vector base = NAMED(widened, WIDTH)(before, j + n, from);
        Vector change = NAMED(widened, WIDTH)(after, j + n, to) - base;
        *(Vector *)(W + n) = base;
        *(Vector *)(out + n) = change;
        if (!rounded) continue;
        NAMED(round_to, WIDTH)((char *)low, n, change, BF16);
        *(Vector *)(rest + n) = change - NAMED(widened, WIDTH)((char *)low, n, BF16);
    }
    NAMED(squares, WIDTH)(W, sums->old);
    NAMED(squares, WIDTH)(out, sums->norm);
    if (rounded) NAMED(squares, WIDTH)(rest, sums->lost);
}

INLINE void NAMED(differ, WIDTH)(Change *at, int from, int to, int rounded)
{
    NAMED(Sums, WIDTH) sums = {0};
    size_t whole = at->count / PARTS * PARTS, left = at->count - whole;
    uint16_t low[PARTS], *lows = rounded ? at->low : low;
    for (size_t j = 0; j < whole; j += PARTS)
        NAMED(part, WIDTH)(at->before, at->after, j, at->out + j, rounded ? lows + j : low, &sums, from, to, rounded);
    if (left) {
        size_t small = from == F32 ? 4 : 2, large = to == F32 ? 4 : 2;
        char before[4 * PARTS] = {0}, after[4 * PARTS] = {0};
        float out[PARTS];
        memcpy(before, at->before + whole * small, left * small);
        memcpy(after, at->after + whole * large, left * large);
        NAMED(part, WIDTH)(before, after, 0, out, low, &sums, from, to, rounded);
        memcpy(at->out + whole, out, left * sizeof(float));
        if (rounded) memcpy(lows + whole, low, left * sizeof(uint16_t));
    }
    at->norm2 = NAMED(total, WIDTH)(sums.norm);
    at->before2 = NAMED(total, WIDTH)(sums.old);
    at->lost2 = NAMED(total, WIDTH)(sums.lost);
}

#define PAIR(from, to)                                                                                                 \
    case 3 * from + to:                                                                                                \
        at->low ? NAMED(differ, WIDTH)(at, from, to, 1) : NAMED(differ, WIDTH)(at, from, to, 0);                       \
        break

TARGET static void NAMED(difference, WIDTH)(Change *at)
{
    switch (3 * at->before_dtype + at->after_dtype) {
        PAIR(BF16, BF16);
        PAIR(BF16, F16);
        PAIR(BF16, F32);
        PAIR(F16, BF16);
        PAIR(F16, F16);
        PAIR(F16, F32);
        PAIR(F32, BF16);
        PAIR(F32, F16);
        PAIR(F32, F32);
    }
}
#undef PAIR

/* `count` numbers of a row in float64, zeros up to `room`. */
INLINE void NAMED(doubled, WIDTH)(const float *from, double *to, size_t count, size_t room)
{
    for (size_t n = 0; n < count; n++) to[n] = from[n];
    for (size_t n = count; n < room; n++) to[n] = 0;
}

/* out (strip, LANES) += Dᵀ·X over `rows` rows, in float64. */
INLINE void NAMED(strip64, WIDTH)(
    const int strip, const double *D, size_t stride, size_t rows, const double *X, size_t wide, double *out)
{
    enum { SUMS = 2 * VECTORS };
    Doubles sums[SQUARE][SUMS];
    for (int i = 0; i < strip; i++)
        for (int n = 0; n < SUMS; n++) sums[i][n] = *(const Doubles *)(out + i * wide + n * WIDTH / 2);
    for (size_t r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < strip; i++)
#pragma GCC unroll 8
            for (int n = 0; n < SUMS; n++)
                sums[i][n] += D[r * stride + i] * *(const Doubles *)(X + r * wide + n * WIDTH / 2);
    for (int i = 0; i < strip; i++)
        for (int n = 0; n < SUMS; n++) *(Doubles *)(out + i * wide + n * WIDTH / 2) = sums[i][n];
}

/* out (columns, k) = Dᵀ·X, in float64; of DᵀD the half below the diagonal blocks is computed, and copied. */
TARGET static void NAMED(gram, WIDTH)(const Product *at)
{
    size_t wide = padded(at->k), high = padded(at->columns);
    int same = at->X == at->D && at->k == at->columns && at->down == at->stride;
    double *out = at->out, *D = at->memory, *X = same ? D : D + FEW * high;
    memset(out, 0, at->columns * wide * sizeof(double));
    for (size_t from = 0; from < at->rows; from += FEW) {
        size_t rows = at->rows - from < FEW ? at->rows - from : FEW;
        for (size_t r = 0; r < rows; r++) {
            NAMED(doubled, WIDTH)((const float *)at->D + (from + r) * at->stride, D + r * high, at->columns, high);
            if (!same) NAMED(doubled, WIDTH)(at->X + (from + r) * at->down, X + r * wide, at->k, wide);
        }
        for (size_t p = 0; p < wide; p += LANES) {
            size_t c = same ? p : 0;
            for (; c + SQUARE <= at->columns; c += SQUARE)
                NAMED(strip64, WIDTH)(SQUARE, D + c, high, rows, X + p, wide, out + c * wide + p);
            for (; c < at->columns; c++) NAMED(strip64, WIDTH)(1, D + c, high, rows, X + p, wide, out + c * wide + p);
        }
    }
    for (size_t c = 0; same && c < at->columns; c++)
        for (size_t n = c / LANES * LANES + LANES; n < at->columns; n++) out[c * wide + n] = out[n * wide + c];
}

/* D of F32: a cell is a number. */
#define TYPE f32
#define DEEP 1
#define Cell float
INLINE float NAMED(NAMED(cell, f32), WIDTH)(float x, float next) { return (void)next, x; }
INLINE Vector NAMED(NAMED(add, f32), WIDTH)(Vector sum, float d, Vector x)
{
    return sum + d * x;
}
INLINE void NAMED(NAMED(gather, f32), WIDTH)(float *to, const char *row, const char *next, size_t count)
{
    (void)next;
    memcpy(to, row, count * sizeof(float));
}
#include "skinny.h"
#undef TYPE
#undef DEEP
#undef Cell
#undef VECTORS
#undef PIECES
#undef HalfVector
#undef Doubles
