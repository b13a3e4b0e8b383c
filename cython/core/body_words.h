/* The tile of unpacked weights (body_unpacked.h) whose values have 8 bits, as words of 16: products of bytes take psignb,
 * pmaddubsw and pmaddwd, which share two ports, for 32 products; those of words take pmaddwd twice. */

#define UNPACKED_FIRST(group) vb_words(group, 0)
#define UNPACKED_OTHER(group) vb_words(group, 1)

/* The products of half h of the columns (or of both halves) with T rows of x, of which words has the even columns and the
 * odd ones. */
MK_INLINE void dots_of_words(const int halves, const int T, const int h, const unpacked *w, int16_t (*words)[2][16], vi *dots) {
    UNROLL
    for (int g = 4 * h; g < 4 * h + 8 / halves; g++)
        UNROLL
        for (int odd = 0; odd < 2; odd++) {
            const vb values = vb_load(w->groups[UNPACKED_SECOND * odd + g]);
            UNROLL
            for (int t = 0; t < T; t++) vb_multiply_words(values, words[t][odd] + 2 * g, &dots[t]);
        }
}

HOT void words_tile(const int form, const int T, const unpacked *w, long count, const uint8_t *x, const uint8_t *ahead,
                    long fetched, vf *sums) {
    const int halves = form == HALVED ? 2 : 1;
    const mk_activation *a = (const void *)x;
    int16_t words[2][MK_GROUP][2][16]; /* of a part, and of the next one, so that no product waits for them */
    vf acc[MK_GROUP];
    for (int t = 0; t < T; t++) vb_store_words(words[0][t], a[t].q);
    UNROLL
    for (int t = 0; t < T; t++) acc[t] = sums[t];
    for (int now = 0; count--; w++, a += MK_GROUP, now ^= 1) {
        vi dots[2][MK_GROUP];
        for (const uint8_t *end = ahead + fetched; ahead < end; ahead += 64) __builtin_prefetch(ahead, 0, 2);
        if (count)
            for (int t = 0; t < T; t++) vb_store_words(words[!now][t], a[MK_GROUP + t].q);
        UNROLL
        for (int h = 0; h < halves; h++) {
            UNROLL
            for (int t = 0; t < T; t++) dots[h][t] = vi_set1(unpacked_start(form, 8, a + t, h));
            dots_of_words(halves, T, h, w, words[now], dots[h]);
        }
        UNROLL
        for (int t = 0; t < T; t++) acc[t] = add_part(form, acc[t], dots[0][t], dots[halves - 1][t], &w->of, w->d, w->m, a + t);
    }
    UNROLL
    for (int t = 0; t < T; t++) sums[t] = acc[t];
}
