/* The tables of tile functions of packed weights: for each block type one for one tile of W, and one for several, at every
 * number of rows of x up to MK_GROUP.  More rows have W unpacked (body_unpacked.h). */

/* How many tiles of W are computed at once with T rows of x.  With few rows, memory is the limit, and one stream of
 * weights keeps fewer lines in flight than memory can deliver; with more rows, registers are the limit. */
#define AT_ONCE(T) (VEC_ROWS < 2 * (T) ? 1 : VEC_ROWS / (T) < MANY_TILES ? VEC_ROWS / (T) : MANY_TILES)

#define TILE(kind, type, name, R, T)                                                                            \
    static void type##_##name##_##T(const uint8_t *w, long w_stride, const uint8_t *x, long x_stride, long count, \
                                    vf *sums) {                                                                 \
        kind##_tile(type, R, T, w, w_stride, x, x_stride, count, sums);                                         \
    }
#define BOTH(kind, type, T) TILE(kind, type, one, 1, T) TILE(kind, type, many, AT_ONCE(T), T)
#define TILES(kind, type) BOTH(kind, type, 4) BOTH(kind, type, 3) BOTH(kind, type, 2) BOTH(kind, type, 1)
#define TILES_FLOAT(type)
#define TILES_SCALED(type)
#define TILES_PLAIN(type) TILES(quantised, type)
#define TILES_SUPER(type) TILES(super, type)
#define TILES_CODED(type)
#define TILES_OF(name, kind, ...) TILES_##kind(MK_##name)
MK_BLOCK_TYPES(TILES_OF)

#define FUNCTIONS(type, name) \
    [type] = {type##_##name##_1, type##_##name##_2, type##_##name##_3, type##_##name##_4},
#define FUNCTIONS_FLOAT(type, name)
#define FUNCTIONS_SCALED(type, name)
#define FUNCTIONS_PLAIN(type, name) FUNCTIONS(type, name)
#define FUNCTIONS_SUPER(type, name) FUNCTIONS(type, name)
#define FUNCTIONS_CODED(type, name)
#define ONE_TILE_OF(name, kind, ...) FUNCTIONS_##kind(MK_##name, one)
#define MANY_OF(name, kind, ...) FUNCTIONS_##kind(MK_##name, many)
static const tile_function ONE_TILE[MK_TYPES][MK_GROUP] = {MK_BLOCK_TYPES(ONE_TILE_OF)};
static const tile_function MANY_AT_ONCE[MK_TYPES][MK_GROUP] = {MK_BLOCK_TYPES(MANY_OF)};
