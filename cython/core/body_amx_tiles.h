/* The tiles of AMX, as both kinds of products use them. */
#ifndef MK_BODY_AMX_TILES_H
#define MK_BODY_AMX_TILES_H

#include <stdint.h>

/* A thread's tiles are configured while it computes. */
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16]; /* of a row */
    uint8_t rows[16];
} tile_shapes;

static void begin_tiles(const tile_shapes *shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(*shapes)); }

static void end_tiles(void) { __asm__ volatile("tilerelease"); }

#endif
