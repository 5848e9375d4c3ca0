/* Products with thin factors beside a linear layer: u = x·Aᵀ, y += s·u·Bᵀ, and what the backward asks for.
 *
 * A rank of 16 fills a vector of AVX-512, so each is a loop of multiply-adds over data that is read once; a library's
 * general product spends half its time at these shapes on its own start. On F32 factors and sums are in float32; on
 * BF16 factors, u and v are rounded to it, as torch does, and sums are in float32 (AVX512_BF16). Every sum is in one
 * order, whatever the number of rows. `thin.h` has the arithmetic, compiled once for each. Other processors are not
 * served: torch does the same there.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { LANES = 16, TOKENS = 12 };

/* One linear layer. Sides are multiples of LANES. */
typedef struct {
    const float *A, *B; /* (r, in), (out, r) */
    float *memory;      /* for (in + out + 2·rows + 1)·R numbers, R being r rounded up to LANES */
    size_t rows, in, out, r;
    float scale;
} Layer;

#if defined(__x86_64__)
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline)) TARGET
#define JOIN(name, type) name##_##type
#define NAMED(name, type) JOIN(name, type)

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define TYPE f32
typedef float f32;
enum { DEEP_f32 = 1 };
INLINE __m512 load_f32(const f32 *from) { return _mm512_loadu_ps(from); }
INLINE void store_f32(f32 *to, __m512 value) { _mm512_storeu_ps(to, value); }
INLINE __m512 add_f32(__m512 sum, const f32 *each, const f32 *same)
{
    return _mm512_fmadd_ps(_mm512_loadu_ps(each), _mm512_set1_ps(*same), sum);
}
/* One row, or two, as they lie in what `add` takes for `each`. */
INLINE void join_f32(f32 *to, __m512 row, __m512 next)
{
    (void)next;
    _mm512_storeu_ps(to, row);
}
INLINE void beside_f32(f32 *to, const f32 *row, const f32 *next)
{
    (void)next;
    _mm512_storeu_ps(to, _mm512_loadu_ps(row));
}
#include "thin.h"
#undef TARGET
#undef TYPE

#define TARGET __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define TYPE bf16
typedef uint16_t bf16;
enum { DEEP_bf16 = 2 };
INLINE __m512i wide(const bf16 *from) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)); }
INLINE __m512 load_bf16(const bf16 *from) { return _mm512_castsi512_ps(_mm512_slli_epi32(wide(from), 16)); }
INLINE void store_bf16(bf16 *to, __m512 value)
{
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(value));
}
INLINE __m512 add_bf16(__m512 sum, const bf16 *each, const bf16 *same)
{
    int pair;
    memcpy(&pair, same, sizeof pair);
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(each), (__m512bh)_mm512_set1_epi32(pair));
}
INLINE void join_bf16(bf16 *to, __m512 row, __m512 next)
{
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(row));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(next));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
INLINE void beside_bf16(bf16 *to, const bf16 *row, const bf16 *next)
{
    __m512i high = next ? _mm512_slli_epi32(wide(next), 16) : _mm512_setzero_si512();
    _mm512_storeu_si512(to, _mm512_or_si512(wide(row), high));
}
#include "thin.h"

static int served(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static Layer layer_of(const float *A, const float *B, size_t rows, size_t in, size_t out, size_t r, float scale)
{
    size_t numbers = (in + out + 2 * rows + 1) * ((r + LANES - 1) / LANES * LANES);
    return (Layer){A, B, malloc(numbers * sizeof(float)), rows, in, out, r, scale};
}

/* y (rows, out) += s·u·Bᵀ with u (rows, r) = x·Aᵀ, which is kept; 0 where there is no memory for it.
 * x, y and u are BF16 or else F32. */
int loratools_thin_forward(
    const float *A, const float *B, size_t rows, size_t in, size_t out, size_t r, float scale, int is_bf16,
    const void *x, void *y, void *u)
{
    Layer at = layer_of(A, B, rows, in, out, r, scale);
    if (at.memory)
        is_bf16 ? forward_bf16(&at, x, y, u) : forward_f32(&at, x, y, u);
    free(at.memory);
    return at.memory != NULL;
}

/* dA = s·(grad·B)ᵀ·x, dB = s·gradᵀ·u, dx += s·grad·B·A; each where it is not NULL; 0 as above. */
int loratools_thin_backward(
    const float *A, const float *B, size_t rows, size_t in, size_t out, size_t r, float scale, int is_bf16,
    const void *grad, const void *x, const void *u, void *dx, float *dA, float *dB)
{
    Layer at = layer_of(A, B, rows, in, out, r, scale);
    if (at.memory)
        is_bf16 ? backward_bf16(&at, grad, x, u, dx, dA, dB) : backward_f32(&at, grad, x, u, dx, dA, dB);
    free(at.memory);
    return at.memory != NULL;
}

/* Of each of a batch: y (rows, out) += x·F·P in float32, with F (in, R), P (R, out), R a multiple of LANES; 0 as above. */
int loratools_thin_batch(
    size_t batch, size_t rows, size_t in, size_t out, size_t R, const float *x, const float *F, const float *P, float *y)
{
    float *u = malloc(rows * R * sizeof(float));
    for (size_t b = 0; u && b < batch; b++) {
        project_f32(x + b * rows * in, F + b * in * R, u, rows, in, R);
        spread_f32(y + b * rows * out, u, P + b * R * out, rows, out, R, R, 1);
    }
    free(u);
    return u != NULL;
}

/* The dtypes that are served on this processor: 0 none, 1 F32, 2 BF16 too. Torch does the others. */
int loratools_thin_served(void) { return served() ? 1 + (__builtin_cpu_supports("avx512bf16") != 0) : 0; }
#else
int loratools_thin_served(void) { return 0; }
#endif
