/* Rows of a tensor of two models, read from their files and measured as in proof.c, a few at a time.
 *
 * Those rows stay in a core's own cache, and no lock of Python's is taken between them.
 */
#include <errno.h>
#include <unistd.h>

enum { BYTES = 1 << 17, ROWS = 8 }; /* of these rows, about, and the fewest of them */
enum { DONE, READ_FAILED, ENDED };

/* The same fields, in the same order, as `_Pass` in proof.py. */
typedef struct {
    int64_t files[2], starts[2]; /* descriptors, before and after, and where the tensor begins in each */
    char *memory[2];             /* each for BYTES or ROWS, whichever is more */
    Region region;               /* but its first two and `rows`; X and Y are of the whole tensor, which is not `across` */
    const uint32_t *kept;        /* columns of which the stored numbers are kept, and their number */
    size_t count;
    char *stored[2]; /* (rows, count), before and after, for the rows of one call */
    /* results, besides those of the region: */
    size_t which;    /* of both files could not be read */
    int64_t ended;   /* at which byte it ended */
    uint32_t error;  /* errno */
} Pass;

static int fill(Pass *at, size_t which, size_t bytes, int64_t from)
{
    char *memory = at->memory[which];
    at->which = which;
    while (bytes) {
        ssize_t count = pread((int)at->files[which], memory, bytes, from);
        if (count == 0) {
            at->ended = from;
            return ENDED;
        }
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) {
            at->error = (uint32_t)errno;
            return READ_FAILED;
        }
        memory += count;
        from += count;
        bytes -= (size_t)count;
    }
    return DONE;
}

static void keep(const Pass *at, size_t which, size_t dtype, size_t rows, char *to)
{
    size_t size = dtype == F32 ? 4 : 2;
    const char *row = at->memory[which];
    for (size_t i = 0; i < rows; i++, row += at->region.columns * size)
        for (size_t n = 0; n < at->count; n++, to += size) memcpy(to, row + at->kept[n] * size, size);
}

/* Read rows [first, first + rows) of both models, measure them, and keep what is to be kept of them. */
int loratools_pass(Pass *at, size_t first, size_t rows, size_t width)
{
    Region *region = &at->region;
    size_t dtypes[] = {region->before_dtype, region->after_dtype}, sizes[2], widest = 0;
    for (int n = 0; n < 2; n++) {
        sizes[n] = dtypes[n] == F32 ? 4 : 2;
        widest = sizes[n] * region->columns > widest ? sizes[n] * region->columns : widest;
    }
    size_t step = widest * ROWS < BYTES ? BYTES / widest : ROWS;
    double squares = 0;
    uint64_t differing = 0;
    for (size_t done = 0; done < rows; done += step) {
        region->rows = least_of(step, rows - done);
        for (size_t n = 0; n < 2; n++) {
            size_t row = region->columns * sizes[n];
            int how = fill(at, n, region->rows * row, at->starts[n] + (int64_t)((first + done) * row));
            if (how) return how;
            if (at->count) keep(at, n, dtypes[n], region->rows, at->stored[n] + done * at->count * sizes[n]);
        }
        Region part = *region;
        part.before = at->memory[0];
        part.after = at->memory[1];
        part.Y = region->Y + (first + done) * PROBES;
        loratools_measure(&part, width);
        squares += part.squares;
        differing += part.differing;
    }
    region->squares = squares;
    region->differing = differing;
    return DONE;
}

size_t loratools_pass_size(void) { return sizeof(Pass); }
