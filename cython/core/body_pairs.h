/* BF16 weights times PAIRS_ROWS rows of x with VDPBF16PS, with the bits of body_float.h.  Four rows of W and a group of rows of
 * x have 16 chains, twice as many as its latency asks for.  Two rows are folded together: row r's 8 lanes become the lower half
 * of a vector and row r + 4's the upper one, which is what vf_sums makes of them first (and adds zeros, to sums that are
 * never -0). */

enum { PAIRS_ROWS = 8, PAIRS_STEPS = MK_BF16_BLOCK / 32, PAIRS_FOURS = MK_TILE / 4, PAIRS_AHEAD = 2, PAIRS_SHARES = 16 };

#define PAIRS_FIT(type, rows, n, columns) \
    ((type) == MK_BF16 && (rows) == PAIRS_ROWS && (n) == MK_TILE && (columns) && (columns) % 32 == 0)

/* What the second cache gets while a tile meets rows of x: one of `every` blocks, `by` bytes further; every 0: nothing. */
typedef struct {
    long by;
    int every, turn;
} pairs_share;

/* The tiles after these are read while other rows of x meet these: with the first ones alone, reading takes longer than
 * computing. */
static pairs_share share_of(const mk_matmul_job *job, int again, long tile, int tiles, long stride) {
    const int rows = (int)(job->m < job->chunk ? job->m : job->chunk), others = rows / PAIRS_ROWS - 1;
    const int every = others < PAIRS_SHARES ? others : PAIRS_SHARES, turn = again / PAIRS_ROWS - 1;
    const int none = turn < 0 || turn >= every || tile + 2 * tiles > job->tiles;
    return (pairs_share){tiles * MK_TILE * stride, none ? 0 : every, turn};
}

/* At most a block of columns, of four rows of W at a distance of `apart` and a group of rows of x.  The sums go on: [MK_GROUP] of
 * the first two rows, and from `second` on of the others. */
MK_INLINE void pairs_block(const uint8_t *w, long apart, const uint8_t *x, long steps, vf *sums, long second) {
    vf acc[4 * MK_GROUP];
    UNROLL
    for (int i = 0; i < 4 * MK_GROUP; i++) acc[i] = vf_set1(0.0f);
    UNROLL
    for (long step = 0; step < steps; step++, w += BF16_STEP, x += BF16_STEP * MK_GROUP) {
        vf rows[4];
        UNROLL
        for (int r = 0; r < 4; r++) rows[r] = vf_load((const void *)(w + r * apart));
        UNROLL
        for (int t = 0; t < MK_GROUP; t++) {
            const vf values = vf_keep(vf_load((const void *)(x + t * BF16_STEP)));
            UNROLL
            for (int r = 0; r < 4; r++) acc[r * MK_GROUP + t] = vf_pairs(rows[r], values, acc[r * MK_GROUP + t]);
        }
    }
    UNROLL
    for (int half = 0; half < 2; half++)
        UNROLL
        for (int t = 0; t < MK_GROUP; t++) {
            const vf *of_row = acc + 2 * half * MK_GROUP + t;
            vf *sum = sums + half * second + t;
            *sum = vf_add(*sum, vf_both_halves(of_row[0], of_row[MK_GROUP]));
        }
}

/* From the columns of four rows to those of the four that are fetched meanwhile, at last of the next tile. */
static long next_four(int four, long begin, long columns, long stride) {
    const int next = (four + PAIRS_AHEAD) % PAIRS_FOURS;
    long at = (next - four) * stride;
    if (next < four) at += begin + DEPTH < columns ? 2 * DEPTH : MK_TILE * stride - 2 * begin;
    return at;
}

/* A block of two rows at a distance of `apart`, into the first cache or into the second one. */
#define FETCH_BLOCK(row, apart, cache)                                                                    \
    for (const uint8_t *line = row, *end = line + 2 * MK_BF16_BLOCK; line < end; line += 64) {            \
        __builtin_prefetch(line, 0, 4 - (cache));                                                         \
        __builtin_prefetch(line + (apart), 0, 4 - (cache));                                               \
    }

/* 16 rows of W; columns > 0, in whole steps. */
HOT void pairs_tile(const uint8_t *w, long stride, long ahead, pairs_share share, const uint8_t *x, long x_stride,
                    long columns, vf *sums) {
    const long apart = 4 * stride;
    vf all[2][PAIRS_FOURS][PAIRS_ROWS]; /* of rows r and r + 4, and of r + 8 and r + 12 */
    int block = 0;
    for (long begin = 0; begin < columns; begin += DEPTH)
        for (int four = 0; four < PAIRS_FOURS; four++)
            for (int group = 0; group < PAIRS_ROWS; group += MK_GROUP) {
                const uint8_t *row = w + 2 * begin + four * stride;
                const uint8_t *from = x + group / MK_GROUP * x_stride + begin / 32 * BF16_STEP * MK_GROUP;
                const long next = (ahead ? ahead : next_four(four, begin, columns, stride)) + group / 2 * apart;
                long count = columns - begin < DEPTH ? columns - begin : DEPTH;
                vf acc[2 * MK_GROUP];
                UNROLL
                for (int i = 0; i < 2 * MK_GROUP; i++)
                    acc[i] = begin ? all[i / MK_GROUP][four][group + i % MK_GROUP] : vf_set1(0.0f);
                for (; count >= MK_BF16_BLOCK; count -= MK_BF16_BLOCK, block++) {
                    if (ahead != FETCHED) {
                        FETCH_BLOCK(row + next, apart, 1)
                    }
                    if (share.every && block % share.every == share.turn) {
                        FETCH_BLOCK(row + share.by + group / 2 * apart, apart, 2)
                    }
                    pairs_block(row, apart, from, PAIRS_STEPS, acc, MK_GROUP);
                    row += 2 * MK_BF16_BLOCK, from += PAIRS_STEPS * BF16_STEP * MK_GROUP;
                }
                if (count) pairs_block(row, apart, from, count / 32, acc, MK_GROUP);
                UNROLL
                for (int i = 0; i < 2 * MK_GROUP; i++) all[i / MK_GROUP][four][group + i % MK_GROUP] = acc[i];
            }
    for (int t = 0; t < PAIRS_ROWS; t++) sums[t] = vf_sums_of_pairs(&all[0][0][t], PAIRS_ROWS);
}
