/* BF16, F16 and F32 as float32 and back, WIDTH numbers at a time, with the instructions of TARGET.
 *
 * `dtype` is a constant wherever these functions are inlined.
 */
#define Vector NAMED(Vector, WIDTH)
#define Bits NAMED(Bits, WIDTH)
#define Halves NAMED(Halves, WIDTH)

typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));

/* WIDTH stored numbers from element j on, as float32. */
INLINE Vector NAMED(widened, WIDTH)(const char *row, size_t j, int dtype)
{
    if (dtype == F32) return *(const Vector *)(row + 4 * j);
    Halves stored = *(const Halves *)(row + 2 * j);
#if WIDTH == 16 /* what the compiler makes of a conversion takes four instructions */
    if (dtype == BF16) return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)stored), 16);
    return (Vector)_mm512_cvtph_ps((__m256i)stored);
#else
#if WIDTH == 8
    if (dtype == BF16) return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)stored), 16);
    return (Vector)_mm256_cvtph_ps((__m128i)stored);
#else
    if (dtype == BF16) return (Vector)(__builtin_convertvector(stored, Bits) << 16);
    Vector numbers;
    for (int n = 0; n < WIDTH; n++) {
        _Float16 number;
        memcpy(&number, row + 2 * (j + n), 2);
        numbers[n] = (float)number;
    }
    return numbers;
#endif
#endif
}

/* The upper halves of numbers, rounded to nearest even. */
INLINE Bits NAMED(upper, WIDTH)(Bits bits) { return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; }

/* Store numbers from element j on, rounded to nearest even. */
INLINE void NAMED(round_to, WIDTH)(char *row, size_t j, Vector numbers, int dtype)
{
    if (dtype == F32) {
        *(Vector *)(row + 4 * j) = numbers;
        return;
    }
    if (dtype == BF16) {
        Bits bits = NAMED(upper, WIDTH)((Bits)numbers);
#if WIDTH == 16
        *(Halves *)(row + 2 * j) = (Halves)_mm512_cvtepi32_epi16((__m512i)bits);
#else
        *(Halves *)(row + 2 * j) = __builtin_convertvector(bits, Halves);
#endif
        return;
    }
#if WIDTH == 16
    *(Halves *)(row + 2 * j) = (Halves)_mm512_cvtps_ph((__m512)numbers, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif WIDTH == 8
    *(Halves *)(row + 2 * j) = (Halves)_mm256_cvtps_ph((__m256)numbers, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    for (int n = 0; n < WIDTH; n++) {
        _Float16 number = (_Float16)numbers[n];
        memcpy(row + 2 * (j + n), &number, 2);
    }
#endif
}

/* Numbers with every NaN as it usually is: one with other bits would be rounded to zero in BF16. */
INLINE Vector NAMED(plain_nan, WIDTH)(Vector numbers)
{
    Bits nan = (Bits)(numbers != numbers), bits = (Bits)numbers;
    return (Vector)((bits & ~(nan & 0x3fffff)) | (nan & 0x400000));
}

/* One number, as it is stored. */
INLINE uint16_t NAMED(half_of, WIDTH)(float x, int dtype)
{
    uint16_t block[WIDTH];
    Vector numbers = {x};
    NAMED(round_to, WIDTH)((char *)block, 0, numbers, dtype);
    return block[0];
}
