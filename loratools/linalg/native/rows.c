/* One pass over rows of a BF16, F16 or F32 matrix: out = g∘(W + left·right), rounded once, to nearest even.
 * `out` has the dtype of W, or 16 bits where W is F32, as what codes stand for is; or out = W alone, rounded.
 *
 * Products are summed by fused multiply-adds in the order of the rank, W is added to the sum, and the row is rescaled
 * where there is a magnitude (DoRA: g = m / ‖W + left·right‖, its squares summed in float64). 16-bit results so near
 * zero that float32's error shows in them are computed again in float64. No sum depends on the width of a processor's
 * vectors, so all processors write the same bytes. `kernel.h` has the arithmetic; it is compiled for each width,
 * `factors.h` arranges what is multiplied, and `tiles.h` passes a tensor through it from file to file. C for its speed
 * alone: a merge that has this waits for the disk.
 */
#define _FILE_OFFSET_BITS 64
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__unix__) || defined(__APPLE__)
#include <errno.h>
#include <unistd.h>
#endif

enum { BF16, F16, F32 };
enum { LANES = 32, PARTS = 16, MOST_ROWS = 8 }; /* columns of a panel; sums of squares of a row; rows at once, at most */
enum { CHUNK = 64 }; /* numbers that are looked through together */
#define INFINITE(dtype) ((dtype) == BF16 ? 0x7f80 : 0x7c00) /* the bits of infinity */

/* The same fields, in the same order, as `_Rows` in __init__.py. */
typedef struct {
    const char *W; /* (rows, columns) as `out`: `stride` elements from row to row, `step` from column to column */
    char *out;
    size_t dtype, result, stride, step, rows, columns, rank; /* dtypes of W and of out */
    const float *left;   /* (rows, rank): factor·diag(scale), rounded */
    const float *right;  /* (rank, columns) in panels of LANES columns, the last filled up with zeros */
    const float *factor; /* (rows, rank) */
    const double *scale; /* (rank) */
    const double *magnitude; /* (rows), or NULL */
    double *gains;           /* (rows): g, filled in where there is a magnitude */
    double bound;            /* 16-bit magnitudes of W + left·right below it are computed again */
    float *sums;             /* memory for (MOST_ROWS + 2, columns rounded up to LANES) */
    size_t measured;         /* the first so many rows are compared with W */
    /* results: */
    double retained, total, changed; /* ⟨out − W, Δ⟩, ⟨Δ, Δ⟩ and the count of out ≠ W over the measured rows */
    uint64_t overflowed, flushed;    /* where W is F32 and out is not: finite numbers made infinite, others made zero */
    int64_t zero_row;                /* a row that has no direction, −1 if all have one */
    uint32_t largest;                /* the bits of the largest magnitude of out */
} Rows;

#define INLINE static inline __attribute__((always_inline)) TARGET
#define JOIN(name, width) name##_##width
#define NAMED(name, width) JOIN(name, width)

#if defined(__x86_64__)
/* Instructions are named here and not to the compiler: one library serves the processors of the last ten years. */
#include <immintrin.h>
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define WIDTH 8
#define TOGETHER 6
#define AT_ONCE 2
#include "kernel.h"
#undef TARGET
#undef WIDTH
#undef TOGETHER
#undef AT_ONCE
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define WIDTH 16
#define TOGETHER 8
#define AT_ONCE 2
#include "kernel.h"

static int wide(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static int served(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static size_t together(void) { return wide() ? 8 : 6; }

void loratools_add_products(Rows *at) { wide() ? add_products_16(at) : add_products_8(at); }
void loratools_round_rows(Rows *at) { wide() ? round_rows_16(at) : round_rows_8(at); }
static void loratools_widen(const char *raw, size_t count, size_t dtype, float *to) { widen_8(raw, count, dtype, to); }
#else
#define TARGET
#define WIDTH 4
#define TOGETHER 2
#define AT_ONCE 8
#include "kernel.h"

static int served(void) { return 1; }
static size_t together(void) { return 2; }

void loratools_add_products(Rows *at) { add_products_4(at); }
void loratools_round_rows(Rows *at) { round_rows_4(at); }
static void loratools_widen(const char *raw, size_t count, size_t dtype, float *to) { widen_4(raw, count, dtype, to); }
#endif

#include "factors.h"
#if defined(__unix__) || defined(__APPLE__)
#include "tiles.h"
#endif

/* Whoever calls checks that it means the same fields; 0 says that torch is faster on this processor. */
size_t loratools_rows_size(void) { return served() ? sizeof(Rows) : 0; }
