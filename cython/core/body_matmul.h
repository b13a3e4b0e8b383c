/* Products: lanes are 16 rows of W, and each output is one chain of fma over the blocks (or k) of a panel.
 *
 * A tile function does R tiles of W (64-byte lanes x R) for T rows of x over one panel; R, T and the type are constants
 * in it, so its sums stay in registers.  How the work is cut never changes an output's chain. */

/* w: R tiles, w_stride bytes apart; x: T rows, x_stride bytes apart; sums [R][T]. */
typedef void (*tile_function)(const uint8_t *w, long w_stride, const uint8_t *x, long x_stride, long count, vf *sums);

/* Up to FEW rows memory is the limit: fetch so many bytes ahead in each stream of weights. */
enum { MANY_TILES = MK_MANY_TILES, FEW = 4, PREFETCH = 2048 };
enum { MAX_SUMS = 2 * (int)VEC_ROWS > (int)MANY_TILES ? 2 * (int)VEC_ROWS : (int)MANY_TILES };

/* One block of 16 rows of W: its 8 groups of 4 columns. */
MK_INLINE void load_groups(int type, const uint8_t *w, vb *groups) {
    UNROLL
    for (int g = 0; g < 8; g++)
        if (type == MK_Q8_0) groups[g] = vb_signed(vb_load(w + 64 * g));
        else groups[g] = g < 4 ? vb_low(vb_load(w + 64 * g)) : vb_high(vb_load(w + 64 * (g - 4)));
}

HOT void quantised_tile(const int type, const int R, const int T, const uint8_t *w, long w_stride,
                              const uint8_t *x, long x_stride, long count, vf *sums) {
    const int scales = type == MK_Q4_1 ? 64 : 32, bias = type == MK_Q4_0 ? 8 : type == MK_Q8_0 ? VEC_Q8_BIAS : 0;
    const long bytes = (long)mk_block_bytes(type) * MK_TILE;
    vf acc[MAX_SUMS];
    UNROLL
    for (int i = 0; i < R * T; i++) acc[i] = vf_set1(0.0f);
    for (long b = 0; b < count; b++, w += bytes, x += MK_ACTIVATION) {
        UNROLL
        for (int r = 0; r < R; r++) {
            const uint8_t *tile = w + r * w_stride;
            if (T <= FEW)
                for (int line = 0; line < bytes; line += 64) __builtin_prefetch(tile + PREFETCH + line);
            vb groups[8];
            load_groups(type, tile + scales, groups);
            vf d = vf_load_f16((const void *)tile), m = d;
            if (type == MK_Q4_1) m = vf_load_f16((const void *)(tile + 32));
            UNROLL
            for (int t = 0; t < T; t++) {
                const uint8_t *block = x + t * x_stride;
                float scale;
                int32_t sum;
                memcpy(&scale, block + MK_BLOCK, 4);
                memcpy(&sum, block + MK_BLOCK + 4, 4);
                vi start = vi_set1(-bias * sum);
                vi dot = type == MK_Q8_0 ? vb_dot_s8(start, groups, (const int8_t *)block)
                                         : vb_dot_u4(start, groups, (const int8_t *)block);
                vf *a = &acc[r * T + t];
                *a = vf_fma(vf_from(dot), vf_mul(d, vf_set1(scale)), *a);
                if (type == MK_Q4_1) *a = vf_fma(m, vf_set1(scale * (float)sum), *a);
            }
        }
    }
    UNROLL
    for (int i = 0; i < R * T; i++) sums[i] = acc[i];
}

HOT void float_tile(const int type, const int R, const int T, const uint8_t *w, long w_stride, const uint8_t *x,
                          long x_stride, long count, vf *sums) {
    const int bytes = mk_block_bytes(type) * MK_TILE;
    vf acc[MAX_SUMS];
    UNROLL
    for (int i = 0; i < R * T; i++) acc[i] = vf_set1(0.0f);
    for (long i = 0; i < count; i++, w += bytes, x += 4) {
        vf row[MANY_TILES];
        UNROLL
        for (int r = 0; r < R; r++) {
            const void *p = w + r * w_stride;
            if (T <= FEW) __builtin_prefetch((const uint8_t *)p + PREFETCH);
            row[r] = type == MK_F32 ? vf_load(p) : type == MK_F16 ? vf_load_f16(p) : vf_load_bf16(p);
        }
        UNROLL
        for (int t = 0; t < T; t++) {
            float value;
            memcpy(&value, x + t * x_stride, 4);
            vf v = vf_set1(value);
            UNROLL
            for (int r = 0; r < R; r++) acc[r * T + t] = vf_fma(row[r], v, acc[r * T + t]);
        }
    }
    UNROLL
    for (int i = 0; i < R * T; i++) sums[i] = acc[i];
}

enum { MANY = VEC_ROWS };
#define TILE(kind, type, R, T)                                                                                  \
    static void type##_##R##_##T(const uint8_t *w, long w_stride, const uint8_t *x, long x_stride, long count,  \
                                 vf *sums) {                                                                    \
        kind##_tile(type, R, T, w, w_stride, x, x_stride, count, sums);                                         \
    }
#define TILES(kind, type) \
    TILE(kind, type, 4, 1) TILE(kind, type, 1, 1) TILE(kind, type, 1, 2) TILE(kind, type, 1, 4) \
    TILE(kind, type, 1, MANY)
TILES(float, MK_F32)
TILES(float, MK_F16)
TILES(float, MK_BF16)
TILES(quantised, MK_Q8_0)
TILES(quantised, MK_Q4_0)
TILES(quantised, MK_Q4_1)

#if VEC_WIDE /* products of floats: a value of x that is fetched serves two tiles */
enum { WIDE = 2, WIDE_SHAPES = 2 };
#define WIDE_TILES(type) TILE(float, type, 2, MANY) TILE(float, type, 2, 4)
WIDE_TILES(MK_F32)
WIDE_TILES(MK_F16)
WIDE_TILES(MK_BF16)
#define WIDE_FUNCTIONS(type) {type##_2_MANY, type##_2_4}
#else
enum { WIDE = 1, WIDE_SHAPES = 1 };
#define WIDE_FUNCTIONS(type) {type##_1_MANY}
#endif
static const tile_function WIDE_TILE_FUNCTIONS[MK_Q8_0][WIDE_SHAPES] = {
    WIDE_FUNCTIONS(MK_F32), WIDE_FUNCTIONS(MK_F16), WIDE_FUNCTIONS(MK_BF16),
};

/* Columns: MANY_TILES x 1, then 1 x ROWS[i]. */
enum { SHAPES = 4 };
static const int ROWS[SHAPES] = {VEC_ROWS, 4, 2, 1};
#define FUNCTIONS(type) {type##_4_1, type##_1_MANY, type##_1_4, type##_1_2, type##_1_1}
static const tile_function TILE_FUNCTIONS[MK_TYPES][1 + SHAPES] = {
    FUNCTIONS(MK_F32),  FUNCTIONS(MK_F16),  FUNCTIONS(MK_BF16),
    FUNCTIONS(MK_Q8_0), FUNCTIONS(MK_Q4_0), FUNCTIONS(MK_Q4_1),
};

static void store_tiles(const mk_matmul_job *job, const vf *sums, long tile, int tiles, long row, int rows, float *out) {
    for (int r = 0; r < tiles; r++)
        for (int t = 0; t < rows; t++)
            vf_row_store(out + (row + t) * job->out_stride, (tile + r) * MK_TILE, job->n, sums[r * rows + t]);
}

/* Outputs of `tiles` tiles for `rows` rows of x: panel by panel, folded in the binary tree ((p0 + p1) + (p2 + p3)). */
static void product(const mk_matmul_job *job, tile_function function, long tile, int tiles, long row, int rows) {
    const int block = mk_block(job->type), x_bytes = job->type >= MK_Q8_0 ? MK_ACTIVATION : 4;
    const long bytes = (long)mk_block_bytes(job->type) * MK_TILE;
    const uint8_t *x = job->x + row * job->x_stride;
    vf pending[MK_MAX_LEVELS][MAX_SUMS]; /* sums of 2^i panels that wait for their neighbour */
    int depth = 0;
    for (int p = 0; p < job->panels; p++) {
        long count = mk_blocks(job->bounds[p + 1] - job->bounds[p], block), stride = count * bytes;
        vf *sums = pending[depth++];
        function(job->at[p] + tile * stride, stride, x, job->x_stride, count, sums);
        x += count * x_bytes;
        if (job->panel_stride) {
            store_tiles(job, sums, tile, tiles, row, rows, job->out + p * job->panel_stride);
            depth--;
            continue;
        }
        for (int carry = p; carry & 1; carry >>= 1) {
            depth--;
            for (int i = 0; i < tiles * rows; i++) pending[depth - 1][i] = vf_add(pending[depth - 1][i], pending[depth][i]);
        }
    }
    if (!job->panel_stride) store_tiles(job, pending[0], tile, tiles, row, rows, job->out);
}

static void matmul(const void *argument, long begin, long end) {
    const mk_matmul_job *job = argument;
    const tile_function *functions = TILE_FUNCTIONS[job->type];
    if (job->m == 1) {
        long tile = begin;
        for (; tile + MANY_TILES <= end; tile += MANY_TILES) product(job, functions[0], tile, MANY_TILES, 0, 1);
        for (; tile < end; tile++) product(job, functions[SHAPES], tile, 1, 0, 1);
        return;
    }
    for (long item = begin, tiles; item < end; item += tiles) {
        long tile = item % job->tiles, row = item / job->tiles * job->chunk;
        long limit = row + job->chunk < job->m ? row + job->chunk : job->m;
        tiles = job->type < MK_Q8_0 && item + WIDE <= end && tile + WIDE <= job->tiles ? WIDE : 1;
        for (int shape = 0; tiles > 1 && shape < WIDE_SHAPES; shape++)
            for (; row + ROWS[shape] <= limit; row += ROWS[shape])
                product(job, WIDE_TILE_FUNCTIONS[job->type][shape], tile, WIDE, row, ROWS[shape]);
        for (int shape = 0; shape < SHAPES; shape++)
            for (; row + ROWS[shape] <= limit; row += ROWS[shape])
                for (int t = 0; t < tiles; t++) product(job, functions[1 + shape], tile + t, 1, row, ROWS[shape]);
    }
}
