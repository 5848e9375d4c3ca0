/* The eigenvalues of a small symmetric matrix, and the eigenvectors of its largest ones, in float64.
 *
 * A = Q·T·Qᵀ by Householder's reflections (Martin, Reinsch & Wilkinson 1968), the eigenvalues of T by QL steps without
 * roots (Reinsch 1973), the eigenvectors by inverse iteration, each made orthogonal to those
 * before it. LAPACK finds all vectors, or none, and calls for each column; here a third of the time goes. What comes of
 * the iteration is measured against T: where it is not an eigenvector the caller has to ask LAPACK.
 *
 * Sums are in QUAD parts, whatever the width of a processor's vectors.
 */
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

enum { QUAD = 4, AHEAD = 8 * QUAD };        /* numbers of a vector; columns that reflections take together */
#define CLOSE 1e-3 /* share of the norm within which eigenvectors are made orthogonal */
#define FAINT 1e-8 /* a vector of length one of which less is left is one of those before it */
enum { MOST_STEPS = 50, MOST_SOLVES = 5 };  /* for one value, for one vector */

/* The same fields, in the same order, as `_Eigen` in eigen.py. */
typedef struct {
    const double *G; /* (n, n), symmetric, `stride` numbers from row to row */
    size_t stride, n, count;
    double *values;  /* (n): results, ascending */
    double *vectors; /* (n, count, rounded up to QUAD): those of the largest values, the largest first */
    double *memory;  /* for n·(n rounded up to QUAD) + 8·n + n·count numbers */
    size_t failed;   /* result: whether LAPACK has to be asked */
} Eigen;

#if defined(__x86_64__)
#define TARGET __attribute__((target("avx2,fma")))
#else
#define TARGET
#endif
#define INLINE static inline __attribute__((always_inline)) TARGET

typedef double Quad __attribute__((vector_size(8 * QUAD), aligned(8), may_alias));

static size_t quads(size_t n) { return (n + QUAD - 1) / QUAD * QUAD; }

INLINE double total(Quad x) { return (x[0] + x[1]) + (x[2] + x[3]); }

INLINE double larger(double x, double y) { return x > y ? x : y; }

INLINE double dot(const double *x, const double *y, size_t n)
{
    Quad sums = {0};
    double rest = 0;
    size_t j = 0;
    for (; j + QUAD <= n; j += QUAD) sums += *(const Quad *)(x + j) * *(const Quad *)(y + j);
    for (; j < n; j++) rest += x[j] * y[j];
    return total(sums) + rest;
}

INLINE void add(double *y, double a, const double *x, size_t n)
{
    size_t j = 0;
    for (; j + QUAD <= n; j += QUAD) *(Quad *)(y + j) += a * *(const Quad *)(x + j);
    for (; j < n; j++) y[j] += a * x[j];
}

/* `rows` rows of A from row r on, left of their first diagonal element: A −= v·qᵀ + q·vᵀ, and y += A·x by both halves. */
INLINE void updated_rows(
    const int rows, double *A, size_t wide, size_t r, const double *v, const double *q, const double *x, double *y)
{
    Quad sums[2] = {{0}};
    double rest[2] = {0};
    size_t j = 0;
    for (; j + QUAD <= r; j += QUAD) {
        Quad left = *(const Quad *)(q + j), right = *(const Quad *)(v + j), onto = *(const Quad *)(x + j), below = {0};
#pragma GCC unroll 2
        for (int i = 0; i < rows; i++) {
            double *at = A + (r + i) * wide + j;
            Quad a = *(Quad *)at - v[r + i] * left - q[r + i] * right;
            *(Quad *)at = a;
            sums[i] += a * onto;
            below += a * x[r + i];
        }
        *(Quad *)(y + j) += below;
    }
    for (; j < r; j++)
        for (int i = 0; i < rows; i++) {
            double *at = A + (r + i) * wide + j, a = *at - v[r + i] * q[j] - q[r + i] * v[j];
            *at = a;
            rest[i] += a * x[j];
            y[j] += a * x[r + i];
        }
    for (int i = 0; i < rows; i++) y[r + i] = total(sums[i]) + rest[i];
    for (int i = 0; i < rows; i++)
        for (int k = 0; k <= i; k++) {
            double *at = A + (r + i) * wide + r + k, a = *at - v[r + i] * q[r + k] - q[r + i] * v[r + k];
            *at = a;
            y[r + i] += a * x[r + k];
            if (k < i) y[r + k] += a * x[r + i];
        }
}

/* d and e of T, and in the rows of A's lower half the reflections I − v·vᵀ/h; h is 0 where there is none.
 *
 * The update of one reflection and the product of the next are one pass over what is left of A.
 */
TARGET static void tridiagonal(double *A, size_t wide, size_t n, double *d, double *e, double *h, double *memory)
{
    double *q = memory, *y = memory + n, *zeros = memory + 2 * n;
    memset(zeros, 0, n * sizeof(double));
    memset(q, 0, n * sizeof(double));
    const double *v = zeros; /* of the reflection that is still to be applied */
    for (size_t i = n - 1; i > 0; i--) {
        double *row = A + i * wide, under = 0;
        for (size_t j = 0; j <= i; j++) row[j] -= v[i] * q[j] + q[i] * v[j];
        d[i] = row[i];
        under = dot(row, row, i - 1);
        double last = row[i - 1], square = under + last * last;
        if (under == 0) { /* nothing to reflect; what is due to the rest is still applied */
            h[i] = 0, e[i] = last;
            memset(row, 0, i * sizeof(double));
        } else {
            double root = last > 0 ? -sqrt(square) : sqrt(square);
            e[i] = root, h[i] = square - last * root;
            row[i - 1] = last - root;
        }
        size_t r = 0;
        for (; r + 2 <= i; r += 2) updated_rows(2, A, wide, r, v, q, row, y);
        for (; r < i; r++) updated_rows(1, A, wide, r, v, q, row, y);
        if (h[i] == 0) {
            v = zeros;
            continue;
        }
        double half = dot(y, row, i) / h[i] / h[i] / 2;
        for (size_t j = 0; j < i; j++) q[j] = y[j] / h[i] - half * row[j];
        v = row;
    }
    d[0] = A[0];
    e[0] = h[0] = 0;
}

/* The eigenvalues of T, ascending, in d; squares of the other diagonal, e[i]² of rows i and i+1, are in e. 0: failed. */
TARGET static int values(double *d, double *e, size_t n)
{
    for (size_t l = 0; l < n; l++)
        for (int step = 0;; step++) {
            size_t m = l;
            for (; m + 1 < n; m++)
                if (e[m] <= DBL_EPSILON * DBL_EPSILON * fabs(d[m] * d[m + 1])) break;
            if (m + 1 < n) e[m] = 0;
            if (m == l) break;
            if (step == MOST_STEPS) return 0;
            double root = sqrt(e[l]), sigma = (d[l + 1] - d[l]) / (2 * root);
            sigma = d[l] - root / (sigma + copysign(sqrt(sigma * sigma + 1), sigma));
            double s = 0, g = d[m] - sigma, h;
            g = g != 0 ? g : DBL_EPSILON * fabs(sigma) + DBL_MIN;
            h = g;
            for (size_t i = m; i-- > l;) {
                double p = g * h, r = p + e[i], here = d[i] - sigma;
                if (i + 1 != m) e[i + 1] = s * r;
                s = e[i] / r;
                d[i + 1] = h + s * (h + here) + sigma;
                g = here - e[i] / g;
                g = g != 0 ? g : DBL_EPSILON * fabs(sigma) + DBL_MIN;
                h = g * (p / r);
            }
            e[l] = s * g * h;
            d[l] = h + sigma;
        }
    for (size_t i = 1; i < n; i++) { /* they come nearly in order */
        double value = d[i];
        size_t j = i;
        for (; j > 0 && d[j - 1] > value; j--) d[j] = d[j - 1];
        d[j] = value;
    }
    return 1;
}

/* Make a vector's length one; return what it was. */
INLINE double unit(double *x, size_t n)
{
    double length = sqrt(dot(x, x, n));
    for (size_t i = 0; i < n; i++) x[i] /= length;
    return length;
}

/* T − λ = P·L·U with partial pivoting: 1/U's diagonal, the two above it, L's factors, and whether rows were swapped. */
INLINE void factored(
    const double *d, const double *e, size_t n, double value, double least, double *inverse, double *first,
    double *second, double *factor, double *swapped)
{
    double here = d[0] - value, next = n > 1 ? e[1] : 0;
    for (size_t i = 0; i + 1 < n; i++) {
        double below = e[i + 1], beside = d[i + 1] - value, after = i + 2 < n ? e[i + 2] : 0;
        swapped[i] = fabs(below) > fabs(here);
        if (swapped[i]) {
            inverse[i] = 1 / below, first[i] = beside, second[i] = after;
            factor[i] = here * inverse[i];
            here = next - factor[i] * beside, next = -factor[i] * after;
        } else {
            if (fabs(here) < least) here = least;
            inverse[i] = 1 / here, first[i] = next, second[i] = 0;
            factor[i] = below * inverse[i];
            here = beside - factor[i] * next, next = after;
        }
    }
    inverse[n - 1] = 1 / (fabs(here) < least ? least : here);
    first[n - 1] = second[n - 1] = 0;
}

/* x = U⁻¹·L⁻¹·P·x, or without the first part U⁻¹·x. */
INLINE void solved(
    double *x, size_t n, const double *inverse, const double *first, const double *second, const double *factor,
    const double *swapped, int whole)
{
    for (size_t i = 0; whole && i + 1 < n; i++) {
        double here = swapped[i] ? x[i + 1] : x[i], other = swapped[i] ? x[i] : x[i + 1];
        x[i] = here, x[i + 1] = other - factor[i] * here;
    }
    double one = 0, two = 0; /* of the rows below */
    for (size_t i = n; i-- > 0;) {
        double here = (x[i] - first[i] * one - second[i] * two) * inverse[i];
        x[i] = here, two = one, one = here;
    }
}

/* The vectors (count, wide) of the largest values of T, one after the other, each a row. 0: one is none. */
TARGET static int vectors(
    const double *d, const double *e, size_t n, const double *found, size_t count, double *Z, size_t wide, double *memory)
{
    double *inverse = memory, *first = memory + n, *second = memory + 2 * n, *factor = memory + 3 * n;
    double *swapped = memory + 4 * n, size = 0;
    for (size_t i = 0; i < n; i++) size = larger(size, fabs(d[i]) + fabs(e[i]) + (i + 1 < n ? fabs(e[i + 1]) : 0));
    if (!(size > 0)) return 0;
    unsigned drawn = 1;
    size_t close = 0; /* the first vector whose value is near this one's: the others are orthogonal already */
    for (size_t k = 0; k < count; k++) {
        double *z = Z + k * wide, value = found[n - 1 - k], off = INFINITY;
        while (found[n - 1 - close] - value > CLOSE * size) close++;
        factored(d, e, n, value, DBL_EPSILON * size, inverse, first, second, factor, swapped);
        for (size_t i = 0; i < n; i++) {
            drawn = drawn * 1664525u + 1013904223u;
            z[i] = 0.5 + drawn / 4294967296.0;
        }
        for (int turn = 0; turn < MOST_SOLVES && off > 64 * DBL_EPSILON * size; turn++) {
            solved(z, n, inverse, first, second, factor, swapped, turn > 0);
            double length = 0;
            for (size_t i = 0; i < n; i++) length = larger(length, fabs(z[i]));
            if (!(length > 0 && length < INFINITY)) return 0;
            for (size_t i = 0; i < n; i++) z[i] /= length;
            unit(z, n);
            for (double left = 0; left < 0.5 && close < k;) { /* of little that is left rounding is taken out again */
                for (size_t j = close; j < k; j++) add(z, -dot(z, Z + j * wide, n), Z + j * wide, n);
                left = unit(z, n);
                if (!(left > FAINT)) return 0;
            }
            if (turn == 0) continue;
            off = 0;
            for (size_t i = 0; i < n; i++) {
                double rest = (d[i] - value) * z[i];
                if (i > 0) rest += e[i] * z[i - 1];
                if (i + 1 < n) rest += e[i + 1] * z[i + 1];
                off = larger(off, fabs(rest));
            }
        }
        if (!(off <= 64 * DBL_EPSILON * size)) return 0;
    }
    return 1;
}

/* X (n, wide) = H(n−1)·…·H(1)·X for the reflections in the rows of A. */
TARGET static void reflected(const double *A, size_t stride, size_t n, const double *h, double *X, size_t wide)
{
    for (size_t first = 0; first < wide; first += AHEAD) {
        size_t count = (wide - first < AHEAD ? wide - first : AHEAD) / QUAD;
        for (size_t i = 1; i < n; i++) {
            if (h[i] == 0) continue;
            const double *v = A + i * stride;
            Quad sums[AHEAD / QUAD] = {{0}};
            if (count == AHEAD / QUAD)
                for (size_t j = 0; j < i; j++)
#pragma GCC unroll 8
                    for (int c = 0; c < AHEAD / QUAD; c++) sums[c] += v[j] * ((const Quad *)(X + j * wide + first))[c];
            else
                for (size_t j = 0; j < i; j++)
                    for (size_t c = 0; c < count; c++) sums[c] += v[j] * ((const Quad *)(X + j * wide + first))[c];
            for (size_t c = 0; c < count; c++) sums[c] /= h[i];
            for (size_t j = 0; j < i; j++)
                for (size_t c = 0; c < count; c++) ((Quad *)(X + j * wide + first))[c] -= v[j] * sums[c];
        }
    }
}

/* Return whether this processor is served. */
size_t loratools_eigen_width(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? QUAD : 0;
#else
    return QUAD;
#endif
}

TARGET void loratools_eigen(Eigen *at, size_t width)
{
    (void)width;
    size_t n = at->n, wide = quads(n), across = quads(at->count);
    double *A = at->memory, *d = A + n * wide, *e = d + n, *h = e + n, *rest = h + n, *Z = rest + 5 * n;
    for (size_t i = 0; i < n; i++) memcpy(A + i * wide, at->G + i * at->stride, (i + 1) * sizeof(double));
    tridiagonal(A, wide, n, d, e, h, rest);
    memcpy(at->values, d, n * sizeof(double));
    for (size_t i = 0; i + 1 < n; i++) rest[i] = e[i + 1] * e[i + 1];
    rest[n - 1] = 0;
    at->failed = !values(at->values, rest, n);
    if (at->failed || !at->count) return;
    at->failed = !vectors(d, e, n, at->values, at->count, Z, n, rest);
    if (at->failed) return;
    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; k < across; k++) at->vectors[i * across + k] = k < at->count ? Z[k * n + i] : 0;
    reflected(A, wide, n, h, at->vectors, across);
}

/* Whoever calls checks that it means the same fields. */
size_t loratools_eigen_size(void) { return sizeof(Eigen); }
