/* The tile of unpacked weights (body_unpacked.h) for 32 registers of 16 bytes: a quarter of the 16 rows of W after the other,
 * so that sums of T rows of x, their bytes, and a quarter's integers are all in registers.  Each quarter's 8 groups lie one
 * after the other. */

#define VEC_PUT(groups, g, a) quarters_put(*(groups), g, a)
MK_INLINE void quarters_put(uint8_t *p, const int g, vb a) {
    QUARTERS vst1q_s8((int8_t *)p + 128 * j + 16 * g, a.q[j]);
}

/* start + the products of quarter j and half h (or of both halves) of the columns with T rows of x. */
MK_INLINE void quarter_dots(const int halves, const int T, const int h, const uint8_t *w, int8x16_t (*x)[2], int32x4_t *dots) {
    UNROLL
    for (int t = 0; t < T; t++) dots[t] = vdupq_n_s32(0);
    UNROLL
    for (int g = 0; g < 8 / halves; g += 2) {
        const int8x16_t first = vld1q_s8((const int8_t *)w + 64 * h + 16 * g);
        const int8x16_t second = vld1q_s8((const int8_t *)w + 64 * h + 16 * g + 16);
        UNROLL
        for (int t = 0; t < T; t++) neon_dot(&dots[t], first, x[t][h + g / 4], g % 4);
        UNROLL
        for (int t = 0; t < T; t++) neon_dot(&dots[t], second, x[t][h + g / 4], g % 4 + 1);
    }
}

HOT void quarters_tile(const int form, const int bits, const int R, const int T, const unpacked *w, long count,
                       const uint8_t *x, const uint8_t *ahead, long fetched, vf *sums, int rows) {
    const int halves = form == HALVED || form == MINIMA ? 2 : 1;
    (void)bits, (void)R, (void)ahead, (void)fetched, (void)rows;
    vf acc[MK_GROUP];
    UNROLL
    for (int t = 0; t < T; t++) acc[t] = sums[t];
    for (; count--; w++, x += MK_GROUP * MK_ACTIVATION) {
        const mk_activation *a = (const void *)x;
        int8x16_t bytes[MK_GROUP][2];
        UNROLL
        for (int t = 0; t < T; t++) bytes[t][0] = vld1q_s8(a[t].q), bytes[t][1] = vld1q_s8(a[t].q + 16);
        UNROLL
        for (int j = 0; j < 4; j++) {
            vi first[MK_GROUP], second[MK_GROUP];
            int32x4_t dots[2][MK_GROUP];
            UNROLL
            for (int h = 0; h < halves; h++) quarter_dots(halves, T, h, *w->groups + 128 * j, bytes, dots[h]);
            UNROLL
            for (int t = 0; t < T; t++) { /* of which the other quarters are not computed */
                first[t].q[j] = dots[0][t], second[t].q[j] = dots[halves - 1][t];
                acc[t].q[j] = add_part(form, acc[t], first[t], second[t], &w->of, w->d, w->m, a + t).q[j];
            }
        }
    }
    UNROLL
    for (int t = 0; t < T; t++) sums[t] = acc[t];
}
#define VEC_TILE quarters_tile
