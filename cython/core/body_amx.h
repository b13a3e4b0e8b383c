/* AMX: a second matmul for the path that was included before, with the same bits. */

/* A thread's tiles are configured while it computes. */
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16]; /* of a row */
    uint8_t rows[16];
} tile_shapes;

static void begin_tiles(const tile_shapes *shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(*shapes)); }

static void end_tiles(void) { __asm__ volatile("tilerelease"); }

#include "body_amx_bf16.h"
#include "body_amx_int8.h"

static void amx_matmul(const void *argument, long begin, long end) {
    const mk_matmul_job *job = argument;
    if (job->in_tiles) bf16_matmul(job, begin, end);
    else if (AMX_FUNCTIONS[job->type].widen && rows_for_tiles(job->m)) int8_matmul(job, begin, end);
    else matmul(job, begin, end);
}

static void amx_mixture(const void *argument, long begin, long end) { mixture_of(amx_matmul, argument, begin, end); }
