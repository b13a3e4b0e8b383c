/* Packing moves bytes only, so one form serves all paths.  Items are tiles; the type is a constant in the loops. */
#include <string.h>

#include "path.h"
#include "super.h"

enum { COLUMNS = 32 /* of floats that are moved together: no more than a cache line of each row */ };

/* Fewer than 16 rows: the others are zeros. */
MK_INLINE void pack_floats(const int bytes, const uint8_t *in, long row_bytes, int rows, long columns, uint8_t *out) {
    if (rows < MK_TILE) memset(out, 0, (size_t)(columns * bytes * MK_TILE));
    for (int r = 0; r < rows; r++)
        for (long c = 0; c < columns; c++)
            memcpy(out + (c * MK_TILE + r) * bytes, in + r * row_bytes + c * bytes, (size_t)bytes);
}

MK_INLINE void pack_block(const int bytes, const int heads, const uint8_t *in, long row_bytes, int rows, uint8_t *out) {
    if (rows < MK_TILE) memset(out, 0, (size_t)bytes * MK_TILE);
    for (int r = 0; r < rows; r++, in += row_bytes) {
        for (int h = 0; h < heads; h++) memcpy(out + h * 32 + r * 2, in + h * 2, 2);
        for (int g = 0; 2 * heads + 4 * g < bytes; g++)
            memcpy(out + 2 * heads * MK_TILE + 64 * g + 4 * r, in + 2 * heads + 4 * g, 4);
    }
}

MK_INLINE void pack_super(const int type, const uint8_t *in, long row_bytes, int rows, uint8_t *out) {
    const int bytes = mk_part_bytes(type), words = mk_high_words(type);
    if (rows < MK_TILE) memset(out, 0, (size_t)mk_packed_bytes(type) * MK_TILE);
    for (int r = 0; r < rows; r++, in += row_bytes) {
        mk_part parts[MK_PARTS];
        mk_split(type, in, parts);
        if (type == MK_Q6_K) memcpy(out + 2 * r, in + 208, 2);
        else memcpy(out + 2 * r, in, 2), memcpy(out + 32 + 2 * r, in + 2, 2);
        for (int s = 0; s < MK_PARTS; s++) {
            uint8_t *scales = out + mk_scales_at(type) + 32 * s + r;
            uint8_t *values = out + mk_values_at(type) + bytes * s + 4 * r;
            scales[0] = parts[s].scales[0], scales[16] = parts[s].scales[1];
            for (int g = 0; g < 4; g++) memcpy(values + 64 * g, parts[s].low + 4 * g, 4);
            for (int h = 0; h < words; h++) memcpy(values + 256 + 64 * h, parts[s].high + 4 * h, 4);
        }
    }
}

/* `count` blocks of a tile's rows. */
MK_INLINE void pack_rows(const int type, const int bytes, const uint8_t *in, long row_bytes, int rows, long count,
                         uint8_t *out) {
    if (type < MK_Q8_0) {
        for (long c = 0; c < count; c += COLUMNS)
            pack_floats(bytes, in + c * bytes, row_bytes, rows, count - c < COLUMNS ? count - c : COLUMNS,
                        out + c * bytes * MK_TILE);
        return;
    }
    for (long b = 0; b < count && type >= MK_Q4_K; b++)
        pack_super(type, in + b * bytes, row_bytes, rows, out + b * mk_packed_bytes(type) * MK_TILE);
    for (long b = 0; b < count && type < MK_Q4_K; b++)
        pack_block(bytes, type == MK_Q4_1 ? 2 : 1, in + b * bytes, row_bytes, rows, out + b * bytes * MK_TILE);
}

static void pack_panel(int type, const uint8_t *in, long row_bytes, int rows, long count, uint8_t *out) {
    switch (type) {
    case MK_F32: pack_rows(MK_F32, 4, in, row_bytes, rows, count, out); break;
    case MK_F16:
    case MK_BF16: pack_rows(MK_F16, 2, in, row_bytes, rows, count, out); break;
    case MK_Q8_0: pack_rows(MK_Q8_0, 34, in, row_bytes, rows, count, out); break;
    case MK_Q4_0: pack_rows(MK_Q4_0, 18, in, row_bytes, rows, count, out); break;
    case MK_Q4_1: pack_rows(MK_Q4_1, 20, in, row_bytes, rows, count, out); break;
    case MK_Q4_K: pack_rows(MK_Q4_K, 144, in, row_bytes, rows, count, out); break;
    case MK_Q5_K: pack_rows(MK_Q5_K, 176, in, row_bytes, rows, count, out); break;
    case MK_Q6_K: pack_rows(MK_Q6_K, 210, in, row_bytes, rows, count, out); break;
    }
}

static void pack_tiles(const void *argument, long begin, long end) {
    const mk_pack_job *job = argument;
    int block = mk_block(job->type);
    long bytes = mk_block_bytes(job->type), tiles = mk_blocks(job->n, MK_TILE), row_bytes = job->blocks * bytes;
    long packed = mk_packed_bytes(job->type) * MK_TILE;
    for (long tile = begin; tile < end; tile++) {
        int rows = job->n - tile * MK_TILE < MK_TILE ? (int)(job->n - tile * MK_TILE) : MK_TILE;
        uint8_t *out = job->out;
        for (int p = 0; p < job->panels; p++) {
            long first = job->bounds[p] / block, count = mk_blocks(job->bounds[p + 1] - job->bounds[p], block);
            pack_panel(job->type, job->in + tile * MK_TILE * row_bytes + first * bytes, row_bytes, rows, count,
                       out + tile * count * packed);
            out += tiles * count * packed;
        }
    }
}

void mk_pack(mk_work *work, int type, const uint8_t *canonical, long n, long k, const int32_t *bounds, int panels,
             uint8_t *out) {
    mk_step_of(work, pack_tiles, mk_blocks(n, MK_TILE), 1, 0)->pack =
        (mk_pack_job){type, panels, n, mk_blocks(k, mk_block(type)), bounds, canonical, out};
}
