/* The tile of unpacked weights (body_unpacked.h) for 32 registers of 16 bytes.  It computes one quarter of the 16 rows of W
 * after the other, so that the sums and bytes of T rows of x and the integers of a quarter stay in registers.  The 8 groups
 * of a quarter are contiguous. */

#define VEC_PUT(to, g, groups) quarters_put(*(to), g, groups)

#ifdef VEC_I8MM
/* A group and the one before it: 8 columns of two rows of W are 16 bytes. */
MK_INLINE void quarters_put(uint8_t *p, const int g, const vb *groups) {
    if (g % 2)
        QUARTERS {
            const int32x4_t before = vreinterpretq_s32_s8(groups[g - 1].q[j]), own = vreinterpretq_s32_s8(groups[g].q[j]);
            vst1q_s8((int8_t *)p + 128 * j + 16 * g - 16, vreinterpretq_s8_s32(vzip1q_s32(before, own)));
            vst1q_s8((int8_t *)p + 128 * j + 16 * g, vreinterpretq_s8_s32(vzip2q_s32(before, own)));
        }
}

/* The operands of 32 columns of T rows of x: 8 columns of two rows are 16 bytes. */
MK_INLINE void quarter_bytes(const int T, const mk_activation *a, int8x16_t (*x)[2]) {
    UNROLL
    for (int t = 0; t < T; t++) {
        const int8_t *first = a[t / 2 * 2].q + t % 2 * 16, *second = a[t / 2 * 2 + 1].q + t % 2 * 16;
        const int64x2_t one = vreinterpretq_s64_s8(vld1q_s8(first)), two = vreinterpretq_s64_s8(vld1q_s8(second));
        x[t][0] = vreinterpretq_s8_s64(vzip1q_s64(one, two));
        x[t][1] = vreinterpretq_s8_s64(vzip2q_s64(one, two));
    }
}

/* The products of quarter j and half h (or of both halves) of the columns with T rows of x. */
MK_INLINE void quarter_dots(const int halves, const int T, const int h, const uint8_t *w, int8x16_t (*x)[2],
                            int32x4_t *dots) {
    int32x4_t sums[MK_GROUP];
    UNROLL
    for (int i = 0; i < T; i++) sums[i] = vdupq_n_s32(0);
    UNROLL
    for (int g = 0; g < 8 / halves; g += 2) {
        const int8x16_t first = vld1q_s8((const int8_t *)w + 64 * h + 16 * g);
        const int8x16_t second = vld1q_s8((const int8_t *)w + 64 * h + 16 * g + 16);
        UNROLL
        for (int i = 0; i < T; i++) neon_mmla(&sums[i], x[i / 2 * 2 + (4 * h + g) / 4][g / 2 % 2], i % 2 ? second : first);
    }
    UNROLL
    for (int t = 0; t < T; t += 2) {
        const int64x2_t low = vreinterpretq_s64_s32(sums[t]), high = vreinterpretq_s64_s32(sums[t + 1]);
        dots[t] = vreinterpretq_s32_s64(vzip1q_s64(low, high));
        dots[t + 1] = vreinterpretq_s32_s64(vzip2q_s64(low, high));
    }
}
#else
MK_INLINE void quarters_put(uint8_t *p, const int g, const vb *groups) {
    QUARTERS vst1q_s8((int8_t *)p + 128 * j + 16 * g, groups[g].q[j]);
}

MK_INLINE void quarter_bytes(const int T, const mk_activation *a, int8x16_t (*x)[2]) {
    UNROLL
    for (int t = 0; t < T; t++) x[t][0] = vld1q_s8(a[t].q), x[t][1] = vld1q_s8(a[t].q + 16);
}

MK_INLINE void quarter_dots(const int halves, const int T, const int h, const uint8_t *w, int8x16_t (*x)[2],
                            int32x4_t *dots) {
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
#endif

HOT void quarters_tile(const int form, const int bits, const int R, const int T, const unpacked *w, long count,
                       const uint8_t *x, const uint8_t *ahead, long fetched, vf *sums, int rows) {
    const int halves = halves_of(form);
    (void)bits, (void)R, (void)ahead, (void)fetched, (void)rows;
    vf acc[MK_GROUP];
    UNROLL
    for (int t = 0; t < T; t++) acc[t] = sums[t];
    for (; count--; w++, x += MK_GROUP * MK_ACTIVATION) {
        const mk_activation *a = (const void *)x;
        int8x16_t bytes[MK_GROUP][2];
        quarter_bytes(T, a, bytes);
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
