/* The tables of tile functions of packed weights: one for each block type and number of rows of x up to MK_GROUP.  More
 * rows have W unpacked (body_unpacked.h). */

#define TILE(kind, type, T)                                                                 \
    static void type##_##T(const uint8_t *w, const uint8_t *x, long count, vf *sums) { \
        kind##_tile(type, T, w, x, count, sums);                                            \
    }
#define TILES(kind, type) TILE(kind, type, 1) TILE(kind, type, 2) TILE(kind, type, 3) TILE(kind, type, 4)
#define TILES_FLOAT(type)
#define TILES_SCALED(type)
#define TILES_PLAIN(type) TILES(quantised, type)
#define TILES_SUPER(type) TILES(super, type)
#define TILES_CODED(type)
#define TILES_PANEL(type)
#define TILES_OF(name, kind, ...) TILES_##kind(MK_##name)
MK_BLOCK_TYPES(TILES_OF)

#define TILE_ROW(type) [type] = {type##_1, type##_2, type##_3, type##_4},
#define TILE_ROW_FLOAT(type)
#define TILE_ROW_SCALED(type)
#define TILE_ROW_PLAIN(type) TILE_ROW(type)
#define TILE_ROW_SUPER(type) TILE_ROW(type)
#define TILE_ROW_CODED(type)
#define TILE_ROW_PANEL(type)
#define TILE_ROW_OF(name, kind, ...) TILE_ROW_##kind(MK_##name)
static const tile_function TILE_FUNCTIONS[MK_TYPES][MK_GROUP] = {MK_BLOCK_TYPES(TILE_ROW_OF)};
