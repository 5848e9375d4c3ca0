/* The sums that rows.c adds to W and residual.c predicts, which have to be the same to the last bit: WIDTH numbers at a
 * time with the instructions of TARGET, TOGETHER rows and AT_ONCE vectors of each in registers.
 */
#include "floats.h"

/* sums = left·right for `count` rows, a constant where this is inlined: those of a row lie in `panels` of LANES. */
INLINE void NAMED(product, WIDTH)(
    const float *left, const float *right, size_t rank, size_t panels, float *sums, int count)
{
    for (size_t p = 0; p < panels; p++, right += rank * LANES, sums += LANES)
        for (int j = 0; j < LANES; j += AT_ONCE * WIDTH) {
            Vector sum[TOGETHER][AT_ONCE] = {{{0}}}; /* these stay in registers */
            for (size_t k = 0; k < rank; k++)
                for (int i = 0; i < count; i++)
                    for (int n = 0; n < AT_ONCE; n++)
                        sum[i][n] += left[i * rank + k] * *(const Vector *)(right + k * LANES + j + n * WIDTH);
            for (int i = 0; i < count; i++)
                for (int n = 0; n < AT_ONCE; n++) *(Vector *)(sums + i * panels * LANES + j + n * WIDTH) = sum[i][n];
        }
}
