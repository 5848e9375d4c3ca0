/* The residual of a merge: the prediction W' - left·right of the base, and the base's place among the floats around it.
 *
 * `left` and `right` are in fixed point (engine/residual/predict.py): every sum is exact in float64, so that each
 * processor finds the same prediction. What is coded, and how, says engine/residual/codes.py, whose formulas in NumPy
 * give the same bytes. `residual.h` has what depends on the vectors of a processor. C for its speed alone.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { BF16, F16, F32 };
enum { LANES = 16 }; /* columns of a panel */
enum { MORE = 16 };  /* numbers that are written at once, of which fewer may be meant */

/* The same fields, in the same order, as `_Step` in residual.py. */
typedef struct {
    float *P; /* (rows, columns), `stride` numbers from row to row */
    size_t stride, rows, columns, rank;
    const double *left;            /* (rows, rank) */
    const double *right;           /* (rank, columns) in panels of LANES columns, the last filled up with zeros */
    const float *by_row, *by_column; /* what P is divided by first, or NULL */
} Step;

/* The same fields, in the same order, as `_Tile` in residual.py. */
typedef struct {
    const float *prediction; /* (count) */
    const char *after;       /* (count), stored in `dtype` where the binades are comparable, else NULL */
    const char *W;           /* (count), stored in `dtype`, or NULL: nothing but P and the places is wanted */
    char *P;                 /* (count): the prediction rounded to `dtype` */
    size_t dtype, count;
    uint32_t *places, *low; /* where W' lies in a higher binade than P, and the low bits of the rank there */
    uint8_t *spread;        /* how many bits that are; like the other lists it has room for MORE numbers than `count` */
    size_t coarse;          /* their number */
    uint32_t *at, *high;    /* where there is more than that, and what */
    size_t exceptions;      /* their number */
    size_t special;         /* not 0: a prediction is NaN or infinite, and nothing here holds */
} Tile;

static const uint32_t EXPONENT[] = {0x7f80, 0x7c00, 0x7f800000};
static const int MANTISSA[] = {7, 10, 23};

/* A byte with its bits in the other order. */
#define TWO(n) n, n + 128, n + 64, n + 192
#define FOUR(n) TWO(n), TWO(n + 32), TWO(n + 16), TWO(n + 48)
#define SIX(n) FOUR(n), FOUR(n + 8), FOUR(n + 4), FOUR(n + 12)
static const uint8_t REVERSED[] = {SIX(0), SIX(2), SIX(1), SIX(3)};

#define INLINE static inline __attribute__((always_inline)) TARGET
#define JOIN(name, width) name##_##width
#define NAMED(name, width) JOIN(name, width)

/* The bits of one stored number. */
static inline uint32_t bits_at(const char *stored, size_t j, int dtype)
{
    uint32_t wide = 0;
    memcpy(&wide, stored + (dtype == F32 ? 4 : 2) * j, dtype == F32 ? 4 : 2);
    return wide;
}

/* An integer of the width of `dtype`, with its sign. */
static inline int32_t wrapped(uint32_t bits, int dtype) { return dtype == F32 ? (int32_t)bits : (int16_t)bits; }

/* Integers in the order of the floats, one for each pattern of bits. */
static inline uint32_t ordered(uint32_t bits, int dtype)
{
    int32_t number = wrapped(bits, dtype);
    return (uint32_t)(number ^ ((number >> 31) & (dtype == F32 ? 0x7fffffff : 0x7fff)));
}

/* The float of a rank. */
static inline uint32_t at_rank(uint32_t rank, uint32_t P, int above, int dtype)
{
    uint32_t steps = (rank >> 1) ^ -(rank & 1);
    if (above) steps = -steps;
    return ordered(ordered(P, dtype) + steps, dtype);
}

#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define WIDTH 8
#define TOGETHER 3
#include "residual.h"
#undef TARGET
#undef WIDTH
#undef TOGETHER
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define WIDTH 16
#define TOGETHER 8
#include "residual.h"

/* Return the widest vectors that this processor has: 16 or 8 numbers; 0 where NumPy has to do. */
size_t loratools_residual_width(void)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") ? 16 : 8;
}

void loratools_widen(const char *stored, size_t count, size_t dtype, float *out, size_t width)
{
    width == 16 ? widen_16(stored, count, dtype, out) : widen_8(stored, count, dtype, out);
}
void loratools_take_back(const Step *at, size_t width) { width == 16 ? take_back_16(at) : take_back_8(at); }
void loratools_scan(Tile *at, size_t width) { width == 16 ? scan_16(at) : scan_8(at); }
void loratools_place(const Tile *at, size_t width) { width == 16 ? place_16(at) : place_8(at); }
size_t loratools_pack(const Tile *at, uint8_t *out, uint32_t *low, uint32_t *spread, size_t width)
{
    return width == 16 ? pack_16(at, out, low, spread) : pack_8(at, out, low, spread);
}
#else
#define TARGET
#define WIDTH 4
#define TOGETHER 2
#include "residual.h"

size_t loratools_residual_width(void) { return 4; }

void loratools_widen(const char *stored, size_t count, size_t dtype, float *out, size_t width)
{
    (void)width, widen_4(stored, count, dtype, out);
}
void loratools_take_back(const Step *at, size_t width) { (void)width, take_back_4(at); }
void loratools_scan(Tile *at, size_t width) { (void)width, scan_4(at); }
void loratools_place(const Tile *at, size_t width) { (void)width, place_4(at); }
size_t loratools_pack(const Tile *at, uint8_t *out, uint32_t *low, uint32_t *spread, size_t width)
{
    (void)width;
    return pack_4(at, out, low, spread);
}
#endif

/* Read the low bits of all ranks; `turn` is memory for as many numbers. */
void loratools_unpack(const Tile *at, const uint8_t *packed, uint32_t *turn)
{
    size_t left = at->coarse, next = 0;
    for (size_t c = 0; c < left; c++) turn[c] = (uint32_t)c, at->low[c] = 0;
    for (int bit = 0; left; bit++) {
        size_t more = 0;
        for (size_t c = 0; c < left; c++, next++) {
            uint32_t place = turn[c];
            at->low[place] |= (uint32_t)(packed[next >> 3] >> (7 - (next & 7)) & 1) << bit;
            turn[more] = place;
            more += at->spread[place] > bit + 1;
        }
        left = more;
    }
}

/* Whoever calls checks that it means the same fields. */
size_t loratools_step_size(void) { return sizeof(Step); }
size_t loratools_tile_size(void) { return sizeof(Tile); }
