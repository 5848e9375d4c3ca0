/* Products of a large matrix with few columns, for vectors of WIDTH numbers and D in cells of DEEP numbers of TYPE.
 *
 * A cell is one F32 number, or two of BF16, which one instruction multiplies and sums. TOGETHER rows or STRIP columns
 * are summed at once over PANELS panels, as many as registers hold.
 */
#define Vector NAMED(Vector, WIDTH)
#define VECTORS (LANES / WIDTH)
#define OF(name) NAMED(NAMED(name, TYPE), WIDTH)

/* X in panels of LANES columns, filled up with zeros; for each cell of a row of D so many vectors of cells. */
TARGET static void OF(pack)(const Product *at, size_t length)
{
    size_t cells = (length + DEEP - 1) / DEEP;
    for (size_t p = 0; p < padded(at->k); p += LANES) {
        size_t count = at->k - p < LANES ? at->k - p : LANES;
        Cell *panel = (Cell *)at->panels + p * cells;
        for (size_t i = 0; i < cells; i++) {
            float rows[DEEP][LANES] = {{0}};
            for (size_t d = 0; d < DEEP && i * DEEP + d < length; d++) {
                const float *from = at->X + p * at->over + (i * DEEP + d) * at->down;
                if (at->over == 1 && count == LANES)
                    memcpy(rows[d], from, sizeof rows[d]);
                else
                    for (size_t n = 0; n < count; n++) rows[d][n] = from[n * at->over];
            }
            for (int n = 0; n < LANES; n++) panel[i * LANES + n] = OF(cell)(rows[0][n], rows[DEEP - 1][n]);
        }
    }
}

/* Rows of D times `count` panels, over `length` of their cells: out = that, or out += that. */
INLINE void OF(run)(
    const int rows, const int count, const char *D, size_t step, size_t length, const Cell *panel, size_t apart,
    float *out, size_t wide, int add)
{
    Vector sums[TOGETHER][PANELS * VECTORS];
    for (int i = 0; i < rows; i++)
        for (int n = 0; n < count * VECTORS; n++) sums[i][n] = (Vector){0};
    for (size_t j = 0; j < length; j++) {
        Vector x[PANELS * VECTORS];
        for (int n = 0; n < count * VECTORS; n++)
            x[n] = *(const Vector *)(panel + n / VECTORS * apart + j * LANES + n % VECTORS * WIDTH);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
            for (int n = 0; n < count * VECTORS; n++)
                sums[i][n] = OF(add)(sums[i][n], ((const Cell *)(D + i * step))[j], x[n]);
    }
    for (int i = 0; i < rows; i++)
        for (int n = 0; n < count * VECTORS; n++) {
            Vector *to = (Vector *)(out + i * wide + n * WIDTH);
            if (add) sums[i][n] += *to;
            *to = sums[i][n];
        }
}

INLINE void OF(times_rows)(const Product *at, const int rows, size_t i, size_t first, size_t last)
{
    size_t wide = padded(at->k), cells = at->columns / DEEP, step = at->stride * sizeof(Cell) / DEEP;
    for (size_t p = 0, count; p < wide; p += count * LANES) {
        count = wide - p >= PANELS * LANES ? PANELS : 1;
        for (size_t j = first; j < last; j += RUN) {
            size_t length = last - j < RUN ? last - j : RUN;
            const char *D = (const char *)at->D + i * step + j * sizeof(Cell);
            const Cell *panel = (const Cell *)at->panels + p * cells + j * LANES;
            float *out = (float *)at->out + i * wide + p;
            if (count == PANELS)
                OF(run)(rows, PANELS, D, step, length, panel, cells * LANES, out, wide, j > 0);
            else
                OF(run)(rows, 1, D, step, length, panel, cells * LANES, out, wide, j > 0);
        }
    }
}

/* out (rows, k) = D·X; the number of columns is one of whole cells. */
TARGET static void OF(times)(const Product *at)
{
    size_t cells = at->columns / DEEP;
    OF(pack)(at, at->columns);
    for (size_t first = 0; first < cells; first += BLOCK) {
        size_t last = cells - first < BLOCK ? cells : first + BLOCK, i = 0;
        for (; i + TOGETHER <= at->rows; i += TOGETHER) OF(times_rows)(at, TOGETHER, i, first, last);
        for (; i < at->rows; i++) OF(times_rows)(at, 1, i, first, last);
    }
}

/* out (strip, count panels) += Dᵀ·X over `rows` rows of cells; they begin anew unless `add`.
 *
 * From row to row there are `aside` cells of D and `down` of a panel, and from panel to panel `apart`.
 */
INLINE void OF(strip)(
    const int strip, const int count, const Cell *D, size_t aside, size_t rows, const Cell *panel, size_t down,
    size_t apart, float *out, size_t wide, int add)
{
    Vector sums[STRIP][PANELS * VECTORS];
    for (int i = 0; i < strip; i++)
        for (int n = 0; n < count * VECTORS; n++)
            sums[i][n] = add ? *(const Vector *)(out + i * wide + n * WIDTH) : (Vector){0};
    for (size_t r = 0; r < rows; r++) {
        Vector x[PANELS * VECTORS];
        for (int n = 0; n < count * VECTORS; n++)
            x[n] = *(const Vector *)(panel + n / VECTORS * apart + r * down + n % VECTORS * WIDTH);
#pragma GCC unroll 8
        for (int i = 0; i < strip; i++)
#pragma GCC unroll 4
            for (int n = 0; n < count * VECTORS; n++) sums[i][n] = OF(add)(sums[i][n], D[r * aside + i], x[n]);
    }
    for (int i = 0; i < strip; i++)
        for (int n = 0; n < count * VECTORS; n++) *(Vector *)(out + i * wide + n * WIDTH) = sums[i][n];
}

#if DEEP == 1
#if PANELS == 1
/* out (columns, LANES) += Dᵀ·X over `count` rows, whose numbers of X stay in registers; they begin anew unless `add`. */
INLINE void OF(outer)(
    const int count, const float *D, size_t stride, size_t columns, const float *X, size_t down, float *out, size_t wide,
    int add)
{
    Vector x[OUTER][VECTORS];
    for (int r = 0; r < count; r++)
        for (int n = 0; n < VECTORS; n++) x[r][n] = *(const Vector *)(X + r * down + n * WIDTH);
    for (size_t c = 0; c < columns; c++) {
        Vector sums[VECTORS];
        for (int n = 0; n < VECTORS; n++) sums[n] = add ? *(const Vector *)(out + c * wide + n * WIDTH) : (Vector){0};
#pragma GCC unroll 6
        for (int r = 0; r < count; r++)
            for (int n = 0; n < VECTORS; n++) sums[n] = OF(add)(sums[n], D[r * stride + c], x[r][n]);
        for (int n = 0; n < VECTORS; n++) *(Vector *)(out + c * wide + n * WIDTH) = sums[n];
    }
}

/* back (columns, k) += Dᵀ·Y over rows [from, to), Y as `outer` takes it, from row `from` on, and its panels `apart`. */
INLINE void OF(back_rows)(
    const Product *at, size_t from, size_t to, const char *next, const float *Y, size_t down, size_t apart, float *back)
{
    (void)next;
    size_t wide = padded(at->k), near = wide < NEAR ? NEAR / wide : 1;
    for (size_t first = 0; first < at->columns; first += near) {
        size_t columns = at->columns - first < near ? at->columns - first : near;
        for (size_t p = 0; p < wide; p += LANES) {
            const float *X = Y + p / LANES * apart, *D = (const float *)at->D + from * at->stride + first;
            float *out = back + first * wide + p;
            size_t r = from;
            for (; r + OUTER <= to; r += OUTER, X += OUTER * down, D += OUTER * at->stride)
                OF(outer)(OUTER, D, at->stride, columns, X, down, out, wide, r > 0);
            for (; r < to; r++, X += down, D += at->stride)
                OF(outer)(1, D, at->stride, columns, X, down, out, wide, r > 0);
        }
    }
}
#else
/* back (columns, k) += Dᵀ·Y over rows [from, to), Y as a `strip` takes it, from row `from` on.
 *
 * PIECE columns at a time are copied beside each other, where no two rows need one place of a cache; meanwhile what lies
 * from `next` on comes, unless that is NULL.
 */
INLINE void OF(back_rows)(
    const Product *at, size_t from, size_t to, const char *next, const float *Y, size_t down, size_t apart, float *back)
{
    float piece[MOST_BAND * PIECE];
    size_t wide = padded(at->k), rows = to - from;
    for (size_t first = 0; first < at->columns; first += PIECE) {
        size_t columns = at->columns - first < PIECE ? at->columns - first : PIECE;
        for (size_t r = 0; r < rows; r++) {
            const float *row = (const float *)at->D + (from + r) * at->stride + first;
            if (next)
                for (size_t line = 0; line < PIECE * sizeof(float); line += LINE, next += LINE)
                    __builtin_prefetch(next, 0, 2);
            if (columns == PIECE)
                memcpy(piece + r * PIECE, row, PIECE * sizeof(float));
            else
                memcpy(piece + r * PIECE, row, columns * sizeof(float));
        }
        for (size_t p = 0, count; p < wide; p += count * LANES) {
            const float *panel = Y + p / LANES * apart;
            count = wide - p >= PANELS * LANES ? PANELS : 1;
            for (size_t c = 0, width; c < columns; c += width) {
                width = columns - c >= STRIP ? STRIP : 1;
                float *out = back + (first + c) * wide + p;
                if (width == STRIP && count == PANELS)
                    OF(strip)(STRIP, PANELS, piece + c, PIECE, rows, panel, down, apart, out, wide, from > 0);
                else if (width == STRIP)
                    OF(strip)(STRIP, 1, piece + c, PIECE, rows, panel, down, 0, out, wide, from > 0);
                else
                    for (size_t q = 0; q < count; q++)
                        OF(strip)(1, 1, piece + c, PIECE, rows, panel + q * apart, down, 0, out + q * LANES, wide, from > 0);
            }
        }
    }
}

#endif

/* out (columns, k) = Dᵀ·X. */
TARGET static void OF(across)(const Product *at)
{
    OF(pack)(at, at->rows);
    size_t band = band_of(at->columns, BAND, TOGETHER);
    for (size_t from = 0; from < at->rows; from += band) {
        size_t to = at->rows - from < band ? at->rows : from + band;
        const char *next = at->rows - to >= band ? (const char *)at->D + to * at->stride * sizeof(float) : NULL;
        OF(back_rows)(at, from, to, next, (const float *)at->panels + from * LANES, LANES, at->rows * LANES, at->out);
    }
}

/* out (rows, k) = D·X and back (columns, k) = Dᵀ·out: a band of rows takes both while it is in the cache. */
TARGET static void OF(both)(const Product *at)
{
    size_t wide = padded(at->k), band = band_of(at->columns, 2 * BAND, TOGETHER);
    OF(pack)(at, at->columns);
    for (size_t from = 0; from < at->rows; from += band) {
        size_t to = at->rows - from < band ? at->rows : from + band, i = from;
        for (; i + TOGETHER <= to; i += TOGETHER) OF(times_rows)(at, TOGETHER, i, 0, at->columns);
        for (; i < to; i++) OF(times_rows)(at, 1, i, 0, at->columns);
        OF(back_rows)(at, from, to, NULL, (const float *)at->out + from * wide, wide, LANES, at->back);
    }
}
#else
/* Columns [first, last) of D over rows [from, to), which lie in `tile`: their part of Dᵀ·X. */
INLINE void OF(across_tile)(const Product *at, const Cell *tile, size_t first, size_t last, size_t from, size_t to)
{
    /* Meanwhile the next tile comes: a line of SOME of its rows for each strip. */
    enum { SOME = TILE * STRIP * sizeof(Cell) / LINE, ROUNDS = TILE * DEEP / SOME };
    size_t size = sizeof(Cell) / DEEP, step = at->stride * size, round = 0;
    const char *next = at->rows - to >= TILE * DEEP ? (const char *)at->D + to * step + first * size : NULL;
    size_t wide = padded(at->k), cells = (at->rows + DEEP - 1) / DEEP, rows = (to - from + DEEP - 1) / DEEP;
    for (size_t p = 0, count; p < wide; p += count * LANES) {
        count = wide - p >= PANELS * LANES ? PANELS : 1;
        const Cell *panel = (const Cell *)at->panels + p * cells + from / DEEP * LANES;
        for (size_t c = first, width; c < last; c += width) {
            width = last - c >= STRIP ? STRIP : 1;
            const Cell *D = tile + c - first;
            float *out = (float *)at->out + c * wide + p;
            if (next && p == 0 && (round / ROUNDS + 1) * LINE <= (last - first) * size) {
                for (size_t r = 0; r < SOME; r++)
                    __builtin_prefetch(next + (round % ROUNDS * SOME + r) * step + round / ROUNDS * LINE, 0, 2);
                round++;
            }
            if (width == STRIP && count == PANELS)
                OF(strip)(STRIP, PANELS, D, ASIDE, rows, panel, LANES, cells * LANES, out, wide, from > 0);
            else if (width == STRIP)
                OF(strip)(STRIP, 1, D, ASIDE, rows, panel, LANES, cells * LANES, out, wide, from > 0);
            else
                for (size_t q = 0; q < count; q++)
                    OF(strip)(1, 1, D, ASIDE, rows, panel + q * cells * LANES, LANES, 0, out + q * LANES, wide, from > 0);
        }
    }
}

/* out (columns, k) = Dᵀ·X; rows of a tile are copied beside each other first, where no two need one place of a cache. */
TARGET static void OF(across)(const Product *at)
{
    Cell *tile = (Cell *)at->memory;
    size_t size = sizeof(Cell) / DEEP;
    OF(pack)(at, at->rows);
    for (size_t first = 0; first < at->columns; first += BLOCK) {
        size_t last = at->columns - first < BLOCK ? at->columns : first + BLOCK;
        for (size_t from = 0; from < at->rows; from += TILE * DEEP) {
            size_t to = at->rows - from < TILE * DEEP ? at->rows : from + TILE * DEEP;
            for (size_t r = from; r < to; r += DEEP) {
                const char *row = (const char *)at->D + (r * at->stride + first) * size;
                const char *next = r + DEEP - 1 < to ? row + (DEEP - 1) * at->stride * size : NULL;
                OF(gather)(tile + (r - from) / DEEP * ASIDE, row, next, last - first);
            }
            OF(across_tile)(at, tile, first, last, from, to);
        }
    }
}
#endif

#undef OF
