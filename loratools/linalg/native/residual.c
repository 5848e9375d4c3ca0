/* The residual of a merge: the prediction W' - left·right of the base, and the base's place among the floats around it.
 *
 * `left` and `right` are in fixed point (engine/residual/predict.py): every sum is exact in float64, so that each
 * processor finds the same prediction. Where 16 bits are to be predicted the sum is first formed in float32, with a
 * bound of its error; only where that leaves open which float is nearest is it formed in float64. What is coded, and
 * how, says engine/residual/codes.py, whose formulas in NumPy give the same bytes. `fixed.h` has that, `residual.h` the predictions,
 * `ranks.h` the codes, all compiled for each width of vectors. C for its speed alone.
 */
#include <float.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { BF16, F16, F32 };
enum { LANES = 32, HALF_PANEL = 16 }; /* columns of a panel, and of what is multiplied in float64 at once */
enum { MOST_ROWS = 8 };               /* rows at once, at most */
enum { CHUNK = 64, MOST_PLANES = 23 }; /* numbers that are coded together; bits of a rank */
enum { SPARSE, DENSE, LISTED };        /* how exceptions are listed: by place, for every element, or by place, few */
enum { FEW = 1024 };                   /* exceptions of a tile, at most, that are LISTED: as they are written */
enum { DONE, SPECIAL, MISFIT };        /* what became of a tile: see `Tile` */

/* The same fields, in the same order, as `_Step` in residual.py. One product on rows first,
 * first + every, … below last, and on columns [from, to) of the matrix. */
typedef struct {
    size_t first, last, every, from, to, rank;
    const double *left;                      /* (rows, rank) */
    const double *right;                     /* (rank, columns) in panels of LANES columns, the last filled with zeros */
    const float *near_left, *near_right;     /* the same in float32; NULL where that serves for nothing */
    size_t held;                             /* whether float32 holds them exactly */
    const float *row_error, *panel_error;    /* whose products bound the error of a sum in float32; 0: it is exact */
    const float *by_row, *by_column;         /* what W' is divided by first, or NULL */
} Step;

/* Numbers of a row, by `mask` from a column on, of which a sum in float32 does not tell what they are rounded to. */
typedef struct {
    uint32_t row, column, mask;
} Doubt;

/* The same fields, in the same order, as `_Tile` in residual.py. */
typedef struct {
    const Step *steps; /* in the order in which they were made */
    size_t many;
    const char *after;                /* (rows, columns), stored in `source`: the merged numbers */
    const char *W;                    /* (rows, columns), stored in `dtype`: the base; NULL where it is wanted */
    char *P;                          /* (rows, columns): memory, and the base where it is wanted */
    size_t source, dtype, start, rows, columns; /* `start` is the first row */
    float *numbers;                   /* memory for MOST_ROWS rows, columns rounded up to CHUNK */
    Doubt *doubts;                    /* memory for one of each LANES of these */
    uint64_t *above;                  /* memory for a bit for each number, rows rounded up to CHUNK */
    uint8_t *planes;                  /* memory for MOST_PLANES rows of bits, `room` bytes each */
    size_t room;
    uint64_t *notes;                  /* memory for MOST_PLANES + 1 bits for each number, rows rounded up to CHUNK */
    uint32_t *at, *high;              /* (rows · columns): where ranks have more bits than `spread` says, and which */
    uint8_t *packed;                  /* the low bits of all ranks, plane after plane */
    size_t packed_bytes;
    uint8_t *raw;                     /* exceptions as they are compressed, or written; dense ones are only read */
    size_t raw_bytes, form, exceptions;
} Tile;

/* The same fields, in the same order, as `_Blocks` in residual.py. */
typedef struct {
    Tile *tile;                 /* the first of tiles that follow each other, all of as many rows */
    size_t tiles;
    uint8_t *to;                /* memory for `room` bytes: blocks as engine/residual/codes.py frames them */
    size_t room, bytes;         /* `bytes` of it are filled */
} Blocks;

/* The same fields, in the same order, as `_Factor` in steps.py. */
typedef struct {
    double *factor; /* (rows, columns): in place */
    size_t rows, columns;
    size_t bits, across; /* multiples of 2^-bits of the power of two above the largest of a row if `across`, or of a column */
    double *scales;      /* memory for two of each of these */
} Factor;

/* The same fields, in the same order, as `_Factors` in steps.py: what becomes those of a Step. */
typedef struct {
    const double *left, *right; /* (rows, rank), (rank, columns) */
    size_t rows, columns, rank;
    double *panels;
    float *near_left, *near_panels, *row_error, *panel_error;
    size_t held;
} Factors;

static const uint32_t EXPONENT[] = {0x7f80, 0x7c00, 0x7f800000};
static const int MANTISSA[] = {7, 10, 23};

#define INLINE static inline __attribute__((always_inline)) TARGET
#define JOIN(name, width) name##_##width
#define NAMED(name, width) JOIN(name, width)

/* Bits that follow each other, the first of them in the lowest bit of a byte. */
typedef struct {
    uint8_t *to;
    uint64_t last; /* the bits of the byte at `to` */
    unsigned filled;
} Bitstream;

/* Append `count` bits, at most 56; eight bytes after the last must be there. */
static inline void append(Bitstream *at, uint64_t bits, unsigned count)
{
    uint64_t all = at->last | bits << at->filled;
    memcpy(at->to, &all, 8);
    unsigned filled = at->filled + count;
    at->to += filled >> 3;
    at->last = all >> (filled & ~7u);
    at->filled = filled & 7;
}

/* Read `count` bits, at most 56, from a place on. */
static inline uint64_t bits_at(const uint8_t *packed, size_t place, unsigned count)
{
    uint64_t all;
    memcpy(&all, packed + (place >> 3), 8);
    return all >> (place & 7) & ((1ull << count) - 1);
}

/* Turn the bits of every byte around: the first of eight is the highest there. */
static void turn(uint8_t *bytes, size_t count)
{
    for (size_t n = 0; n < count; n += 8) {
        uint64_t all;
        memcpy(&all, bytes + n, 8);
        all = (all >> 1 & 0x5555555555555555) | (all & 0x5555555555555555) << 1;
        all = (all >> 2 & 0x3333333333333333) | (all & 0x3333333333333333) << 2;
        all = (all >> 4 & 0x0f0f0f0f0f0f0f0f) | (all & 0x0f0f0f0f0f0f0f0f) << 4;
        memcpy(bytes + n, &all, 8);
    }
}

/* Join the planes; eight bytes after the last must be there. */
static void join(Tile *at, const Bitstream *planes)
{
    Bitstream all = {at->packed, 0, 0};
    for (int bit = 0; bit < MOST_PLANES; bit++) {
        const uint8_t *from = at->planes + bit * at->room;
        size_t left = (size_t)(planes[bit].to - from) * 8 + planes[bit].filled;
        for (size_t place = 0; left; place += 56) {
            unsigned count = left < 56 ? (unsigned)left : 56;
            append(&all, bits_at(from, place, count), count);
            left -= count;
        }
    }
    at->packed_bytes = (size_t)(all.to - at->packed) + (all.filled > 0);
    turn(at->packed, at->packed_bytes);
}

/* Write a number in as few bytes as it takes, seven bits in each, the lowest first; return their end. */
static uint8_t *put_number(uint8_t *to, uint32_t number)
{
    for (; number > 0x7f; number >>= 7) *to++ = (uint8_t)(number | 0x80);
    *to++ = (uint8_t)number;
    return to;
}

/* Read such a number, and move on; return whether it ends before `end` and has at most 32 bits. */
static int get_number(const uint8_t **from, const uint8_t *end, uint32_t *number)
{
    uint64_t all = 0;
    for (int shift = 0; shift < 35 && *from < end; shift += 7) {
        uint8_t byte = *(*from)++;
        all |= (uint64_t)(byte & 0x7f) << shift;
        if (byte & 0x80) continue;
        *number = (uint32_t)all;
        return all <= UINT32_MAX;
    }
    return 0;
}

/* List the exceptions: each with its distance where they are few, else all distances, all lowest bytes, all next. */
static void list(Tile *at)
{
    size_t count = at->exceptions, size = at->dtype == F32 ? 4 : 2;
    if (at->form == LISTED) {
        uint8_t *to = at->raw;
        for (size_t e = 0; e < count; e++)
            to = put_number(put_number(to, at->at[e] - (e ? at->at[e - 1] : 0)), at->high[e]);
        at->raw_bytes = (size_t)(to - at->raw);
        return;
    }
    at->raw_bytes = count * (4 + size);
    for (size_t e = 0; e < count; e++) {
        uint32_t gap = at->at[e] - (e ? at->at[e - 1] : 0);
        for (int byte = 0; byte < 4; byte++) at->raw[4 * e + byte] = (uint8_t)(gap >> 8 * byte);
        for (size_t byte = 0; byte < size; byte++) at->raw[(4 + byte) * count + e] = (uint8_t)(at->high[e] >> 8 * byte);
    }
}

/* Read what `list` wrote, or one number for each element, into `at` and `high`; say whether all lie in the tile. */
static int listed(Tile *at)
{
    size_t length = at->rows * at->columns, count = at->exceptions, size = at->dtype == F32 ? 4 : 2, e = 0;
    const uint8_t *high = at->raw + (at->form == SPARSE ? 4 * count : 0), *end = at->raw + at->raw_bytes;
    uint64_t place = 0;
    if (at->form == LISTED) {
        const uint8_t *from = at->raw;
        for (; e < count; e++) {
            uint32_t gap, more;
            if (!get_number(&from, end, &gap) || !get_number(&from, end, &more)) return 0;
            place += gap;
            if (place >= length || (size == 2 && more > 0xffff)) return 0;
            at->at[e] = (uint32_t)place, at->high[e] = more;
        }
        return from == end;
    }
    for (size_t n = 0; n < count; n++) {
        uint32_t gap = 0, more = 0;
        for (size_t byte = 0; byte < size; byte++) more |= (uint32_t)high[byte * count + n] << 8 * byte;
        if (at->form == SPARSE) {
            for (int byte = 0; byte < 4; byte++) gap |= (uint32_t)at->raw[4 * n + byte] << 8 * byte;
            place += gap;
            if (place >= length) return 0;
        } else {
            place = n;
            if (!more) continue;
        }
        at->at[e] = (uint32_t)place;
        at->high[e++] = more;
    }
    at->exceptions = e;
    return 1;
}

#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET __attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt")))
#define WIDTH 8
#define TOGETHER 6
#define AT_ONCE 2
#define BACK 3
#include "residual.h"
#include "fixed.h"
#undef TARGET
#undef WIDTH
#undef TOGETHER
#undef AT_ONCE
#undef BACK
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt")))
#define WIDTH 16
#define TOGETHER 8
#define AT_ONCE 2
#define BACK 8
#include "residual.h"
#include "fixed.h"

/* Return the widest vectors that this processor has: 16 or 8 numbers; 0 where NumPy has to do. */
size_t loratools_residual_width(void)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c") ||
        !__builtin_cpu_supports("bmi2") || !__builtin_cpu_supports("popcnt")) return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") ? 16 : 8;
}

size_t loratools_encode(Tile *at, size_t width) { return width == 16 ? encode_16(at) : encode_8(at); }
size_t loratools_decode(Tile *at, size_t width) { return width == 16 ? decode_16(at) : decode_8(at); }
size_t loratools_fix(Factor *at, size_t width) { return width == 16 ? fix_16(at) : fix_8(at); }
size_t loratools_lay_out(Factors *at, size_t width) { return width == 16 ? lay_out_16(at) : lay_out_8(at); }
#else
#define TARGET
#define WIDTH 4
#define TOGETHER 2
#define AT_ONCE 8
#define BACK 2
#include "residual.h"
#include "fixed.h"

size_t loratools_residual_width(void) { return 4; }
size_t loratools_encode(Tile *at, size_t width) { return (void)width, encode_4(at); }
size_t loratools_decode(Tile *at, size_t width) { return (void)width, decode_4(at); }
size_t loratools_fix(Factor *at, size_t width) { return (void)width, fix_4(at); }
size_t loratools_lay_out(Factors *at, size_t width) { return (void)width, lay_out_4(at); }
#endif

static uint8_t *put_size(uint8_t *to, size_t size)
{
    for (int byte = 0; byte < 4; byte++) *to++ = (uint8_t)(size >> 8 * byte);
    return to;
}

/* Code tiles into blocks, each after its length, as long as all exceptions are few and there is room; return how many. */
size_t loratools_encode_blocks(Blocks *at, size_t width)
{
    enum { HEAD = 13 }; /* bytes before the ranks */
    Tile *tile = at->tile;
    size_t step = tile->rows * tile->columns, source = tile->source == F32 ? 4 : 2, size = tile->dtype == F32 ? 4 : 2;
    uint8_t *to = at->to;
    size_t done = 0;
    for (; done < at->tiles; done++) {
        if (loratools_encode(tile, width) != DONE || tile->form != LISTED) break;
        size_t bytes = HEAD + tile->packed_bytes + tile->raw_bytes;
        if (4 + bytes > at->room - (size_t)(to - at->to)) break;
        to = put_size(to, bytes);
        *to++ = LISTED;
        to = put_size(put_size(put_size(to, tile->exceptions), tile->packed_bytes), tile->raw_bytes);
        memcpy(to, tile->packed, tile->packed_bytes);
        memcpy(to += tile->packed_bytes, tile->raw, tile->raw_bytes);
        to += tile->raw_bytes;
        tile->after += step * source, tile->W += step * size, tile->start += tile->rows;
    }
    at->bytes = (size_t)(to - at->to);
    return done;
}

/* Whoever calls checks that it means the same fields. */
size_t loratools_blocks_size(void) { return sizeof(Blocks); }
size_t loratools_factor_size(void) { return sizeof(Factor); }
size_t loratools_factors_size(void) { return sizeof(Factors); }
size_t loratools_step_size(void) { return sizeof(Step); }
size_t loratools_tile_size(void) { return sizeof(Tile); }
