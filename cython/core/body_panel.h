/* Products with PANEL types: int8, of which a row has one scale for a whole column panel, in W as in x (mk_panel_row).  A
 * panel's products are exact integers, so they may be summed in any order, and an output takes one multiplication by both
 * scales.  A tile has the scales of its 16 rows, then values interleaved like Q8_0's.
 *
 * One value of x in hundreds may be ten times as large as all others, and would take three of their bits: it has more. */

enum { PANEL_ROWS = VEC_ROWS > 8 ? 8 : MK_GROUP, PANEL_TILES = UNPACKED_TILES };
enum { PANEL_DEPTH = 32 /* blocks of a few tiles that stay in the first cache while rows of x pass by */ };
enum { PANEL_BLOCK = MK_BLOCK * MK_TILE /* bytes of 32 columns of a tile */ };

/* What row t of x has for the panel that begins at x. */
#define ROW_HEAD(t, x, x_stride) ((const mk_panel_row *)ROW(MK_GROUP, t, x, x_stride, MK_PANEL_ROW))

/* Sums of a tile's products with row `of` of x: the largest value's 7 more bits, and the scales. */
MK_INLINE vf scale_dots(const uint8_t *tile, const mk_panel_row *of, vi dots) {
    const vb group = vb_signed(vb_load(tile + MK_PANEL_HEAD + 64 * of->group));
    vi high = vi_set1(VEC_Q8_BIAS ? of->high128 : 0);
    vp pairs;
    vb_multiply(8, 0, 0, group, vb_size(group), of->high, &high, &pairs);
    const vf dot = vf_fma(vf_from(high), vf_set1(128.0f), vf_from(dots));
    return vf_mul(dot, vf_mul(vf_load((const float *)tile), vf_set1(of->scale)));
}

/* The products of T rows of x with `count` blocks of R tiles, `stride` bytes apart, from block `block` of `blocks` on: sums
 * [R][rows] if these are the last ones, before that dots [R][rows], from which the next blocks go on.  Each block fetches
 * `fetched` bytes from `ahead` on into the second-level cache. */
HOT void panel_tile(const int R, const int T, const uint8_t *w, long stride, const uint8_t *x, long x_stride, long block,
                    long count, long blocks, const uint8_t *ahead, long fetched, vi *dots, vf *sums, int rows) {
    const int few = R * T <= MK_GROUP, chains = few ? 2 : 1; /* one chain of products would wait for each */
    const uint8_t *from = w + MK_PANEL_HEAD + block * PANEL_BLOCK;
    const uint8_t *q = x + GROUP(T) * (MK_PANEL_ROW + block * MK_BLOCK);
    const int last = block + count == blocks;
    vi acc[2 * PANEL_TILES * PANEL_ROWS];
    vp parts[PANEL_TILES * PANEL_ROWS];
    UNROLL
    for (int i = 0; i < R * T; i++)
        acc[i] = block ? dots[i / T * rows + i % T] : vi_set1(VEC_Q8_BIAS ? ROW_HEAD(i % T, x, x_stride)->offset128 : 0);
    UNROLL
    for (int i = R * T; i < chains * R * T; i++) acc[i] = vi_set1(0);
    for (; count--; from += PANEL_BLOCK, q += GROUP(T) * MK_BLOCK) {
        if (few) fetch_ahead(from, PANEL_BLOCK, ahead_of(MK_W8A8, T));
        else
            for (const uint8_t *end = ahead + fetched; ahead < end; ahead += 64) __builtin_prefetch(ahead, 0, 2);
        UNROLL
        for (int g = 0; g < 8; g++) {
            vb groups[PANEL_TILES];
            UNROLL
            for (int r = 0; r < R; r++) groups[r] = vb_signed(vb_load(from + r * stride + 64 * g));
            UNROLL
            for (int t = 0; t < T; t++)
                UNROLL
                for (int r = 0; r < R; r++)
                    vb_multiply(8, g, 7, groups[r], vb_size(groups[r]), (const int8_t *)ROW(T, t, q, x_stride, MK_BLOCK),
                                &acc[g % chains * R * T + r * T + t], &parts[r * T + t]);
        }
    }
    UNROLL
    for (int i = 0; i < R * T; i++) {
        if (few) acc[i] = vi_add(acc[i], acc[R * T + i]);
        if (last) sums[i / T * rows + i % T] = scale_dots(w + i / T * stride, ROW_HEAD(i % T, x, x_stride), acc[i]);
        else dots[i / T * rows + i % T] = acc[i];
    }
}

typedef void (*panel_tile_function)(const uint8_t *w, long stride, const uint8_t *x, long x_stride, long block, long count,
                                    long blocks, const uint8_t *ahead, long fetched, vi *dots, vf *sums, int rows);
#define PANEL_TILE(R, T)                                                                                            \
    static void panel_tile_##R##_##T(const uint8_t *w, long stride, const uint8_t *x, long x_stride, long block,    \
                                     long count, long blocks, const uint8_t *ahead, long fetched, vi *dots,         \
                                     vf *sums, int rows) {                                                          \
        panel_tile(R, T, w, stride, x, x_stride, block, count, blocks, ahead, fetched, dots, sums, rows);           \
    }
/* By tiles, and by rows of x: 1 to 4, then 8. */
PANEL_TILE(1, 1) PANEL_TILE(1, 2) PANEL_TILE(1, 3) PANEL_TILE(1, 4)
#define PANEL_OF_ONE panel_tile_1_1, panel_tile_1_2, panel_tile_1_3, panel_tile_1_4
#if VEC_ROWS > 8
PANEL_TILE(1, 8) PANEL_TILE(2, 4) PANEL_TILE(2, 8)
static const panel_tile_function PANEL_FUNCTIONS[][5] = {
    {PANEL_OF_ONE, panel_tile_1_8}, {[3] = panel_tile_2_4, panel_tile_2_8}};
#elif VEC_ROWS > 4
PANEL_TILE(2, 4)
static const panel_tile_function PANEL_FUNCTIONS[][4] = {{PANEL_OF_ONE}, {[3] = panel_tile_2_4}};
#else
static const panel_tile_function PANEL_FUNCTIONS[][4] = {{PANEL_OF_ONE}};
#endif

/* A panel for 1 to 4 rows of x, or whole groups. */
static void whole_panel(const mk_matmul_job *job, int rows, int p, long tile, int tiles, int again, const uint8_t *x,
                        vf *sums) {
    (void)again;
    const long columns = job->bounds[p + 1] - job->bounds[p], blocks = mk_blocks(columns, MK_BLOCK);
    const long stride = mk_tile_bytes(job->type, columns);
    const uint8_t *w = job->at[p] + tile * stride;
    vi dots[PANEL_TILES * UNPACKED_ROWS];
    for (int i = 0; i < tiles * rows && !blocks; i++) sums[i] = vf_set1(0.0f);
    for (int R; tiles; tiles -= R, w += R * stride, sums += R * rows) {
        R = rows > MK_GROUP && tiles >= PANEL_TILES ? PANEL_TILES : 1;
        /* Rows with which the next parts of one tile are fetched, and bytes of it with each block. */
        const int each = (int)mk_blocks(rows, R * PANEL_ROWS) * PANEL_ROWS;
        const long fetched = mk_blocks(PANEL_BLOCK * PANEL_ROWS, each * 64) * 64;
        for (long block = 0, count; block < blocks; block += count) {
            count = blocks - block < PANEL_DEPTH ? blocks - block : PANEL_DEPTH;
            const uint8_t *next = w + (block + count < blocks ? MK_PANEL_HEAD + (block + count) * PANEL_BLOCK : R * stride);
            for (int t = 0, T; t < rows; t += T) {
                T = rows - t >= PANEL_ROWS ? PANEL_ROWS : rows - t;
                const uint8_t *ahead = next + t / each * stride + t % each / PANEL_ROWS * count * fetched;
                PANEL_FUNCTIONS[R - 1][T > MK_GROUP ? MK_GROUP : T - 1](
                    w, stride, x + t * job->x_stride, MK_GROUP * job->x_stride, block, count, blocks, ahead, fetched,
                    dots + t, sums + t, rows);
            }
        }
    }
}
