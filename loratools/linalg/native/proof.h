/* The arithmetic of proof.c for vectors of WIDTH float64, with the instructions of TARGET, TOGETHER sums at a time.
 *
 * `before` and `after`, the dtypes, are constants wherever these functions are inlined.
 */
#define Doubles NAMED(Doubles, WIDTH)
#define Counts NAMED(Counts, WIDTH)
#define Floats NAMED(Floats, WIDTH)
#define Bits NAMED(Bits, WIDTH)
#define Halves NAMED(Halves, WIDTH)

typedef double Doubles __attribute__((vector_size(8 * WIDTH), aligned(8), may_alias));
typedef int64_t Counts __attribute__((vector_size(8 * WIDTH), aligned(8), may_alias));
typedef float Floats __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));

#define VECTORS (LANES / WIDTH)

INLINE Floats NAMED(floats_of, WIDTH)(Halves stored)
{
#if WIDTH == 8
    return (Floats)_mm256_cvtph_ps((__m128i)stored);
#elif WIDTH == 4
    int64_t bits;
    memcpy(&bits, &stored, 8);
    return (Floats)_mm_cvtph_ps(_mm_cvtsi64_si128(bits));
#else
    Floats numbers;
    for (int n = 0; n < WIDTH; n++) {
        uint16_t bits = stored[n];
        _Float16 number;
        memcpy(&number, &bits, 2);
        numbers[n] = (float)number;
    }
    return numbers;
#endif
}

/* Conversions by single instructions, where GCC makes several of `__builtin_convertvector`. */
INLINE Doubles NAMED(wide, WIDTH)(Floats numbers)
{
#if WIDTH == 8
    return (Doubles)_mm512_cvtps_pd((__m256)numbers);
#elif WIDTH == 4
    return (Doubles)_mm256_cvtps_pd((__m128)numbers);
#else
    return __builtin_convertvector(numbers, Doubles);
#endif
}

INLINE Floats NAMED(single, WIDTH)(Doubles numbers)
{
#if WIDTH == 8
    return (Floats)_mm512_cvtpd_ps((__m512d)numbers);
#elif WIDTH == 4
    return (Floats)_mm256_cvtpd_ps((__m256d)numbers);
#else
    return __builtin_convertvector(numbers, Floats);
#endif
}

INLINE Bits NAMED(bits_of, WIDTH)(Halves stored)
{
#if WIDTH == 8
    return (Bits)_mm256_cvtepu16_epi32((__m128i)stored);
#elif WIDTH == 4
    int64_t bits;
    memcpy(&bits, &stored, 8);
    return (Bits)_mm_cvtepu16_epi32(_mm_cvtsi64_si128(bits));
#else
    return __builtin_convertvector(stored, Bits);
#endif
}

/* What is stored from element j on, exactly. */
INLINE Doubles NAMED(load, WIDTH)(const char *stored, size_t j, int dtype)
{
    if (dtype == F32) return NAMED(wide, WIDTH)(*(const Floats *)(stored + 4 * j));
    Halves bits = *(const Halves *)(stored + 2 * j);
    if (dtype == F16) return NAMED(wide, WIDTH)(NAMED(floats_of, WIDTH)(bits));
    return NAMED(wide, WIDTH)((Floats)(NAMED(bits_of, WIDTH)(bits) << 16));
}

/* Numbers rounded to a dtype, to nearest even; by way of float32, as all who round do. */
INLINE Doubles NAMED(rounded, WIDTH)(Doubles numbers, int dtype)
{
    Floats single = NAMED(single, WIDTH)(numbers);
    if (dtype == BF16) {
        Bits nan = (Bits)(single != single), bits = (Bits)single;
        Bits near = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
        single = (Floats)((near & ~nan) | (bits & nan));
    }
    if (dtype == F16) {
#if WIDTH == 8
        single = (Floats)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)single, _MM_FROUND_TO_NEAREST_INT));
#elif WIDTH == 4
        single = (Floats)_mm_cvtph_ps(_mm_cvtps_ph((__m128)single, _MM_FROUND_TO_NEAREST_INT));
#else
        for (int n = 0; n < WIDTH; n++) single[n] = (float)(_Float16)single[n];
#endif
    }
    return NAMED(wide, WIDTH)(single);
}

INLINE Doubles NAMED(chosen, WIDTH)(Counts which, Doubles these, Doubles others)
{
    return (Doubles)(((Counts)these & which) | ((Counts)others & ~which));
}

INLINE Doubles NAMED(magnitude, WIDTH)(Doubles numbers) { return (Doubles)((Counts)numbers & INT64_MAX); }

INLINE double NAMED(folded, WIDTH)(const Doubles *lanes)
{
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += lanes[lane / WIDTH][lane % WIDTH];
    return sum;
}

INLINE uint64_t NAMED(counted, WIDTH)(Counts lanes)
{
    uint64_t count = 0;
    for (int n = 0; n < WIDTH; n++) count += (uint64_t)lanes[n];
    return count;
}

/* Put W' - W of some rows and columns in D, `pitch` numbers from row to row; add to the sums. */
INLINE void NAMED(differences, WIDTH)(
    const Region *at, size_t i, size_t j, size_t rows, size_t columns, double *D, size_t pitch, Doubles *squares,
    Counts *differing, int before, int after)
{
    size_t sizes[] = {before == F32 ? 4 : 2, after == F32 ? 4 : 2};
    Doubles sums[VECTORS];
    Counts count = *differing;
    for (int n = 0; n < VECTORS; n++) sums[n] = squares[n];
    for (size_t row = 0; row < rows; row++, D += pitch) {
        size_t first = (i + row) * at->stride + j;
        const char *old = at->before + first * sizes[0], *new = at->after + first * sizes[1];
        for (size_t c = 0; c < columns; c += LANES) {
            char last[2][4 * LANES]; /* zeros stand after the last columns */
            size_t from = c;
            const char *W = old, *result = new;
            if (c + LANES > columns) {
                memset(last, 0, sizeof last);
                memcpy(last[0], old + c * sizes[0], (columns - c) * sizes[0]);
                memcpy(last[1], new + c * sizes[1], (columns - c) * sizes[1]);
                W = last[0], result = last[1], from = 0;
            }
            for (int n = 0; n < VECTORS; n++) {
                Doubles number = NAMED(load, WIDTH)(result, from + n * WIDTH, after);
                Doubles delta = number - NAMED(load, WIDTH)(W, from + n * WIDTH, before);
                sums[n] += number * number;
                count -= (Counts)(delta != 0);
                *(Doubles *)(D + c + n * WIDTH) = delta;
            }
        }
    }
    for (int n = 0; n < VECTORS; n++) squares[n] = sums[n];
    *differing = count;
}

/* Add sum over s of D(t, s)·X(s) to Y(t), for `targets` targets, a constant where this is inlined. */
INLINE void NAMED(products, WIDTH)(
    const double *D, size_t to_target, size_t to_source, size_t sources, const double *X, double *Y, int targets)
{
    enum { PARTS = PROBES / WIDTH };
    Doubles sum[TOGETHER][PARTS]; /* these stay in registers */
    for (int t = 0; t < targets; t++)
        for (int n = 0; n < PARTS; n++) sum[t][n] = *(const Doubles *)(Y + t * PROBES + n * WIDTH);
    for (size_t s = 0; s < sources; s++, X += PROBES, D += to_source)
        for (int t = 0; t < targets; t++)
            for (int n = 0; n < PARTS; n++) sum[t][n] += D[t * to_target] * *(const Doubles *)(X + n * WIDTH);
    for (int t = 0; t < targets; t++)
        for (int n = 0; n < PARTS; n++) *(Doubles *)(Y + t * PROBES + n * WIDTH) = sum[t][n];
}

INLINE void NAMED(project, WIDTH)(
    const double *D, size_t to_target, size_t to_source, size_t targets, size_t sources, const double *X, double *Y)
{
    size_t t = 0;
    for (; t + TOGETHER <= targets; t += TOGETHER)
        NAMED(products, WIDTH)(D + t * to_target, to_target, to_source, sources, X, Y + t * PROBES, TOGETHER);
    for (; t < targets; t++)
        NAMED(products, WIDTH)(D + t * to_target, to_target, to_source, sources, X, Y + t * PROBES, 1);
}

INLINE void NAMED(measure_as, WIDTH)(Region *at, int before, int after)
{
    double D[BLOCK] __attribute__((aligned(64)));
    size_t wide = at->across ? 64 : 256, high = BLOCK / wide;
    Doubles squares[VECTORS] = {{0}};
    Counts differing = {0};
    for (size_t j = 0; j < at->columns; j += wide)
        for (size_t i = 0; i < at->rows; i += high) {
            size_t rows = least_of(high, at->rows - i), columns = least_of(wide, at->columns - j);
            NAMED(differences, WIDTH)(at, i, j, rows, columns, D, wide, squares, &differing, before, after);
            if (!at->X) continue;
            if (at->across)
                NAMED(project, WIDTH)(D, 1, wide, columns, rows, at->X + i * PROBES, at->Y + j * PROBES);
            else
                NAMED(project, WIDTH)(D, wide, 1, rows, columns, at->X + j * PROBES, at->Y + i * PROBES);
        }
    at->squares = NAMED(folded, WIDTH)(squares);
    at->differing = NAMED(counted, WIDTH)(differing);
}

/* What some elements of a row are, and may be. */
INLINE void NAMED(elements, WIDTH)(
    const Elements *at, const char *W, const char *result, const double *change, size_t j, double least, Doubles *actual,
    Doubles *expected, Doubles *total, Counts *wrong, Counts *far, int before, int after)
{
    for (int n = 0; n < VECTORS; n++, j += WIDTH) {
        Doubles old = NAMED(load, WIDTH)(W, j, before), new = NAMED(load, WIDTH)(result, j, after);
        Doubles delta = *(const Doubles *)(change + n * WIDTH), exact = old + delta;
        Doubles right = NAMED(rounded, WIDTH)(exact, after), off = NAMED(magnitude, WIDTH)(right - new);
        Counts fits;
        if (at->ties) {
            Doubles beside = NAMED(magnitude, WIDTH)(exact - (right + new) / 2);
            fits = (Counts)(beside <= at->unit * (NAMED(magnitude, WIDTH)(old) + at->reach)) | (Counts)(off == 0);
        } else {
            Doubles largest = NAMED(magnitude, WIDTH)(right), other = NAMED(magnitude, WIDTH)(new);
            largest = NAMED(chosen, WIDTH)((Counts)(other > largest), other, largest);
            other = NAMED(magnitude, WIDTH)(delta);
            if (at->of_change) largest = NAMED(chosen, WIDTH)((Counts)(other > largest), other, largest);
            largest *= at->unit;
            Doubles floor = least - (Doubles){0};
            largest = NAMED(chosen, WIDTH)((Counts)(largest < floor), floor, largest);
            fits = (Counts)(off <= largest) & (Counts)(off < __builtin_inf());
        }
        *far -= ~fits;
        *wrong -= (Counts)(off != 0);
        actual[n] += (new - old) * delta;
        expected[n] += (right - old) * delta;
        total[n] += delta * delta;
    }
}

INLINE void NAMED(compare_as, WIDTH)(Elements *at, int before, int after)
{
    size_t sizes[] = {before == F32 ? 4 : 2, after == F32 ? 4 : 2};
    double least = at->smallest, largest = 0;
    Doubles actual[VECTORS] = {{0}}, expected[VECTORS] = {{0}}, total[VECTORS] = {{0}};
    Counts wrong = {0}, far = {0};
    for (int pass = at->terms ? 0 : 1; pass < 2; pass++) { /* the first one finds the largest number before */
        if (pass && at->terms * (largest + at->reach) > least) least = at->terms * (largest + at->reach);
        for (size_t i = 0; i < at->rows; i++) {
            size_t first = (at->row_at ? at->row_at[i] : i) * at->stride;
            const char *old = at->before + first * sizes[0], *new = at->after + first * sizes[1];
            for (size_t j = 0; j < at->columns; j += LANES) {
                const double *change = at->change + i * at->pitch + j;
                const char *W = old, *result = new;
                char some[2][4 * LANES];
                double ends[LANES];
                size_t count = least_of(LANES, at->columns - j), from = j;
                if (at->column_at || count < LANES) { /* zeros stand after the last ones */
                    if (count < LANES) memset(some, 0, sizeof some);
                    for (size_t n = 0; n < count; n++) {
                        size_t column = at->column_at ? at->column_at[j + n] : j + n;
                        memcpy(some[0] + n * sizes[0], old + column * sizes[0], sizes[0]);
                        memcpy(some[1] + n * sizes[1], new + column * sizes[1], sizes[1]);
                    }
                    W = some[0], result = some[1], from = 0;
                }
                if (!pass) {
                    for (int n = 0; n < VECTORS; n++) {
                        Doubles number = NAMED(magnitude, WIDTH)(NAMED(load, WIDTH)(W, from + n * WIDTH, before));
                        for (int lane = 0; lane < WIDTH; lane++)
                            if (number[lane] > largest) largest = number[lane];
                    }
                    continue;
                }
                if (count < LANES) {
                    memset(ends, 0, sizeof ends);
                    memcpy(ends, change, count * sizeof *ends);
                    change = ends;
                }
                NAMED(elements, WIDTH)(
                    at, W, result, change, from, least, actual, expected, total, &wrong, &far, before, after);
            }
        }
    }
    at->wrong = NAMED(counted, WIDTH)(wrong), at->far = NAMED(counted, WIDTH)(far);
    at->actual = NAMED(folded, WIDTH)(actual), at->expected = NAMED(folded, WIDTH)(expected);
    at->total = NAMED(folded, WIDTH)(total);
}

/* Inline `function` for each pair of dtypes. */
#define FOR_DTYPES(function, at)                                                    \
    switch (at->before_dtype * 3 + at->after_dtype) {                               \
    case BF16 * 3 + BF16: NAMED(function, WIDTH)(at, BF16, BF16); break;            \
    case BF16 * 3 + F16: NAMED(function, WIDTH)(at, BF16, F16); break;              \
    case BF16 * 3 + F32: NAMED(function, WIDTH)(at, BF16, F32); break;              \
    case F16 * 3 + BF16: NAMED(function, WIDTH)(at, F16, BF16); break;              \
    case F16 * 3 + F16: NAMED(function, WIDTH)(at, F16, F16); break;                \
    case F16 * 3 + F32: NAMED(function, WIDTH)(at, F16, F32); break;                \
    case F32 * 3 + BF16: NAMED(function, WIDTH)(at, F32, BF16); break;              \
    case F32 * 3 + F16: NAMED(function, WIDTH)(at, F32, F16); break;                \
    default: NAMED(function, WIDTH)(at, F32, F32);                                  \
    }

/* Sum the squares of what is after, count what differs, and add the products of the differences with the probes. */
static TARGET void NAMED(measure, WIDTH)(Region *at) { FOR_DTYPES(measure_as, at) }

/* Compare elements with before + change, rounded. With `ties` a number may be its neighbour only where the exact sum
 * lies between the two as nearly as `unit` of the terms, |before| + `reach`. Otherwise it may be off by `unit` of the
 * largest of both numbers, and `of_change` of the change, and by `smallest`, or by `terms` of the largest terms. NaN is
 * far from every number. */
static TARGET void NAMED(compare, WIDTH)(Elements *at) { FOR_DTYPES(compare_as, at) }
