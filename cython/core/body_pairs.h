/* BF16 weights times PAIRS_ROWS rows of x with VDPBF16PS, with the bits of body_float.h.  Two rows of W have the 16 chains
 * that its latency asks for, and are folded together: row r's 8 lanes become the lower half of a vector and row r + 4's
 * the upper one, which is what vf_sums makes of them first (and adds zeros, to sums that are never -0). */

enum { PAIRS_ROWS = 8, PAIRS_STEPS = MK_BF16_BLOCK / 32, PAIRS_AHEAD = 3 };
#define PAIR_ROW(pair) ((pair) / 4 * 8 + (pair) % 4) /* and the one 4 rows below */

/* At most a block of columns, of rows w and `below` bytes further; sums [PAIRS_ROWS] go on. */
MK_INLINE void pairs_block(const uint8_t *w, long below, const uint8_t *x, long x_stride, long steps, vf *sums) {
    vf acc[2 * PAIRS_ROWS];
    UNROLL
    for (int i = 0; i < 2 * PAIRS_ROWS; i++) acc[i] = vf_set1(0.0f);
    UNROLL
    for (long step = 0; step < steps; step++, w += BF16_STEP, x += BF16_STEP * MK_GROUP) {
        const vf first = vf_load((const void *)w), second = vf_load((const void *)(w + below));
        UNROLL
        for (int t = 0; t < PAIRS_ROWS; t++) {
            const vf values = vf_keep(vf_load((const void *)ROW(PAIRS_ROWS, t, x, x_stride, BF16_STEP)));
            acc[t] = vf_pairs(first, values, acc[t]);
            acc[PAIRS_ROWS + t] = vf_pairs(second, values, acc[PAIRS_ROWS + t]);
        }
    }
    UNROLL
    for (int t = 0; t < PAIRS_ROWS; t++) sums[t] = vf_add(sums[t], vf_both_halves(acc[t], acc[PAIRS_ROWS + t]));
}

/* From a pair's columns to those of the pair that is fetched meanwhile, at last of the next tile. */
static long next_pair(int pair, long begin, long columns, long stride) {
    const int next = (pair + PAIRS_AHEAD) % (MK_TILE / 2);
    long at = (PAIR_ROW(next) - PAIR_ROW(pair)) * stride;
    if (next < pair) at += begin + DEPTH < columns ? 2 * DEPTH : MK_TILE * stride - 2 * begin;
    return at;
}

/* 16 rows of W; columns > 0, in whole steps. */
HOT void pairs_tile(const uint8_t *w, long stride, long ahead, const uint8_t *x, long x_stride, long columns, vf *sums) {
    const long below = 4 * stride;
    vf all[MK_TILE / 2 * PAIRS_ROWS];
    for (long begin = 0; begin < columns; begin += DEPTH)
        for (int pair = 0; pair < MK_TILE / 2; pair++) {
            const uint8_t *row = w + 2 * begin + PAIR_ROW(pair) * stride;
            const uint8_t *from = x + begin / 32 * BF16_STEP * MK_GROUP;
            const long next = ahead ? ahead : next_pair(pair, begin, columns, stride);
            long count = columns - begin < DEPTH ? columns - begin : DEPTH;
            vf *to = all + pair * PAIRS_ROWS, acc[PAIRS_ROWS];
            UNROLL
            for (int t = 0; t < PAIRS_ROWS; t++) acc[t] = begin ? to[t] : vf_set1(0.0f);
            for (; count >= MK_BF16_BLOCK; count -= MK_BF16_BLOCK) {
                if (ahead != FETCHED)
                    for (const uint8_t *line = row + next; line < row + next + 2 * MK_BF16_BLOCK; line += 64) {
                        __builtin_prefetch(line);
                        __builtin_prefetch(line + below);
                    }
                pairs_block(row, below, from, x_stride, PAIRS_STEPS, acc);
                row += 2 * MK_BF16_BLOCK, from += PAIRS_STEPS * BF16_STEP * MK_GROUP;
            }
            if (count) pairs_block(row, below, from, x_stride, count / 32, acc);
            UNROLL
            for (int t = 0; t < PAIRS_ROWS; t++) to[t] = acc[t];
        }
    for (int t = 0; t < PAIRS_ROWS; t++) sums[t] = vf_sums_of_pairs(all + t, PAIRS_ROWS);
}
