/* ΔW = W' − W in float32 with both norms, in one pass, and the products of a large matrix with few columns.
 *
 * Squares are summed in float64, in PARTS sums of every PARTS-th number. Products are fused multiply-adds in float32 in
 * the order of the numbers, each run of RUN of them summed on its own; Gram matrices are in float64 throughout. No
 * sum depends on the width of a processor's vectors. A library's general product reaches a third of a processor's speed
 * at 32 columns, and its sums depend on the number of threads. `delta.h` has the arithmetic, compiled for each width.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { BF16, F16, F32 };
enum { LANES = 16, PARTS = 16 };               /* columns of a panel; sums of squares */
enum { RUN = 512, FEW = 64 };                 /* numbers summed in one run; rows of a Gram matrix at once */
enum { BLOCK = 2048, TILE = 32, AHEAD = 16 }; /* columns, and rows, whose numbers stay in the cache; floats of a line */

/* The same fields, in the same order, as `_Change` in delta.py. */
typedef struct {
    const char *before, *after; /* W and W' (count), stored in their dtypes */
    float *out;                 /* (count) */
    size_t before_dtype, after_dtype, count;
    double norm2, before2; /* results: ‖W' − W‖² and ‖W‖² */
} Change;

/* The same fields, in the same order, as `_Product` in delta.py. */
typedef struct {
    const float *D; /* (rows, columns), `stride` numbers from row to row */
    size_t stride, rows, columns;
    const float *X; /* (columns or rows, k), `down` numbers from row to row, `over` from column to column */
    size_t down, over, k;
    void *out;     /* (rows or columns, k rounded up to LANES), float, or double of a Gram matrix */
    float *panels; /* memory for as many numbers as X has with k rounded up to LANES */
    double *memory; /* of a Gram matrix: for FEW rows of D and of X, both rounded up to LANES; their rows are contiguous */
} Product;

#define INLINE static inline __attribute__((always_inline)) TARGET
#define JOIN(name, width) name##_##width
#define NAMED(name, width) JOIN(name, width)

static size_t padded(size_t k) { return (k + LANES - 1) / LANES * LANES; }

/* X in panels of LANES columns, the last filled up with zeros. */
static void pack(const Product *at, size_t length)
{
    for (size_t p = 0; p < padded(at->k); p += LANES) {
        size_t count = at->k - p < LANES ? at->k - p : LANES;
        float *panel = at->panels + p * length;
        const float *from = at->X + p * at->over;
        if (count < LANES) memset(panel, 0, length * LANES * sizeof(float));
        if (at->over == 1 && count == LANES)
            for (size_t i = 0; i < length; i++) memcpy(panel + i * LANES, from + i * at->down, LANES * sizeof(float));
        else
            for (size_t i = 0; i < length; i++)
                for (size_t n = 0; n < count; n++) panel[i * LANES + n] = from[i * at->down + n * at->over];
    }
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

/* Return the widest vectors that this processor has: 16 or 8 numbers; 0 where NumPy and torch have to do. */
size_t loratools_delta_width(void)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") ? 16 : 8;
}

void loratools_difference(Change *at, size_t width) { width == 16 ? difference_16(at) : difference_8(at); }
void loratools_times(const Product *at, size_t width) { width == 16 ? times_16(at) : times_8(at); }
void loratools_across(const Product *at, size_t width) { width == 16 ? across_16(at) : across_8(at); }
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
void loratools_times(const Product *at, size_t width) { (void)width, times_4(at); }
void loratools_across(const Product *at, size_t width) { (void)width, across_4(at); }
void loratools_gram(const Product *at, size_t width) { (void)width, gram_4(at); }
#endif

/* Whoever calls checks that it means the same fields. */
size_t loratools_change_size(void) { return sizeof(Change); }
size_t loratools_product_size(void) { return sizeof(Product); }
