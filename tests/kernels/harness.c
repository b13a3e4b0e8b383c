/* Runs the records that cases.py writes, on a machine without Python (an emulated one).
 *
 *     harness list                       the names of the paths that this machine has, one per line
 *     harness PATH < records > outputs   every output array of every record, one after another
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "path.h"

enum { MOST = 12 };

static int ints[MOST];
static void *arrays[MOST];
static long sizes[MOST];
static mk_work work;

static void stop(const char *why) {
    fprintf(stderr, "harness: %s\n", why);
    exit(2);
}

static void take(void *to, size_t bytes) {
    if (fread(to, 1, bytes, stdin) != bytes) stop("the records end too soon");
}

static void *make(size_t bytes, int fill) {
    void *p = aligned_alloc(64, bytes / 64 * 64 + 64);
    if (!p) stop("no memory");
    memset(p, fill, bytes);
    return p;
}

/* What has been asked for so far is done before anything of it is given. */
static void give(void *p, size_t bytes) {
    if (mk_run(&work, 1)) stop("no memory");
    if (fwrite(p, 1, bytes, stdout) != bytes) stop("the output is full");
    free(p);
}

static void product(void) {
    int type = ints[0], fold = ints[4], panels = (int)(sizes[1] / 4) - 1, block = mk_block(type);
    long n = ints[1], k = ints[2], m = ints[3], x_bytes = 0, parts = fold ? 1 : panels;
    const int32_t *bounds = arrays[1];
    const uint8_t *at[MK_MAX_PANELS];
    const size_t packed_bytes = (size_t)mk_panels(type, NULL, n, 0, bounds, panels, at);
    int misfit = 0;
    size_t out_bytes = (size_t)(parts * m * n) * 4;
    uint8_t *packed = make(packed_bytes, 0xAA);
    float *out = make(out_bytes, 0);
    const void *x = arrays[2];
    mk_panels(type, packed, n, 0, bounds, panels, at);
    mk_pack(&work, type, type, arrays[0], mk_blocks(k, block) * mk_block_bytes(type), n, 0, bounds, panels, packed, 0, n,
            &misfit);
    if (mk_is_quantised(type)) {
        for (int p = 0; p < panels; p++) x_bytes += mk_activation_bytes(type, bounds[p + 1] - bounds[p]);
        uint8_t *rows = make((size_t)(m * x_bytes), 0xAA);
        mk_quantize_rows(&work, type, x, k, NULL, m, bounds, panels, rows, x_bytes);
        mk_matmul(&work, type, at, n, 0, bounds, panels, rows, x_bytes, m, out, n, fold ? 0 : m * n);
        give(packed, packed_bytes);
        give(rows, (size_t)(m * x_bytes));
    } else {
        x_bytes = mk_float_bytes(type, bounds, panels);
        uint8_t *rows = make((size_t)(mk_blocks(m, MK_TILE) * MK_TILE * x_bytes), 0xAA); /* AMX has whole tiles */
        mk_float_rows(&work, type, x, k, NULL, m, bounds, panels, rows, x_bytes);
        mk_matmul(&work, type, at, n, 0, bounds, panels, rows, x_bytes, m, out, n, fold ? 0 : m * n);
        give(packed, packed_bytes);
        free(rows);
    }
    give(out, out_bytes);
}

static const void *optional(int array) { return sizes[array] ? arrays[array] : NULL; }

static void attention(void) {
    int type = ints[0], stored = ints[1], rows = ints[2], heads = ints[3], kvh = ints[4], hd = ints[5], vd = ints[8];
    const float *values = optional(1); /* NULL: they are a part of the keys */
    size_t bytes[2] = {(size_t)ints[7] * (size_t)kvh * (size_t)mk_kv_bytes(type, hd),
                       values ? (size_t)ints[7] * (size_t)kvh * (size_t)mk_kv_bytes(type, vd) : 0};
    const uint32_t nan = type == MK_F32 ? 0x7fc00000u : 0x7e007e00u;
    uint8_t *pools[2];
    for (int p = 0; p < 2; p++) {
        pools[p] = make(bytes[p], 0);
        for (size_t i = 0; i < bytes[p]; i += 4) memcpy(pools[p] + i, &nan, bytes[p] - i < 4 ? bytes[p] - i : 4);
    }
    const size_t out_bytes = (size_t)(rows * heads * vd) * 4;
    float *out = make(out_bytes, 0), scale[4]; /* of scores, their soft cap, beta of their tuning, bidirectional */
    memcpy(scale, arrays[9], sizeof scale);
    const mk_tuning tuning = {.beta = scale[2], .length = 7, .offset = 1};
    mk_kv_store(&work, type, arrays[0], kvh * hd, values, kvh * vd, arrays[2], arrays[3], stored, pools[0], pools[1],
                kvh, hd, values ? vd : 0);
    mk_attention(&work, type, arrays[4], heads * hd, out, heads * vd, pools[0], values ? pools[1] : NULL, arrays[5],
                 arrays[6],
                 arrays[7], arrays[8], rows, heads, kvh, hd, vd, scale[0], abs(ints[6]),
                 optional(10), scale[1], ints[6] < 0, scale[3] != 0.0f, tuning.beta != 0.0f ? &tuning : NULL);
    give(pools[0], bytes[0]);
    give(pools[1], bytes[1]);
    give(out, out_bytes);
}

static const int32_t *ids_of(int array) { return arrays[array]; }

static void short_conv(void) {
    const long m = ints[0], channels = ints[1], taps = ints[2];
    const size_t bytes = (size_t)(m * channels) * 4;
    float *out = make(bytes, 0), *tails = make((size_t)sizes[3], 0);
    memcpy(tails, arrays[3], (size_t)sizes[3]);
    mk_short_conv(&work, arrays[0], channels, arrays[1], optional(2), tails, sizes[3] / 4 / ints[4], ids_of(4), ids_of(5),
                  sizes[4] / 4, m, channels, (int)taps, ints[3], out, channels);
    give(out, bytes);
    give(tails, (size_t)sizes[3]);
}

static void delta_rule(void) {
    const int m = ints[0], keys = ints[1], heads = ints[2], dk = ints[3], dv = ints[4];
    float *out = make((size_t)sizes[2], 0), *states = make((size_t)sizes[5], 0);
    memcpy(states, arrays[5], (size_t)sizes[5]);
    mk_delta_rule(&work, arrays[0], arrays[1], arrays[2], arrays[3], arrays[4], states, sizes[5] / 4 / ints[5], ids_of(6),
                  ids_of(7), sizes[6] / 4, ids_of(8), m, keys, heads, dk, dv, out);
    give(out, (size_t)sizes[2]);
    give(states, (size_t)sizes[5]);
}

static void selective_scan(void) {
    const int m = ints[0], groups = ints[1], heads = ints[2], dk = ints[3], dv = ints[4];
    float *out = make((size_t)sizes[2], 0), *states = make((size_t)sizes[6], 0);
    memcpy(states, arrays[6], (size_t)sizes[6]);
    mk_selective_scan(&work, arrays[0], arrays[1], arrays[2], arrays[3], arrays[4], arrays[5], states,
                      sizes[6] / 4 / ints[5], ids_of(7), ids_of(8), sizes[7] / 4, ids_of(9), m, groups, heads, dk, dv,
                      out);
    give(out, (size_t)sizes[2]);
    give(states, (size_t)sizes[6]);
}

static void decays(void) {
    const size_t bytes = (size_t)(ints[0] * ints[1]) * 4;
    float *steps = make(bytes, 0), *out = make(bytes, 0), of_steps[3];
    memcpy(of_steps, arrays[3], sizeof of_steps);
    mk_decays(&work, arrays[0], of_steps[0], arrays[1], arrays[2], of_steps[1], of_steps[2], ints[0], ints[1], steps, out);
    give(steps, bytes);
    give(out, bytes);
}

/* The others: one or two outputs of the shape of the first array or stated by the numbers. */
static void run(int op) {
    long a = ints[0], b = ints[1], c = ints[2], blocks = mk_blocks(c, mk_block((int)a));
    size_t cells = (size_t)(a * b) * 4;
    float *out = NULL, eps, limits[2];
    int32_t *ids;
    uint8_t *bytes;
    switch (op) {
    case 0: product(); return;
    case 1:
        bytes = make((size_t)(b * blocks * mk_block_bytes((int)a)), 0xAA);
        mk_quantize(&work, (int)a, arrays[0], c, b, c, bytes);
        give(bytes, (size_t)(b * blocks * mk_block_bytes((int)a)));
        return;
    case 2:
        out = make((size_t)(b * c) * 4, 0);
        mk_dequantize(&work, (int)a, arrays[0], b, c, out, c);
        give(out, (size_t)(b * c) * 4);
        return;
    case 3:
        memcpy(&eps, arrays[2], 4);
        mk_rms_norm(&work, arrays[0], b, optional(1), eps, (int)c, a, b, out = make(cells, 0), b);
        break;
    case 4:
        cells = (size_t)sizes[0];
        memcpy(out = make(cells, 0), arrays[0], cells);
        mk_rope(&work, out, b * c, arrays[1], arrays[2], a, (int)b, (int)c, ints[3], ints[4]);
        break;
    case 5:
        memcpy(limits, arrays[2], sizeof limits);
        mk_activate(&work, (int)c, arrays[0], b, optional(1), b, limits[0], limits[1], a, b, out = make(cells, 0), b);
        break;
    case 6:
        memcpy(out = make(cells, 0), arrays[0], cells);
        mk_softmax(&work, out, b, a, b);
        break;
    case 7:
        cells = (size_t)(a * c) * 4;
        mk_top_k(&work, arrays[0], b, a, b, c, out = make(cells, 0), ids = make(cells, 0));
        give(out, cells);
        give(ids, cells);
        return;
    case 8:
        cells = (size_t)(a * c) * 12;
        mk_lse_parts(&work, arrays[0], b, arrays[1], a, arrays[2], (int)c, out = make(cells, 0));
        break;
    case 9: attention(); return;
    case 10:
        cells = (size_t)(b * c) * 4;
        mk_fold(&work, arrays[0], (int)a, b, c, out = make(cells, 0), c);
        break;
    case 11:
        memcpy(&eps, arrays[3], 4);
        mk_layer_norm(&work, arrays[0], b, optional(1), optional(2), eps, a, b, out = make(cells, 0), b);
        break;
    case 12:
        cells = (size_t)a * 4;
        mk_square_sums(&work, arrays[0], b, a, b, out = make(cells, 0));
        break;
    case 13:
        memcpy(&eps, arrays[1], 4);
        memcpy(out = make(cells, 0), arrays[0], cells);
        mk_softcap(&work, out, b, eps, a, b);
        break;
    case 14: decays(); return;
    case 15: short_conv(); return;
    case 16: delta_rule(); return;
    case 17: selective_scan(); return;
    default: stop("unknown operation");
    }
    give(out, cells);
}

int main(int argc, char **argv) {
    if (argc != 2) stop("usage: harness list | harness PATH");
    if (!strcmp(argv[1], "list")) {
        for (int i = 0; i < mk_path_count(); i++) puts(mk_path_name(i));
        return 0;
    }
    if (mk_set_path(argv[1])) stop("this machine lacks the path");
    mk_begin(&work);
    int32_t head[2], count;
    while (fread(head, 4, 2, stdin) == 2) {
        if (head[1] > MOST) stop("too many numbers");
        memset(ints, 0, sizeof ints);
        take(ints, 4 * (size_t)head[1]);
        take(&count, 4);
        if (count > MOST) stop("too many arrays");
        for (int i = 0; i < count; i++) {
            int64_t bytes;
            take(&bytes, 8);
            sizes[i] = (long)bytes;
            take(arrays[i] = make((size_t)bytes, 0), (size_t)bytes);
        }
        run(head[0]);
        for (int i = 0; i < count; i++) free(arrays[i]);
    }
    return 0;
}
