/* Products of BF16 weights with many rows of x on AVX2, whose fma takes floats alone.
 *
 * A block of columns of a tile of W becomes floats once for up to WIDE_ROWS rows of x, and stays in the first cache while they
 * pass by, WIDE_X at a time.  One half of the lanes is computed after the other: WIDE_W rows of W and WIDE_X rows of x have 12
 * sums, so with WIDE_X vectors of x and one of W all 16 registers are in use.  The chains are those of body_float.h. */

#ifdef VEC_HALF_ROWS
enum { WIDE_W = 4, WIDE_X = 3, WIDE_FOURS = MK_TILE / WIDE_W, WIDE_STEPS = MK_BF16_BLOCK / MK_TILE };
enum { WIDE_ROWS = 96, WIDE_FROM = 16 /* fewer rows take less time in body_float.h */ };

/* [half of the lanes][rows of W][step][row]: of 32 columns the first step has the odd ones, the second one the even ones. */
typedef vh wide_block[2][WIDE_FOURS][WIDE_STEPS][WIDE_W];
typedef vh wide_sums[MK_TILE]; /* of a row of x */

/* The number of `rows` rows of x that are computed together; 0 if there are too few, or if the type is another one. */
static int wide_rows(int type, long rows) {
    if (!mk_is_bf16(type) || rows < WIDE_FROM) return 0;
    return rows < WIDE_ROWS ? (int)rows / MK_GROUP * MK_GROUP : WIDE_ROWS;
}

/* Columns of `rows` rows, at most a block; what is missing of 16 rows and of the last 32 columns becomes zero. */
static void widen(const uint8_t *from, long stride, int rows, long columns, wide_block to) {
    for (int r = 0; r < MK_TILE; r++)
        for (long i = 0; i < mk_blocks(columns, 32); i++) {
            uint8_t part[64] = {0};
            const uint8_t *at = from + r * stride + 64 * i;
            const long count = r >= rows ? 0 : columns - 32 * i < 32 ? columns - 32 * i : 32;
            if (count < 32) at = memcpy(part, at, (size_t)(2 * count));
            UNROLL
            for (int half = 0; half < 2; half++) {
                vh(*steps)[WIDE_W] = &to[half][r / WIDE_W][2 * i];
                steps[0][r % WIDE_W] = vh_odd((const void *)(at + 32 * half));
                steps[1][r % WIDE_W] = vh_even((const void *)(at + 32 * half));
            }
        }
}

/* acc [WIDE_W][T] = the products of rows of W with T rows of x in half of the lanes.  For the first half, a line `ahead` bytes
 * after each of the first row of x is fetched. */
MK_INLINE void wide_chains(const int half, const int T, const vh (*w)[WIDE_W], const uint8_t *const *x, long ahead,
                           long steps, vh *acc) {
    long at = 32 * half;
    UNROLL
    for (int i = 0; i < WIDE_W * T; i++) acc[i] = vh_zero();
    do {
        vh values[WIDE_X];
        UNROLL
        for (int t = 0; t < T; t++) values[t] = vh_load((const void *)(x[t] + at));
        if (!half) __builtin_prefetch(*x + at + ahead);
        UNROLL
        for (int r = 0; r < WIDE_W; r++) {
            const vh row = vh_keep((*w)[r]);
            UNROLL
            for (int t = 0; t < T; t++) acc[r * T + t] = vh_fma(row, values[t], acc[r * T + t]);
        }
        w++, at += 64 * MK_GROUP;
    } while (--steps);
}

/* A block of W times T rows of x, whose sums [T] go on.  x: those rows, and then the WIDE_X rows that are fetched meanwhile. */
HOT void wide_tile(const int T, const wide_block w, const uint8_t *const *x, long steps, wide_sums *sums) {
    _Pragma("GCC unroll 1") /* else the compiler keeps sums of two turns in memory */
    for (int four = 0; four < WIDE_FOURS; four++) {
        vh low[WIDE_W * WIDE_X], high[WIDE_W * WIDE_X];
        wide_chains(0, T, w[0][four], x, x[WIDE_X + four % WIDE_X] - *x, steps, low);
        wide_chains(1, T, w[1][four], x, 0, steps, high);
        UNROLL
        for (int i = 0; i < WIDE_W * T; i++) {
            vh *sum = &sums[i % T][four * WIDE_W + i / T];
            *sum = vh_add(*sum, vh_add(low[i], high[i]));
        }
    }
}
#define WIDE_TILE(T)                                                                                                  \
    static void wide_tile_##T(const wide_block w, const uint8_t *const *x, long steps, wide_sums *sums) {             \
        wide_tile(T, w, x, steps, sums);                                                                              \
    }
WIDE_TILE(1) WIDE_TILE(2) WIDE_TILE(3)

/* A block of W times `rows` rows of x, while `bytes` bytes of each of the next block's rows are fetched. */
static void wide_times(const wide_block w, long steps, const uint8_t *x, long x_stride, int rows, const uint8_t *next,
                       long stride, long bytes, wide_sums *sums) {
    static void (*const of_rows[])(const wide_block, const uint8_t *const *, long, wide_sums *) = {
        wide_tile_1, wide_tile_2, wide_tile_3};
    for (int t = 0, T; t < rows; t += T) {
        const uint8_t *of[2 * WIDE_X];
        T = rows - t < WIDE_X ? rows - t : WIDE_X;
        for (int i = 0; i < 2 * WIDE_X; i++) of[i] = ROW(WIDE_ROWS, t + i, x, x_stride, 64);
        for (int r = MK_TILE * t / rows; r < MK_TILE * (t + T) / rows; r++)
            for (long at = 0; at < bytes; at += 64) __builtin_prefetch(next + r * stride + at);
        of_rows[T - 1](w, of, steps, sums + t);
    }
}

/* A panel, like float_panel and coded_panel. */
static void wide_panel(const mk_matmul_job *job, int rows, int p, long tile, int tiles, int again, const uint8_t *x,
                       vf *sums) {
    const int coded = mk_is_coded(job->type);
    const long columns = job->bounds[p + 1] - job->bounds[p], x_stride = MK_GROUP * job->x_stride;
    const long stride = job->row_bytes ? job->row_bytes : mk_row_bytes(MK_BF16, columns);
    const unsigned mode = mk_flush_denormals();
    wide_block wide;
    wide_sums all[WIDE_ROWS];
    decoded_rows decoded;
    for (long first = tile * MK_TILE; tiles--; first += MK_TILE, sums += rows) {
        const int n = job->n - first < MK_TILE ? (int)(job->n - first) : MK_TILE;
        const uint8_t *w = job->at[p] + (coded ? first / MK_TILE * mk_coded_bytes(columns) : first * stride);
        memset(all, 0, (size_t)rows * sizeof *all);
        for (long c = 0; c < columns; c += MK_BF16_BLOCK) {
            const long width = columns - c < MK_BF16_BLOCK ? columns - c : MK_BF16_BLOCK, steps = mk_blocks(width, 32);
            const uint8_t *next = w + mk_coded_bytes(width);
            long apart = MK_CODED_STEP / MK_TILE * steps;
            if (coded) {
                decode_block(w, steps, decoded);
                widen(decoded, 64 * steps, n, width, wide);
            } else {
                widen(w, stride, n, width, wide);
                next = c + width < columns ? w + 2 * width : job->at[p] + (first + MK_TILE) * stride;
                apart = stride;
            }
            wide_times(wide, 2 * steps, x + 4 * MK_GROUP * c, x_stride, rows, next, apart,
                       again ? 0 : coded ? apart : 2 * MK_BF16_BLOCK, all);
            w = next;
        }
        for (int t = 0; t < rows; t++) sums[t] = vh_sums(all[t]);
    }
    mk_restore(mode);
}
#else
#define wide_rows(type, rows) 0
#define wide_panel NULL
#endif
