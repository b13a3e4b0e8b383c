/* What tiles of every kind of weights share: their type, what is fetched ahead, and how rows of x lie. */

/* w: `count` blocks of a tile; x: T rows of a group; sums [T]. */
typedef void (*tile_function)(const uint8_t *w, const uint8_t *x, long count, vf *sums);

/* With few rows, memory is the limit: tiles are one stream, of which so many bytes ahead are fetched into the first cache.
 * Into the second one it took a seventh longer, and with streams of several tiles at once up to half as long again. */
enum { AHEAD = 6144 };

MK_INLINE void fetch_ahead(const uint8_t *w, long bytes) {
    for (long line = 0; line < bytes; line += 64) __builtin_prefetch(w + AHEAD + line);
}

/* Row t of T in a block of groups, and how many rows a group has. */
#define ROW(T, t, x, x_stride, bytes) ((x) + (t) / MK_GROUP * (x_stride) + (t) % MK_GROUP * (long)(bytes))
#define GROUP(T) ((T) < MK_GROUP ? (T) : MK_GROUP)
