/* Products with quantised rows as they lie in a file: each tile is packed just before it is multiplied, and stays in the
 * second cache meanwhile.  The path's own product takes it, so its bits are those of a packed matrix. */
#include "active.h"

/* Panel by panel to `out`; `at`: where each begins. */
static void pack_tile(const mk_matmul_job *job, long tile, int rows, uint8_t *out, const uint8_t **at) {
    const long begin = tile * MK_TILE * job->row_bytes;
    mk_look_at(job->at[0] + begin, rows, job->row_bytes);
    for (int p = 0; p < job->panels; p++) {
        const long columns = job->bounds[p + 1] - job->bounds[p];
        const uint8_t *in[MK_TILE];
        for (int r = 0; r < rows; r++) in[r] = job->at[p] + begin + r * job->row_bytes;
        at[p] = out;
        mk_pack_panel(job->type, in, 0, rows, mk_blocks(columns, mk_block(job->type)), out);
        out += mk_tile_bytes(job->type, columns);
    }
}

void mk_stored(const void *argument, long begin, long end) {
    const mk_matmul_job *job = argument;
    _Alignas(64) uint8_t packed[MK_STORED_TILE];
    const uint8_t *at[MK_MAX_PANELS];
    for (long item = begin; item < end; item++) {
        const long tile = item % job->tiles, chunk = item / job->tiles, left = job->n - tile * MK_TILE;
        mk_matmul_job one = *job;
        one.at = at, one.row_bytes = 0, one.tiles = 1;
        one.n = left < MK_TILE ? left : MK_TILE;
        one.out += tile * MK_TILE;
        pack_tile(job, tile, (int)one.n, packed, at);
        mk_active->matmul(&one, chunk, chunk + 1);
    }
}
