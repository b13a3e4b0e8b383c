/* Products whose values have 8 bits, where bytes are multiplied with and without a sign: w x is |w| (-x) = |w| ~x + |w| for
 * w < 0.  So x is flipped by an exclusive or, which other ports execute than products, unlike psignb, and a sum begins with the
 * sum of |w| of all w < 0, which all rows of x share.  A pair's sum is at least 2 * 128 * -128 and fits 16 bits. */

#if VEC_ALIKE
#define IS_FLIPPED(bits) 0
#define FLIPPED_START(of, h) vi_set1(0)
#define FLIPPED(halves, groups, to) (void)(to)
#else
#define IS_FLIPPED(bits) ((bits) == 8)
#define FLIPPED_START(of, h) (of)->starts[h]
#define FLIPPED flip_groups
/* starts: minus the product with zeros, which are -1 where they are flipped. */
MK_INLINE void flip_groups(const int halves, const vb *groups, unpacked *to) {
    static const int8_t zeros[MK_BLOCK];
    UNROLL
    for (int h = 0; h < halves; h++) {
        vi sum = vi_set1(0);
        vp pairs;
        UNROLL
        for (int g = 8 / halves * h; g < 8 / halves * (h + 1); g++) {
            const vb flips = vb_negative(groups[g]), sizes = vb_size(groups[g]);
            vb_store(to->groups[g], flips);
            vb_store(to->groups[UNPACKED_SIZES + g], sizes);
            vb_multiply(MK_FLIPPED, g, 7, flips, sizes, zeros, &sum, &pairs);
        }
        to->starts[h] = vi_sub(vi_set1(0), sum);
    }
}
#endif
