/* The arithmetic of delta.c for vectors of WIDTH numbers, with the instructions of TARGET.
 *
 * TOGETHER rows or STRIP columns are summed at once over PANELS panels, as many as registers hold.
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

/* out = after − before of PARTS numbers. */
INLINE void NAMED(part, WIDTH)(
    const char *before, const char *after, size_t j, float *out, Doubles *norm, Doubles *old, int from, int to)
{
    float W[PARTS];
    for (int n = 0; n < PARTS; n += WIDTH) {
        Vector base = NAMED(widened, WIDTH)(before, j + n, from);
        *(Vector *)(W + n) = base;
        *(Vector *)(out + n) = NAMED(widened, WIDTH)(after, j + n, to) - base;
    }
    NAMED(squares, WIDTH)(W, old);
    NAMED(squares, WIDTH)(out, norm);
}

INLINE void NAMED(differ, WIDTH)(Change *at, int from, int to)
{
    Doubles norm[PIECES] = {{0}}, old[PIECES] = {{0}};
    size_t whole = at->count / PARTS * PARTS, left = at->count - whole;
    for (size_t j = 0; j < whole; j += PARTS)
        NAMED(part, WIDTH)(at->before, at->after, j, at->out + j, norm, old, from, to);
    if (left) {
        size_t small = from == F32 ? 4 : 2, large = to == F32 ? 4 : 2;
        char before[4 * PARTS] = {0}, after[4 * PARTS] = {0};
        float out[PARTS];
        memcpy(before, at->before + whole * small, left * small);
        memcpy(after, at->after + whole * large, left * large);
        NAMED(part, WIDTH)(before, after, 0, out, norm, old, from, to);
        memcpy(at->out + whole, out, left * sizeof(float));
    }
    at->norm2 = NAMED(total, WIDTH)(norm);
    at->before2 = NAMED(total, WIDTH)(old);
}

TARGET static void NAMED(difference, WIDTH)(Change *at)
{
    switch (3 * at->before_dtype + at->after_dtype) {
    case 3 * BF16 + BF16: NAMED(differ, WIDTH)(at, BF16, BF16); break;
    case 3 * BF16 + F16: NAMED(differ, WIDTH)(at, BF16, F16); break;
    case 3 * BF16 + F32: NAMED(differ, WIDTH)(at, BF16, F32); break;
    case 3 * F16 + BF16: NAMED(differ, WIDTH)(at, F16, BF16); break;
    case 3 * F16 + F16: NAMED(differ, WIDTH)(at, F16, F16); break;
    case 3 * F16 + F32: NAMED(differ, WIDTH)(at, F16, F32); break;
    case 3 * F32 + BF16: NAMED(differ, WIDTH)(at, F32, BF16); break;
    case 3 * F32 + F16: NAMED(differ, WIDTH)(at, F32, F16); break;
    default: NAMED(differ, WIDTH)(at, F32, F32);
    }
}

/* Rows of D times `count` panels, over `length` ≤ RUN of their numbers: out = that, or out += that. */
INLINE void NAMED(run, WIDTH)(
    const int rows, const int count, const float *D, size_t stride, size_t length, const float *panel, size_t apart,
    float *out, size_t wide, int add)
{
    Vector sums[TOGETHER][PANELS * VECTORS];
    for (int i = 0; i < rows; i++)
        for (int n = 0; n < count * VECTORS; n++) sums[i][n] = (Vector){0};
    for (size_t j = 0; j < length; j++) {
        Vector x[PANELS * VECTORS];
        for (int n = 0; n < count * VECTORS; n++)
            x[n] = *(const Vector *)(panel + n / VECTORS * apart + j * LANES + n % VECTORS * WIDTH);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
            for (int n = 0; n < count * VECTORS; n++) sums[i][n] += D[i * stride + j] * x[n];
    }
    for (int i = 0; i < rows; i++)
        for (int n = 0; n < count * VECTORS; n++) {
            Vector *to = (Vector *)(out + i * wide + n * WIDTH);
            if (add) sums[i][n] += *to;
            *to = sums[i][n];
        }
}

INLINE void NAMED(times_rows, WIDTH)(const Product *at, const int rows, size_t i, size_t first, size_t last)
{
    size_t wide = padded(at->k), apart = at->columns * LANES;
    for (size_t p = 0, count; p < wide; p += count * LANES) {
        count = wide - p >= PANELS * LANES ? PANELS : 1;
        for (size_t j = first; j < last; j += RUN) {
            size_t length = last - j < RUN ? last - j : RUN;
            const float *D = at->D + i * at->stride + j, *panel = at->panels + p * at->columns + j * LANES;
            float *out = (float *)at->out + i * wide + p;
            if (count == PANELS)
                NAMED(run, WIDTH)(rows, PANELS, D, at->stride, length, panel, apart, out, wide, j > 0);
            else
                NAMED(run, WIDTH)(rows, 1, D, at->stride, length, panel, apart, out, wide, j > 0);
        }
    }
}

/* out (rows, k) = D·X. */
TARGET static void NAMED(times, WIDTH)(const Product *at)
{
    pack(at, at->columns);
    for (size_t first = 0; first < at->columns; first += BLOCK) {
        size_t last = at->columns - first < BLOCK ? at->columns : first + BLOCK, i = 0;
        for (; i + TOGETHER <= at->rows; i += TOGETHER) NAMED(times_rows, WIDTH)(at, TOGETHER, i, first, last);
        for (; i < at->rows; i++) NAMED(times_rows, WIDTH)(at, 1, i, first, last);
    }
}

/* out (strip, count panels) += Dᵀ·X over `rows` rows; they begin anew unless `add`. */
INLINE void NAMED(strip, WIDTH)(
    const int strip, const int count, const float *D, size_t stride, size_t rows, const float *panel, size_t apart,
    float *out, size_t wide, int add, const float *next)
{
    Vector sums[STRIP][PANELS * VECTORS];
    for (int i = 0; i < strip; i++)
        for (int n = 0; n < count * VECTORS; n++)
            sums[i][n] = add ? *(const Vector *)(out + i * wide + n * WIDTH) : (Vector){0};
    for (size_t r = 0; r < rows; r++) {
        Vector x[PANELS * VECTORS];
        if (next) __builtin_prefetch(next + r * stride);
        for (int n = 0; n < count * VECTORS; n++)
            x[n] = *(const Vector *)(panel + n / VECTORS * apart + r * LANES + n % VECTORS * WIDTH);
#pragma GCC unroll 8
        for (int i = 0; i < strip; i++)
#pragma GCC unroll 4
            for (int n = 0; n < count * VECTORS; n++) sums[i][n] += D[r * stride + i] * x[n];
    }
    for (int i = 0; i < strip; i++)
        for (int n = 0; n < count * VECTORS; n++) *(Vector *)(out + i * wide + n * WIDTH) = sums[i][n];
}

/* Columns [first, last) of D over rows [from, to): their part of Dᵀ·X. */
INLINE void NAMED(across_rows, WIDTH)(
    const Product *at, float *out, size_t first, size_t last, size_t from, size_t to, int add, int more)
{
    size_t wide = padded(at->k), apart = at->rows * LANES;
    for (size_t p = 0, count; p < wide; p += count * LANES) {
        count = wide - p >= PANELS * LANES ? PANELS : 1;
        const float *panel = at->panels + p * at->rows + from * LANES;
        size_t c = first, width;
        for (; c < last; c += width) {
            width = last - c >= STRIP ? STRIP : 1;
            const float *D = at->D + from * at->stride + c, *next = more ? D + (to - from) * at->stride : NULL;
            float *sums = out + c * wide + p;
            if (width == STRIP && count == PANELS)
                NAMED(strip, WIDTH)(STRIP, PANELS, D, at->stride, to - from, panel, apart, sums, wide, add, next);
            else if (width == STRIP)
                NAMED(strip, WIDTH)(STRIP, 1, D, at->stride, to - from, panel, apart, sums, wide, add, next);
            else if (count == PANELS)
                NAMED(strip, WIDTH)(1, PANELS, D, at->stride, to - from, panel, apart, sums, wide, add, NULL);
            else
                NAMED(strip, WIDTH)(1, 1, D, at->stride, to - from, panel, apart, sums, wide, add, NULL);
        }
    }
}

/* out (columns, k) = Dᵀ·X. */
TARGET static void NAMED(across, WIDTH)(const Product *at)
{
    pack(at, at->rows);
    for (size_t first = 0; first < at->columns; first += BLOCK) {
        size_t last = at->columns - first < BLOCK ? at->columns : first + BLOCK;
        for (size_t from = 0; from < at->rows; from += TILE) {
            size_t to = at->rows - from < TILE ? at->rows : from + TILE;
            NAMED(across_rows, WIDTH)(at, at->out, first, last, from, to, from > 0, to + TILE <= at->rows);
        }
    }
}

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

/* out (columns, k) = Dᵀ·X, in float64. */
TARGET static void NAMED(gram, WIDTH)(const Product *at)
{
    size_t wide = padded(at->k), high = padded(at->columns);
    double *out = at->out, *D = at->memory, *X = D + FEW * high;
    memset(out, 0, at->columns * wide * sizeof(double));
    for (size_t from = 0; from < at->rows; from += FEW) {
        size_t rows = at->rows - from < FEW ? at->rows - from : FEW;
        for (size_t r = 0; r < rows; r++) {
            NAMED(doubled, WIDTH)(at->D + (from + r) * at->stride, D + r * high, at->columns, high);
            NAMED(doubled, WIDTH)(at->X + (from + r) * at->down, X + r * wide, at->k, wide);
        }
        for (size_t p = 0; p < wide; p += LANES) {
            size_t c = 0;
            for (; c + SQUARE <= at->columns; c += SQUARE)
                NAMED(strip64, WIDTH)(SQUARE, D + c, high, rows, X + p, wide, out + c * wide + p);
            for (; c < at->columns; c++) NAMED(strip64, WIDTH)(1, D + c, high, rows, X + p, wide, out + c * wide + p);
        }
    }
}

#undef VECTORS
#undef PIECES
#undef HalfVector
#undef Doubles
