/* The codes of residual.c for numbers of SIZE bytes, in vectors of 4 * WIDTH bytes: CHUNK numbers at a time.
 *
 * `dtype` is a constant wherever these functions are inlined.
 */
#define OF(name) NAMED(NAMED(name, SIZE), WIDTH)
#define Unit OF(Unit)
#define Units OF(Units)
#define Signed OF(Signed)
#define Codes OF(Codes)

#if SIZE == 2
typedef uint16_t Unit;
typedef int16_t Signed __attribute__((vector_size(4 * WIDTH), aligned(2), may_alias));
#else
typedef uint32_t Unit;
typedef int32_t Signed __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
#endif
typedef Unit Units __attribute__((vector_size(4 * WIDTH), aligned(SIZE), may_alias));

enum { OF(ACROSS) = 4 * WIDTH / SIZE, OF(VECTORS) = CHUNK / OF(ACROSS) };

/* A bit for each number that has one of some bits. */
INLINE uint64_t OF(with)(Units numbers, Units some)
{
#if WIDTH == 16 && SIZE == 2
    return _mm512_test_epi16_mask((__m512i)numbers, (__m512i)some);
#elif WIDTH == 16
    return _mm512_test_epi32_mask((__m512i)numbers, (__m512i)some);
#elif WIDTH == 8 && SIZE == 2
    __m256i all = (__m256i)((numbers & some) != 0);
    return (uint32_t)_mm_movemask_epi8(_mm_packs_epi16(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
#elif WIDTH == 8
    return (uint32_t)_mm256_movemask_ps((__m256)((numbers & some) != 0));
#else
    uint64_t mask = 0;
    for (int n = 0; n < OF(ACROSS); n++) mask |= (uint64_t)((numbers[n] & some[n]) != 0) << n;
    return mask;
#endif
}

/* All ones in each number whose bit is set. */
INLINE Units OF(chosen)(uint64_t mask)
{
#if WIDTH == 16 && SIZE == 2
    return (Units)_mm512_movm_epi16((__mmask32)mask);
#elif WIDTH == 16
    return (Units)_mm512_movm_epi32((__mmask16)mask);
#else
    Units numbers, bits; /* at most 16 across */
    for (int n = 0; n < OF(ACROSS); n++) bits[n] = (Unit)(1u << n);
    numbers = (Units){0} + (Unit)mask;
    return (Units)((numbers & bits) != 0);
#endif
}

/* Numbers shifted to the left, each by so many bits. */
INLINE Units OF(shifted)(Units numbers, Units by)
{
#if WIDTH == 8 && SIZE == 2
    __m256i low = _mm256_sllv_epi32(
        _mm256_unpacklo_epi16((__m256i)numbers, _mm256_setzero_si256()),
        _mm256_unpacklo_epi16((__m256i)by, _mm256_setzero_si256()));
    __m256i high = _mm256_sllv_epi32(
        _mm256_unpackhi_epi16((__m256i)numbers, _mm256_setzero_si256()),
        _mm256_unpackhi_epi16((__m256i)by, _mm256_setzero_si256()));
    __m256i mask = _mm256_set1_epi32(0xffff);
    return (Units)_mm256_packus_epi32(_mm256_and_si256(low, mask), _mm256_and_si256(high, mask));
#else
    return numbers << by;
#endif
}

/* The same to the right. */
INLINE Units OF(unshifted)(Units numbers, Units by)
{
#if WIDTH == 8 && SIZE == 2
    return (Units)_mm256_packus_epi32(
        _mm256_srlv_epi32(
            _mm256_unpacklo_epi16((__m256i)numbers, _mm256_setzero_si256()),
            _mm256_unpacklo_epi16((__m256i)by, _mm256_setzero_si256())),
        _mm256_srlv_epi32(
            _mm256_unpackhi_epi16((__m256i)numbers, _mm256_setzero_si256()),
            _mm256_unpackhi_epi16((__m256i)by, _mm256_setzero_si256())));
#else
    return numbers >> by;
#endif
}

/* Those bits of `mask` that are set in `bits`, one after another. */
INLINE uint64_t OF(picked)(uint64_t bits, uint64_t mask)
{
#if WIDTH >= 8
    return _pext_u64(bits, mask);
#else
    uint64_t all = 0;
    for (int n = 0; mask; mask &= mask - 1, n++) all |= (bits >> __builtin_ctzll(mask) & 1) << n;
    return all;
#endif
}

/* Bits put to where `mask` has some, one after another. */
INLINE uint64_t OF(laid)(uint64_t bits, uint64_t mask)
{
#if WIDTH >= 8
    return _pdep_u64(bits, mask);
#else
    uint64_t all = 0;
    for (int n = 0; mask; mask &= mask - 1, n++) all |= (bits >> n & 1) << __builtin_ctzll(mask);
    return all;
#endif
}

/* Integers in the order of the floats, one for each pattern of bits. */
INLINE Units OF(ordered)(Units bits)
{
    return bits ^ ((Units)((Signed)bits >> (8 * SIZE - 1)) & (Unit)(SIZE == 4 ? 0x7fffffff : 0x7fff));
}

/* How many bits of the rank are open: W' lies so many binades above the prediction, as far as a mantissa goes. */
INLINE Units OF(spread_of)(Units P, Units after, int dtype)
{
    Signed apart = (Signed)(after & (Unit)EXPONENT[dtype]) - (Signed)(P & (Unit)EXPONENT[dtype]), most = {0};
    apart &= ~(apart >> (8 * SIZE - 1)); /* not below 0 */
    apart >>= MANTISSA[dtype];
    most += (short)MANTISSA[dtype];
#if WIDTH == 16 && SIZE == 2
    return (Units)_mm512_min_epi16((__m512i)apart, (__m512i)most);
#elif WIDTH == 16
    return (Units)_mm512_min_epi32((__m512i)apart, (__m512i)most);
#else
    Signed over = apart > most;
    return (Units)((apart & ~over) | (most & over));
#endif
}

/* CHUNK numbers from one row: pointers into it, or into zeros where it ends earlier. */
typedef struct {
    const char *P, *after, *W;
    char some[3][CHUNK * SIZE];
} Codes;

INLINE void OF(take)(Codes *chunk, const char *P, const char *after, const char *W, size_t j, size_t columns)
{
    const char *from[] = {P, after, W};
    if (j + CHUNK <= columns) {
        chunk->P = P + j * SIZE, chunk->after = after + j * SIZE, chunk->W = W + j * SIZE;
        return;
    }
    for (int n = 0; n < 3; n++) {
        memset(chunk->some[n], 0, CHUNK * SIZE);
        if (from[n]) memcpy(chunk->some[n], from[n] + j * SIZE, (columns - j) * SIZE);
    }
    chunk->P = chunk->some[0], chunk->after = chunk->some[1], chunk->W = chunk->some[2];
}

/* Code one row; `place` is that of its first number in the tile. */
INLINE void OF(encode_row)(
    Tile *at, const char *P, const char *after, const char *W, const uint64_t *above, size_t place, Bitstream *planes,
    int dtype)
{
    enum { ACROSS = OF(ACROSS), VECTORS = OF(VECTORS) };
    Codes chunk;
    for (size_t j = 0; j < at->columns; j += CHUNK) {
        Units fill[VECTORS], rank[VECTORS], high[VECTORS], all = {0}, bit = {0};
        uint64_t exceptions = 0, mask = 0;
        OF(take)(&chunk, P, after, W, j, at->columns);
        bit += 1;
        all = ~all;
        for (int n = 0; n < VECTORS; n++) {
            Units predicted = *(const Units *)(chunk.P + 4 * WIDTH * n), base = *(const Units *)(chunk.W + 4 * WIDTH * n);
            Units spread = {0}, side = OF(chosen)(above[j / CHUNK] >> n * ACROSS);
            if (after) spread = OF(spread_of)(predicted, *(const Units *)(chunk.after + 4 * WIDTH * n), dtype);
            Units steps = OF(ordered)(base) - OF(ordered)(predicted);
            steps = (steps ^ side) - side; /* negated where the prediction lies above */
            rank[n] = steps << 1 ^ (Units)((Signed)steps >> (8 * SIZE - 1));
            fill[n] = OF(shifted)(bit, spread) - 1;
            high[n] = OF(unshifted)(rank[n], spread);
            exceptions |= OF(with)(high[n], all) << n * ACROSS;
            mask |= OF(with)(fill[n], bit) << n * ACROSS;
        }
        for (Bitstream *plane = planes; mask; plane++) {
            uint64_t bits = 0;
            for (int n = 0; n < VECTORS; n++) bits |= OF(with)(rank[n], bit) << n * ACROSS;
            unsigned count = (unsigned)__builtin_popcountll(mask);
            if (count <= 56) {
                append(plane, OF(picked)(bits, mask), count);
            } else {
                unsigned first = (unsigned)__builtin_popcount((uint32_t)mask);
                append(plane, OF(picked)(bits, (uint32_t)mask), first);
                append(plane, OF(picked)(bits >> 32, mask >> 32), count - first);
            }
            bit <<= 1;
            mask = 0;
            for (int n = 0; n < VECTORS; n++) mask |= OF(with)(fill[n], bit) << n * ACROSS;
        }
        if (exceptions) {
            Unit numbers[CHUNK];
            for (int n = 0; n < VECTORS; n++) *(Units *)(numbers + n * ACROSS) = high[n];
            for (; exceptions; exceptions &= exceptions - 1) {
                int n = __builtin_ctzll(exceptions);
                at->at[at->exceptions] = (uint32_t)(place + j) + (uint32_t)n;
                at->high[at->exceptions++] = numbers[n];
            }
        }
    }
}

INLINE size_t OF(encode_as)(Tile *at, int dtype)
{
    size_t columns = at->columns, words = (columns + CHUNK - 1) / CHUNK;
    int comparable = (int)at->source == dtype;
    Bits largest = {0};
    Bitstream planes[MOST_PLANES + 1];
    for (int bit = 0; bit < MOST_PLANES; bit++) planes[bit] = (Bitstream){at->planes + bit * at->room, 0, 0};
    at->exceptions = 0;
    for (size_t i = 0, count; i < at->rows; i += count) {
        count = NAMED(predict, WIDTH)(at, i, at->P, at->above, &largest, dtype);
        for (size_t row = 0; row < count; row++) {
            size_t place = (i + row) * columns;
            const char *P = at->P + row * columns * SIZE, *after = comparable ? at->after + place * SIZE : NULL;
            OF(encode_row)(at, P, after, at->W + place * SIZE, at->above + row * words, place, planes, dtype);
        }
    }
    if (NAMED(is_special, WIDTH)(largest)) return SPECIAL;
    join(at, planes);
    at->form = at->exceptions * 16 < at->rows * columns ? SPARSE : DENSE;
    if (at->form == SPARSE) list(at);
    return DONE;
}

/* Count, for each plane, the numbers of a row whose ranks have a bit there. */
INLINE void OF(count_row)(const char *P, const char *after, size_t columns, size_t *counts, int dtype)
{
    enum { ACROSS = OF(ACROSS), VECTORS = OF(VECTORS) };
    Codes chunk;
    for (size_t j = 0; j < columns; j += CHUNK) {
        Units fill[VECTORS], bit = {0};
        uint64_t mask = 0;
        OF(take)(&chunk, P, after, NULL, j, columns);
        bit += 1;
        for (int n = 0; n < VECTORS; n++) {
            Units predicted = *(const Units *)(chunk.P + 4 * WIDTH * n);
            Units spread = OF(spread_of)(predicted, *(const Units *)(chunk.after + 4 * WIDTH * n), dtype);
            fill[n] = OF(shifted)(bit, spread) - 1;
            mask |= OF(with)(fill[n], bit) << n * ACROSS;
        }
        for (size_t *plane = counts; mask; plane++) {
            *plane += (size_t)__builtin_popcountll(mask);
            bit <<= 1;
            mask = 0;
            for (int n = 0; n < VECTORS; n++) mask |= OF(with)(fill[n], bit) << n * ACROSS;
        }
    }
}

/* Put the floats of the ranks in place of a row's predictions; `next` is the first exception that was not met yet. */
INLINE void OF(decode_row)(
    const Tile *at, char *P, const char *after, const uint64_t *above, size_t place, size_t *places, size_t *next,
    int dtype)
{
    enum { ACROSS = OF(ACROSS), VECTORS = OF(VECTORS) };
    Codes chunk;
    for (size_t j = 0; j < at->columns; j += CHUNK) {
        Units fill[VECTORS], rank[VECTORS], spread[VECTORS], bit = {0};
        uint64_t mask = 0;
        OF(take)(&chunk, P, after, NULL, j, at->columns);
        bit += 1;
        for (int n = 0; n < VECTORS; n++) {
            Units predicted = *(const Units *)(chunk.P + 4 * WIDTH * n);
            spread[n] = rank[n] = (Units){0};
            if (after) spread[n] = OF(spread_of)(predicted, *(const Units *)(chunk.after + 4 * WIDTH * n), dtype);
            fill[n] = OF(shifted)(bit, spread[n]) - 1;
            mask |= OF(with)(fill[n], bit) << n * ACROSS;
        }
        for (size_t *plane = places; mask; plane++) {
            unsigned count = (unsigned)__builtin_popcountll(mask), first = (unsigned)__builtin_popcount((uint32_t)mask);
            uint64_t bits;
            if (count <= 56) bits = OF(laid)(bits_at(at->packed, *plane, count), mask);
            else
                bits = OF(laid)(bits_at(at->packed, *plane, first), (uint32_t)mask) |
                       OF(laid)(bits_at(at->packed, *plane + first, count - first), mask >> 32) << 32;
            *plane += count;
            for (int n = 0; n < VECTORS; n++) rank[n] |= OF(chosen)(bits >> n * ACROSS) & bit;
            bit <<= 1;
            mask = 0;
            for (int n = 0; n < VECTORS; n++) mask |= OF(with)(fill[n], bit) << n * ACROSS;
        }
        size_t end = place + (j + CHUNK < at->columns ? j + CHUNK : at->columns);
        if (*next < at->exceptions && at->at[*next] < end) {
            Unit ranks[CHUNK], spreads[CHUNK];
            for (int n = 0; n < VECTORS; n++) {
                *(Units *)(ranks + n * ACROSS) = rank[n];
                *(Units *)(spreads + n * ACROSS) = spread[n];
            }
            for (; *next < at->exceptions && at->at[*next] < end; ++*next) { /* of two in one place the last counts */
                size_t n = at->at[*next] - place - j;
                ranks[n] = (Unit)((ranks[n] & ((1u << spreads[n]) - 1)) | at->high[*next] << spreads[n]);
            }
            for (int n = 0; n < VECTORS; n++) rank[n] = *(const Units *)(ranks + n * ACROSS);
        }
        char *to = j + CHUNK <= at->columns ? P + j * SIZE : chunk.some[0];
        for (int n = 0; n < VECTORS; n++) {
            Units predicted = *(const Units *)(chunk.P + 4 * WIDTH * n), side = OF(chosen)(above[j / CHUNK] >> n * ACROSS);
            Units steps = rank[n] >> 1 ^ -(rank[n] & 1);
            steps = (steps ^ side) - side;
            *(Units *)(to + 4 * WIDTH * n) = OF(ordered)(OF(ordered)(predicted) + steps);
        }
        if (to == chunk.some[0]) memcpy(P + j * SIZE, to, (at->columns - j) * SIZE);
    }
}

INLINE size_t OF(decode_as)(Tile *at, int dtype)
{
    size_t columns = at->columns, words = (columns + CHUNK - 1) / CHUNK, places[MOST_PLANES + 1] = {0}, total = 0;
    size_t next = 0;
    int comparable = (int)at->source == dtype;
    Bits largest = {0};
    for (size_t i = 0, count; i < at->rows; i += count) {
        char *P = at->P + i * columns * SIZE;
        const char *after = at->after + i * columns * SIZE;
        count = NAMED(predict, WIDTH)(at, i, P, at->above + i * words, &largest, dtype);
        for (size_t row = 0; comparable && row < count; row++)
            OF(count_row)(P + row * columns * SIZE, after + row * columns * SIZE, columns, places, dtype);
    }
    if (NAMED(is_special, WIDTH)(largest)) return SPECIAL;
    for (int bit = 0; bit < MOST_PLANES; bit++) { /* where each plane begins */
        size_t count = places[bit];
        places[bit] = total;
        total += count;
    }
    if ((total + 7) / 8 != at->packed_bytes || !listed(at)) return MISFIT;
    turn(at->packed, at->packed_bytes);
    for (size_t i = 0; i < at->rows; i++) {
        const char *after = comparable ? at->after + i * columns * SIZE : NULL;
        OF(decode_row)(
            at, at->P + i * columns * SIZE, after, at->above + i * words, i * columns, places, &next, dtype);
    }
    return DONE;
}

#undef OF
#undef Unit
#undef Units
#undef Signed
#undef Codes
