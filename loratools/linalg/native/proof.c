/* The proof of a merge: what two models differ by, along probes and in single elements, in float64.
 *
 * `surgery/verify` has the formulas, also in NumPy, which gives the same up to the order of its sums; here that order is
 * one for all widths of vectors. Nothing is shared with what merges (rows.c), so that no fault of it can hide here.
 * `proof.h` has what depends on the vectors of a processor, `passes.h` reads files. C for its speed alone.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { BF16, F16, F32 };
enum { PROBES = 16 };
enum { LANES = 16 };   /* sums over elements are this many, of which each takes every sixteenth column */
enum { BLOCK = 2048 }; /* differences that are held at once: half of a core's nearest cache */

/* The same fields, in the same order, as `_Region` in proof.py. */
typedef struct {
    const char *before, *after; /* (rows, columns) of both models, `stride` numbers from row to row */
    size_t before_dtype, after_dtype, stride, rows, columns;
    const double *X; /* (columns, PROBES), or `across`: (rows, PROBES); NULL where only the sums are wanted */
    double *Y;       /* (rows, PROBES), or `across`: (columns, PROBES); the products are added to it */
    size_t across;
    double squares;     /* of what is after, summed */
    uint64_t differing; /* elements that are another number after than before; NaN is another than itself */
} Region;

/* The same fields, in the same order, as `_Elements` in proof.py. */
typedef struct {
    const char *before, *after; /* as in Region */
    size_t before_dtype, after_dtype, stride, rows, columns;
    const uint32_t *row_at, *column_at; /* which rows and columns of the region these are; NULL: the first ones */
    const double *change;               /* (rows, columns), `pitch` numbers from row to row */
    size_t pitch;
    double reach, unit, smallest, terms; /* see `compare` in proof.h */
    size_t ties, of_change;
    uint64_t wrong, far;
    double actual, expected, total;
} Elements;

#define INLINE static inline __attribute__((always_inline)) TARGET
#define JOIN(name, width) name##_##width
#define NAMED(name, width) JOIN(name, width)

static inline size_t least_of(size_t a, size_t b) { return a < b ? a : b; }

#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define WIDTH 4
#define TOGETHER 2
#include "proof.h"
#undef TARGET
#undef WIDTH
#undef TOGETHER
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define WIDTH 8
#define TOGETHER 8
#include "proof.h"

/* Return the widest vectors that this processor has: 8 or 4 numbers; 0 where NumPy has to do. */
size_t loratools_proof_width(void)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") ? 8 : 4;
}

void loratools_measure(Region *at, size_t width) { width == 8 ? measure_8(at) : measure_4(at); }
void loratools_compare(Elements *at, size_t width) { width == 8 ? compare_8(at) : compare_4(at); }
#else
#define TARGET
#define WIDTH 2
#define TOGETHER 2
#include "proof.h"

size_t loratools_proof_width(void) { return 2; }
void loratools_measure(Region *at, size_t width) { (void)width, measure_2(at); }
void loratools_compare(Elements *at, size_t width) { (void)width, compare_2(at); }
#endif

#if defined(__unix__) || defined(__APPLE__)
#include "passes.h"
#endif

/* Whoever calls checks that it means the same fields. */
size_t loratools_region_size(void) { return sizeof(Region); }
size_t loratools_elements_size(void) { return sizeof(Elements); }
