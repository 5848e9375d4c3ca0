/* ΔW = W' − W in float32 with both norms, in one pass, and the products of a large matrix with few columns.
 *
 * Squares are summed in float64, in PARTS sums of every PARTS-th number. Products are fused multiply-adds in float32 in
 * the order of the numbers, each run of RUN of them summed on its own; Gram matrices are in float64 throughout. No
 * sum depends on the width of a processor's vectors. A library's general product reaches a third of a processor's speed
 * at 32 columns, and its sums depend on the number of threads. `delta.h` and `skinny.h` have the
 * arithmetic, compiled for each width, `blocks.h` what is made of it. Where a processor multiplies BF16 it does so in half
 * the time.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { BF16, F16, F32 };
enum { LANES = 16, PARTS = 16 };               /* columns of a panel; sums of squares */
enum { RUN = 512, FEW = 64 };                 /* numbers summed in one run; rows of a Gram matrix at once */
enum { BLOCK = 2048, TILE = 32 };             /* columns, and rows, whose numbers stay in the cache */
enum { BAND = 24576, MOST_BAND = 48 };        /* numbers, and rows at most, that stay in a smaller one */
enum { PIECE = 48 };                          /* columns that are copied together */
enum { OUTER = 6, NEAR = 4096 };              /* rows that are taken at once; numbers of a result that stay near */
enum { ASIDE = BLOCK + 16, LINE = 64 };       /* numbers from row to row of a tile: a line more; bytes of a line */

/* The same fields, in the same order, as `_Change` in delta.py. */
typedef struct {
    const char *before, *after; /* W and W' (count), stored in their dtypes */
    float *out;                 /* (count) */
    uint16_t *low;              /* (count): W' − W rounded to BF16, or NULL where it is not wanted */
    size_t before_dtype, after_dtype, count;
    double norm2, before2, lost2; /* results: ‖W' − W‖², ‖W‖², and ‖W' − W − low‖² */
} Change;

/* The same fields, in the same order, as `_Product` in delta.py. */
typedef struct {
    const void *D; /* (rows, columns), F32 or BF16, `stride` numbers from row to row */
    size_t stride, rows, columns;
    const float *X; /* (columns or rows, k), `down` numbers from row to row, `over` from column to column */
    size_t down, over, k;
    void *out;    /* (rows or columns, k rounded up to LANES), float, or double of a Gram matrix */
    void *panels; /* for as many numbers as X has with k rounded up to LANES, and one row more */
    float *back;  /* of `both`: (columns, k rounded up to LANES) */
    void *memory; /* of BF16 for TILE rows of ASIDE numbers; of a Gram matrix for FEW rows of D and X, rounded up to LANES */
} Product;

#define INLINE static inline __attribute__((always_inline)) TARGET
#define JOIN(name, width) name##_##width
#define NAMED(name, width) JOIN(name, width)

static size_t padded(size_t k) { return (k + LANES - 1) / LANES * LANES; }

/* Rows of `columns` numbers that are worked on one band after the other, whole groups of them. */
static size_t band_of(size_t columns, size_t numbers, size_t group)
{
    size_t band = numbers / columns / group * group;
    return band < group ? group : band > MOST_BAND ? MOST_BAND : band;
}

#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define WIDTH 8
#define TOGETHER 6
#define STRIP 6
#define SQUARE 2
#define PANELS 1
#include "delta.h"
#undef TARGET
#undef WIDTH
#undef TOGETHER
#undef STRIP
#undef SQUARE
#undef PANELS
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define WIDTH 16
#define TOGETHER 12
#define STRIP 8
#define SQUARE 8
#define PANELS 2
#include "delta.h"
#undef TARGET
#undef WIDTH
#undef TOGETHER
#undef STRIP
#undef SQUARE
#undef PANELS

/* D of BF16: a cell is two numbers, of one row or of two. */
#define TARGET __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define WIDTH 16
#define TOGETHER 12
#define STRIP 8
#define PANELS 2
#define TYPE bf16
#define DEEP 2
typedef uint32_t Cell __attribute__((aligned(2), may_alias));
INLINE uint32_t rounded_bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
INLINE Cell NAMED(NAMED(cell, bf16), 16)(float x, float next) { return rounded_bf16(x) | rounded_bf16(next) << 16; }
INLINE Vector NAMED(NAMED(add, bf16), 16)(Vector sum, uint32_t d, Vector x)
{
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)_mm512_set1_epi32((int)d));
}
/* Two rows number by number; zeros where there is no second. */
INLINE void NAMED(NAMED(gather, bf16), 16)(Cell *to, const char *row, const char *next, size_t count)
{
    const uint16_t *low = (const uint16_t *)row, *high = (const uint16_t *)next;
    size_t c = 0;
    for (; high && c + 16 <= count; c += 16) {
        Bits_16 first = __builtin_convertvector(*(const Halves_16 *)(low + c), Bits_16);
        *(Bits_16 *)(to + c) = first | __builtin_convertvector(*(const Halves_16 *)(high + c), Bits_16) << 16;
    }
    for (; c < count; c++) to[c] = low[c] | (high ? (uint32_t)high[c] << 16 : 0);
}
#include "skinny.h"

/* Return the widest vectors that this processor has: 16 or 8 numbers; 0 where NumPy and torch have to do. */
size_t loratools_delta_width(void)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") ? 16 : 8;
}

void loratools_difference(Change *at, size_t width) { width == 16 ? difference_16(at) : difference_8(at); }
void loratools_times(const Product *at, size_t width) { width == 16 ? times_f32_16(at) : times_f32_8(at); }
void loratools_across(const Product *at, size_t width) { width == 16 ? across_f32_16(at) : across_f32_8(at); }
void loratools_both(const Product *at, size_t width) { width == 16 ? both_f32_16(at) : both_f32_8(at); }
void loratools_times_bf16(const Product *at, size_t width) { (void)width, times_bf16_16(at); }
void loratools_across_bf16(const Product *at, size_t width) { (void)width, across_bf16_16(at); }

/* Tell whether this processor multiplies numbers of BF16. */
size_t loratools_multiplies_bf16(void)
{
    return loratools_delta_width() == 16 && __builtin_cpu_supports("avx512bf16") != 0;
}
void loratools_gram(const Product *at, size_t width) { width == 16 ? gram_16(at) : gram_8(at); }
#else
#define TARGET
#define WIDTH 4
#define TOGETHER 6
#define STRIP 6
#define SQUARE 2
#define PANELS 1
#include "delta.h"

size_t loratools_delta_width(void) { return 4; }

void loratools_difference(Change *at, size_t width) { (void)width, difference_4(at); }
void loratools_times(const Product *at, size_t width) { (void)width, times_f32_4(at); }
void loratools_across(const Product *at, size_t width) { (void)width, across_f32_4(at); }
void loratools_both(const Product *at, size_t width) { (void)width, both_f32_4(at); }
void loratools_times_bf16(const Product *at, size_t width) { (void)at, (void)width; }
void loratools_across_bf16(const Product *at, size_t width) { (void)at, (void)width; }
size_t loratools_multiplies_bf16(void) { return 0; }
void loratools_gram(const Product *at, size_t width) { (void)width, gram_4(at); }
#endif

#include "blocks.h"

/* Whoever calls checks that it means the same fields. */
size_t loratools_change_size(void) { return sizeof(Change); }
size_t loratools_product_size(void) { return sizeof(Product); }
