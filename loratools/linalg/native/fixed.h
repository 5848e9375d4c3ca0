/* Factors in fixed point, and laid out for products, with the instructions of TARGET: see `_fixed` in
 * engine/residual/predict.py, whose numbers these are.
 */

/* Round numbers to multiples of 1 / up, a power of two as 1 / up is. */
INLINE double NAMED(rounded_by, WIDTH)(double number, double up, double down)
{
    return __builtin_rint(number * up) * down;
}

static TARGET size_t NAMED(fix, WIDTH)(Factor *at)
{
    size_t rows = at->rows, columns = at->columns, count = at->across ? rows : columns;
    double *up = at->scales, *down = up + count;
    for (size_t n = 0; n < count; n++) up[n] = 0; /* the largest magnitudes first */
    for (size_t i = 0; i < rows; i++) {
        const double *row = at->factor + i * columns;
        double largest = 0;
        if (at->across) {
            for (size_t j = 0; j < columns; j++) largest = __builtin_fabs(row[j]) > largest ? __builtin_fabs(row[j]) : largest;
            up[i] = largest;
        } else {
            for (size_t j = 0; j < columns; j++) up[j] = __builtin_fabs(row[j]) > up[j] ? __builtin_fabs(row[j]) : up[j];
        }
    }
    for (size_t n = 0; n < count; n++) {
        uint64_t bits;
        memcpy(&bits, up + n, 8);
        int64_t shift = (int64_t)at->bits - (bits ? (int64_t)(bits >> 52) - 1022 : 0); /* less than 2^that */
        if (shift < -1000 || shift > 1000) return 0; /* 2^shift, or what it makes of a number, may be no float64 */
        uint64_t powers[2] = {(uint64_t)(1023 + shift) << 52, (uint64_t)(1023 - shift) << 52};
        memcpy(up + n, powers, 8);
        memcpy(down + n, powers + 1, 8);
    }
    for (size_t i = 0; i < rows; i++) {
        double *row = at->factor + i * columns;
        if (at->across)
            for (size_t j = 0; j < columns; j++) row[j] = NAMED(rounded_by, WIDTH)(row[j], up[i], down[i]);
        else
            for (size_t j = 0; j < columns; j++) row[j] = NAMED(rounded_by, WIDTH)(row[j], up[j], down[j]);
    }
    return 1;
}

/* Store numbers in float32; return whether it holds them. */
INLINE int NAMED(narrowed, WIDTH)(const double *numbers, float *to, size_t count)
{
    int lost = 0;
    for (size_t n = 0; n < count; n++) {
        to[n] = (float)numbers[n];
        lost |= (double)to[n] != numbers[n];
    }
    return !lost;
}

/* A norm times `by` as float32, which is not 0 unless the norm is. */
INLINE float NAMED(bound, WIDTH)(double squares, double by)
{
    double error = __builtin_sqrt(squares) * by;
    return (float)(error > 0 && error < FLT_MIN ? FLT_MIN : error);
}

static TARGET size_t NAMED(lay_out, WIDTH)(Factors *at)
{
    size_t rank = at->rank, count = (at->columns + LANES - 1) / LANES;
    double largest = 0;
    at->held = NAMED(narrowed, WIDTH)(at->left, at->near_left, at->rows * rank);
    for (size_t p = 0; p < count; p++) {
        double *panel = at->panels + p * rank * LANES, squares[LANES] = {0}, most = 0;
        size_t some = at->columns - p * LANES < LANES ? at->columns - p * LANES : LANES;
        for (size_t k = 0; k < rank; k++, panel += LANES) {
            memcpy(panel, at->right + k * at->columns + p * LANES, some * 8);
            memset(panel + some, 0, (LANES - some) * 8);
            for (size_t n = 0; n < LANES; n++) squares[n] += panel[n] * panel[n];
        }
        for (size_t n = 0; n < LANES; n++) most = squares[n] > most ? squares[n] : most;
        panel -= rank * LANES;
        at->held &= NAMED(narrowed, WIDTH)(panel, at->near_panels + p * rank * LANES, rank * LANES);
        at->panel_error[p] = NAMED(bound, WIDTH)(most, 1.01);
        largest = most > largest ? most : largest;
    }
    /* `rank` sums and the exact one are rounded, by at most 2^-24 of |left|·|right| each, and so are factors that
     * float32 does not hold; 1 more is for what is of second order. */
    double by = (double)(rank + (at->held ? 2 : 4)) * 0x1p-24 * 1.01;
    for (size_t i = 0; i < at->rows; i++) {
        double squares = 0;
        for (size_t k = 0; k < rank; k++) squares += at->left[i * rank + k] * at->left[i * rank + k];
        at->row_error[i] = NAMED(bound, WIDTH)(squares, by);
        largest = squares > largest ? squares : largest;
    }
    return largest < 0x1p40; /* norms below 2^20, up to which this is a bound */
}
