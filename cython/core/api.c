/* kernels.h on top of the active path: a step with its job and how many items it has. */
#include <string.h>

#include "active.h"
#include "half.h"

/* The rows of x that one tile of W is multiplied with take about CACHE bytes (FLOAT_CACHE for float weights), so that they
 * stay in the cache.  At least FEW_ROWS go together, so that W is read once for a batch that decodes. */
enum { CACHE = 1 << 18, FLOAT_CACHE = 1 << 22, FEW_ROWS = 4 * MK_ROWS, FEW_TILES = 32 };

/* A part reads at least MINIMUM bytes, times rows of x, so that the bytes prefetched beyond its end are a small share. */
enum { MINIMUM = 1 << 17 };

#define ADD(range, items, kind, ...) \
    mk_step_of(work, mk_active->of_rows->range, items, 1, 0)->kind = (mk_##kind##_job){__VA_ARGS__}

void mk_quantize(mk_work *work, int type, const float *x, long stride, long n, long k, uint8_t *out) {
    ADD(quantize, n, rows, .type = type, .k = k, .x = x, .stride = stride, .out = out);
}

void mk_dequantize(mk_work *work, int type, const uint8_t *canonical, long n, long k, float *out, long stride) {
    ADD(dequantize, n, rows, .type = type, .k = k, .in = canonical, .values = out, .stride = stride);
}

void mk_quantize_rows(mk_work *work, int type, const float *x, long stride, const int32_t *at, long m,
                      const int32_t *bounds, int panels, uint8_t *out, long out_bytes) {
    ADD(quantize_rows, m, rows, .type = type, .panels = panels, .n = m, .x = x, .out = out, .bounds = bounds, .at = at,
        .stride = stride, .out_bytes = out_bytes);
}

/* Nearest BF16, ties to even, as the float it is; NaNs stay NaNs. */
static inline uint32_t rounded(float x) {
    uint32_t u = mk_float_bits(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (u | 0x400000u) & 0xffff0000u;
    return (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u;
}

/* A step of `count` columns of a row of x.  halves: 0, or how far even columns of BF16 lie behind the odd ones. */
static void float_step(int type, long halves, const float *x, long count, uint8_t *out) {
    float values[32] = {0};
    uint32_t words[32];
    memcpy(values, x, (size_t)count * sizeof *values);
    if (!mk_is_bf16(type)) {
        memcpy(out, values, 64);
        return;
    }
    for (int i = 0; i < 32; i++) words[i] = rounded(values[i]);
    for (int i = 0; i < 16; i++) {
        const uint32_t even = words[2 * i], odd = words[2 * i + 1], pair = even >> 16 | odd;
        if (halves) memcpy(out + 4 * i, &odd, 4), memcpy(out + halves + 4 * i, &even, 4);
        else memcpy(out + 4 * i, &pair, 4);
    }
}

/* Panels of x for float weights, each filled up to whole steps with zeros; rows in groups. */
static void float_rows(const void *argument, long begin, long end) {
    const mk_rows_job *job = argument;
    const int type = job->type, step = mk_float_step(type), bytes = mk_is_bf16(type) ? mk_active->bf16_step : 64;
    for (long row = begin; row < end; row++) {
        const float *x = job->x + (job->at ? job->at[row] : row) * job->stride;
        long first = row / MK_GROUP * MK_GROUP, rows = job->n - first < MK_GROUP ? job->n - first : MK_GROUP;
        uint8_t *out = job->out + first * job->out_bytes + (row - first) * 64;
        const long halves = bytes == MK_BF16_HALVES ? rows * 64 : 0;
        for (int p = 0; p < job->panels; p++)
            for (long i = job->bounds[p], last = job->bounds[p + 1]; i < last; i += step, out += rows * bytes)
                float_step(type, halves, x + i, last - i < step ? last - i : step, out);
    }
}

/* Whether m rows of x for the type are made to tiles. */
static int in_tiles(int type, long m) { return mk_is_bf16(type) && mk_active->tile_rows && m >= MK_IN_TILES; }

static long tile_bytes(const int32_t *bounds, int panels) { /* of a row in tiles */
    long blocks = 0;
    for (int p = 0; p < panels; p++) blocks += mk_blocks(bounds[p + 1] - bounds[p], MK_BF16_BLOCK);
    return blocks * MK_BF16_BLOCK * 2;
}

void mk_float_rows(mk_work *work, int type, const float *x, long stride, const int32_t *at, long m,
                   const int32_t *bounds, int panels, uint8_t *out, long out_bytes) {
    const int tiles = in_tiles(type, m);
    mk_step_of(work, tiles ? mk_active->tile_rows : float_rows, tiles ? mk_blocks(m, MK_TILE) : m, 1, 0)->rows =
        (mk_rows_job){.type = type, .panels = panels, .n = m, .x = x, .out = out, .bounds = bounds, .at = at,
                      .stride = stride, .out_bytes = tiles ? tile_bytes(bounds, panels) : out_bytes};
}

long mk_float_bytes(int type, const int32_t *bounds, int panels) { /* the widest form; x of another may have gaps */
    const long tiles = mk_is_bf16(type) ? tile_bytes(bounds, panels) : 0;
    long steps = 0;
    for (int p = 0; p < panels; p++) steps += mk_blocks(bounds[p + 1] - bounds[p], mk_float_step(type));
    const long rows = steps * (mk_is_bf16(type) ? MK_BF16_HALVES : 64);
    return rows > tiles ? rows : tiles;
}

/* Bytes of columns of W [n, .] as they are packed. */
static long panel_bytes(int type, long n, long columns) {
    if (mk_is_float(type)) return n * mk_row_bytes(type, columns);
    return mk_blocks(n, MK_TILE) * mk_tile_bytes(type, columns);
}

long mk_panels(int type, const uint8_t *w, long n, long row_bytes, const int32_t *bounds, int panels, const uint8_t **at) {
    long begin = 0;
    for (int p = 0; p < panels; p++) {
        at[p] = w + begin;
        begin += row_bytes ? mk_row_bytes(type, bounds[p + 1] - bounds[p])
                           : panel_bytes(type, n, bounds[p + 1] - bounds[p]);
    }
    return row_bytes && n ? begin + (n - 1) * row_bytes : begin;
}

static mk_product product_of(mk_work *work, int type, const uint8_t *const *at, long n, long row_bytes,
                             const int32_t *bounds, int panels, const void *x, long x_stride, long m, float *out,
                             long out_stride, long panel_stride) {
    mk_product job = {.type = type, .panels = panels, .tiles = mk_blocks(n, MK_TILE), .n = n, .m = m, .bounds = bounds,
                      .at = at, .row_bytes = row_bytes, .x = x, .x_stride = x_stride, .out = out,
                      .out_stride = out_stride, .panel_stride = panel_stride, .in_tiles = in_tiles(type, m)};
    if (job.in_tiles) job.x_stride = tile_bytes(bounds, panels);
    job.chunk = (mk_is_quantised(type) ? CACHE : FLOAT_CACHE) / (job.x_stride + !job.x_stride) / MK_ROWS * MK_ROWS;
    if (job.chunk < FEW_ROWS) job.chunk = FEW_ROWS;
    if (job.tiles <= FEW_TILES && job.chunk > FEW_ROWS) job.chunk = FEW_ROWS; /* share out the rows too */
    const long chunks = mk_blocks(m, (int)job.chunk);
    for (int p = 0; p < panels; p++) work->weights += chunks * panel_bytes(type, n, bounds[p + 1] - bounds[p]);
    return job;
}

void mk_matmul(mk_work *work, int type, const uint8_t *const *at, long n, long row_bytes, const int32_t *bounds,
               int panels, const void *x, long x_stride, long m, float *out, long out_stride, long panel_stride) {
    mk_product job = product_of(work, type, at, n, row_bytes, bounds, panels, x, x_stride, m, out, out_stride,
                                panel_stride);
    const long tile = panel_bytes(type, MK_TILE, bounds[panels]);
    const mk_range range = row_bytes && mk_is_quantised(type) ? mk_stored : mk_active->matmul;
    mk_step_of(work, range, job.tiles * mk_blocks(m, (int)job.chunk), 1, 0)->matmul = job;
    work->last->minimum = MINIMUM / (tile * (m < job.chunk ? m : job.chunk) + 1);
}

void mk_weigh(mk_work *work, mk_product *product, int type, const uint8_t *const *at, long n, long row_bytes,
              const int32_t *bounds, int panels, const void *x, long x_stride, long m, float *out, long out_stride,
              long panel_stride, const int32_t *rows, const float *weights, const float *bias) {
    *product = product_of(work, type, at, n, row_bytes, bounds, panels, x, x_stride, m, out, out_stride, panel_stride);
    product->rows = rows;
    product->weights = weights;
    product->bias = bias;
}

void mk_mixture(mk_work *work, const mk_product *products, long count) {
    mk_step_of(work, mk_active->mixture, products->panels * products->tiles, 1, 0)->mixture =
        (mk_mixture_job){.products = products, .count = count};
}

void mk_fold(mk_work *work, const float *parts, int panels, long m, long d, float *out, long stride) {
    ADD(fold, m, small, .a = parts, .panels = panels, .m = m, .d = d, .out = out, .out_stride = stride);
}

void mk_square_sums(mk_work *work, const float *x, long stride, long m, long d, float *out) {
    ADD(square_sums, m, small, .a = x, .a_stride = stride, .d = d, .out = out);
}

void mk_rms_norm(mk_work *work, const float *x, long x_stride, const float *w, float eps, int groups, long m, long d,
                 float *out, long out_stride) {
    ADD(rms_norm, m, small, .a = x, .a_stride = x_stride, .b = w, .eps = eps, .heads = groups, .d = d, .out = out,
        .out_stride = out_stride);
}

void mk_layer_norm(mk_work *work, const float *x, long x_stride, const float *w, const float *bias, float eps, long m,
                   long d, float *out, long out_stride) {
    ADD(layer_norm, m, small, .a = x, .a_stride = x_stride, .b = w, .c = bias, .eps = eps, .d = d, .out = out,
        .out_stride = out_stride);
}

void mk_rope(mk_work *work, float *x, long stride, const float *cosine, const float *sine, long m, int heads, int hd,
             int rotary, int interleaved) {
    mk_range range = interleaved ? mk_active->of_rows->rope_interleaved : mk_active->of_rows->rope;
    mk_step_of(work, range, m, 1, 0)->small = (mk_small_job){
        .a = cosine, .b = sine, .out = x, .out_stride = stride, .heads = heads, .hd = hd, .d = rotary};
}

void mk_activate(mk_work *work, int kind, const float *gate, long gate_stride, const float *up, long up_stride,
                 float limit, float alpha, long m, long d, float *out, long out_stride) {
    ADD(activate, m, small, .kind = kind, .a = gate, .a_stride = gate_stride, .b = up, .b_stride = up_stride,
        .limit = limit, .alpha = alpha, .d = d, .out = out, .out_stride = out_stride);
}

void mk_softcap(mk_work *work, float *x, long stride, float cap, long m, long d) {
    ADD(softcap, m, small, .out = x, .out_stride = stride, .limit = cap, .d = d);
}

void mk_softmax(mk_work *work, float *x, long stride, long m, long d) {
    ADD(softmax, m, small, .out = x, .out_stride = stride, .d = d);
}

void mk_top_k(mk_work *work, const float *x, long stride, long m, long n, long k, float *values, int32_t *ids) {
    ADD(top_k, m, small, .a = x, .a_stride = stride, .d = n, .k = k, .out = values, .ids = ids);
}

void mk_lse_parts(mk_work *work, const float *x, long stride, const float *inv_t, long m, const int32_t *bounds, int
                  panels,
                  float *out) {
    ADD(lse_parts, m * panels, small, .a = x, .a_stride = stride, .b = inv_t, .bounds = bounds, .panels = panels,
        .out = out);
}

void mk_decays(mk_work *work, const float *x, float scale, const float *rates, const float *bias, float low, float high,
               long m, long d, float *steps, float *out) {
    ADD(decays, m, small, .a = x, .a_stride = d, .b = rates, .c = bias, .alpha = scale, .eps = low, .limit = high,
        .d = d, .steps = steps, .out = out, .out_stride = d);
}

void mk_short_conv(mk_work *work, const float *x, long x_stride, const float *w, const float *bias, float *tails,
                   long tail_stride, const int32_t *first_rows, const int32_t *slots, long sequences, long m,
                   long channels, int taps, int silu, float *out, long out_stride) {
    ADD(short_conv, mk_blocks(channels, MK_TILE) * sequences, conv, .of = {first_rows, slots, sequences, m}, .x = x,
        .w = w, .bias = bias, .out = out, .tails = tails, .x_stride = x_stride, .out_stride = out_stride,
        .tail_stride = tail_stride, .channels = channels, .taps = taps, .silu = silu);
}

void mk_delta_rule(mk_work *work, const float *q, const float *k, const float *v, const float *decay, const float *beta,
                   float *states, long state_stride, const int32_t *first_rows, const int32_t *slots, long sequences,
                   const int32_t *key_of_head, long m, int keys, int heads, int dk, int dv, float *out) {
    ADD(delta_rule, heads * mk_blocks(dv, MK_TILE) * sequences, state, .of = {first_rows, slots, sequences, m}, .q = q,
        .k = k, .v = v, .decay = decay, .beta = beta, .out = out, .states = states, .key_of_head = key_of_head,
        .state_stride = state_stride, .keys = keys, .heads = heads, .dk = dk, .dv = dv);
}

void mk_selective_scan(mk_work *work, const float *c, const float *b, const float *x, const float *decay,
                       const float *step, const float *skip, float *states, long state_stride,
                       const int32_t *first_rows, const int32_t *slots, long sequences, const int32_t *group_of_head,
                       long m, int groups, int heads, int dk, int dv, float *out) {
    ADD(selective_scan, heads * mk_blocks(dv, MK_TILE) * sequences, state, .of = {first_rows, slots, sequences, m},
        .q = c, .k = b, .v = x, .decay = decay, .beta = step, .skip = skip, .out = out, .states = states,
        .key_of_head = group_of_head, .state_stride = state_stride, .keys = groups, .heads = heads, .dk = dk, .dv = dv);
}

static void add_rows(const void *argument, long begin, long end) { /* each operation rounds: one form for all paths */
    const mk_small_job *job = argument;
    for (long row = begin; row < end; row++) {
        float *to = job->out + row * job->out_stride;
        const float *from = job->b + row * job->b_stride;
        for (long i = 0; i < job->d; i++) to[i] += job->alpha * from[i];
    }
}

void mk_add_rows(mk_work *work, float *x, long stride, const float *rows, long rows_stride, float scale, long m,
                 long d) {
    mk_step_of(work, add_rows, m, 1, 0)->small = (mk_small_job){
        .b = rows, .b_stride = rows_stride, .alpha = scale, .d = d, .out = x, .out_stride = stride};
}

static void copy_rows(const void *argument, long begin, long end) {
    const mk_small_job *job = argument;
    for (long row = begin; row < end; row++)
        memcpy(job->out + row * job->out_stride, job->a + row * job->a_stride, (size_t)job->d * sizeof *job->a);
}

void mk_copy_rows(mk_work *work, const float *x, long x_stride, long m, long d, float *out, long out_stride) {
    mk_step_of(work, copy_rows, m, 1, 0)->small =
        (mk_small_job){.a = x, .a_stride = x_stride, .d = d, .out = out, .out_stride = out_stride};
}
