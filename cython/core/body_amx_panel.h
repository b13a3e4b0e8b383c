/* Products of PANEL types with many rows of x, on the tiles of AMX, with the bits of body_panel.h.
 *
 * A panel's products are exact integers, so they stay in tiles from its first column to its last.  A tile instruction takes
 * 64 columns of 16 rows of W, as they lie, and of 16 rows of x, which are copied together once for many tiles of W. */

#include "body_amx_tiles.h"

enum { COPIED_STEPS = 256 /* of 64 columns of 16 rows of x */, STEP_BLOCKS = 2 };

typedef int8_t copied_step[AMX_ROWS][STEP_BLOCKS * MK_BLOCK] __attribute__((aligned(64)));

/* How many of `left` rows go through tiles: as many as a panel's copies have room for, and no few. */
static int panel_rows(const mk_matmul_job *job, long left) {
    long widest = 1, rows;
    for (int p = 0; p < job->panels; p++) {
        const long steps = mk_blocks(job->bounds[p + 1] - job->bounds[p], STEP_BLOCKS * MK_BLOCK);
        if (steps > widest) widest = steps;
    }
    rows = COPIED_STEPS / widest * AMX_ROWS;
    if (rows > AMX_GROUPS * AMX_ROWS) rows = AMX_GROUPS * AMX_ROWS;
    if (rows > left) rows = left;
    return rows < MK_IN_TILES ? 0 : (int)rows;
}

/* Copy `blocks` blocks of a group of `rows` rows of x.  If their number is odd, zeros follow the last block. */
static void copy_group(const int8_t *q, int rows, long blocks, copied_step *to, int first) {
    const long block = (long)rows * MK_BLOCK;
    for (long b = 0; b < blocks; b += STEP_BLOCKS, q += STEP_BLOCKS * block, to++)
        for (int t = 0; t < rows; t++) {
            const __m256i low = _mm256_loadu_si256((const void *)(q + t * MK_BLOCK));
            __m256i high = _mm256_setzero_si256();
            if (b + 1 < blocks) high = _mm256_loadu_si256((const void *)(q + block + t * MK_BLOCK));
            _mm512_store_si512((*to)[first + t], _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
        }
}

/* Copy panel p of `rows` rows of x, of which it begins at x, to [16 rows][step]; rows[t]: what row t has for the panel.
 * The last group of x may have fewer rows than the others, and its panels begin earlier then. */
static void copy_panel(const mk_matmul_job *job, int rows, int p, const uint8_t *x, copied_step *to,
                       const mk_panel_row **of) {
    const long blocks = mk_blocks(job->bounds[p + 1] - job->bounds[p], MK_BLOCK), steps = mk_blocks(blocks, STEP_BLOCKS);
    long before = 0;
    for (int i = 0; i < p; i++) before += mk_activation_bytes(job->type, job->bounds[i + 1] - job->bounds[i]);
    for (int t = 0; t < rows; t += MK_GROUP, x += MK_GROUP * job->x_stride) {
        const int count = rows - t < MK_GROUP ? rows - t : MK_GROUP;
        const mk_panel_row *group = (const mk_panel_row *)(x - (MK_GROUP - count) * before);
        for (int i = 0; i < count; i++) of[t + i] = group + i;
        copy_group((const int8_t *)(group + count), count, blocks, to + t / AMX_ROWS * steps, t % AMX_ROWS);
    }
}

#define LOAD_OPERAND(t, from) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(from), "r"(64l) : "memory")
#define ADD_PRODUCTS(c, x, w) __asm__ volatile("tdpbssd %%tmm" #w ", %%tmm" #x ", %%tmm" #c ::: "memory")
#define ZERO_SUMS(c) __asm__ volatile("tilezero %%tmm" #c ::: "memory")
#define STORE_SUMS(c, to) __asm__ volatile("tilestored %%tmm" #c ", (%0,%1,1)" ::"r"(to), "r"(64l) : "memory")

/* The products of 64 columns of R tiles of W with G times 16 rows of x; x_stride: from the first 16 rows to the others. */
MK_INLINE void add_step(const int R, const int G, const uint8_t *w, long stride, const copied_step *x, long x_stride) {
    LOAD_OPERAND(4, x);
    LOAD_OPERAND(6, w);
    ADD_PRODUCTS(0, 4, 6);
    if (R > 1) {
        LOAD_OPERAND(7, w + stride);
        ADD_PRODUCTS(1, 4, 7);
    }
    if (G > 1) {
        LOAD_OPERAND(5, x + x_stride);
        ADD_PRODUCTS(2, 5, 6);
        if (R > 1) ADD_PRODUCTS(3, 5, 7);
    }
}

/* The products of a whole panel.  Each step fetches `fetched` bytes from `ahead` on into the second-level cache. */
HOT void amx_panel_tile(const int R, const int G, const uint8_t *w, long stride, const copied_step *x, long blocks,
                        const uint8_t *ahead, long fetched, dot_products *dots) {
    const long steps = mk_blocks(blocks, STEP_BLOCKS);
    uint8_t last[2][TILE_BYTES] __attribute__((aligned(64))); /* where W has half a step, which other bytes follow */
    for (int r = 0; r < R && blocks % STEP_BLOCKS; r++) {
        memcpy(last[r], w + r * stride + (steps - 1) * TILE_BYTES, PANEL_BLOCK);
        memset(last[r] + PANEL_BLOCK, 0, PANEL_BLOCK);
    }
    ZERO_SUMS(0);
    ZERO_SUMS(1);
    ZERO_SUMS(2);
    ZERO_SUMS(3);
    for (long step = 0; step < blocks / STEP_BLOCKS; step++, w += TILE_BYTES) {
        for (const uint8_t *end = ahead + fetched; ahead < end; ahead += 64) __builtin_prefetch(ahead, 0, 2);
        add_step(R, G, w, stride, x + step, steps);
    }
    if (blocks % STEP_BLOCKS) add_step(R, G, *last, TILE_BYTES, x + steps - 1, steps);
    STORE_SUMS(0, dots[0]);
    if (R > 1) STORE_SUMS(1, dots[1]);
    if (G > 1) STORE_SUMS(2, dots[2]);
    if (R > 1 && G > 1) STORE_SUMS(3, dots[3]);
}

typedef void (*amx_panel_function)(const uint8_t *w, long stride, const copied_step *x, long blocks, const uint8_t *ahead,
                                   long fetched, dot_products *dots);
#define AMX_PANEL_TILE(R, G)                                                                                              \
    static void amx_panel_tile_##R##_##G(const uint8_t *w, long stride, const copied_step *x, long blocks,                \
                                         const uint8_t *ahead, long fetched, dot_products *dots) {                        \
        amx_panel_tile(R, G, w, stride, x, blocks, ahead, fetched, dots);                                                 \
    }
AMX_PANEL_TILE(1, 1) AMX_PANEL_TILE(1, 2) AMX_PANEL_TILE(2, 1) AMX_PANEL_TILE(2, 2)
static const amx_panel_function AMX_PANEL_FUNCTIONS[2][2] = {
    {amx_panel_tile_1_1, amx_panel_tile_1_2}, {amx_panel_tile_2_1, amx_panel_tile_2_2}};

/* A panel, like `whole_panel`, for any number of rows up to AMX_GROUPS * AMX_ROWS.  32 rows of x stay in the first cache
 * while as many tiles of W pass by as stay in the second one for the other rows. */
static void amx_whole_panel(const mk_matmul_job *job, int rows, int p, long tile, int tiles, int again, const uint8_t *x,
                            vf *sums) {
    const long columns = job->bounds[p + 1] - job->bounds[p], blocks = mk_blocks(columns, MK_BLOCK);
    const long steps = mk_blocks(blocks, STEP_BLOCKS), stride = mk_tile_bytes(job->type, columns);
    const uint8_t *w = job->at[p] + tile * stride;
    const int most = stride < TILES_CACHE / 2 ? (int)(TILES_CACHE / stride / 2 * 2) : 2;
    copied_step copies[COPIED_STEPS];
    const mk_panel_row *of[AMX_GROUPS * AMX_ROWS];
    dot_products dots[4];
    for (int i = 0; i < tiles * rows && !blocks; i++) sums[i] = vf_set1(0.0f);
    if (blocks) copy_panel(job, rows, p, x, copies, of);
    for (int first = 0, end; first < tiles && blocks; first = end) {
        end = tiles - first < most ? tiles : first + most;
        for (int t = 0; t < rows; t += 2 * AMX_ROWS)
            for (int i = first, R, G = rows - t > AMX_ROWS ? 2 : 1; i < end; i += R) {
                R = end - i > 1 ? 2 : 1;
                const uint8_t *from = w + i * stride;
                AMX_PANEL_FUNCTIONS[R - 1][G - 1](from + MK_PANEL_HEAD, stride, copies + t / AMX_ROWS * steps,
                                                  blocks, from + R * stride, t || again ? 0 : R * TILE_BYTES, dots);
                for (int j = 0; j < G * AMX_ROWS && t + j < rows; j++)
                    for (int r = 0; r < R; r++)
                        sums[(i + r) * rows + t + j] = scale_dots(
                            from + r * stride, of[t + j], vb_load((const void *)dots[j / AMX_ROWS * 2 + r][j % AMX_ROWS]));
            }
    }
}
