/* The arithmetic of rows.c for vectors of WIDTH numbers, with the instructions of TARGET: TOGETHER rows and AT_ONCE
 * vectors of each at a time.
 *
 * `dtype`, that of W, and `result`, that of out, are constants wherever these functions are inlined: what stands once
 * here becomes a loop for each of them.
 */
#include "product.h"

#define HalfVector NAMED(HalfVector, WIDTH)
#define Doubles NAMED(Doubles, WIDTH)
#define Integers NAMED(Integers, WIDTH)
#define Pairs NAMED(Pairs, WIDTH)

typedef float HalfVector __attribute__((vector_size(2 * WIDTH), aligned(4), may_alias));
typedef double Doubles __attribute__((vector_size(4 * WIDTH), aligned(8), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int16_t Pairs __attribute__((vector_size(4 * WIDTH), aligned(2), may_alias)); /* 16-bit numbers of two Vectors */

/* Add W to the sums of a row; return the sum of their squares. */
INLINE double NAMED(squares, WIDTH)(const char *W, float *sums, size_t padded, int dtype)
{
    enum { VECTORS = PARTS / WIDTH, PIECES = 2 * VECTORS };
    Doubles parts[PIECES] = {{0}};
    for (size_t j = 0; j < padded; j += PARTS) {
        for (int n = 0; n < VECTORS; n++)
            *(Vector *)(sums + j + n * WIDTH) += NAMED(widened, WIDTH)(W, j + n * WIDTH, dtype);
        for (int n = 0; n < PIECES; n++) {
            Doubles x = __builtin_convertvector(*(const HalfVector *)(sums + j + n * WIDTH / 2), Doubles);
            parts[n] += x * x;
        }
    }
    double total = 0;
    for (int n = 0; n < PARTS; n++) total += parts[n / (WIDTH / 2)][n % (WIDTH / 2)];
    return total;
}

/* Compute 16-bit results of columns [first, last) of a row again in float64, where they are below the limit. */
INLINE void NAMED(refine, WIDTH)(
    const Rows *at, size_t i, const char *W, char *out, size_t first, size_t last, double gain, uint32_t limit,
    int dtype, int result)
{
    for (size_t j = first; j < last; j++) {
        uint16_t *number = (uint16_t *)out + j;
        if ((*number & 0x7fff) >= limit) continue;
        const float *right = at->right + j / LANES * LANES * at->rank + j % LANES;
        double change = 0, base = NAMED(widened, WIDTH)(W, j / WIDTH * WIDTH, dtype)[j % WIDTH];
        for (size_t k = 0; k < at->rank; k++)
            change += at->factor[i * at->rank + k] * at->scale[k] * right[k * LANES];
        *number = NAMED(half_of, WIDTH)((float)(gain * (base + change)), result);
    }
}

/* Tell the largest and the least of 16-bit magnitudes. */
INLINE void NAMED(extremes, WIDTH)(const char *out, size_t first, size_t last, uint16_t *largest, uint16_t *least)
{
    uint16_t high = 0, low = 0x7fff;
    for (size_t j = first; j < last; j++) {
        uint16_t magnitude = ((const uint16_t *)out)[j] & 0x7fff;
        high = magnitude > high ? magnitude : high;
        low = magnitude < low ? magnitude : low;
    }
    *largest = high;
    *least = low;
}

/* The bits of numbers in 16 bit, those of x before those of y, rounded to nearest even. */
INLINE Pairs NAMED(rounded, WIDTH)(Vector x, Vector y, int dtype)
{
#if WIDTH == 8
    if (dtype == BF16) {
        Bits low = NAMED(upper, WIDTH)((Bits)x), high = NAMED(upper, WIDTH)((Bits)y);
        return (Pairs)_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)low, (__m256i)high), 0xd8);
    }
#endif
    struct { Halves x, y; } halves;
    NAMED(round_to, WIDTH)((char *)&halves.x, 0, x, dtype);
    NAMED(round_to, WIDTH)((char *)&halves.y, 0, y, dtype);
#if WIDTH == 16
    return (Pairs)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)halves.x), (__m256i)halves.y, 1);
#elif WIDTH == 8
    return (Pairs)_mm256_set_m128i((__m128i)halves.y, (__m128i)halves.x);
#else
    Pairs both;
    memcpy(&both, &halves, sizeof both);
    return both;
#endif
}

/* The larger of each two numbers, and the lesser. */
INLINE Pairs NAMED(larger, WIDTH)(Pairs x, Pairs y)
{
#if WIDTH == 16
    return (Pairs)_mm512_max_epi16((__m512i)x, (__m512i)y);
#elif WIDTH == 8
    return (Pairs)_mm256_max_epi16((__m256i)x, (__m256i)y);
#else
    Pairs over = x > y;
    return (x & over) | (y & ~over);
#endif
}

INLINE Pairs NAMED(lesser, WIDTH)(Pairs x, Pairs y)
{
#if WIDTH == 16
    return (Pairs)_mm512_min_epi16((__m512i)x, (__m512i)y);
#elif WIDTH == 8
    return (Pairs)_mm256_min_epi16((__m256i)x, (__m256i)y);
#else
    Pairs over = x > y;
    return (y & over) | (x & ~over);
#endif
}

/* Tell whether one of the numbers is at most so large. */
INLINE int NAMED(any_within, WIDTH)(Pairs numbers, int16_t limit)
{
    Pairs limits = {0};
    limits += limit;
#if WIDTH == 16
    return _mm512_cmple_epi16_mask((__m512i)numbers, (__m512i)limits) != 0;
#elif WIDTH == 8
    return _mm256_movemask_epi8((__m256i)(numbers > limits)) != -1;
#else
    int any = 0;
    for (int n = 0; n < 2 * WIDTH; n++) any |= numbers[n] <= limits[n];
    return any;
#endif
}

/* Count the numbers of which rounding made an infinity, and those that were not zero and became it. */
INLINE void NAMED(lost, WIDTH)(Rows *at, const float *numbers, const uint16_t *out, size_t count, uint16_t infinity)
{
    uint32_t overflowed = 0, flushed = 0;
    for (size_t j = 0; j < count; j++) {
        uint32_t bits;
        memcpy(&bits, numbers + j, 4);
        bits &= 0x7fffffff;
        uint16_t magnitude = out[j] & 0x7fff;
        overflowed += magnitude == infinity && bits < 0x7f800000;
        flushed += !magnitude && bits;
    }
    at->overflowed += overflowed;
    at->flushed += flushed;
}

INLINE void NAMED(measure, WIDTH)(
    Rows *at, const char *W, const char *out, const float *sums, size_t padded, int dtype, int result)
{
    double retained[PARTS] = {0}, total[PARTS] = {0};
    size_t changed = 0;
    for (size_t j = 0; j < padded; j += WIDTH) {
        Vector base = NAMED(widened, WIDTH)(W, j, dtype), after = NAMED(widened, WIDTH)(out, j, result);
        for (int n = 0; n < WIDTH; n++) {
            double delta = (double)sums[j + n] - base[n], kept = (double)after[n] - base[n];
            retained[(j + n) % PARTS] += kept * delta;
            total[(j + n) % PARTS] += delta * delta;
            changed += base[n] != after[n];
        }
    }
    for (int n = 0; n < PARTS; n++) {
        at->retained += retained[n];
        at->total += total[n];
    }
    at->changed += (double)changed;
}

/* WIDTH numbers of a row: g(W + sum); `rescaled` sums have W in them. They are put into the sums where they are `kept`. */
INLINE Vector NAMED(changed, WIDTH)(
    const char *W, float *sums, size_t j, float by, int rescaled, int kept, int narrows, int dtype)
{
    Vector x = *(const Vector *)(sums + j);
    x = rescaled ? x * by : NAMED(widened, WIDTH)(W, j, dtype) + x;
    if (kept) *(Vector *)(sums + j) = x;
    return narrows ? NAMED(plain_nan, WIDTH)(x) : x;
}

/* Make a row of results from W and the sums, which have zeros beyond the columns, up to a whole panel. */
INLINE void NAMED(finish, WIDTH)(
    Rows *at, size_t i, const char *W, char *out, float *sums, size_t padded, int dtype, int result)
{
    int rescaled = at->magnitude != NULL, measured = i < at->measured, narrows = dtype != result;
    double gain = 1;
    if (rescaled) {
        double squares = NAMED(squares, WIDTH)(W, sums, padded, dtype);
        if (squares == 0 && at->zero_row < 0) at->zero_row = (int64_t)i;
        at->gains[i] = gain = at->magnitude[i] / sqrt(squares);
    }
    float by = (float)gain;
#define NUMBER(j) NAMED(changed, WIDTH)(W, sums, j, by, rescaled, measured || narrows, narrows, dtype)
    if (result == F32) {
        Integers most = {0};
        for (size_t j = 0; j < padded; j += WIDTH) {
            Vector x = NUMBER(j);
            *(Vector *)(out + 4 * j) = x;
            Integers magnitude = (Integers)x & 0x7fffffff, over = magnitude > most;
            most = (magnitude & over) | (most & ~over);
        }
        for (int n = 0; n < WIDTH; n++)
            at->largest = (uint32_t)most[n] > at->largest ? (uint32_t)most[n] : at->largest;
    } else {
        uint32_t limit = NAMED(half_of, WIDTH)((float)(at->bound * fabs(gain)), result) + 1;
        int16_t within = limit < 0x8000 ? (int16_t)(limit - 1) : 0x7fff;
        Pairs most = {0};
        for (size_t first = 0; first < at->columns; first += CHUNK) {
            size_t last = first + CHUNK < at->columns ? first + CHUNK : at->columns;
            size_t end = first + CHUNK < padded ? first + CHUNK : padded;
            Pairs high = {0}, low = {0};
            low += 0x7fff;
            for (size_t j = first; j < end; j += 2 * WIDTH) {
                Vector x = NUMBER(j), y = NUMBER(j + WIDTH);
                Pairs numbers = NAMED(rounded, WIDTH)(x, y, result);
                *(Pairs *)(out + 2 * j) = numbers;
                numbers &= 0x7fff;
                high = NAMED(larger, WIDTH)(high, numbers);
                low = NAMED(lesser, WIDTH)(low, numbers);
            }
            if (last - first == CHUNK && !narrows && !NAMED(any_within, WIDTH)(low, within)) {
                most = NAMED(larger, WIDTH)(most, high);
                continue;
            }
            uint16_t largest, least;
            NAMED(extremes, WIDTH)(out, first, last, &largest, &least);
            if (least < limit) {
                NAMED(refine, WIDTH)(at, i, W, out, first, last, gain, limit, dtype, result);
                NAMED(extremes, WIDTH)(out, first, last, &largest, &least);
            }
            at->largest = largest > at->largest ? largest : at->largest;
            if (narrows && (largest >= INFINITE(result) || !least))
                NAMED(lost, WIDTH)(at, sums + first, (const uint16_t *)out + first, last - first, INFINITE(result));
        }
        for (int n = 0; n < 2 * WIDTH; n++)
            at->largest = (uint32_t)most[n] > at->largest ? (uint32_t)most[n] : at->largest;
    }
#undef NUMBER
    if (measured) NAMED(measure, WIDTH)(at, W, out, sums, padded, dtype, result);
}

/* Finish a row where it lies, or in memory beside the sums where its columns are apart or fill no whole panel. */
INLINE void NAMED(place, WIDTH)(Rows *at, size_t i, float *sums, size_t padded, int dtype, int result)
{
    size_t size = dtype == F32 ? 4 : 2, wide = result == F32 ? 4 : 2, columns = at->columns, step = at->step;
    const char *W = at->W + i * at->stride * size;
    char *out = at->out + i * at->stride * wide;
    if (step == 1 && columns == padded) {
        NAMED(finish, WIDTH)(at, i, W, out, sums, padded, dtype, result);
        return;
    }
    char *base = (char *)(at->sums + MOST_ROWS * padded), *made = (char *)(at->sums + (MOST_ROWS + 1) * padded);
    memset(base + columns * size, 0, (padded - columns) * size);
    if (step == 1) memcpy(base, W, columns * size);
    else for (size_t j = 0; j < columns; j++) memcpy(base + j * size, W + j * step * size, size);
    NAMED(finish, WIDTH)(at, i, base, made, sums, padded, dtype, result);
    if (step == 1) memcpy(out, made, columns * wide);
    else for (size_t j = 0; j < columns; j++) memcpy(out + j * step * wide, made + j * wide, wide);
}

INLINE void NAMED(rows, WIDTH)(Rows *at, int dtype, int result)
{
    size_t panels = (at->columns + LANES - 1) / LANES, padded = panels * LANES, i = 0;
    at->zero_row = -1;
    for (; i + TOGETHER <= at->rows; i += TOGETHER) {
        NAMED(product, WIDTH)(at->left + i * at->rank, at->right, at->rank, panels, at->sums, TOGETHER);
        for (size_t n = 0; n < TOGETHER; n++)
            NAMED(place, WIDTH)(at, i + n, at->sums + n * padded, padded, dtype, result);
    }
    for (; i < at->rows; i++) {
        NAMED(product, WIDTH)(at->left + i * at->rank, at->right, at->rank, panels, at->sums, 1);
        NAMED(place, WIDTH)(at, i, at->sums, padded, dtype, result);
    }
}

static TARGET void NAMED(add_products, WIDTH)(Rows *at)
{
    switch (at->dtype * 3 + at->result) {
    case BF16 * 3 + BF16: NAMED(rows, WIDTH)(at, BF16, BF16); break;
    case F16 * 3 + F16: NAMED(rows, WIDTH)(at, F16, F16); break;
    case F32 * 3 + BF16: NAMED(rows, WIDTH)(at, F32, BF16); break;
    case F32 * 3 + F16: NAMED(rows, WIDTH)(at, F32, F16); break;
    default: NAMED(rows, WIDTH)(at, F32, F32);
    }
}

/* out = W in 16 bit, W being F32; a constant dtype of the result. */
INLINE void NAMED(narrow, WIDTH)(Rows *at, int result)
{
    float numbers[CHUNK] = {0};
    uint16_t rounded[CHUNK];
    for (size_t i = 0; i < at->rows; i++) {
        const float *W = (const float *)at->W + i * at->stride;
        uint16_t *out = (uint16_t *)at->out + i * at->stride, largest, least;
        for (size_t first = 0; first < at->columns; first += CHUNK) {
            size_t left = at->columns - first, count = left < CHUNK ? left : CHUNK;
            if (at->step == 1) memcpy(numbers, W + first, count * 4);
            else for (size_t j = 0; j < count; j++) numbers[j] = W[(first + j) * at->step];
            for (size_t j = 0; j < CHUNK; j += WIDTH)
                NAMED(round_to, WIDTH)((char *)rounded, j, NAMED(plain_nan, WIDTH)(*(const Vector *)(numbers + j)), result);
            NAMED(extremes, WIDTH)((const char *)rounded, 0, count, &largest, &least);
            at->largest = largest > at->largest ? largest : at->largest;
            if (largest >= INFINITE(result) || !least)
                NAMED(lost, WIDTH)(at, numbers, rounded, count, INFINITE(result));
            if (at->step == 1) memcpy(out + first, rounded, count * 2);
            else for (size_t j = 0; j < count; j++) out[(first + j) * at->step] = rounded[j];
        }
    }
}

static TARGET void NAMED(round_rows, WIDTH)(Rows *at)
{
    if (at->result == BF16) NAMED(narrow, WIDTH)(at, BF16);
    else NAMED(narrow, WIDTH)(at, F16);
}

/* Return 16-bit numbers as float32; a constant dtype. */
INLINE void NAMED(widen_all, WIDTH)(const char *raw, size_t count, int dtype, float *to)
{
    size_t whole = count - count % WIDTH;
    for (size_t j = 0; j < whole; j += WIDTH) *(Vector *)(to + j) = NAMED(widened, WIDTH)(raw, j, dtype);
    if (whole == count) return;
    uint16_t block[WIDTH] = {0};
    memcpy(block, raw + 2 * whole, 2 * (count - whole));
    Vector last = NAMED(widened, WIDTH)((const char *)block, 0, dtype);
    for (size_t j = whole; j < count; j++) to[j] = last[j - whole];
}

static TARGET __attribute__((unused)) void NAMED(widen, WIDTH)(const char *raw, size_t count, size_t dtype, float *to)
{
    if (dtype == BF16) NAMED(widen_all, WIDTH)(raw, count, BF16, to);
    else NAMED(widen_all, WIDTH)(raw, count, F16, to);
}
