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
#elif WIDTH == 8 && SIZE == 4
    return (uint32_t)_mm256_movemask_ps((__m256)((numbers & some) != 0));
#else
    uint64_t mask = 0;
    for (int n = 0; n < OF(ACROSS); n++) mask |= (uint64_t)((numbers[n] & some[n]) != 0) << n;
    return mask;
#endif
}

/* A bit for each of CHUNK numbers that has one of some bits. */
INLINE uint64_t OF(with_any)(const Units *numbers, Units some)
{
    uint64_t mask = 0;
#if WIDTH == 8 && SIZE == 2
    for (int n = 0; n < OF(VECTORS); n += 2) { /* two at a time, and those that have none */
        __m256i x = (__m256i)((numbers[n] & some) == 0), y = (__m256i)((numbers[n + 1] & some) == 0);
        uint32_t none = (uint32_t)_mm256_movemask_epi8(_mm256_permute4x64_epi64(_mm256_packs_epi16(x, y), 0xd8));
        mask |= (uint64_t)~none << n * OF(ACROSS);
    }
#else
    for (int n = 0; n < OF(VECTORS); n++) mask |= OF(with)(numbers[n], some) << n * OF(ACROSS);
#endif
    return mask;
}

/* A bit for each of CHUNK numbers that is more than so many; both are small. */
INLINE uint64_t OF(with_more)(const Units *numbers, int than)
{
    uint64_t mask = 0;
    Signed least = {0};
    least += (short)than;
#if WIDTH == 8 && SIZE == 2
    for (int n = 0; n < OF(VECTORS); n += 2) {
        __m256i x = (__m256i)((Signed)numbers[n] > least), y = (__m256i)((Signed)numbers[n + 1] > least);
        uint32_t some = (uint32_t)_mm256_movemask_epi8(_mm256_permute4x64_epi64(_mm256_packs_epi16(x, y), 0xd8));
        mask |= (uint64_t)some << n * OF(ACROSS);
    }
#elif WIDTH == 16 && SIZE == 2
    for (int n = 0; n < OF(VECTORS); n++)
        mask |= (uint64_t)_mm512_cmpgt_epi16_mask((__m512i)numbers[n], (__m512i)least) << n * OF(ACROSS);
#elif WIDTH == 16
    for (int n = 0; n < OF(VECTORS); n++)
        mask |= (uint64_t)_mm512_cmpgt_epi32_mask((__m512i)numbers[n], (__m512i)least) << n * OF(ACROSS);
#else
    for (int n = 0; n < OF(VECTORS); n++) {
        Units more = (Units)((Signed)numbers[n] > least);
        mask |= OF(with)(more, more) << n * OF(ACROSS);
    }
#endif
    return mask;
}

/* All ones in each of CHUNK numbers whose bit is set. */
INLINE void OF(chosen)(uint64_t mask, Units *numbers)
{
#if WIDTH == 16 && SIZE == 2
    for (int n = 0; n < OF(VECTORS); n++) numbers[n] = (Units)_mm512_movm_epi16((__mmask32)(mask >> n * OF(ACROSS)));
#elif WIDTH == 16
    for (int n = 0; n < OF(VECTORS); n++) numbers[n] = (Units)_mm512_movm_epi32((__mmask16)(mask >> n * OF(ACROSS)));
#else
    Units bits; /* at most 16 across */
    for (int n = 0; n < OF(ACROSS); n++) bits[n] = (Unit)(1u << n);
    for (int n = 0; n < OF(VECTORS); n++) {
#if WIDTH == 8 && SIZE == 2
        __m256i words = _mm256_set1_epi16((short)(2 * n | (2 * n + 1) << 8)); /* two bytes of the mask, in all numbers */
        Units some = (Units)_mm256_shuffle_epi8(_mm256_set1_epi64x((int64_t)mask), words);
#else
        Units some = (Units){0} + (Unit)(mask >> n * OF(ACROSS));
#endif
        numbers[n] = (Units)((some & bits) == bits);
    }
#endif
}

/* Numbers whose lowest bits are ones, each so many: those of a rank that are open. */
INLINE Units OF(ones)(Units count, int dtype)
{
#if WIDTH == 8 && SIZE == 2 /* at most 10, or 7 of BF16, for which shuffles of bytes are a table */
    const __m256i low = _mm256_setr_epi8(
        0, 1, 3, 7, 15, 31, 63, 127, -1, -1, -1, 0, 0, 0, 0, 0, 0, 1, 3, 7, 15, 31, 63, 127, -1, -1, -1, 0, 0, 0, 0, 0);
    const __m256i high = _mm256_setr_epi8(
        0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 3, 0, 0, 0, 0, 0);
    if (dtype == BF16) return (Units)_mm256_shuffle_epi8(low, (__m256i)count); /* of none in the upper byte */
    __m256i all = _mm256_shuffle_epi8(low, _mm256_or_si256((__m256i)count, _mm256_set1_epi16((short)0x8000)));
    __m256i more = _mm256_slli_epi16((__m256i)count, 8);
    return (Units)_mm256_or_si256(all, _mm256_shuffle_epi8(high, _mm256_or_si256(more, _mm256_set1_epi16(0x80))));
#else
    Units bit = {0};
    (void)dtype;
    bit += 1;
    return (bit << count) - 1;
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
#if WIDTH == 8 && SIZE == 2
    __m256i exponents = _mm256_set1_epi16((short)EXPONENT[dtype]);
    __m256i over = _mm256_subs_epu16(_mm256_and_si256((__m256i)after, exponents), _mm256_and_si256((__m256i)P, exponents));
    return (Units)_mm256_min_epu16(_mm256_srli_epi16(over, MANTISSA[dtype]), _mm256_set1_epi16((short)MANTISSA[dtype]));
#else
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
        Units rank[VECTORS], spread[VECTORS], beyond[VECTORS], side[VECTORS], any = {0}, bit = {0};
        OF(take)(&chunk, P, after, W, j, at->columns);
        OF(chosen)(above[j / CHUNK], side);
        bit += 1;
        for (int n = 0; n < VECTORS; n++) {
            Units predicted = *(const Units *)(chunk.P + 4 * WIDTH * n), base = *(const Units *)(chunk.W + 4 * WIDTH * n);
            spread[n] = (Units){0};
            if (after) spread[n] = OF(spread_of)(predicted, *(const Units *)(chunk.after + 4 * WIDTH * n), dtype);
            Units steps = OF(ordered)(base) - OF(ordered)(predicted);
            steps = (steps ^ side[n]) - side[n]; /* negated where the prediction lies above */
            rank[n] = steps << 1 ^ (Units)((Signed)steps >> (8 * SIZE - 1));
            beyond[n] = rank[n] & ~OF(ones)(spread[n], dtype);
            any |= beyond[n];
        }
        uint64_t exceptions = NAMED(any, WIDTH)((Bits)any) ? OF(with_any)(beyond, ~(Units){0}) : 0;
        uint64_t mask = OF(with_more)(spread, 0);
        for (Bitstream *plane = planes; mask; plane++) {
            uint64_t bits = OF(with_any)(rank, bit);
            unsigned count = (unsigned)__builtin_popcountll(mask);
            if (count <= 56) {
                append(plane, OF(picked)(bits, mask), count);
            } else {
                unsigned first = (unsigned)__builtin_popcount((uint32_t)mask);
                append(plane, OF(picked)(bits, (uint32_t)mask), first);
                append(plane, OF(picked)(bits >> 32, mask >> 32), count - first);
            }
            bit <<= 1;
            mask = OF(with_more)(spread, (int)(plane - planes) + 1);
        }
        if (exceptions) {
            Unit ranks[CHUNK], spreads[CHUNK];
            for (int n = 0; n < VECTORS; n++) {
                *(Units *)(ranks + n * ACROSS) = rank[n];
                *(Units *)(spreads + n * ACROSS) = spread[n];
            }
            for (; exceptions; exceptions &= exceptions - 1) {
                int n = __builtin_ctzll(exceptions);
                at->at[at->exceptions] = (uint32_t)(place + j) + (uint32_t)n;
                at->high[at->exceptions++] = (uint32_t)ranks[n] >> spreads[n];
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
    at->form = at->exceptions * 16 >= at->rows * columns ? DENSE : at->exceptions > FEW ? SPARSE : LISTED;
    if (at->form != DENSE) list(at);
    return DONE;
}

/* Note which numbers of a row have ranks with a bit in each plane, for every chunk to the first plane without, and count
 * them; return the end of the notes. */
INLINE uint64_t *OF(open_row)(const char *P, const char *after, size_t columns, size_t *counts, uint64_t *notes, int dtype)
{
    enum { VECTORS = OF(VECTORS) };
    Codes chunk;
    for (size_t j = 0; j < columns; j += CHUNK) {
        Units spread[VECTORS];
        OF(take)(&chunk, P, after, NULL, j, columns);
        for (int n = 0; n < VECTORS; n++) {
            Units predicted = *(const Units *)(chunk.P + 4 * WIDTH * n);
            spread[n] = OF(spread_of)(predicted, *(const Units *)(chunk.after + 4 * WIDTH * n), dtype);
        }
        for (int plane = 0; (*notes++ = OF(with_more)(spread, plane)); plane++)
            counts[plane] += (size_t)__builtin_popcountll(notes[-1]);
    }
    return notes;
}

/* Put the floats of the ranks in place of a row's predictions; `next` is the first exception that was not met yet.
 * `notes` are those of the row; their end is returned. */
INLINE const uint64_t *OF(decode_row)(
    const Tile *at, char *P, const char *after, const uint64_t *above, size_t place, size_t *places,
    const uint64_t *notes, size_t *next, int dtype)
{
    enum { ACROSS = OF(ACROSS), VECTORS = OF(VECTORS) };
    Codes chunk;
    for (size_t j = 0; j < at->columns; j += CHUNK) {
        Units rank[VECTORS], some[VECTORS], bit = {0};
        OF(take)(&chunk, P, after, NULL, j, at->columns);
        bit += 1;
        for (int n = 0; n < VECTORS; n++) rank[n] = (Units){0};
        for (size_t *plane = places; after && *notes; plane++, notes++) {
            uint64_t mask = *notes, bits;
            unsigned count = (unsigned)__builtin_popcountll(mask), first = (unsigned)__builtin_popcount((uint32_t)mask);
            if (count <= 56) bits = OF(laid)(bits_at(at->packed, *plane, count), mask);
            else
                bits = OF(laid)(bits_at(at->packed, *plane, first), (uint32_t)mask) |
                       OF(laid)(bits_at(at->packed, *plane + first, count - first), mask >> 32) << 32;
            *plane += count;
            OF(chosen)(bits, some);
            for (int n = 0; n < VECTORS; n++) rank[n] |= some[n] & bit;
            bit <<= 1;
        }
        notes += after != NULL;
        size_t end = place + (j + CHUNK < at->columns ? j + CHUNK : at->columns);
        if (*next < at->exceptions && at->at[*next] < end) {
            Unit ranks[CHUNK], spreads[CHUNK];
            for (int n = 0; n < VECTORS; n++) {
                Units predicted = *(const Units *)(chunk.P + 4 * WIDTH * n), spread = {0};
                if (after) spread = OF(spread_of)(predicted, *(const Units *)(chunk.after + 4 * WIDTH * n), dtype);
                *(Units *)(ranks + n * ACROSS) = rank[n];
                *(Units *)(spreads + n * ACROSS) = spread;
            }
            for (; *next < at->exceptions && at->at[*next] < end; ++*next) { /* of two in one place the last counts */
                size_t n = at->at[*next] - place - j;
                ranks[n] = (Unit)((ranks[n] & ((1u << spreads[n]) - 1)) | at->high[*next] << spreads[n]);
            }
            for (int n = 0; n < VECTORS; n++) rank[n] = *(const Units *)(ranks + n * ACROSS);
        }
        char *to = j + CHUNK <= at->columns ? P + j * SIZE : chunk.some[0];
        OF(chosen)(above[j / CHUNK], some);
        for (int n = 0; n < VECTORS; n++) {
            Units predicted = *(const Units *)(chunk.P + 4 * WIDTH * n), steps = rank[n] >> 1 ^ -(rank[n] & 1);
            steps = (steps ^ some[n]) - some[n];
            *(Units *)(to + 4 * WIDTH * n) = OF(ordered)(OF(ordered)(predicted) + steps);
        }
        if (to == chunk.some[0]) memcpy(P + j * SIZE, to, (at->columns - j) * SIZE);
    }
    return notes;
}

INLINE size_t OF(decode_as)(Tile *at, int dtype)
{
    size_t columns = at->columns, words = (columns + CHUNK - 1) / CHUNK, places[MOST_PLANES + 1] = {0}, total = 0;
    size_t next = 0;
    int comparable = (int)at->source == dtype;
    uint64_t *end = at->notes;
    const uint64_t *notes = at->notes;
    Bits largest = {0};
    for (size_t i = 0, count; i < at->rows; i += count) {
        char *P = at->P + i * columns * SIZE;
        const char *after = at->after + i * columns * SIZE;
        count = NAMED(predict, WIDTH)(at, i, P, at->above + i * words, &largest, dtype);
        for (size_t row = 0; comparable && row < count; row++)
            end = OF(open_row)(P + row * columns * SIZE, after + row * columns * SIZE, columns, places, end, dtype);
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
        notes = OF(decode_row)(
            at, at->P + i * columns * SIZE, after, at->above + i * words, i * columns, places, notes, &next, dtype);
    }
    return DONE;
}

#undef OF
#undef Unit
#undef Units
#undef Signed
#undef Codes
