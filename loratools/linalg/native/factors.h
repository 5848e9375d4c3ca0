/* Stored factors as add_products takes them: left and the factor row after row, right in panels.
 *
 * A sum of products has them side by side along the rank; each product is put in its place by a call.
 */

/* A stored matrix: element (i, j) is number first + i·down + j·across of `raw`. */
typedef struct {
    const char *raw;
    size_t dtype, count, first, down, across; /* `count` numbers are in `raw` */
} Matrix;

/* The same fields, in the same order, as `_Sum` in factors.py. */
typedef struct {
    size_t rows, columns, rank; /* of the whole sum */
    float *factor, *left, *right;
    double *scale, *magnitude; /* `magnitude` may be NULL */
} Sum;

/* Whether a number is NaN or infinite, by its bits: all ones in the exponent. */
static uint32_t odd(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return (bits & 0x7f800000) == 0x7f800000;
}

/* Return the numbers of a matrix as float32: where they are, or in `memory` for `count` of them. */
static const float *numbers_of(const Matrix *matrix, float *memory)
{
    if (matrix->dtype == F32) return (const float *)matrix->raw;
    loratools_widen(matrix->raw, matrix->count, matrix->dtype, memory);
    return memory;
}

/* Put left·scale·right into the sum, from `offset` of its rank on; `memory` is for the numbers of either matrix.
 * Return whether all numbers are finite. */
int loratools_add_factors(
    const Sum *to, const Matrix *left, const Matrix *right, size_t offset, size_t rank, double scale, float *memory)
{
    uint32_t bad = 0;
    const float *numbers = numbers_of(left, memory) + left->first;
    for (size_t i = 0; i < to->rows; i++)
        for (size_t k = 0; k < rank; k++) {
            float x = numbers[i * left->down + k * left->across];
            bad |= odd(x);
            to->factor[i * to->rank + offset + k] = x;
            to->left[i * to->rank + offset + k] = (float)((double)x * scale);
        }
    numbers = numbers_of(right, memory) + right->first;
    for (size_t k = 0; k < rank; k++) {
        to->scale[offset + k] = scale;
        for (size_t j = 0; j < to->columns; j += LANES) {
            size_t count = to->columns - j < LANES ? to->columns - j : LANES;
            float *panel = to->right + j * to->rank + (offset + k) * LANES;
            for (size_t n = 0; n < LANES; n++) panel[n] = 0;
            if (right->across == 1) memcpy(panel, numbers + k * right->down + j, count * 4);
            else for (size_t n = 0; n < count; n++) panel[n] = numbers[k * right->down + (j + n) * right->across];
            for (size_t n = 0; n < LANES; n++) bad |= odd(panel[n]);
        }
    }
    return !bad;
}

/* Fill in the magnitudes; return whether all of them are finite. */
int loratools_set_magnitudes(const Sum *to, const Matrix *magnitudes, float *memory)
{
    const float *numbers = numbers_of(magnitudes, memory) + magnitudes->first;
    uint32_t bad = 0;
    for (size_t i = 0; i < to->rows; i++) {
        bad |= odd(numbers[i * magnitudes->down]);
        to->magnitude[i] = numbers[i * magnitudes->down];
    }
    return !bad;
}

/* Return a bound of the magnitudes of left·right: the largest norm of a row of left times that of a column of right. */
double loratools_bound(const Sum *at)
{
    float rows = 0, columns = 0;
    for (size_t i = 0; i < at->rows; i++) {
        float sum = 0;
        for (size_t k = 0; k < at->rank; k++) sum += at->left[i * at->rank + k] * at->left[i * at->rank + k];
        rows = sum > rows ? sum : rows;
    }
    for (size_t j = 0; j < at->columns; j += LANES) {
        float sums[LANES] = {0};
        for (size_t k = 0; k < at->rank; k++)
            for (size_t n = 0; n < LANES; n++) {
                float x = at->right[j * at->rank + k * LANES + n];
                sums[n] += x * x;
            }
        for (size_t n = 0; n < LANES; n++) columns = sums[n] > columns ? sums[n] : columns;
    }
    return (double)(sqrtf(rows) * sqrtf(columns));
}

size_t loratools_sum_size(void) { return sizeof(Sum) + sizeof(Matrix); }
