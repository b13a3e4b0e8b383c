/* Tiles of PLAIN blocks, and the values of any packed block as the products' operands: 32 columns of 16 rows of W are 8
 * groups of 4 columns, whose products with x are exact integers. */

/* The values of nibbles as the products' operands: MXFP4's begin at 0, IQ4's have the bias that signed bytes have. */
#define FROM_ZERO(value) (value) + 12,
#define BIASED(value) (int8_t)((value) + VEC_Q8_BIAS),
static const int8_t E2M1_OPERANDS[16] = {MK_E2M1_VALUES(FROM_ZERO)}, IQ4_OPERANDS[16] = {MK_IQ4_VALUES(BIASED)};

MK_INLINE int is_iq4(int type) { return type == MK_IQ4_NL || type == MK_IQ4_XS; }
MK_INLINE int is_signed(int type) { return type == MK_Q8_0 || is_iq4(type) || mk_is_grid(type); }

/* Bits of the values of group g of 4 columns: two of each in a byte, or one. */
MK_INLINE vb two_bits(const uint8_t *w, const int g, const int to) {
    return vb_bits(vb_load(w + 64 * (g / 4)), g % 4 * 2, 3, to);
}
MK_INLINE vb one_bit(const uint8_t *w, const int g, const int to) { return vb_bits(vb_load(w), g, 1, to); }

/* Row by row, because table look-ups are gathers on every path.  Not copied into each tile: the code is too long. */
MK_INLINE void grid_rows(const int type, const uint8_t *w, uint32_t (*words)[MK_TILE]) {
    for (int r = 0; r < MK_TILE; r++)
        for (int i = 0; i < 4; i++) {
            const uint64_t eight = mk_grid_eight(type, w + r * mk_grid_bytes(type), i);
            words[2 * i][r] = (uint32_t)eight, words[2 * i + 1][r] = (uint32_t)(eight >> 32);
        }
}
static __attribute__((noinline)) void grid_words(int type, const uint8_t *w, uint32_t (*words)[MK_TILE]) {
    switch (type) {
    case MK_IQ2_XXS: grid_rows(MK_IQ2_XXS, w, words); break;
    case MK_IQ2_XS: grid_rows(MK_IQ2_XS, w, words); break;
    case MK_IQ2_S: grid_rows(MK_IQ2_S, w, words); break;
    case MK_IQ3_XXS: grid_rows(MK_IQ3_XXS, w, words); break;
    default: grid_rows(MK_IQ3_S, w, words);
    }
}

/* Group g of 4 columns of a block of 16 rows of W; words: what grid_words makes of types of grids. */
MK_INLINE vb load_group(const int type, const uint8_t *w, uint32_t (*words)[MK_TILE], const int g) {
    if (mk_is_grid(type)) return vb_signed(vb_load((const uint8_t *)words[g]));
    if (type == MK_Q8_0) return vb_signed(vb_load(w + 64 * g));
    if (type == MK_Q2_K) return two_bits(w, g, 0);
    if (type == MK_Q3_K) return vb_or(two_bits(w, g, 0), one_bit(w + 128, g, 2));
    const vb group = vb_bits(vb_load(w + 64 * (g % 4)), g / 4 * 4, 15, 0);
    if (type == MK_MXFP4) return vb_table(E2M1_OPERANDS, group);
    if (is_iq4(type)) return vb_table(IQ4_OPERANDS, group);
    if (mk_bits(type) == 5) return vb_or(group, one_bit(w + 256, g, 4));
    return type == MK_Q6_K ? vb_or(group, two_bits(w + 256, g, 4)) : group;
}

/* All 8 of them. */
MK_INLINE void load_groups(const int type, const uint8_t *w, vb *groups) {
    uint32_t words[8][MK_TILE];
    if (mk_is_grid(type)) grid_words(type, w, words);
    UNROLL
    for (int g = 0; g < 8; g++) groups[g] = load_group(type, w, words, g);
}

/* The start of a block's sum of products: it takes away what stored weights have been raised by (mk_activation). */
MK_INLINE int32_t start_of(int type, const mk_activation *a) {
    if (type == MK_Q4_0) return a->offset8;
    if (type == MK_Q5_0) return 2 * a->offset8;
    if (type == MK_MXFP4) return a->offset8 / 2 * 3;
    return is_signed(type) && VEC_Q8_BIAS ? a->offset128 : 0;
}

/* Of values as load_groups gives them. */
MK_INLINE int value_bits(const int type) {
    if (is_signed(type)) return 8;
    return type == MK_Q6_K ? 6 : mk_bits(type) == 5 || type == MK_MXFP4 ? 5 : 4;
}

/* dots [halves][T] += the products of T rows of x with the groups of a block of W, each as soon as it is unpacked: held, they
 * would only fill registers. */
MK_INLINE void dots_of_rows(const int type, const int halves, const int T, const uint8_t *w, const mk_activation *a,
                            vi (*dots)[MK_GROUP]) {
    const int bits = value_bits(type), in_turn = type == MK_Q8_0 || (!VEC_ALIKE && bits == 5); /* for MK_CHAIN of 5 bits */
    uint32_t words[8][MK_TILE];
    vp pairs[2][MK_GROUP];
    if (mk_is_grid(type)) grid_words(type, w, words);
    UNROLL
    for (int i = 0; i < 8; i++) {
        const int g = in_turn ? i : i / 2 + i % 2 * 4, h = halves == 2 ? g / 4 : 0; /* nibbles of the same bytes are neighbours */
        const vb group = vb_keep(load_group(type, w, words, g)), size = bits == 8 ? vb_size(group) : group;
        UNROLL
        for (int t = 0; t < T; t++)
            vb_multiply(bits, g - 4 * h, 8 / halves - 1, group, size, a[t].q + 16 * h, &dots[h][t], &pairs[h][t]);
    }
}

MK_INLINE part_scales load_plain_scales(const int type, const uint8_t *w) {
    part_scales of;
    of.scale[0] = type == MK_MXFP4 ? vf_load_e8m0(w) : vf_load_f16((const void *)w);
    if (mk_f16s(type) == 2) of.minimum[0] = vf_load_f16((const void *)(w + 32));
    return of;
}

HOT void quantised_tile(const int type, const int T, const uint8_t *w, const uint8_t *x, long count, vf *sums) {
    const int scales = mk_scale_bytes(type) * MK_TILE;
    const long bytes = (long)mk_block_bytes(type) * MK_TILE;
    vf acc[MK_GROUP];
    UNROLL
    for (int t = 0; t < T; t++) acc[t] = vf_set1(0.0f);
    for (long b = 0; b < count; b++, w += bytes, x += T * MK_ACTIVATION) {
        const mk_activation *a = (const void *)x;
        fetch_ahead(w, bytes, ahead_of(type, T));
        vi dots[1][MK_GROUP];
        UNROLL
        for (int t = 0; t < T; t++) dots[0][t] = vi_set1(start_of(type, a + t));
        dots_of_rows(type, 1, T, w + scales, a, dots);
        const part_scales of = load_plain_scales(type, w);
        UNROLL
        for (int t = 0; t < T; t++)
            acc[t] = add_part(form_of(type), acc[t], dots[0][t], dots[0][t], &of, of.scale[0], of.scale[0], a + t);
    }
    UNROLL
    for (int t = 0; t < T; t++) sums[t] = acc[t];
}
