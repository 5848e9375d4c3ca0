/* The predictions of residual.c for vectors of WIDTH numbers, with the instructions of TARGET, TOGETHER rows at a time.
 *
 * `dtype` and `source`, those of the base and of the merged numbers, are constants wherever these functions are inlined.
 */
#include "product.h"

#define Doubles NAMED(Doubles, WIDTH)
#define HalfVector NAMED(HalfVector, WIDTH)
#define Integers NAMED(Integers, WIDTH)

typedef double Doubles __attribute__((vector_size(4 * WIDTH), aligned(8), may_alias));
typedef float HalfVector __attribute__((vector_size(2 * WIDTH), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

/* A bit for each number that has one of some bits. */
INLINE uint32_t NAMED(having, WIDTH)(Bits numbers, Bits some)
{
#if WIDTH == 16
    return _mm512_test_epi32_mask((__m512i)numbers, (__m512i)some);
#elif WIDTH == 8
    return (uint32_t)_mm256_movemask_ps((__m256)((numbers & some) != 0));
#else
    uint32_t mask = 0;
    for (int n = 0; n < WIDTH; n++) mask |= (uint32_t)((numbers[n] & some[n]) != 0) << n;
    return mask;
#endif
}

/* Whether any bit is set. */
INLINE int NAMED(any, WIDTH)(Bits numbers)
{
#if WIDTH == 16
    return _mm512_test_epi32_mask((__m512i)numbers, (__m512i)numbers) != 0;
#elif WIDTH == 8
    return !_mm256_testz_si256((__m256i)numbers, (__m256i)numbers);
#else
    uint32_t all = 0;
    for (int n = 0; n < WIDTH; n++) all |= numbers[n];
    return all != 0;
#endif
}

/* A bit for each number of x that is greater. */
INLINE uint32_t NAMED(greater, WIDTH)(Vector x, Vector y)
{
#if WIDTH == 16
    return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_GT_OQ);
#elif WIDTH == 8
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)y, _CMP_GT_OQ));
#else
    Bits all = (Bits)(x > y);
    return NAMED(having, WIDTH)(all, all);
#endif
}

/* The larger of each two numbers. */
INLINE Bits NAMED(larger, WIDTH)(Bits x, Bits y)
{
#if WIDTH == 16
    return (Bits)_mm512_max_epu32((__m512i)x, (__m512i)y);
#elif WIDTH == 8
    return (Bits)_mm256_max_epu32((__m256i)x, (__m256i)y);
#else
    Bits over = (Bits)(x > y);
    return (x & over) | (y & ~over);
#endif
}

/* Store the upper halves of 2 * WIDTH numbers from element j on. */
INLINE void NAMED(cut, WIDTH)(char *row, size_t j, Bits x, Bits y)
{
#if WIDTH == 16
    *(Halves *)(row + 2 * j) = (Halves)_mm512_cvtepi32_epi16((__m512i)(x >> 16));
    *(Halves *)(row + 2 * (j + WIDTH)) = (Halves)_mm512_cvtepi32_epi16((__m512i)(y >> 16));
#elif WIDTH == 8 /* what the compiler makes of a conversion takes several instructions more */
    __m256i both = _mm256_packus_epi32((__m256i)(x >> 16), (__m256i)(y >> 16));
    _mm256_storeu_si256((__m256i *)(row + 2 * j), _mm256_permute4x64_epi64(both, 0xd8));
#else
    *(Halves *)(row + 2 * j) = __builtin_convertvector(x >> 16, Halves);
    *(Halves *)(row + 2 * (j + WIDTH)) = __builtin_convertvector(y >> 16, Halves);
#endif
}

/* A bit for each of LANES numbers of x that is greater. */
INLINE uint32_t NAMED(all_greater, WIDTH)(const Vector *x, const Vector *y)
{
#if WIDTH == 8
    __m256i over[4];
    for (int n = 0; n < 4; n++) over[n] = (__m256i)_mm256_cmp_ps((__m256)x[n], (__m256)y[n], _CMP_GT_OQ);
    __m256i low = _mm256_packs_epi32(over[0], over[1]), high = _mm256_packs_epi32(over[2], over[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); /* packing leaves fours of them apart */
    return (uint32_t)_mm256_movemask_epi8(_mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
#else
    uint32_t mask = 0;
    for (int n = 0; n < LANES / WIDTH; n++) mask |= NAMED(greater, WIDTH)(x[n], y[n]) << n * WIDTH;
    return mask;
#endif
}

INLINE void NAMED(widen_as, WIDTH)(const char *stored, size_t count, float *out, int dtype)
{
    size_t j = 0, size = dtype == F32 ? 4 : 2;
    for (; j + WIDTH <= count; j += WIDTH) *(Vector *)(out + j) = NAMED(widened, WIDTH)(stored, j, dtype);
    if (j < count) {
        char last[4 * WIDTH] = {0};
        memcpy(last, stored + j * size, (count - j) * size);
        Vector numbers = NAMED(widened, WIDTH)(last, 0, dtype);
        memcpy(out + j, &numbers, (count - j) * 4);
    }
}

static TARGET void NAMED(widen, WIDTH)(const char *stored, size_t count, size_t dtype, float *out)
{
    switch (dtype) {
    case BF16: NAMED(widen_as, WIDTH)(stored, count, out, BF16); break;
    case F16: NAMED(widen_as, WIDTH)(stored, count, out, F16); break;
    default: memcpy(out, stored, 4 * count);
    }
}

/* Turn `count` rows, a constant where this is inlined, into what they were before a step; row i of the step's is first. */
INLINE void NAMED(before, WIDTH)(const Step *step, size_t i, float *P, size_t stride, int count)
{
    enum { VECTORS = 2 * HALF_PANEL / WIDTH, HALF = WIDTH / 2 };
    const double *left = step->left + i * step->rank;
    size_t columns = step->to - step->from;
    for (size_t first = 0; first < columns; first += HALF_PANEL) {
        const double *right = step->right + first / LANES * LANES * step->rank + first % LANES;
        Doubles sum[BACK][VECTORS] = {{{0}}}; /* these stay in registers */
        for (size_t k = 0; k < step->rank; k++)
            for (int row = 0; row < count; row++)
                for (int n = 0; n < VECTORS; n++)
                    sum[row][n] += left[row * step->rank + k] * *(const Doubles *)(right + k * LANES + n * HALF);
        size_t rest = columns - first;
        for (int row = 0; row < count; row++) {
            float *at = P + row * stride + step->from + first, part[HALF_PANEL] = {0}, divisor[HALF_PANEL];
            for (int n = 0; n < HALF_PANEL; n++) divisor[n] = 1;
            if (rest < HALF_PANEL) memcpy(part, at, rest * 4);
            float *to = rest < HALF_PANEL ? part : at;
            if (step->by_column) memcpy(divisor, step->by_column + first, (rest < HALF_PANEL ? rest : HALF_PANEL) * 4);
            for (int n = 0; n < VECTORS; n++) {
                HalfVector number = *(HalfVector *)(to + n * HALF);
                if (step->by_row) number /= step->by_row[i + row];
                if (step->by_column) number /= *(HalfVector *)(divisor + n * HALF);
                *(HalfVector *)(to + n * HALF) = number - __builtin_convertvector(sum[row][n], HalfVector);
            }
            if (rest < HALF_PANEL) memcpy(at, part, rest * 4);
        }
    }
}

static TARGET void NAMED(take_back, WIDTH)(const Step *step, size_t i, float *P, size_t stride, size_t rows)
{
    size_t row = 0;
    for (; row + BACK <= rows; row += BACK)
        NAMED(before, WIDTH)(step, i + row, P + row * stride, stride, BACK);
    for (; row < rows; row++) NAMED(before, WIDTH)(step, i + row, P + row * stride, stride, 1);
}

/* Store 2 * WIDTH predictions from element j on, rounded, and tell to what. */
INLINE void NAMED(store, WIDTH)(char *P, size_t j, const Vector *number, Vector *rounded, int dtype)
{
    if (dtype == BF16) {
        Bits bits[2];
        for (int n = 0; n < 2; n++) {
            bits[n] = (Bits)number[n];
            bits[n] += 0x7fff + ((bits[n] >> 16) & 1);
            rounded[n] = (Vector)(bits[n] & 0xffff0000);
        }
        NAMED(cut, WIDTH)(P, j, bits[0], bits[1]);
    } else {
        for (int n = 0; n < 2; n++) {
            NAMED(round_to, WIDTH)(P, j + n * WIDTH, number[n], dtype);
            rounded[n] = NAMED(widened, WIDTH)(P, j + n * WIDTH, dtype);
        }
    }
}

/* Store LANES predictions, rounded; return the bits of those that lie above what they were rounded to. */
INLINE uint32_t NAMED(predicted, WIDTH)(char *P, const Vector *number, int dtype)
{
    enum { VECTORS = LANES / WIDTH };
    Vector rounded[VECTORS];
#pragma GCC unroll 8
    for (int n = 0; n < VECTORS; n += 2) NAMED(store, WIDTH)(P, n * WIDTH, number + n, rounded + n, dtype);
    return NAMED(all_greater, WIDTH)(number, rounded);
}

/* Round the predictions of LANES columns of one row: W' at `after`, the results at P.
 *
 * `sums` are those of the step in float32, off by at most `error`, which is below 0 where they are exact; `open` tells
 * where that could change a result. `changed`, a constant, is 0 where nothing, or all, was taken back already. Returns the bits of those predictions that lie above what they
 * were rounded to; `largest` gathers the largest bits met: magnitudes that are not finite exceed all others.
 */
INLINE uint32_t NAMED(settle, WIDTH)(
    const char *after, const float *sums, float error, char *P, uint32_t *open, Bits *largest, int changed, int source,
    int dtype)
{
    enum { VECTORS = LANES / WIDTH };
    const uint32_t bucket = dtype == BF16 ? ~0x7fffu : ~0xfffu; /* of float32: between a result and the middle to the next */
    Vector number[VECTORS];
    *open = 0;
#pragma GCC unroll 8
    for (int n = 0; n < VECTORS; n++) {
        number[n] = NAMED(widened, WIDTH)(after, n * WIDTH, source);
        if (changed) number[n] -= *(const Vector *)(sums + n * WIDTH);
        Bits magnitude = (Bits)number[n] & 0x7fffffff;
        *largest = NAMED(larger, WIDTH)(*largest, magnitude);
    }
    if (changed && error >= 0) {
        Vector least[VECTORS], most[VECTORS];
        Bits apart = {0}, all = {0}; /* beyond the bounds even after their own rounding, so that no end of a bucket is met */
        all += bucket;
#pragma GCC unroll 8
        for (int n = 0; n < VECTORS; n++) {
            Vector size = (Vector)((Bits)number[n] & 0x7fffffff);
            least[n] = size * (1 - 0x1p-22f) - error, most[n] = size * (1 + 0x1p-22f) + error;
            apart |= (Bits)least[n] ^ (Bits)most[n];
        }
        if (NAMED(any, WIDTH)(apart & all))
            for (int n = 0; n < VECTORS; n++)
                *open |= NAMED(having, WIDTH)((Bits)least[n] ^ (Bits)most[n], all) << n * WIDTH;
    }
    return NAMED(predicted, WIDTH)(P, number, dtype);
}

/* left·right from a column on, a multiple of WIDTH: exact in float64, rounded once. */
INLINE Vector NAMED(exact, WIDTH)(const Step *step, size_t i, size_t column)
{
    const double *left = step->left + i * step->rank;
    const double *right = step->right + column / LANES * LANES * step->rank + column % LANES;
    Doubles low[2] = {{0}}, high[2] = {{0}}; /* any order does: nothing is rounded */
    size_t k = 0;
    for (; k + 2 <= step->rank; k += 2)
        for (int n = 0; n < 2; n++, right += LANES) {
            low[n] += left[k + n] * *(const Doubles *)right;
            high[n] += left[k + n] * *(const Doubles *)(right + WIDTH / 2);
        }
    if (k < step->rank) {
        low[0] += left[k] * *(const Doubles *)right;
        high[0] += left[k] * *(const Doubles *)(right + WIDTH / 2);
    }
    HalfVector halves[2] = {
        __builtin_convertvector(low[0] + low[1], HalfVector), __builtin_convertvector(high[0] + high[1], HalfVector)};
    Vector numbers;
    memcpy(&numbers, halves, sizeof numbers);
    return numbers;
}

/* Predict one number of a row again, from a sum in float64; return whether it lies above what it is rounded to. */
INLINE uint64_t NAMED(once_more, WIDTH)(
    const Step *step, size_t i, size_t column, const char *after, char *P, int source, int dtype)
{
    size_t from = column / LANES * LANES * step->rank + column % LANES, k = 0;
    double even = 0, odd = 0; /* any order does: nothing is rounded */
    if (step->held) { /* these are in the core's cache */
        const float *left = step->near_left + i * step->rank, *right = step->near_right + from;
        for (; k + 2 <= step->rank; k += 2, right += 2 * LANES) {
            even += (double)left[k] * right[0];
            odd += (double)left[k + 1] * right[LANES];
        }
        if (k < step->rank) even += (double)left[k] * right[0];
    } else {
        const double *left = step->left + i * step->rank, *right = step->right + from;
        for (; k + 2 <= step->rank; k += 2, right += 2 * LANES) {
            even += left[k] * right[0];
            odd += left[k + 1] * right[LANES];
        }
        if (k < step->rank) even += left[k] * right[0];
    }
    float sum = (float)(even + odd);
    if (source != F16 && dtype == BF16) { /* by itself: a vector of one number is slow to fill */
        uint32_t bits;
        uint16_t half;
        float number, rounded;
        memcpy(&half, after + column * 2, 2);
        bits = (uint32_t)half << 16;
        if (source == F32) memcpy(&bits, after + column * 4, 4);
        memcpy(&number, &bits, 4);
        number -= sum;
        memcpy(&bits, &number, 4);
        bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
        memcpy(&rounded, &bits, 4);
        half = (uint16_t)(bits >> 16);
        memcpy(P + column * 2, &half, 2);
        return number > rounded;
    }
    char stored[4 * WIDTH] = {0}, made[4 * WIDTH];
    memcpy(stored, after + column * (source == F32 ? 4 : 2), source == F32 ? 4 : 2);
    Vector number[2] = {NAMED(widened, WIDTH)(stored, 0, source) - sum}, rounded[2];
    NAMED(store, WIDTH)(made, 0, number, rounded, dtype);
    memcpy(P + column * 2, made, 2);
    return number[0][0] > rounded[0][0];
}

/* Predict numbers of rows again of which float32 told too little: `i` is the first row among the step's. */
INLINE void NAMED(resolve, WIDTH)(
    const Step *step, size_t i, const Doubt *doubts, size_t count, const char *after, char *P, uint64_t *above,
    size_t words, size_t columns, int source, int dtype)
{
    size_t size = source == F32 ? 4 : 2;
    for (const Doubt *doubt = doubts; doubt < doubts + count; doubt++) {
        const char *from = after + doubt->row * columns * size;
        char *to = P + doubt->row * columns * 2;
        uint64_t *word = above + doubt->row * words + doubt->column / CHUNK, bits = *word;
        unsigned place = doubt->column % CHUNK;
        if (__builtin_popcount(doubt->mask) > 4 && columns - doubt->column >= LANES) {
            bits &= ~(0xffffffffull << place);
            Vector number[LANES / WIDTH];
            for (size_t n = 0, j = doubt->column; n < LANES / WIDTH; n++, j += WIDTH)
                number[n] = NAMED(widened, WIDTH)(from, j, source) - NAMED(exact, WIDTH)(step, i + doubt->row, j);
            bits |= (uint64_t)NAMED(predicted, WIDTH)(to + doubt->column * 2, number, dtype) << place;
        } else {
            for (uint32_t mask = doubt->mask; mask; mask &= mask - 1) {
                unsigned n = (unsigned)__builtin_ctz(mask);
                bits &= ~(1ull << (place + n));
                bits |= NAMED(once_more, WIDTH)(step, i + doubt->row, doubt->column + n, from, to, source, dtype)
                        << (place + n);
            }
        }
        *word = bits;
    }
}

/* sums (count, LANES) = left·right for any number of rows. */
static TARGET __attribute__((noinline)) void NAMED(multiply, WIDTH)(
    const float *left, const float *right, size_t rank, float (*sums)[LANES], size_t count)
{
    size_t row = 0;
    for (; row + TOGETHER <= count; row += TOGETHER)
        NAMED(product, WIDTH)(left + row * rank, right, rank, 1, sums[row], TOGETHER);
#if TOGETHER > 4
    for (; row + 4 <= count; row += 4) NAMED(product, WIDTH)(left + row * rank, right, rank, 1, sums[row], 4);
#endif
    for (; row + 2 <= count; row += 2) NAMED(product, WIDTH)(left + row * rank, right, rank, 1, sums[row], 2);
    for (; row < count; row++) NAMED(product, WIDTH)(left + row * rank, right, rank, 1, sums[row], 1);
}

/* Predict at most TOGETHER rows of 16 bit; `i` is the first of them among the step's.
 *
 * `changed`, a constant where this is inlined, is 0 where nothing is to be taken back; `above` has `words` for each row.
 */
INLINE void NAMED(rows_of, WIDTH)(
    const Step *step, size_t i, const char *after, char *P, uint64_t *above, size_t words, size_t columns,
    Doubt *doubts, Bits *largest, size_t count, int changed, int source, int dtype)
{
    size_t size = source == F32 ? 4 : 2, many = 0;
    float sums[TOGETHER][LANES] __attribute__((aligned(64)));
    for (size_t first = 0; first < columns; first += LANES) {
        if (changed) {
            const float *left = step->near_left + i * step->rank, *right = step->near_right + first * step->rank;
            NAMED(multiply, WIDTH)(left, right, step->rank, sums, count);
        }
        float panel_error = changed ? step->panel_error[first / LANES] : 0;
        for (size_t row = 0; row < count; row++) {
            float error = -1, row_error = changed ? step->row_error[i + row] : 0;
            if (row_error && panel_error) /* more than all that is lost below the smallest floats */
                error = row_error * panel_error + 0x1p-120f;
            const char *from = after + (row * columns + first) * size;
            char *to = P + (row * columns + first) * 2;
            uint32_t bits, open;
            if (columns - first >= LANES) {
                bits = NAMED(settle, WIDTH)(from, sums[row], error, to, &open, largest, changed, source, dtype);
            } else { /* the last ones, with zeros after them */
                char some[4 * LANES] = {0}, rounded[2 * LANES];
                memcpy(some, from, (columns - first) * size);
                bits = NAMED(settle, WIDTH)(some, sums[row], error, rounded, &open, largest, changed, source, dtype);
                bits &= (1u << (columns - first)) - 1;
                open &= (1u << (columns - first)) - 1;
                memcpy(to, rounded, (columns - first) * 2);
            }
            uint64_t *word = above + row * words + first / CHUNK;
            *word = first % CHUNK ? *word | (uint64_t)bits << LANES : bits;
            if (changed && open) doubts[many++] = (Doubt){(uint32_t)row, (uint32_t)first, open};
        }
    }
    if (changed) NAMED(resolve, WIDTH)(step, i, doubts, many, after, P, above, words, columns, source, dtype);
}

/* Predict at most TOGETHER rows of 16 bit; without a `step` nothing is to be taken back. */
INLINE void NAMED(some_rows, WIDTH)(
    const Step *step, size_t i, const char *after, char *P, uint64_t *above, size_t words, size_t columns,
    Doubt *doubts, Bits *largest, size_t count, int source, int dtype)
{
    if (step) NAMED(rows_of, WIDTH)(step, i, after, P, above, words, columns, doubts, largest, count, 1, source, dtype);
    else NAMED(rows_of, WIDTH)(NULL, 0, after, P, above, words, columns, doubts, largest, count, 0, source, dtype);
}

static TARGET void NAMED(divide, WIDTH)(const Step *step, size_t i, float *P, size_t columns, size_t rows)
{
    for (size_t row = 0; row < rows; row++, P += columns) {
        if (step->by_row)
            for (size_t j = 0; j < columns; j++) P[j] /= step->by_row[i + row];
        if (step->by_column)
            for (size_t j = 0; j < columns; j++) P[j] /= step->by_column[j];
    }
}

INLINE int NAMED(touches, WIDTH)(const Step *step, size_t row)
{
    return row >= step->first && row < step->last && (row - step->first) % step->every == 0;
}

/* Predict rows from `i` of the tile on, at most TOGETHER, as far as the same steps hold for them; return how many. */
INLINE size_t NAMED(predict, WIDTH)(Tile *at, size_t i, char *P, uint64_t *above, Bits *largest, int dtype)
{
    size_t columns = at->columns, words = (columns + CHUNK - 1) / CHUNK, row = at->start + i;
    size_t size = at->source == F32 ? 4 : 2, next = at->start + at->rows, met = 0;
    const char *after = at->after + i * columns * size;
    const Step *last = NULL;
    next = row + TOGETHER < next ? row + TOGETHER : next;
    for (const Step *step = at->steps; step < at->steps + at->many; step++) {
        size_t end = row < step->first ? step->first : step->every > 1 ? row + 1 : step->last;
        if (row >= step->last) continue;
        next = end < next ? end : next;
        if (NAMED(touches, WIDTH)(step, row)) met++, last = step;
    }
    size_t count = next - row;
    if (dtype != F32 && (!met || (met == 1 && last->near_left && !last->from && last->to == columns))) {
        int divided = last && (last->by_row || last->by_column);
        if (dtype == (int)at->source && !divided) {
            NAMED(some_rows, WIDTH)(
                last, last ? (row - last->first) / last->every : 0, after, P, above, words, columns, at->doubts,
                largest, count, dtype, dtype);
            return count;
        }
        NAMED(widen, WIDTH)(after, count * columns, at->source, at->numbers);
        if (divided) NAMED(divide, WIDTH)(last, (row - last->first) / last->every, at->numbers, columns, count);
    } else {
        float *numbers = dtype == F32 ? (float *)P : at->numbers;
        NAMED(widen, WIDTH)(after, count * columns, at->source, numbers);
        for (const Step *step = at->steps + at->many; step-- > at->steps;)
            if (NAMED(touches, WIDTH)(step, row))
                NAMED(take_back, WIDTH)(step, (row - step->first) / step->every, numbers, columns, count);
        last = NULL;
        if (dtype == F32) {
            memset(above, 0, count * words * 8);
            for (size_t j = 0; j < count * columns; j++) {
                uint32_t bits;
                memcpy(&bits, numbers + j, 4);
                bits &= 0x7fffffff;
                if (bits > (*largest)[0]) (*largest)[0] = bits;
            }
            return count;
        }
    }
    NAMED(some_rows, WIDTH)(
        last, last ? (row - last->first) / last->every : 0, (const char *)at->numbers, P, above, words, columns,
        at->doubts, largest, count, F32, dtype);
    return count;
}

INLINE int NAMED(is_special, WIDTH)(Bits largest)
{
    int special = 0;
    for (int n = 0; n < WIDTH; n++) special |= largest[n] >= 0x7f800000;
    return special;
}

#define SIZE 2
#include "ranks.h"
#undef SIZE
#define SIZE 4
#include "ranks.h"
#undef SIZE

static TARGET size_t NAMED(encode, WIDTH)(Tile *at)
{
    switch (at->dtype) {
    case BF16: return NAMED(NAMED(encode_as, 2), WIDTH)(at, BF16);
    case F16: return NAMED(NAMED(encode_as, 2), WIDTH)(at, F16);
    default: return NAMED(NAMED(encode_as, 4), WIDTH)(at, F32);
    }
}

static TARGET size_t NAMED(decode, WIDTH)(Tile *at)
{
    switch (at->dtype) {
    case BF16: return NAMED(NAMED(decode_as, 2), WIDTH)(at, BF16);
    case F16: return NAMED(NAMED(decode_as, 2), WIDTH)(at, F16);
    default: return NAMED(NAMED(decode_as, 4), WIDTH)(at, F32);
    }
}
