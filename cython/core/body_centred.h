/* Products whose parts have a scale for each half and values of up to 6 bits (Q6_K, Q3_K), summed in 16 bits over the columns
 * of a half: with x's offset the sum is that of values between -32 and 31, so it is at most 8 * 32 * 127.  On its way there it
 * may be larger, which does not matter, because words wrap.  pmaddwd multiplies it by the half's scale.  The sum of both halves
 * is an integer below 2^24, as in add_part. */

#if VEC_ALIKE
#define IS_CENTRED(form, bits) 0
#define CENTRED_START(offset) ((vp){0})
#define CENTRED_END(pairs, words) vi_set1(0)
#define CENTRED_SCALES(of, all, to) (void)(to)
#else
#define IS_CENTRED(form, bits) ((form) == HALVED && (bits) == 6)
#define CENTRED_START(offset) vp_set(offset)
#define CENTRED_END(pairs, words) vp_times(pairs, words)
#define CENTRED_SCALES(of, all, to) \
    for (int h = 0; h < 2; h++) (to)->words[h] = vi_words(vi_trunc((of)->scale[h])), (to)->d = (all)->d
#endif
