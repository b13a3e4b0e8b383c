/* Packing moves bytes, so one form serves all paths; where it quantises as well, the active path does that.  Items are
 * tiles; the type is a constant in the loops. */
#include <string.h>

#include "active.h"
#include "super.h"

enum { PIECE = 512 /* columns of a tile that are converted together: they stay in the first cache */ };

/* Four words: every compiler turns them into its machine's vectors. */
typedef uint32_t words __attribute__((vector_size(16)));
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (words){__VA_ARGS__})
#endif

/* 16 bytes from `at` on of 16 rows: word i of row r goes to word 16 i + r. */
MK_INLINE void turn_words(const uint8_t *const *in, long at, uint8_t *out) {
    for (int r = 0; r < MK_TILE; r += 4) {
        words a, b, c, d, turned[4];
        memcpy(&a, in[r] + at, 16), memcpy(&b, in[r + 1] + at, 16);
        memcpy(&c, in[r + 2] + at, 16), memcpy(&d, in[r + 3] + at, 16);
        words ab = SHUFFLE(a, b, 0, 4, 1, 5), cd = SHUFFLE(c, d, 0, 4, 1, 5);
        turned[0] = SHUFFLE(ab, cd, 0, 1, 4, 5), turned[1] = SHUFFLE(ab, cd, 2, 3, 6, 7);
        ab = SHUFFLE(a, b, 2, 6, 3, 7), cd = SHUFFLE(c, d, 2, 6, 3, 7);
        turned[2] = SHUFFLE(ab, cd, 0, 1, 4, 5), turned[3] = SHUFFLE(ab, cd, 2, 3, 6, 7);
        for (int i = 0; i < 4; i++) memcpy(out + 64 * i + 4 * r, &turned[i], 16);
    }
}

MK_INLINE void pack_block(const int bytes, const int heads, const uint8_t *const *in, long at, int rows, uint8_t *out) {
    if (rows < MK_TILE) memset(out, 0, (size_t)bytes * MK_TILE);
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < heads; h++) memcpy(out + h * 32 + r * 2, in[r] + at + h * 2, 2);
    at += 2 * heads, out += 2 * heads * MK_TILE;
    for (int g = 0; 2 * heads + 4 * g < bytes; g += 4)
        if (rows == MK_TILE) turn_words(in, at + 4 * g, out + 64 * g);
        else
            for (int r = 0; r < rows; r++)
                for (int i = g; i < g + 4; i++) memcpy(out + 64 * i + 4 * r, in[r] + at + 4 * i, 4);
}

MK_INLINE void pack_super(const int type, const uint8_t *const *rows_in, long at, int rows, uint8_t *out) {
    const int bytes = mk_part_bytes(type), words = mk_high_words(type);
    if (rows < MK_TILE) memset(out, 0, (size_t)mk_packed_bytes(type) * MK_TILE);
    for (int r = 0; r < rows; r++) {
        const uint8_t *in = rows_in[r] + at;
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
MK_INLINE void pack_rows(const int type, const int bytes, const uint8_t *const *in, long at, int rows, long count,
                         uint8_t *out) {
    for (long b = 0; b < count && type >= MK_Q4_K; b++)
        pack_super(type, in, at + b * bytes, rows, out + b * mk_packed_bytes(type) * MK_TILE);
    for (long b = 0; b < count && type < MK_Q4_K; b++)
        pack_block(bytes, type == MK_Q4_1 ? 2 : 1, in, at + b * bytes, rows, out + b * bytes * MK_TILE);
}

static void pack_panel(int type, const uint8_t *const *in, long at, int rows, long count, uint8_t *out) {
    const size_t width = (size_t)(count * mk_block_bytes(type));
    switch (type) {
    case MK_F32:
    case MK_F16:
    case MK_BF16: /* as they are, row by row */
        for (int r = 0; r < rows; r++) memcpy(out + (size_t)r * width, in[r] + at, width);
        break;
    case MK_Q8_0: pack_rows(MK_Q8_0, 34, in, at, rows, count, out); break;
    case MK_Q4_0: pack_rows(MK_Q4_0, 18, in, at, rows, count, out); break;
    case MK_Q4_1: pack_rows(MK_Q4_1, 20, in, at, rows, count, out); break;
    case MK_Q4_K: pack_rows(MK_Q4_K, 144, in, at, rows, count, out); break;
    case MK_Q5_K: pack_rows(MK_Q5_K, 176, in, at, rows, count, out); break;
    case MK_Q6_K: pack_rows(MK_Q6_K, 210, in, at, rows, count, out); break;
    }
}

/* Columns begin..end-1 of a tile's rows of floats, quantised on the way. */
static void quantise_panel(const mk_pack_job *job, const uint8_t *const *in, int rows, long begin, long end,
                           uint8_t *out) {
    float values[PIECE];
    uint8_t made[MK_TILE][PIECE / MK_BLOCK * 34];
    const uint8_t *blocks[MK_TILE];
    for (int r = 0; r < MK_TILE; r++) blocks[r] = made[r];
    for (long first = begin; first < end; first += PIECE) {
        long width = end - first < PIECE ? end - first : PIECE, count = mk_blocks(width, MK_BLOCK);
        for (int r = 0; r < rows; r++) {
            mk_rows_job read = {.type = job->stored, .k = width, .in = in[r] + first * mk_block_bytes(job->stored),
                                .values = values};
            mk_rows_job write = {.type = job->type, .k = width, .x = values, .out = made[r]};
            mk_active->dequantize(&read, 0, 1);
            mk_active->quantize(&write, 0, 1);
        }
        pack_panel(job->type, blocks, 0, rows, count, out);
        out += count * mk_packed_bytes(job->type) * MK_TILE;
    }
}

/* Where a row lies; in llama.cpp's order row (head, half, j) of q and k lies at (head, j, half). */
static long place_of(long row, long head) {
    if (!head) return row;
    long inside = row % head, half = head / 2;
    return row - inside + 2 * (inside % half) + inside / half;
}

static void pack_tiles(const void *argument, long begin, long end) {
    const mk_pack_job *job = argument;
    int block = mk_block(job->type);
    long bytes = mk_block_bytes(job->type), packed = mk_packed_bytes(job->type) * MK_TILE;
    long tiles = mk_blocks(job->whole, MK_TILE), before = job->first / MK_TILE;
    for (long tile = begin; tile < end; tile++) {
        const uint8_t *in[MK_TILE];
        int rows = job->n - tile * MK_TILE < MK_TILE ? (int)(job->n - tile * MK_TILE) : MK_TILE;
        for (int r = 0; r < rows; r++) in[r] = job->in + place_of(tile * MK_TILE + r, job->head) * job->stride;
        uint8_t *out = job->out;
        for (int p = 0; p < job->panels; p++) {
            long first = job->bounds[p], last = job->bounds[p + 1], count = mk_blocks(last - first, block);
            uint8_t *to = out + (before + tile) * count * packed;
            if (job->stored != job->type) quantise_panel(job, in, rows, first, last, to);
            else pack_panel(job->type, in, first / block * bytes, rows, count, to);
            out += job->type < MK_Q8_0 ? job->whole * count * bytes : tiles * count * packed;
        }
    }
}

void mk_pack(mk_work *work, int type, int stored, const uint8_t *canonical, long stride, long n, long head, const
             int32_t *bounds, int panels, uint8_t *out, long first, long whole) {
    mk_step_of(work, pack_tiles, mk_blocks(n, MK_TILE), 1, 0)->pack =
        (mk_pack_job){type, stored, panels, n, head, stride, first, whole, bounds, canonical, out};
}
