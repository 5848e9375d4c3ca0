/* The arithmetic of codes.c for vectors of WIDTH numbers, with the instructions of TARGET; 1 for a processor of any kind.
 *
 * `form` is a constant wherever these functions are inlined.
 */
#if WIDTH > 1
#define Vector NAMED(Vector, WIDTH)
#define Bits NAMED(Bits, WIDTH)
typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

/* WIDTH halves of 16 bits as float32, from WIDTH bytes: E5M2 as it is, E4M3 with the exponent's place moved. */
INLINE Vector NAMED(small_floats, WIDTH)(const uint8_t *codes, int form)
{
#if WIDTH == 16
    __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)codes)), halves = _mm256_slli_epi16(wide, 8);
    if (form == E4M3)
        halves = _mm256_or_si256(_mm256_and_si256(halves, _mm256_set1_epi16((short)0x8000)),
                                 _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f)), 7));
    Vector x = (Vector)_mm512_cvtph_ps(halves);
#else
    __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)codes)), halves = _mm_slli_epi16(wide, 8);
    if (form == E4M3)
        halves = _mm_or_si128(_mm_and_si128(halves, _mm_set1_epi16((short)0x8000)),
                              _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x7f)), 7));
    Vector x = (Vector)_mm256_cvtph_ps(halves);
#endif
    if (form == E4M3) x *= 256.0f; /* exact: the bias is 7, that of a half is 15 */
    /* E4M3 has no infinities, and NaN where 480 would be. */
    Bits nan = form == E4M3 ? (Bits)(((Bits)x & 0x7fffffff) == 0x43f00000) : (Bits)(x != x);
    return (Vector)(((Bits)x & ~nan) | (nan & 0x7fc00000));
}

/* WIDTH numbers from element j on, of which nibbles begin at a whole byte. */
INLINE Vector NAMED(numbers, WIDTH)(const Codes *at, const uint8_t *row, size_t j, int form)
{
    if (form == E4M3 || form == E5M2) return NAMED(small_floats, WIDTH)(row + j, form);
    if (form == LOW_FIRST || form == HIGH_FIRST) {
        __m128i bytes, low = _mm_set1_epi16(15);
#if WIDTH == 16
        bytes = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)(row + j / 2)));
#else
        int four;
        memcpy(&four, row + j / 2, 4);
        bytes = _mm_cvtepu8_epi16(_mm_cvtsi32_si128(four));
#endif
        __m128i lower = _mm_and_si128(bytes, low), upper = _mm_srli_epi16(bytes, 4);
        __m128i apart = form == LOW_FIRST ? _mm_or_si128(lower, _mm_slli_epi16(upper, 8))
                                          : _mm_or_si128(upper, _mm_slli_epi16(lower, 8));
#if WIDTH == 16
        return (Vector)_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(apart), _mm512_loadu_ps(at->table));
#else
        __m256i places = _mm256_cvtepu8_epi32(apart);
        __m256 first = _mm256_permutevar8x32_ps(_mm256_loadu_ps(at->table), places);
        __m256 second = _mm256_permutevar8x32_ps(_mm256_loadu_ps(at->table + 8), places);
        return (Vector)_mm256_blendv_ps(first, second, _mm256_castsi256_ps(_mm256_slli_epi32(places, 28)));
#endif
    }
    if (form == SIGNED) {
#if WIDTH == 16
        return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(row + j))));
#else
        return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(row + j))));
#endif
    }
    Vector gathered;
    for (int n = 0; n < WIDTH; n++) gathered[n] = at->table[row[j + n]];
    return gathered;
}
#endif

INLINE void NAMED(decode_rows, WIDTH)(const Codes *at, int form, int scaled, int shifted)
{
    size_t columns = at->columns;
    for (size_t i = 0; i < at->rows; i++) {
        const uint8_t *row = at->codes + i * at->pitch;
        float *out = at->out + i * columns;
        for (size_t g = 0; g < at->groups; g++) {
            size_t j = g * at->width, last = j + at->width < columns ? j + at->width : columns;
            float scale = scaled ? at->scales[i * at->groups + g] : 1, zero = shifted ? at->zeros[i * at->groups + g] : 0;
#if WIDTH > 1
            if (!((form == LOW_FIRST || form == HIGH_FIRST) && (j & 1)))
                for (; j + WIDTH <= last; j += WIDTH) {
                    Vector x = NAMED(numbers, WIDTH)(at, row, j, form);
                    if (shifted) x -= zero;
                    if (scaled) x *= scale;
                    *(Vector *)(out + j) = x;
                }
#endif
            for (; j < last; j++) {
                float x = number(at, row, j, form);
                if (shifted) x -= zero;
                if (scaled) x *= scale;
                out[j] = x;
            }
        }
    }
}

INLINE void NAMED(decode_form, WIDTH)(const Codes *at, int form)
{
    if (!at->scales) NAMED(decode_rows, WIDTH)(at, form, 0, 0);
    else if (!at->zeros) NAMED(decode_rows, WIDTH)(at, form, 1, 0);
    else NAMED(decode_rows, WIDTH)(at, form, 1, 1);
}

static TARGET void NAMED(decode, WIDTH)(const Codes *at)
{
    switch (at->form) {
    case LOW_FIRST: NAMED(decode_form, WIDTH)(at, LOW_FIRST); break;
    case HIGH_FIRST: NAMED(decode_form, WIDTH)(at, HIGH_FIRST); break;
    case SIGNED: NAMED(decode_form, WIDTH)(at, SIGNED); break;
    case E4M3: NAMED(decode_form, WIDTH)(at, E4M3); break;
    case E5M2: NAMED(decode_form, WIDTH)(at, E5M2); break;
    default: NAMED(decode_form, WIDTH)(at, BYTES);
    }
}
