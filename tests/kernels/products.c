/* products PATH TYPE COLUMNS WEIGHTS ROWS TIMES: the product of so many rows of weights of a type with so many rows of
 * activations, over 8 panels, so many times.  All bytes are zero: no instruction depends on them.  instructions.py counts what it takes. */
#include <stdlib.h>
#include <string.h>

#include "path.h"

enum { PANELS = 8 };

static const char *const NAMES[] = {
#define NAME_OF(name, ...) [MK_##name] = #name,
    MK_BLOCK_TYPES(NAME_OF)
};

static mk_work work;

int main(int argc, char **argv) {
    if (argc != 7 || mk_set_path(argv[1])) return 2;
    const long columns = atol(argv[3]), weights = atol(argv[4]), rows = atol(argv[5]);
    int type = 0;
    while (type < MK_TYPES && strcmp(NAMES[type], argv[2])) type++;
    if (type == MK_TYPES) return 2;
    int32_t bounds[PANELS + 1];
    for (int p = 0; p <= PANELS; p++) bounds[p] = (int32_t)(p * columns / PANELS);
    const long stride = mk_is_quantised(type) ? columns / MK_BLOCK * MK_ACTIVATION : mk_float_bytes(type, bounds, PANELS);
    const uint8_t *at[MK_MAX_PANELS];
    uint8_t *w = calloc((size_t)(weights * columns), 4), *x = calloc((size_t)rows, (size_t)stride);
    float *out = calloc((size_t)(weights * rows), sizeof *out);
    if (!w || !x || !out) return 2;
    mk_begin(&work);
    mk_panels(type, w, weights, 0, bounds, PANELS, at);
    for (long times = atol(argv[6]); times--;) {
        mk_matmul(&work, type, at, weights, 0, bounds, PANELS, x, stride, rows, out, weights, 0);
        if (mk_run(&work, 1)) return 2;
    }
    return 0;
}
