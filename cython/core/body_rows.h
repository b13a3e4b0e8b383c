/* What tiles of every kind of weights share: their type, what is fetched ahead, and how rows of x lie. */

/* w: `count` blocks of a tile; x: T rows of a group; sums [T]. */
typedef void (*tile_function)(const uint8_t *w, const uint8_t *x, long count, vf *sums);

/* With few rows, memory is the limit: tiles are one stream, of which so many bytes ahead are fetched into the first cache.
 * Into the second one it took a seventh longer, and with streams of several tiles at once up to half as long again.  (All on x86: Arm's
 * processors are left to follow the stream by themselves.) */
enum { AHEAD = 6144 };

MK_INLINE void fetch_ahead(const uint8_t *w, long bytes) {
    if (!VEC_FETCHES) return;
    for (long line = 0; line < bytes; line += 64) __builtin_prefetch(w + AHEAD + line);
}

/* Row t of T in a block of groups, and how many rows a group has. */
#define ROW(T, t, x, x_stride, bytes) ((x) + (t) / MK_GROUP * (x_stride) + (t) % MK_GROUP * (long)(bytes))
#define GROUP(T) ((T) < MK_GROUP ? (T) : MK_GROUP)

/* What the columns of a part (32 of them) or of its halves are multiplied by: scales, and minima where a type has them. */
typedef struct {
    vf scale[2], minimum[2];
} part_scales;

/* What a part's product consists of: the products with a scale; those and a minimum; two halves with scales of their own;
 * and two halves with minima. */
enum { SCALED, MINIMUM, HALVED, MINIMA };
MK_INLINE int form_of(const int type) {
    if (mk_is_super(type) && mk_halved(type)) return mk_f16s(type) == 2 ? MINIMA : HALVED;
    return mk_f16s(type) == 2 ? MINIMUM : SCALED;
}

/* acc + the product of a part with a row of x, whose integer sums over the halves are first and second; the forms without
 * halves use the first alone, and neither d nor m.  A scale of 4, 6 or 8 bits times an f16 is exact, and so is the sum of
 * both halves times their scales: these are integers below 2^24.  One fma rounds the columns, and one their minima. */
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
    vf minimum = vf_mul(of->minimum[0], vf_set1((float)row->offset32[0]));
    minimum = vf_fma(of->minimum[1], vf_set1((float)row->offset32[1]), minimum);
    return vf_fma(minimum, vf_mul(m, scale), acc);
}
