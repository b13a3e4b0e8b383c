/* Products with BF12 weights (coded.h).  Rows of W become BF16 four at a time, in registers for one row of x, else in the
 * first cache, and are multiplied as in body_float.h, with the bits of BF16. */

enum { CODED_ROWS = 32 /* rows of x that pass by a block, at most */ };
enum { CODED_GROUP = VEC_ROWS > 4 ? 8 : 4 /* rows of x at a time */ };

/* From rows decoded from w to the line that is prefetched meanwhile, or 0 (ahead_of). */
MK_INLINE long coded_ahead(const int T, const uint8_t *w, const uint8_t *decoded) {
    return ahead_of(MK_BF12, T) ? w + ahead_of(MK_BF12, T) - decoded : 0;
}

typedef uint8_t decoded_rows[MK_TILE * MK_BF16_BLOCK * 2] __attribute__((aligned(64)));

/* 32 columns of two of four rows, 64 bytes each. */
MK_INLINE void decode_pair(const uint8_t *table, const uint8_t *from, const int pair, uint8_t *a, uint8_t *b) {
    const vb high = vb_table((const int8_t *)table, vb_bits(vb_load(from + 128), 4 * pair, 15, 0));
    vb_zip(vb_load(from + 64 * pair), high, a, b);
}

/* A block's rows first ... first + 3, each of `steps` steps of 32 columns, one after the other. */
static void decode_four(const uint8_t *block, int first, long steps, uint8_t *rows) {
    const uint8_t *from = block + MK_CODED_HEAD + first * steps * (MK_CODED_FOUR / 4), *listed = block + MK_CODED_LIST;
    for (long s = 0; s < steps; s++, from += MK_CODED_FOUR, rows += 64) {
        decode_pair(block, from, 0, rows, rows + 64 * steps);
        decode_pair(block, from, 1, rows + 128 * steps, rows + 192 * steps);
    }
    rows -= 64 * steps;
    for (int i = block[MK_CODED_COUNT]; i--; listed += 3)
        if (listed[1] / 4 == first / 4) rows[listed[1] % 4 * steps * 64 + listed[0] * 2 + 1] = listed[2];
}

/* Whether each four rows of a block have exceptions: bit 0 the first four. */
MK_INLINE int exceptional(const uint8_t *block) {
    int fours = 0;
    for (int i = 0; i < block[MK_CODED_COUNT]; i++) fours |= 1 << block[MK_CODED_LIST + 3 * i + 1] / 4;
    return fours;
}

/* Four rows without exceptions, of whole steps, times one row of x. */
static void four_times_one(const uint8_t *block, int first, long steps, const uint8_t *x, vf *sums) {
    const uint8_t *from = block + MK_CODED_HEAD + first * steps * (MK_CODED_FOUR / 4);
    vf acc[4];
    UNROLL
    for (int r = 0; r < 4; r++) acc[r] = vf_set1(0.0f);
    for (; steps--; from += MK_CODED_FOUR, x += BF16_STEP) {
        fetch_ahead(from, MK_CODED_FOUR, ahead_of(MK_BF12, 1));
        UNROLL
        for (int pair = 0; pair < 2; pair++) { /* which compilers keep in registers */
            uint8_t rows[2][64];
            const uint8_t *const of[] = {rows[0], rows[1]};
            decode_pair(block, from, pair, rows[0], rows[1]);
            float_step(MK_BF16, 2, 1, of, x, 0, acc + 2 * pair);
        }
    }
    UNROLL
    for (int r = 0; r < 4; r++) sums[r] = vf_add_halves(sums[r], acc[r]);
}

static void decode_block(const uint8_t *block, long steps, uint8_t *rows) {
    for (int r = 0; r < MK_TILE; r += 4) decode_four(block, r, steps, rows + r * steps * 64);
}

/* `count` rows that decode_four has made, times T rows of x, added to sums [row][T].  As many bytes are fetched, `ahead` bytes
 * after the rows. */
HOT void decoded_times(const int R, const int T, int count, const uint8_t *rows, long ahead, const uint8_t *x,
                       long x_stride, long columns, vf *sums) {
    const long stride = mk_blocks(columns, 32) * 64;
    for (int row = 0; row < count; row += R) {
        const uint8_t *of[MAX_STREAMS];
        UNROLL
        for (int r = 0; r < R; r++) of[r] = rows + (row + r) * stride;
        float_run(MK_BF16, R, T, of, ahead, x, x_stride, columns, sums + row * T);
    }
}
#define DECODED_TIMES(T)                                                                                          \
    static void decoded_times_##T(int count, const uint8_t *rows, long ahead, const uint8_t *x, long x_stride,    \
                                  long columns, vf *sums) {                                                       \
        decoded_times(STREAMS(T) == 3 ? 2 : STREAMS(T), T, count, rows, ahead, x, x_stride, columns, sums);       \
    }
DECODED_TIMES(1) DECODED_TIMES(2) DECODED_TIMES(3) DECODED_TIMES(4)
#if VEC_ROWS > 4
DECODED_TIMES(8)
#else
#define decoded_times_8 NULL
#endif
static void (*const DECODED_TIMES_ROWS[])(int, const uint8_t *, long, const uint8_t *, long, long, vf *) = {
    NULL, decoded_times_1, decoded_times_2, decoded_times_3, decoded_times_4, NULL, NULL, NULL, decoded_times_8};

#ifdef VEC_BF16
/* The same for whole steps of PAIRS_ROWS rows of x: sums [pair][row of x]. */
static void decoded_pairs(const uint8_t *rows, long ahead, const uint8_t *x, long x_stride, long columns, vf *sums) {
    const long stride = columns * 2;
    for (int four = 0; four < PAIRS_FOURS; four++)
        for (int group = 0; group < PAIRS_ROWS; group += MK_GROUP) {
            const uint8_t *row = rows + four * stride, *of_group = x + group / MK_GROUP * x_stride;
            vf *to = sums + four * PAIRS_ROWS + group;
            for (long line = group / 2 * 4 * stride, end = line + stride; ahead && line < end; line += 64) {
                __builtin_prefetch(row + ahead + line);
                __builtin_prefetch(row + ahead + line + 4 * stride);
            }
            if (columns == MK_BF16_BLOCK)
                pairs_block(row, 4 * stride, of_group, PAIRS_STEPS, to, PAIRS_FOURS * PAIRS_ROWS);
            else
                pairs_block(row, 4 * stride, of_group, columns / 32, to, PAIRS_FOURS * PAIRS_ROWS);
        }
}
#define HAS_PAIRS(T, columns) ((T) == PAIRS_ROWS && (columns) % 32 == 0)
#define CODED_SUMS(pairs, a, T) ((pairs) ? vf_sums_of_pairs(a, T) : vf_sums(a, T))
#else
#define decoded_pairs(...) (void)0
#define HAS_PAIRS(T, columns) 0
#define CODED_SUMS(pairs, a, T) vf_sums(a, T)
#endif

/* A block of `columns` columns times one row of x, added to sums [row]. */
static void block_times_one(const uint8_t *block, long columns, const uint8_t *x, vf *sums) {
    uint8_t four[4 * MK_BF16_BLOCK * 2] __attribute__((aligned(64)));
    const long steps = mk_blocks(columns, 32);
    const int decoded = columns % 32 ? 15 : exceptional(block);
    for (int r = 0; r < MK_TILE; r += 4)
        if (decoded >> r / 4 & 1) {
            decode_four(block, r, steps, four);
            decoded_times_1(4, four, coded_ahead(1, block + r * steps * 48, four), x, 0, columns, sums + r);
        } else {
            four_times_one(block, r, steps, x, sums + r);
        }
}

/* The number of `rows` rows of x that are computed together: whole groups, or the last one. */
static int coded_rows(long rows) {
    if (rows >= CODED_ROWS) return CODED_ROWS;
    const int group = rows >= CODED_GROUP ? CODED_GROUP : rows >= MK_GROUP ? MK_GROUP : 1;
    return (int)rows / group * group;
}

static void coded_panel(const mk_matmul_job *job, int rows, int p, long tile, int tiles, int again, const uint8_t *x,
                           vf *sums) {
    (void)again;
    const long columns = job->bounds[p + 1] - job->bounds[p], x_stride = MK_GROUP * job->x_stride;
    const int T = rows < MK_GROUP ? rows : rows < CODED_GROUP ? MK_GROUP : CODED_GROUP;
    const uint8_t *w = job->at[p] + tile * mk_coded_bytes(columns);
    const int pairs = HAS_PAIRS(T, columns);
    const unsigned mode = mk_flush_denormals();
    decoded_rows decoded;
    vf acc[MK_TILE * CODED_ROWS];
    for (; tiles--; sums += rows) {
        for (int i = 0; i < MK_TILE * rows; i++) acc[i] = vf_set1(0.0f);
        for (long c = 0; c < columns; c += MK_BF16_BLOCK) {
            const long width = columns - c < MK_BF16_BLOCK ? columns - c : MK_BF16_BLOCK;
            const uint8_t *from = x + c / 32 * BF16_STEP * GROUP(T);
            long ahead = coded_ahead(T, w, decoded);
            if (T == 1) block_times_one(w, width, from, acc);
            else decode_block(w, mk_blocks(width, 32), decoded);
            for (int t = 0; t < rows && T > 1; t += T, ahead = 0)
                if (pairs) decoded_pairs(decoded, ahead, from + t * job->x_stride, x_stride, width, acc + t * MK_TILE);
                else DECODED_TIMES_ROWS[T](MK_TILE, decoded, ahead, from + t * job->x_stride, x_stride, width,
                                      acc + t * MK_TILE);
            w += mk_coded_bytes(width);
        }
        for (int t = 0; t < rows; t++) sums[t] = CODED_SUMS(pairs, acc + t / T * T * MK_TILE + t % T, T);
    }
    mk_restore(mode);
}
