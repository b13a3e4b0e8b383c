/* Definitions that the tiles of all kinds of weights share: their type, their prefetching, and the layout of rows of x. */

/* w: `count` blocks of a tile; x: T rows of a group; sums [T]. */
typedef void (*tile_function)(const uint8_t *w, const uint8_t *x, long count, vf *sums);

/* With few rows, memory bandwidth is the limit: tiles are read as one stream, which is prefetched this many bytes ahead into
 * the first-level cache.  Prefetching into the second level took a seventh longer, and several streams up to half as long
 * again. */
enum { AHEAD = 6144 };

/* Whether Zen 4's own prefetchers read a tile of floats faster for T rows of x: prefetching took 1.05 to 2 times as long with one
 * or two rows, but 0.85 with four. */
MK_INLINE int unaided(const int T) { return T < MK_GROUP && mk_is_zen4; }

/* How many bytes ahead kernels prefetch for T rows of x; 0: they do not.  On Zen 4 prefetching is worth it where
 * computing takes longer than reading weights: products took 0.8 to 1.0 times as long then, and 1.0 to 1.15 times with fewer rows.
 * That is from three rows on with AVX2, from four on with AVX-512, and there from five on with weights of 8 bits and with BF12
 * (with VDPBF16PS four rows took 1.2 times as long, eight rows 0.7 to 0.9 times). */
MK_INLINE long ahead_of(const int type, const int T) {
    const int from = VEC_ROWS <= MK_GROUP ? 3 : mk_bits(type) == 8 || mk_is_coded(type) ? 5 : 4;
    return !VEC_FETCHES || (mk_is_zen4 && T < from) ? 0 : AHEAD;
}

MK_INLINE void fetch_lines(const uint8_t *w, long bytes) {
    for (long line = 0; line < bytes; line += 64) __builtin_prefetch(w + line);
}
MK_INLINE void fetch_ahead(const uint8_t *w, long bytes, long ahead) {
    if (ahead) fetch_lines(w + ahead, bytes);
}

/* Row t of T in a block of groups, and how many rows a group has. */
#define ROW(T, t, x, x_stride, bytes) ((x) + (t) / MK_GROUP * (x_stride) + (t) % MK_GROUP * (long)(bytes))
#define GROUP(T) ((T) < MK_GROUP ? (T) : MK_GROUP)

/* The factors of a part of 32 columns or of its halves: scales, and minima if the type has them. */
typedef struct {
    vf scale[2], minimum[2];
} part_scales;

/* Forms of a part's product: one scale; one scale and one minimum; a scale for each half; a scale and a minimum for each
 * half. */
enum { SCALED, MINIMUM, HALVED, MINIMA };
MK_INLINE int form_of(const int type) {
    if (mk_is_super(type) && mk_halved(type)) return mk_f16s(type) == 2 ? MINIMA : HALVED;
    return mk_f16s(type) == 2 ? MINIMUM : SCALED;
}
/* How many scales a part of a form has: one for each half of its columns, or one for all. */
MK_INLINE int halves_of(const int form) { return form == HALVED || form == MINIMA ? 2 : 1; }

/* acc + the product of a part with a row of x.  first and second are the integer sums over the halves; forms without halves
 * use only first, and neither d nor m.  A scale of 4, 6 or 8 bits times an f16 is exact, and so is the sum of both halves
 * times their scales, which are integers below 2^24.  So one fma rounds the columns, and one their minima. */
MK_INLINE vf add_part(const int form, vf acc, vi first, vi second, const part_scales *of, vf d, vf m,
                      const mk_activation *row) {
    const vf scale = vf_set1(row->scale);
    if (form == SCALED || form == MINIMUM) {
        acc = vf_fma(vf_from(first), vf_mul(of->scale[0], scale), acc);
        return form == MINIMUM ? vf_fma(of->minimum[0], vf_set1(row->total), acc) : acc;
    }
    const vf dot = vf_fma(vf_from(second), of->scale[1], vf_mul(vf_from(first), of->scale[0]));
    acc = vf_fma(dot, vf_mul(d, scale), acc);
    if (form == HALVED) return acc;
    vf minimum = vf_mul(of->minimum[0], vf_set1((float)mk_offset32(row, 0)));
    minimum = vf_fma(of->minimum[1], vf_set1((float)mk_offset32(row, 1)), minimum);
    return vf_fma(minimum, vf_mul(m, scale), acc);
}
