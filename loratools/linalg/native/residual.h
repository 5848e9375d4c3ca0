/* The arithmetic of residual.c for vectors of WIDTH numbers, with the instructions of TARGET, TOGETHER rows at a time.
 *
 * `dtype` is a constant wherever these functions are inlined.
 */
#include "floats.h"

#define Doubles NAMED(Doubles, WIDTH)
#define HalfVector NAMED(HalfVector, WIDTH)
#define Integers NAMED(Integers, WIDTH)

typedef double Doubles __attribute__((vector_size(4 * WIDTH), aligned(8), may_alias));
typedef float HalfVector __attribute__((vector_size(2 * WIDTH), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

/* WIDTH stored numbers from element j on as integers. */
INLINE Bits NAMED(bits_of, WIDTH)(const char *stored, size_t j, int dtype)
{
    if (dtype == F32) return *(const Bits *)(stored + 4 * j);
    return __builtin_convertvector(*(const Halves *)(stored + 2 * j), Bits);
}

/* A bit for each number that is not 0. */
INLINE uint32_t NAMED(mask_of, WIDTH)(Bits numbers)
{
#if WIDTH == 16
    return _mm512_test_epi32_mask((__m512i)numbers, (__m512i)numbers);
#elif WIDTH == 8
    return (uint32_t)_mm256_movemask_ps((__m256)(numbers != 0));
#else
    uint32_t mask = 0;
    for (int n = 0; n < WIDTH; n++) mask |= (uint32_t)(numbers[n] != 0) << n;
    return mask;
#endif
}

static TARGET void NAMED(widen, WIDTH)(const char *stored, size_t count, size_t dtype, float *out)
{
    size_t j = 0, size = dtype == F32 ? 4 : 2;
    if (dtype == BF16)
        for (; j + WIDTH <= count; j += WIDTH) *(Vector *)(out + j) = NAMED(widened, WIDTH)(stored, j, BF16);
    else if (dtype == F16)
        for (; j + WIDTH <= count; j += WIDTH) *(Vector *)(out + j) = NAMED(widened, WIDTH)(stored, j, F16);
    else memcpy(out, stored, 4 * (j = count));
    if (j < count) {
        char last[4 * WIDTH] = {0};
        memcpy(last, stored + j * size, (count - j) * size);
        Vector numbers = dtype == BF16 ? NAMED(widened, WIDTH)(last, 0, BF16) : NAMED(widened, WIDTH)(last, 0, F16);
        memcpy(out + j, &numbers, (count - j) * 4);
    }
}

/* Turn `count` rows, a constant where this is inlined, from `i` on, into what they were before. */
INLINE void NAMED(before, WIDTH)(const Step *at, size_t i, int count)
{
    enum { VECTORS = 2 * LANES / WIDTH, HALF = WIDTH / 2 };
    const double *left = at->left + i * at->rank, *right = at->right;
    for (size_t first = 0; first < at->columns; first += LANES, right += at->rank * LANES) {
        Doubles sum[TOGETHER][VECTORS] = {{{0}}}; /* these stay in registers */
        for (size_t k = 0; k < at->rank; k++)
            for (int row = 0; row < count; row++)
                for (int n = 0; n < VECTORS; n++)
                    sum[row][n] += left[row * at->rank + k] * *(const Doubles *)(right + k * LANES + n * HALF);
        size_t rest = at->columns - first;
        for (int row = 0; row < count; row++) {
            float *P = at->P + (i + row) * at->stride + first, part[LANES], divisor[LANES];
            if (rest < LANES) memcpy(part, P, rest * 4);
            float *to = rest < LANES ? part : P;
            if (at->by_column) memcpy(divisor, at->by_column + first, (rest < LANES ? rest : LANES) * 4);
            for (int n = 0; n < VECTORS; n++) {
                HalfVector number = *(HalfVector *)(to + n * HALF);
                if (at->by_row) number /= at->by_row[i + row];
                if (at->by_column) number /= *(HalfVector *)(divisor + n * HALF);
                *(HalfVector *)(to + n * HALF) = number - __builtin_convertvector(sum[row][n], HalfVector);
            }
            if (rest < LANES) memcpy(P, part, rest * 4);
        }
    }
}

static TARGET void NAMED(take_back, WIDTH)(const Step *at)
{
    size_t i = 0;
    for (; i + TOGETHER <= at->rows; i += TOGETHER) NAMED(before, WIDTH)(at, i, TOGETHER);
    for (; i < at->rows; i++) NAMED(before, WIDTH)(at, i, 1);
}

/* Integers of the width of `dtype`, with their signs. */
INLINE Bits NAMED(wrapped, WIDTH)(Bits numbers, int dtype)
{
    return dtype == F32 ? numbers : (Bits)((Integers)(numbers << 16) >> 16);
}

/* Integers in the order of the floats, one for each pattern of bits. */
INLINE Bits NAMED(ordered, WIDTH)(Bits bits, int dtype)
{
    Integers number = (Integers)NAMED(wrapped, WIDTH)(bits, dtype);
    return (Bits)(number ^ ((number >> 31) & (dtype == F32 ? 0x7fffffff : 0x7fff)));
}

/* 0, 1, 2, … for W = P, the next float on the prediction's side, the next on the other, and so on. */
INLINE Bits NAMED(rank_of, WIDTH)(Bits W, Bits P, Bits above, int dtype)
{
    Bits steps = NAMED(wrapped, WIDTH)(NAMED(ordered, WIDTH)(W, dtype) - NAMED(ordered, WIDTH)(P, dtype), dtype);
    steps = NAMED(wrapped, WIDTH)((steps ^ above) - above, dtype); /* negated where above is all ones */
    return (steps << 1 ^ (Bits)((Integers)steps >> 31)) & (dtype == F32 ? 0xffffffff : 0xffff);
}

/* Write those of WIDTH numbers that the mask has, one after another; memory for all of them must be there. */
INLINE void NAMED(gather, WIDTH)(uint32_t *to, Bits numbers, uint32_t mask)
{
#if WIDTH == 16
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32((__mmask16)mask, (__m512i)numbers));
#else
    for (; mask; mask &= mask - 1) *to++ = numbers[__builtin_ctz(mask)];
#endif
}

INLINE void NAMED(gather_bytes, WIDTH)(uint8_t *to, Bits numbers, uint32_t mask)
{
#if WIDTH == 16
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(_mm512_maskz_compress_epi32((__mmask16)mask, (__m512i)numbers)));
#else
    for (; mask; mask &= mask - 1) *to++ = (uint8_t)numbers[__builtin_ctz(mask)];
#endif
}

/* Round WIDTH predictions from element j on, which stand at `from`, and note those that do not say enough. */
INLINE void NAMED(look, WIDTH)(
    Tile *at, const float *prediction, const char *W, const char *after, char *P, size_t j, size_t from, int dtype)
{
    Vector numbers = *(const Vector *)(prediction + from);
    Bits nowhere = (Bits)(((Bits)numbers & 0x7f800000) == 0x7f800000), place, spread = {0}, rank = {0};
    if (NAMED(mask_of, WIDTH)(nowhere)) at->special = 1;
    NAMED(round_to, WIDTH)(P, from, numbers, dtype);
    Bits rounded = NAMED(bits_of, WIDTH)(P, from, dtype), base = rounded, open = {0};
    if (after) {
        Integers lower = (Integers)(rounded & EXPONENT[dtype]);
        Integers higher = (Integers)(NAMED(bits_of, WIDTH)(after, from, dtype) & EXPONENT[dtype]);
        open = (Bits)(higher > lower);
        spread = open & (Bits)((higher - lower) >> MANTISSA[dtype]);
        Bits over = (Bits)((Integers)spread > MANTISSA[dtype]);
        spread = (spread & ~over) | (over & (uint32_t)MANTISSA[dtype]);
    }
    if (W) base = NAMED(bits_of, WIDTH)(W, from, dtype);
    uint32_t coarse = NAMED(mask_of, WIDTH)(spread);
    if (!(coarse | NAMED(mask_of, WIDTH)(base ^ rounded))) return;
    for (uint32_t n = 0; n < WIDTH; n++) place[n] = (uint32_t)j + n;
    NAMED(gather, WIDTH)(at->places + at->coarse, place, coarse);
    NAMED(gather_bytes, WIDTH)(at->spread + at->coarse, spread, coarse);
    if (W) {
        Bits above = (Bits)(numbers > NAMED(widened, WIDTH)(P, from, dtype)), one = {0};
        one += 1;
        rank = NAMED(rank_of, WIDTH)(base, rounded, above, dtype);
        NAMED(gather, WIDTH)(at->low + at->coarse, rank & ((one << spread) - 1), coarse);
        Bits high = rank >> spread;
        uint32_t exceptions = NAMED(mask_of, WIDTH)(high);
        if (exceptions) {
            NAMED(gather, WIDTH)(at->at + at->exceptions, place, exceptions);
            NAMED(gather, WIDTH)(at->high + at->exceptions, high, exceptions);
            at->exceptions += (size_t)__builtin_popcount(exceptions);
        }
    }
    at->coarse += (size_t)__builtin_popcount(coarse);
}

INLINE void NAMED(scan_as, WIDTH)(Tile *at, int dtype)
{
    size_t j = 0, size = dtype == F32 ? 4 : 2, left;
    for (; j + WIDTH <= at->count; j += WIDTH)
        NAMED(look, WIDTH)(at, at->prediction, at->W, at->after, at->P, j, j, dtype);
    if ((left = at->count - j)) { /* the last ones, with zeros after them */
        float prediction[WIDTH] = {0};
        char W[4 * WIDTH] = {0}, after[4 * WIDTH] = {0}, P[4 * WIDTH] = {0};
        memcpy(prediction, at->prediction + j, left * 4);
        if (at->W) memcpy(W, at->W + j * size, left * size);
        if (at->after) memcpy(after, at->after + j * size, left * size);
        NAMED(look, WIDTH)(at, prediction, at->W ? W : NULL, at->after ? after : NULL, P, j, 0, dtype);
        memcpy(at->P + j * size, P, left * size);
    }
}

static TARGET void NAMED(scan, WIDTH)(Tile *at)
{
    at->coarse = at->exceptions = at->special = 0;
    switch (at->dtype) {
    case BF16: NAMED(scan_as, WIDTH)(at, BF16); break;
    case F16: NAMED(scan_as, WIDTH)(at, F16); break;
    default: NAMED(scan_as, WIDTH)(at, F32);
    }
}

/* Put the float of each rank in place of the prediction: `low` and `high` of it stand in the order of their places. */
INLINE void NAMED(place_as, WIDTH)(const Tile *at, int dtype)
{
    size_t c = 0, e = 0, size = dtype == F32 ? 4 : 2;
    while (c < at->coarse || e < at->exceptions) {
        while (e + 1 < at->exceptions && at->at[e + 1] == at->at[e]) e++; /* the last one counts */
        uint32_t here = c < at->coarse ? at->places[c] : UINT32_MAX, there = e < at->exceptions ? at->at[e] : UINT32_MAX;
        uint32_t j = here < there ? here : there, rank = 0, spread = 0;
        if (j == here) rank = at->low[c], spread = at->spread[c++];
        if (j == there) rank |= at->high[e++] << spread;
        if (dtype != F32) rank &= 0xffff;
        if (!rank) continue;
        float block[WIDTH] = {0};
        char stored[4 * WIDTH] = {0};
        memcpy(stored, at->P + j * size, size);
        *(Vector *)block = NAMED(widened, WIDTH)(stored, 0, dtype);
        uint32_t W = at_rank(rank, bits_at(stored, 0, dtype), at->prediction[j] > block[0], dtype);
        memcpy(at->P + j * size, &W, size);
    }
}

static TARGET void NAMED(place, WIDTH)(const Tile *at)
{
    switch (at->dtype) {
    case BF16: NAMED(place_as, WIDTH)(at, BF16); break;
    case F16: NAMED(place_as, WIDTH)(at, F16); break;
    default: NAMED(place_as, WIDTH)(at, F32);
    }
}

/* Write the low bits of all ranks, plane after plane, the first in the highest bit of a byte; return their bytes. */
static TARGET size_t NAMED(pack, WIDTH)(const Tile *at, uint8_t *out, uint32_t *low, uint32_t *spread)
{
    size_t left = at->coarse, bytes = 0, filled = 0;
    uint64_t bits = 0; /* the last `filled` ones, the first of them the highest */
    for (size_t c = 0; c < left; c++) low[c] = at->low[c], spread[c] = at->spread[c];
    for (uint32_t bit = 0; left; bit++) { /* those with more bits move to the front, in order */
        size_t more = 0;
        for (size_t c = 0; c < left; c += WIDTH) {
            size_t count = left - c < WIDTH ? left - c : WIDTH;
            Bits some = *(const Bits *)(low + c), open = *(const Bits *)(spread + c);
            uint32_t valid = (1u << count) - 1, set = NAMED(mask_of, WIDTH)(some & 1u << bit);
            uint32_t mask = NAMED(mask_of, WIDTH)((Bits)((Integers)open > (int32_t)bit + 1)) & valid;
            uint32_t turned = (uint32_t)REVERSED[set & 255] << 8 | REVERSED[set >> 8];
            bits = bits << count | turned >> (16 - count);
            for (filled += count; filled >= 8; filled -= 8) out[bytes++] = (uint8_t)(bits >> (filled - 8));
            NAMED(gather, WIDTH)(low + more, some, mask);
            NAMED(gather, WIDTH)(spread + more, open, mask);
            more += (size_t)__builtin_popcount(mask);
        }
        left = more;
    }
    if (filled) out[bytes++] = (uint8_t)(bits << (8 - filled));
    return bytes;
}
