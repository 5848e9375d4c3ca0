/* The arithmetic of thin.c for one TYPE of x and y. No include guard: it is compiled once for each.
 *
 * `add` multiplies and sums DEEP numbers at once: 1 of F32, 2 of BF16. What it takes for `each` has them beside each
 * other, lane by lane. R is the rank rounded up to LANES, filled up with zeros.
 */
#define T_ TYPE
#define DEEP NAMED(DEEP, TYPE)
#define LOAD NAMED(load, TYPE)
#define STORE NAMED(store, TYPE)
#define ADD NAMED(add, TYPE)
#define JOIN_ROWS NAMED(join, TYPE)
#define BESIDE NAMED(beside, TYPE)

/* U (tokens, R) = X (tokens, d) · F, F (d, R) with DEEP rows beside each other. */
INLINE void NAMED(project_rows, TYPE)(const int tokens, const T_ *X, const T_ *F, T_ *U, size_t d, size_t R)
{
    for (size_t panel = 0; panel < R; panel += LANES) {
        __m512 sums[TOKENS];
        for (int t = 0; t < tokens; t++)
            sums[t] = _mm512_setzero_ps();
        for (size_t k = 0; k < d; k += DEEP) {
            const T_ *f = F + k * R + panel * DEEP;
#pragma GCC unroll 12
            for (int t = 0; t < tokens; t++)
                sums[t] = ADD(sums[t], f, X + t * d + k);
        }
        for (int t = 0; t < tokens; t++)
            STORE(U + t * R + panel, sums[t]);
    }
}

TARGET static void NAMED(project, TYPE)(const T_ *X, const T_ *F, T_ *U, size_t rows, size_t d, size_t R)
{
    size_t n = 0;
    for (; n + TOKENS <= rows; n += TOKENS)
        NAMED(project_rows, TYPE)(TOKENS, X + n * d, F, U + n * R, d, R);
    for (; n + 4 <= rows; n += 4)
        NAMED(project_rows, TYPE)(4, X + n * d, F, U + n * R, d, R);
    for (; n < rows; n++)
        NAMED(project_rows, TYPE)(1, X + n * d, F, U + n * R, d, R);
}

/* Y (tokens, d) += s · U (tokens, R) · P in `count` panels of columns from j on; P (r, d) with DEEP rows beside. */
INLINE void NAMED(spread_tile, TYPE)(
    const int tokens, const int count, T_ *Y, const T_ *U, const T_ *P, size_t d, size_t r, size_t R, size_t j, __m512 s)
{
    __m512 sums[2][8];
    for (int c = 0; c < count; c++)
        for (int t = 0; t < tokens; t++)
            sums[c][t] = _mm512_setzero_ps();
    for (size_t i = 0; i < r; i += DEEP) {
        const T_ *p = P + i * d + j * DEEP;
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++)
#pragma GCC unroll 2
            for (int c = 0; c < count; c++)
                sums[c][t] = ADD(sums[c][t], p + c * LANES * DEEP, U + t * R + i);
    }
    for (int t = 0; t < tokens; t++)
        for (int c = 0; c < count; c++) {
            T_ *y = Y + t * d + j + c * LANES;
            STORE(y, _mm512_fmadd_ps(sums[c][t], s, LOAD(y)));
        }
}

INLINE void NAMED(spread_rows, TYPE)(
    const int tokens, T_ *Y, const T_ *U, const T_ *P, size_t d, size_t r, size_t R, __m512 s)
{
    size_t j = 0;
    for (; j + 2 * LANES <= d; j += 2 * LANES)
        NAMED(spread_tile, TYPE)(tokens, 2, Y, U, P, d, r, R, j, s);
    if (j < d)
        NAMED(spread_tile, TYPE)(tokens, 1, Y, U, P, d, r, R, j, s);
}

TARGET static void NAMED(spread, TYPE)(
    T_ *Y, const T_ *U, const T_ *P, size_t rows, size_t d, size_t r, size_t R, float scale)
{
    __m512 s = _mm512_set1_ps(scale);
    size_t n = 0;
    for (; n + 8 <= rows; n += 8)
        NAMED(spread_rows, TYPE)(8, Y + n * d, U + n * R, P, d, r, R, s);
    for (; n < rows; n++)
        NAMED(spread_rows, TYPE)(1, Y + n * d, U + n * R, P, d, r, R, s);
}

/* out[i·down + j·over] = s · Σₙ V[n, i] · X[n, j] for i < r, j < d; V (rows, R) with DEEP rows beside each other. */
TARGET static void NAMED(outer, TYPE)(
    const T_ *V, const T_ *X, float *out, size_t rows, size_t d, size_t r, size_t R, size_t down, size_t over, float s)
{
    for (size_t panel = 0; panel < r; panel += LANES)
        for (size_t j = 0; j < d; j += LANES) {
            size_t count = r - panel < LANES ? r - panel : LANES;
            __m512 sums[LANES];
            for (int i = 0; i < LANES; i++)
                sums[i] = _mm512_setzero_ps();
            for (size_t n = 0; n < rows; n += DEEP) {
                T_ x[LANES * DEEP];
                BESIDE(x, X + n * d + j, n + 1 < rows ? X + (n + 1) * d + j : NULL);
                const T_ *v = V + n * R + panel * DEEP;
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++)
                    sums[i] = ADD(sums[i], x, v + i * DEEP);
            }
            float tile[LANES][LANES];
            for (int i = 0; i < LANES; i++)
                _mm512_storeu_ps(tile[i], _mm512_mul_ps(sums[i], _mm512_set1_ps(s)));
            for (size_t i = 0; over == 1 && i < count; i++)
                memcpy(out + (panel + i) * down + j, tile[i], sizeof tile[i]);
            for (size_t k = 0; over != 1 && k < LANES; k++)
                for (size_t i = 0; i < count; i++)
                    out[(panel + i) * down + (j + k) * over] = tile[i][k];
        }
}

/* to (rows, R) with DEEP rows beside each other = from (rows, columns) in float32, columns filled up to R with zeros. */
TARGET static void NAMED(paired, TYPE)(const float *from, T_ *to, size_t rows, size_t columns, size_t R)
{
    for (size_t n = 0; n < rows; n += DEEP)
        for (size_t panel = 0; panel < R; panel += LANES) {
            size_t left = columns - panel;
            __mmask16 mask = left < LANES ? (__mmask16)((1 << left) - 1) : 0xffff;
            const float *row = from + n * columns + panel;
            __m512 next = n + 1 < rows ? _mm512_maskz_loadu_ps(mask, row + columns) : _mm512_setzero_ps();
            JOIN_ROWS(to + n * R + panel * DEEP, _mm512_maskz_loadu_ps(mask, row), next);
        }
}

/* to (columns, R) with DEEP rows beside each other = the transpose of from (rows, columns), filled up with zeros. */
TARGET static void NAMED(turned, TYPE)(const float *from, T_ *to, size_t rows, size_t columns, size_t R)
{
    for (size_t j = 0; j < columns; j += LANES)
        for (size_t i = 0; i < R; i += LANES) {
            T_ tile[LANES][LANES];
            for (size_t k = 0; k < LANES; k++) {
                size_t left = columns - j;
                __mmask16 mask = i + k >= rows ? 0 : left < LANES ? (__mmask16)((1 << left) - 1) : 0xffff;
                STORE(tile[k], _mm512_maskz_loadu_ps(mask, from + (i + k) * columns + j));
            }
            for (size_t c = 0; c < LANES && j + c < columns; c += DEEP)
                for (size_t k = 0; k < LANES; k++) /* DEEP numbers that lie in one row already */
                    memcpy(to + (j + c) * R + (i + k) * DEEP, &tile[k][c], DEEP * sizeof(T_));
        }
}

/* to (rows, R) with DEEP rows beside each other, the last one with zeros where it has no partner. */
TARGET static void NAMED(beside_all, TYPE)(const T_ *from, T_ *to, size_t rows, size_t R)
{
    for (size_t n = 0; n < rows; n += DEEP)
        for (size_t i = 0; i < R; i += LANES)
            BESIDE(to + n * R + i * DEEP, from + n * R + i, n + 1 < rows ? from + (n + 1) * R + i : NULL);
}

TARGET static void NAMED(forward, TYPE)(const Layer *at, const T_ *x, T_ *y, T_ *u)
{
    size_t r = at->r, R = (r + LANES - 1) / LANES * LANES;
    T_ *F = (T_ *)at->memory, *P = F + at->in * R, *kept = u;
    if (r != R)
        u = P + at->out * R;
    NAMED(turned, TYPE)(at->A, F, r, at->in, R);
    NAMED(project, TYPE)(x, F, u, at->rows, at->in, R);
    for (size_t n = 0; u != kept && n < at->rows; n++)
        memcpy(kept + n * r, u + n * R, r * sizeof(T_));
    NAMED(turned, TYPE)(at->B, P, at->out, r, at->out);
    NAMED(spread, TYPE)(y, u, P, at->rows, at->out, r, R, at->scale);
}

TARGET static void NAMED(backward, TYPE)(
    const Layer *at, const T_ *grad, const T_ *x, const T_ *u, T_ *dx, float *dA, float *dB)
{
    size_t r = at->r, R = (r + LANES - 1) / LANES * LANES, even = (at->rows + 1) / 2 * 2;
    T_ *v = (T_ *)at->memory, *V = v + at->rows * R, *F = V + even * R, *P = F + at->out * R;
    if (dB) {
        if (r != R) {
            memset(v, 0, at->rows * R * sizeof(T_));
            for (size_t n = 0; n < at->rows; n++)
                memcpy(v + n * R, u + n * r, r * sizeof(T_));
            u = v;
        }
        NAMED(beside_all, TYPE)(u, V, at->rows, R);
        NAMED(outer, TYPE)(V, grad, dB, at->rows, at->out, r, R, 1, r, at->scale);
    }
    if (!dx && !dA)
        return;
    NAMED(paired, TYPE)(at->B, F, at->out, r, R);
    NAMED(project, TYPE)(grad, F, v, at->rows, at->out, R);
    if (dA) {
        NAMED(beside_all, TYPE)(v, V, at->rows, R);
        NAMED(outer, TYPE)(V, x, dA, at->rows, at->in, r, R, at->in, 1, at->scale);
    }
    if (dx) {
        NAMED(paired, TYPE)(at->A, P, r, at->in, at->in);
        NAMED(spread, TYPE)(dx, v, P, at->rows, at->in, r, R, at->scale);
    }
}

#undef T_
#undef DEEP
#undef LOAD
#undef STORE
#undef ADD
#undef JOIN_ROWS
#undef BESIDE
