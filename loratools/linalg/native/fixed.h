/* Factors in fixed point, with the instructions of TARGET: see `_fixed` in engine/residual/predict.py, whose numbers
 * these are.
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
