/* Products of values of 8 bits, for instructions of which one operand has no sign: w x is |w| (-x) = |w| ~x + |w| for w < 0.
 * So x is flipped by an exclusive or, which takes other ports than products, unlike psignb.  A sum begins with the sum of |w| of
 * all w < 0, which all rows of x share.  The sum of a pair of products is at least 2 * 128 * -128, so it fits 16 bits. */

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
