/* One step of a block Krylov iteration for delta.c: what Dᵀ·(last block of Y) adds to V becomes columns of V, and of Y.
 *
 * G = YᵀY is block tridiagonal but for rounding, as Dᵀ·D·(a block of V) lies in the blocks up to the next. So Dᵀ·Y·R
 * loses what it has of the last two blocks through G alone, and then what rounding left of all blocks, once. A step
 * from Python takes a dozen calls, each as long as the arithmetic of a small matrix.
 */
enum { DEPENDENT = 1 }; /* columns depend on others */

/* The same fields, in the same order, as `_Step` in blocks.py. */
typedef struct {
    const void *D; /* as in Product; with `turned` what is decomposed is its transpose */
    size_t stride, rows, columns, low, turned;
    size_t wide;   /* numbers from row to row of V, Y and G */
    float *V, *Y;  /* (n, wide) and (m, wide), orthonormal columns and D·V */
    double *G;     /* (wide, wide) */
    const float *S; /* (m, block): the iteration begins with DᵀS; NULL: it goes on */
    float *W, *back, *spare; /* (n, block), and (m, block) twice; m ≥ n */
    double *small; /* for (wide + 6·block)·block numbers */
    float *room;   /* as a Product has `panels` and `memory`, for all products here */
    size_t width, block; /* columns before the step, and that it adds, a multiple of LANES */
    size_t onward;       /* whether DᵀY is formed in the same pass over D, where that can be */
    size_t whole;        /* whether products are too coarse for G to be block tridiagonal */
    size_t known;        /* result, and argument of the next step: whether `back` has DᵀY */
    size_t state;        /* result: 0, or DEPENDENT */
} Step;

typedef void (*Kernel)(const Product *, size_t);

/* What Cholesky leaves of each column of length one: below the first one pass does not make them orthonormal, below the
 * second products with Dᵀ are not taken through them, and below the last directions would have to be dropped. */
static const double CLEAR = 0.125, APART = 0.03, LOST = 1e-4;
/* Of a column's length, in squares: less than this is what rounding leaves where a column lies in V. */
static const double NOTHING = 256.0 * 0x1p-46;

static void multiplied(
    Kernel kernel, const Step *at, size_t width, const void *D, size_t stride, size_t rows, size_t columns,
    const float *X, size_t down, size_t k, void *out, float *back)
{
    int down_D = kernel == loratools_across || kernel == loratools_across_bf16;
    size_t length = kernel == loratools_gram ? 0 : (down_D ? rows : columns) + 1;
    Product product = {D, stride, rows, columns, X, down, 1, k, out, at->room, back, at->room + length * padded(k)};
    kernel(&product, width);
}

/* out = D·X, or Dᵀ·X where that is `across`. */
static void of_D(const Step *at, size_t width, int across, const float *X, float *out)
{
    Kernel kernels[2][2] = {{loratools_times, loratools_across}, {loratools_times_bf16, loratools_across_bf16}};
    Kernel kernel = kernels[at->low][across ^ (int)at->turned];
    multiplied(kernel, at, width, at->D, at->stride, at->rows, at->columns, X, at->block, at->block, out, NULL);
}

/* W (rows, block) −= V·C for `count` columns of V, `wide` apart from row to row, and C (count, block). */
static void less(const Step *at, size_t width, float *W, size_t rows, const float *V, size_t count, const float *C)
{
    size_t b = at->block;
    multiplied(loratools_times, at, width, V, at->wide, rows, count, C, b, b, at->spare, NULL);
    for (size_t i = 0; i < rows * b; i++) W[i] -= at->spare[i];
}

/* R (b, b), upper triangular, makes columns orthonormal whose Gram matrix is G (b, b); return what Cholesky left of a
 * column, 0 where they depend on each other. L has room for as many numbers. */
static double change(const double *G, size_t stride, size_t b, double *L, double *R)
{
    double apart = 1;
    for (size_t i = 0; i < b; i++)
        if (!(G[i * stride + i] > 0)) return 0;
    for (size_t i = 0; i < b; i++)
        for (size_t j = 0; j <= i; j++) {
            double sum = G[i * stride + j] / sqrt(G[i * stride + i]) / sqrt(G[j * stride + j]);
            for (size_t k = 0; k < j; k++) sum -= L[i * b + k] * L[j * b + k];
            if (i > j) {
                L[i * b + j] = sum / L[j * b + j];
                continue;
            }
            if (!(sum > 0)) return 0;
            L[i * b + i] = sqrt(sum);
            apart = L[i * b + i] < apart ? L[i * b + i] : apart;
        }
    if (!(apart > LOST)) return 0;
    memset(R, 0, b * b * sizeof(double)); /* the transpose of L⁻¹·diag(1/lengths) */
    for (size_t c = 0; c < b; c++)
        for (size_t i = c; i < b; i++) {
            double sum = i == c ? 1 / sqrt(G[c * stride + c]) : 0;
            for (size_t k = c; k < i; k++) sum -= L[i * b + k] * R[c * b + k];
            R[c * b + i] = sum / L[i * b + i];
        }
    return apart;
}

static void rounded(const double *from, float *to, size_t count)
{
    for (size_t i = 0; i < count; i++) to[i] = (float)from[i];
}

/* W (rows, b) = W·R. */
static void turned(const Step *at, size_t width, float *W, size_t rows, const double *R)
{
    size_t b = at->block;
    float *C = (float *)(at->small + 5 * b * b);
    rounded(R, C, b * b);
    multiplied(loratools_times, at, width, W, b, rows, b, C, b, b, at->spare, NULL);
    memcpy(W, at->spare, rows * b * sizeof(float));
}

/* Make the columns of W (rows, b) orthonormal, and orthogonal to `count` columns of V; return whether that can be.
 *
 * `passes` are those that the first turn takes; sums that V had of W, in squares, are in `had` (b).
 */
static int orthonormal(const Step *at, size_t width, float *W, size_t rows, size_t count, int passes, double *had)
{
    size_t b = at->block;
    double *G = at->small, *L = G + b * b, *R = L + b * b;
    float *C = (float *)(at->small + 6 * b * b);
    for (int turn = 0; turn < 3; turn++) {
        for (int pass = 0; count && pass < (turn ? 2 : passes); pass++) {
            multiplied(loratools_across, at, width, at->V, at->wide, rows, count, W, b, b, C, NULL);
            for (size_t i = 0; turn == 0 && i < count; i++)
                for (size_t c = 0; c < b; c++) had[c] += (double)C[i * b + c] * C[i * b + c];
            less(at, width, W, rows, at->V, count, C);
        }
        multiplied(loratools_gram, at, width, W, b, rows, b, W, b, b, G, NULL);
        for (size_t c = 0; turn == 0 && count && c < b; c++)
            if (G[c * b + c] <= NOTHING * had[c]) return 0;
        double apart = change(G, b, b, L, R);
        if (apart == 0) return 0;
        turned(at, width, W, rows, R);
        if (apart > CLEAR) return 1;
    }
    return 0;
}

/* W = orthonormal columns that Dᵀ·(last block of Y) adds to V; return whether there are as many. */
static int news(Step *at, size_t width, size_t n, size_t m)
{
    size_t b = at->block, last = at->width - b, from = last >= b ? last - b : 0, count = at->width - from;
    double *L = at->small, *R = at->small + 3 * b * b, *had = at->small + 4 * b * b;
    double apart = change(at->G + last * at->wide + last, at->wide, b, L, R);
    memset(had, 0, b * sizeof(double));
    if (apart == 0) return 0;
    if (!at->known || apart <= APART) {
        float *Q = at->back;
        for (size_t i = 0; i < m; i++) memcpy(Q + i * b, at->Y + i * at->wide + last, b * sizeof(float));
        turned(at, width, Q, m, R);
        if (apart <= CLEAR && !orthonormal(at, width, Q, m, 0, 0, had)) return 0;
        of_D(at, width, 1, Q, at->W);
        if (at->whole || apart <= CLEAR) return orthonormal(at, width, at->W, n, at->width, 2, had);
    } else {
        memcpy(at->W, at->back, n * b * sizeof(float));
        turned(at, width, at->W, n, R);
    }
    float *C = (float *)(at->small + 6 * b * b);
    for (size_t i = 0; i < count; i++)
        for (size_t c = 0; c < b; c++) {
            double sum = 0;
            for (size_t k = 0; k <= c; k++) sum += at->G[(from + i) * at->wide + last + k] * R[k * b + c];
            C[i * b + c] = (float)sum;
            had[c] += sum * sum;
        }
    less(at, width, at->W, n, at->V + from, count, C);
    return orthonormal(at, width, at->W, n, at->width, 1, had);
}

void loratools_step(Step *at, size_t width)
{
    size_t m = at->turned ? at->columns : at->rows, n = at->turned ? at->rows : at->columns, b = at->block;
    double had[64] = {0};
    if (at->S) of_D(at, width, 1, at->S, at->W);
    int made = at->S ? orthonormal(at, width, at->W, n, 0, 0, had) : news(at, width, n, m);
    at->state = made ? 0 : DEPENDENT;
    if (!made) return;
    /* Y of the new columns, beside DᵀY where one pass gives both. */
    at->known = at->onward && !at->turned && !at->low;
    float *Y = at->spare;
    if (at->known)
        multiplied(loratools_both, at, width, at->D, at->stride, m, n, at->W, b, b, Y, at->back);
    else
        of_D(at, width, 0, at->W, Y);
    size_t old = at->width, from = at->whole || old < b ? 0 : old - b, count = old + b - from;
    for (size_t i = 0; i < n; i++) memcpy(at->V + i * at->wide + old, at->W + i * b, b * sizeof(float));
    for (size_t i = 0; i < m; i++) memcpy(at->Y + i * at->wide + old, Y + i * b, b * sizeof(float));
    multiplied(loratools_gram, at, width, at->Y + from, at->wide, m, count, Y, b, b, at->small, NULL);
    for (size_t i = 0; i < old + b; i++)
        for (size_t c = 0; c < b; c++) {
            double sum = i < from ? 0 : at->small[(i - from) * b + c];
            at->G[i * at->wide + old + c] = at->G[(old + c) * at->wide + i] = sum;
        }
    at->width += b;
}

size_t loratools_step_size(void) { return sizeof(Step); }
