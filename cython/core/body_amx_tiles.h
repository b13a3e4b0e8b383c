/* The tiles of AMX, as all kinds of products use them. */
#ifndef MK_BODY_AMX_TILES_H
#define MK_BODY_AMX_TILES_H

#include <stdint.h>

enum { AMX_ROWS = 16, AMX_GROUPS = 4, TILE_BYTES = 1024 };

typedef int32_t dot_products[AMX_ROWS][MK_TILE] __attribute__((aligned(64)));

/* A thread's tiles are configured while it computes. */
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16]; /* of a row */
    uint8_t rows[16];
} tile_shapes;

/* Tiles 0 to 3 are sums, 4 to 7 operands. */
static const tile_shapes FULL_TILES = {
    1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

static void begin_tiles(const tile_shapes *shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(*shapes)); }

static void end_tiles(void) { __asm__ volatile("tilerelease"); }

#endif
