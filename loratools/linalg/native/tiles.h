/* Tiles of a tensor, read from one file and changed a few rows at a time, and written to another.
 *
 * Those rows stay in a core's own cache while they are changed, and no lock of Python's is taken in a tile. It is written
 * then, in pieces that the kernel's cache takes quickly: shorter ones cost more, and longer ones where memory is full.
 */
enum { BLOCK = 1 << 17, PIECE = 1 << 18 }; /* bytes of these rows, about; of one write */
enum { DONE, READ_FAILED, ENDED, WRITE_FAILED, NO_DIRECTION };

/* Rows `first`, `first + step`, … below `last` of a tensor, from `column` on, and the products that are added there:
 * as for a call of add_products, but `W`, `out`, `rows` and `measured`; pointers are to the first row of the rectangle.
 * The same fields as `_Place` in tiles.py, and those of Tensor as `_Tensor`. */
typedef struct {
    size_t first, last, step, column;
    Rows products;
} Place;

typedef struct {
    int64_t source, start, target, offset; /* descriptors, and where the tensor begins in each file */
    size_t dtype, columns;
    char *stored, *made; /* memory for a tile as it was, and as it is */
    Place *places;
    size_t count, everywhere; /* places, which do not meet; whether they are the whole tensor */
    /* results: */
    int64_t zero_row, ended; /* of a place, the row without direction; the byte at which a file ended */
    uint32_t largest, error; /* bits of the largest magnitude of out; errno */
    size_t place;            /* whose row it is */
} Tensor;

static size_t ceiling(size_t number, size_t by) { return (number + by - 1) / by; }

/* Return the bits of the largest magnitude. */
static uint32_t largest_of(const char *numbers, size_t count, size_t dtype)
{
    if (dtype == F32) {
        int32_t most = 0; /* signed, for which the oldest vectors have a maximum */
        for (size_t i = 0; i < count; i++) {
            int32_t magnitude = ((const int32_t *)numbers)[i] & 0x7fffffff;
            most = magnitude > most ? magnitude : most;
        }
        return (uint32_t)most;
    }
    int16_t most = 0;
    for (size_t i = 0; i < count; i++) {
        int16_t magnitude = ((const int16_t *)numbers)[i] & 0x7fff;
        most = magnitude > most ? magnitude : most;
    }
    return (uint32_t)most;
}

/* Change rows [first, first + rows) of the tensor, of which the first `measured` are compared with W. */
static int change(Tensor *at, size_t first, size_t rows, size_t measured, const char *W, char *out)
{
    size_t size = at->dtype == F32 ? 4 : 2, columns = at->columns;
    if (!at->everywhere) {
        memcpy(out, W, rows * columns * size);
        uint32_t largest = largest_of(W, rows * columns, at->dtype);
        at->largest = largest > at->largest ? largest : at->largest;
    }
    for (size_t n = 0; n < at->count; n++) {
        Place *place = at->places + n;
        size_t end = first + rows < place->last ? first + rows : place->last;
        size_t low = first > place->first ? ceiling(first - place->first, place->step) : 0;
        size_t high = end > place->first ? ceiling(end - place->first, place->step) : 0;
        if (low >= high) continue;
        Rows *sums = &place->products, call = *sums;
        size_t begin = place->first + low * place->step - first, from = (begin * columns + place->column) * size;
        call.W = W + from;
        call.out = out + from;
        call.rows = high - low;
        size_t looked = measured > begin ? ceiling(measured - begin, place->step) : 0;
        call.measured = looked < call.rows ? looked : call.rows;
        call.left += low * call.rank;
        call.factor += low * call.rank;
        if (call.magnitude) {
            call.magnitude += low;
            call.gains += low;
        }
        loratools_add_products(&call);
        sums->retained = call.retained;
        sums->total = call.total;
        sums->changed = call.changed;
        at->largest = call.largest > at->largest ? call.largest : at->largest;
        if (call.zero_row >= 0) {
            at->zero_row = (int64_t)low + call.zero_row;
            at->place = n;
            return NO_DIRECTION;
        }
    }
    return DONE;
}

static int fill(Tensor *at, char *memory, size_t bytes, int64_t from)
{
    while (bytes) {
        ssize_t count = pread((int)at->source, memory, bytes, from);
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

static int put(Tensor *at, const char *memory, size_t bytes, int64_t to)
{
    while (bytes) {
        ssize_t count = pwrite((int)at->target, memory, bytes < PIECE ? bytes : PIECE, to);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) {
            at->error = (uint32_t)errno;
            return WRITE_FAILED;
        }
        memory += count;
        to += count;
        bytes -= (size_t)count;
    }
    return DONE;
}

/* Read rows [first, first + rows) into `stored`, change them, and write them; the first `measured` are measured. */
int loratools_pass_rows(Tensor *at, size_t first, size_t rows, size_t measured)
{
    size_t row = at->columns * (at->dtype == F32 ? 4 : 2), step = row && row < BLOCK ? BLOCK / row : 1;
    if (step > together()) step -= step % together();
    for (size_t n = 0; n < at->count; n++) {
        Rows *sums = &at->places[n].products;
        sums->retained = sums->total = sums->changed = 0;
    }
    at->largest = 0;
    for (size_t done = 0; done < rows; done += step) {
        size_t count = rows - done < step ? rows - done : step;
        char *W = at->stored + done * row;
        int how = fill(at, W, count * row, at->start + (int64_t)((first + done) * row));
        if (!how) how = change(at, first + done, count, measured > done ? measured - done : 0, W, at->made + done * row);
        if (how) return how;
    }
    return put(at, at->made, rows * row, at->offset + (int64_t)(first * row));
}

size_t loratools_tensor_size(void) { return sizeof(Tensor) + sizeof(Place); }
