/* What small codes stand for, in float32: (table[code] - zero)·scale, a scale and perhaps a zero for each group.
 *
 * Codes are nibbles or bytes, row by row; each step is rounded as float32 has it, so that all processors write the same
 * bytes, which are those of the formula in NumPy. `codes.h` has the arithmetic for the vectors of a processor. C for
 * its speed alone: what decodes at the speed of memory leaves a merge waiting for the disk.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { LOW_FIRST, HIGH_FIRST, BYTES, SIGNED, E4M3, E5M2 }; /* nibbles, the first in the low or high half; bytes */

/* The same fields, in the same order, as `_Codes` in codes.py. */
typedef struct {
    const uint8_t *codes; /* (rows, pitch) */
    float *out;           /* (rows, columns) */
    size_t form, rows, columns, pitch;
    size_t width, groups;        /* columns of a group; groups of a row */
    const float *table;          /* 16 or 256 numbers, by code */
    const float *scales, *zeros; /* (rows, groups), or NULL */
} Codes;

/* One number. */
static inline __attribute__((always_inline)) float number(const Codes *at, const uint8_t *row, size_t j, int form)
{
    if (form == LOW_FIRST) return at->table[row[j >> 1] >> 4 * (j & 1) & 15];
    if (form == HIGH_FIRST) return at->table[row[j >> 1] >> 4 * (~j & 1) & 15];
    return at->table[row[j]];
}

#define INLINE static inline __attribute__((always_inline)) TARGET
#define JOIN(name, width) name##_##width
#define NAMED(name, width) JOIN(name, width)

#define TARGET
#define WIDTH 1
#include "codes.h"
#undef TARGET
#undef WIDTH

#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define WIDTH 8
#include "codes.h"
#undef TARGET
#undef WIDTH
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define WIDTH 16
#include "codes.h"

/* Return the widest vectors that this processor has: 16, 8 or 1 numbers. */
size_t loratools_codes_width(void)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 1;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") ? 16 : 8;
}

/* Decode with vectors of a width that the processor has. */
void loratools_decode(const Codes *at, size_t width)
{
    if (width == 16) decode_16(at);
    else if (width == 8) decode_8(at);
    else decode_1(at);
}
#else
size_t loratools_codes_width(void) { return 1; }

void loratools_decode(const Codes *at, size_t width) { (void)width, decode_1(at); }
#endif

/* Take apart blocks of 32 signed bytes with a float16 before them (Q8_0): the bytes, and the bits of the float16. */
void loratools_split_blocks(const uint8_t *blocks, size_t count, uint8_t *codes, uint16_t *scales)
{
    for (size_t i = 0; i < count; i++, blocks += 34) {
        memcpy(scales + i, blocks, 2);
        memcpy(codes + 32 * i, blocks + 2, 32);
    }
}

/* out (rows, count) = words (count, stride)ᵀ, of whose rows the first so many columns are taken. */
void loratools_turn_words(const uint32_t *words, size_t stride, size_t count, size_t rows, uint32_t *out)
{
    enum { TOGETHER = 16 }; /* words of one line of the cache */
    for (size_t first = 0; first < rows; first += TOGETHER) {
        size_t last = first + TOGETHER < rows ? first + TOGETHER : rows;
        for (size_t w = 0; w < count; w++)
            for (size_t r = first; r < last; r++) out[r * count + w] = words[w * stride + r];
    }
}

/* Whoever calls checks that it means the same fields. */
size_t loratools_codes_size(void) { return sizeof(Codes); }
