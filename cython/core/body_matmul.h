/* Products with quantised weights: lanes are 16 rows of W, and each output is one chain of fma over a panel's blocks.
 *
 * A tile function does a tile of W (64-byte lanes) for T rows of x over one panel; T and the type are constants in it, so
 * its sums stay in registers.  How the work is cut never changes an output's chain.  Float weights have
 * their own tiles (body_float.h) and share the rest. */

#include "body_rows.h"

#include "body_float.h"
#include "body_coded.h"
#include "body_wide.h"
#include "body_plain.h"
#include "body_super.h"
#include "body_tiles.h"
#include "body_centred.h"
#include "body_unpacked.h"
#include "body_panel.h"

enum { RUN_SUMS = 128 /* sums of consecutive tiles: RUN_SUMS tiles with one row, fewer with more rows */ };
enum { TILES_CACHE = 3 << 17 /* bytes of float tiles that stay in the second cache */ };

static void store_tiles(const mk_matmul_job *job, const vf *sums, long tile, int tiles, long row, int rows, float *out) {
    for (int t = 0; t < rows; t++)
        for (int r = 0; r < tiles; r++) {
            const long i = (tile + r) * MK_TILE;
            vf sum = sums[r * rows + t];
            float *to = out + (job->rows ? job->rows[row + t] : row + t) * job->out_stride;
            if (job->rows) sum = vf_add(vf_row(to, i, job->n, 0.0f), vf_mul(vf_set1(job->weights[row + t]), sum));
            vf_row_store(to, i, job->n, sum);
        }
}

/* Tiles `tile`... of panel p, for `rows` rows of x: sums [tiles][rows].  again: how many rows of x had these tiles before. */
typedef void (*panel_function)(const mk_matmul_job *job, int rows, int p, long tile, int tiles, int again,
                               const uint8_t *x, vf *sums);

/* Whether the panels of a tile lie in the same rows, and should be read one after the other. */
static int side_by_side(const mk_matmul_job *job) { return job->row_bytes && job->panels > 1; }

static void float_panel(const mk_matmul_job *job, int rows, int p, long tile, int tiles, int again, const uint8_t *x,
                        vf *sums) {
    const int type = job->type;
    const long columns = job->bounds[p + 1] - job->bounds[p], x_stride = MK_GROUP * job->x_stride;
    const long stride = job->row_bytes ? job->row_bytes : mk_row_bytes(type, columns);
    const unsigned mode = type == MK_BF16 ? mk_flush_denormals() : 0;
    const int several = side_by_side(job) && !again;
    long ahead = again || (several && unaided(rows)) ? FETCHED : 0;
    if (several && !ahead) /* the next panel, or the next tile's first one */
        ahead = p + 1 < job->panels ? job->at[p + 1] - job->at[p] : job->at[0] - job->at[p] + MK_TILE * stride;
    const float_function of_shape = FLOAT_TILE_FUNCTIONS(type)[rows - 1];
    for (long first = tile * MK_TILE, end = first + tiles * MK_TILE; first < end; first += MK_TILE, sums += rows) {
        const int n = job->n - first < MK_TILE ? (int)(job->n - first) : MK_TILE;
        if (several && unaided(rows) && !p) mk_look_at(job->at[0] + first * stride, n, stride);
        const uint8_t *w = job->at[p] + first * stride;
        if (PAIRS_FIT(type, rows, n, columns))
            pairs_tile(w, stride, ahead, share_of(job, again, tile, tiles, stride), x, x_stride, columns, sums);
        else
            of_shape(w, stride, ahead, n, x, x_stride, columns, sums);
    }
    if (type == MK_BF16) mk_restore(mode);
}

static void panel(const mk_matmul_job *job, int rows, int p, long tile, int tiles, int again, const uint8_t *x,
                  vf *sums) {
    (void)again;
    const int type = job->type;
    const long columns = job->bounds[p + 1] - job->bounds[p], stride = mk_tile_bytes(type, columns);
    const long count = mk_blocks(columns, mk_block(type));
    const uint8_t *w = job->at[p] + tile * stride;
    for (; tiles--; w += stride, sums += rows) TILE_FUNCTIONS[type][rows - 1](w, x, count, sums);
}

/* Bytes of columns of a panel of activations: of the rows that lie together. */
static long x_bytes(const mk_matmul_job *job, long columns, int rows) {
    const int type = job->type;
    if (job->in_tiles) return mk_blocks(columns, MK_BF16_BLOCK) * MK_BF16_BLOCK * 2 * MK_TILE;
    if (!mk_is_quantised(type))
        return mk_blocks(columns, mk_float_step(type)) * (mk_is_bf16(type) ? BF16_STEP : 64) * GROUP(rows);
    return mk_activation_bytes(type, columns) * GROUP(rows);
}

/* Outputs of `tiles` tiles for `rows` rows of x: panel by panel, folded in the binary tree ((p0 + p1) + (p2 + p3)).
 * All tiles' parts of a panel come before the next panel, so that weights are read as they lie in memory.
 * pending [levels][capacity]: sums of 2^i panels that wait for their neighbour. */
static void product(const mk_matmul_job *job, panel_function panel, vf *pending, long capacity, int rows, long tile,
                    int tiles, long row) {
    const uint8_t *x = job->x + row * job->x_stride;
    int depth = 0;
    for (int p = 0; p < job->panels; p++) {
        const long bytes = x_bytes(job, job->bounds[p + 1] - job->bounds[p], rows);
        if (p < job->skip) {
            x += bytes;
            continue;
        }
        vf *sums = pending + depth++ * capacity;
        panel(job, rows, p, tile, tiles, (int)(row % job->chunk), x, sums);
        x += bytes;
        if (job->panel_stride) {
            store_tiles(job, sums, tile, tiles, row, rows, job->out + p * job->panel_stride);
            depth--;
            continue;
        }
        for (int carry = p; carry & 1; carry >>= 1, sums -= capacity) {
            depth--;
            for (int i = 0; i < tiles * rows; i++) sums[i - capacity] = vf_add(sums[i - capacity], sums[i]);
        }
    }
    if (!job->panel_stride) store_tiles(job, pending, tile, tiles, row, rows, job->out);
}

/* The number of `rows` rows of x that are computed together. */
static int rows_at_once(int type, long rows) {
    const int wide = wide_rows(type, rows);
    if (wide) return wide;
    if (mk_is_coded(type)) return coded_rows(rows);
    const int most = mk_is_float(type) ? FLOAT_ROWS : unpacked_rows(rows);
    return most && rows >= most ? most : rows < MK_GROUP ? (int)rows : MK_GROUP;
}

/* The function that computes a panel of `rows` rows together. */
static panel_function panel_of(int type, int rows) {
    if (wide_rows(type, rows)) return wide_panel;
    if (mk_is_coded(type)) return coded_panel;
    if (mk_is_float(type)) return float_panel;
    if (mk_is_panel(type)) return whole_panel;
    return rows > MK_GROUP ? unpacked_panel : panel;
}

/* Compute rows row .. limit - 1 of up to `tiles` tiles, as many as the sums on the stack allow; return how many. */
static int some_tiles(const mk_matmul_job *job, long tile, long tiles, long row, long limit) {
    vf pending[MK_MAX_LEVELS][RUN_SUMS];
    int rows = rows_at_once(job->type, limit - row);
    if (tiles > RUN_SUMS / rows) tiles = RUN_SUMS / rows;
    if (mk_is_float(job->type)) { /* they pass by again for the next rows of x */
        const long bytes = MK_TILE * mk_row_bytes(job->type, job->bounds[job->panels] - job->bounds[0]);
        if (tiles * bytes > TILES_CACHE) tiles = bytes < TILES_CACHE ? TILES_CACHE / bytes : 1;
    }
    if (side_by_side(job)) tiles = 1;
    for (; row < limit; row += rows) {
        rows = rows_at_once(job->type, limit - row);
        product(job, panel_of(job->type, rows), *pending, RUN_SUMS, rows, tile, (int)tiles, row);
    }
    return (int)tiles;
}

static void matmul(const void *argument, long begin, long end) {
    const mk_matmul_job *job = argument;
    for (long item = begin, tiles; item < end; item += tiles) {
        long tile = item % job->tiles, row = item / job->tiles * job->chunk;
        long limit = row + job->chunk < job->m ? row + job->chunk : job->m;
        tiles = end - item < job->tiles - tile ? end - item : job->tiles - tile;
        tiles = some_tiles(job, tile, tiles, row, limit);
    }
}

static void add_bias(const mk_product *job, long tile, long tiles) {
    const long first = tile * MK_TILE, last = (tile + tiles) * MK_TILE < job->n ? (tile + tiles) * MK_TILE : job->n;
    for (long row = 0; row < job->m; row++) {
        float *to = job->out + job->rows[row] * job->out_stride;
        for (long i = first; i < last; i++) to[i] += job->weights[row] * job->bias[i];
    }
}

/* The experts of a row are added one after the other, so one item has a panel's tile for the rows of all experts. */
static void mixture_of(mk_range matmul, const mk_mixture_job *job, long begin, long end) {
    for (long item = begin, tiles; item < end; item += tiles) {
        long panel = item / job->products->tiles, tile = item % job->products->tiles;
        tiles = job->products->tiles - tile;
        if (tiles > end - item) tiles = end - item;
        for (long i = 0; i < job->count; i++) {
            mk_product product = job->products[i];
            if (product.bias && !panel) add_bias(&product, tile, tiles);
            product.skip = (int)panel;
            product.panels = (int)panel + 1;
            for (long row = 0, from = tile; row < product.m; row += product.chunk, from += product.tiles)
                matmul(&product, from, from + tiles);
        }
    }
}

static void mixture(const void *argument, long begin, long end) { mixture_of(matmul, argument, begin, end); }
