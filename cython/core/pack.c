/* Packing moves bytes, so one form serves all paths; where it quantises as well, the active path does that.  Items are
 * tiles; the type is a constant in the loops. */
#include <string.h>

#include "active.h"
#include "coded.h"
#include "half.h"
#include "super.h"

enum { PIECE = 512 /* columns of a tile that are converted together: they stay in the first cache */ };

/* Sixteen bytes, and four words: every compiler turns them into its machine's vectors. */
typedef uint8_t octets __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(16)));
#ifdef __clang__
#define SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif

MK_INLINE words load(const uint8_t *p) { words v; memcpy(&v, p, 16); return v; }

/* Word i of row r becomes word r of row i. */
MK_INLINE void transpose_words(words *v) {
    words ab = SHUFFLE(words, v[0], v[1], 0, 4, 1, 5), cd = SHUFFLE(words, v[2], v[3], 0, 4, 1, 5);
    words last = SHUFFLE(words, v[0], v[1], 2, 6, 3, 7), more = SHUFFLE(words, v[2], v[3], 2, 6, 3, 7);
    v[0] = SHUFFLE(words, ab, cd, 0, 1, 4, 5), v[1] = SHUFFLE(words, ab, cd, 2, 3, 6, 7);
    v[2] = SHUFFLE(words, last, more, 0, 1, 4, 5), v[3] = SHUFFLE(words, last, more, 2, 3, 6, 7);
}

/* Byte i of row r becomes byte r of row i: each of the four rounds moves one bit of a byte's place to its row. */
MK_INLINE void transpose_bytes(octets *v) {
    for (int round = 0; round < 4; round++) {
        octets was[MK_TILE];
        memcpy(was, v, sizeof was);
        for (int i = 0; i < 8; i++) {
            v[2 * i] = SHUFFLE(octets, was[i], was[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            v[2 * i + 1] =
                SHUFFLE(octets, was[i], was[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
    }
}

/* Exchange the upper `width` bits of each field of 2 * width bits in *a with the lower ones of the same field in *b. */
MK_INLINE void trade(words *a, words *b, const int width, const uint32_t lower) {
    words t = (*a >> width ^ *b) & lower;
    *a ^= t << width, *b ^= t;
}

/* 16 bytes from `at` on of 16 rows: word i of row r goes to word 16 i + r. */
MK_INLINE void interleave(const uint8_t *const *in, long at, uint8_t *out) {
    for (int r = 0; r < MK_TILE; r += 4) {
        words v[4] = {load(in[r] + at), load(in[r + 1] + at), load(in[r + 2] + at), load(in[r + 3] + at)};
        transpose_words(v);
        for (int i = 0; i < 4; i++) memcpy(out + 64 * i + 4 * r, &v[i], 16);
    }
}

/* Bit 4g + b becomes bit g of byte b. */
MK_INLINE uint32_t pack_bits(uint32_t bits) {
    uint32_t bytes = 0;
    for (int b = 0; b < 4; b++) {
        uint32_t of = bits >> b & 0x11111111u;
        of = (of | of >> 3) & 0x03030303u;
        of = (of | of >> 6) & 0x000f000fu;
        bytes |= ((of | of >> 12) & 0xffu) << 8 * b;
    }
    return bytes;
}

/* A PLAIN block: scales, then words of values; of Q5_0 and Q5_1, whose fifth bits come first, those bits are last.  Of a
 * PANEL type, the values alone. */
MK_INLINE void pack_block(const int type, const uint8_t *const *in, long at, int rows, uint8_t *out) {
    const int scales = mk_scale_bytes(type), each = mk_f16s(type) ? 2 : 1, bits = mk_bits(type) == 5 ? 4 : 0;
    const int words = (mk_block_bytes(type) - scales - bits) / 4, kept = mk_is_panel(type) ? 0 : scales;
    if (rows < MK_TILE) memset(out, 0, (size_t)mk_packed_bytes(type) * MK_TILE);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < kept; i += each) memcpy(out + i * MK_TILE + r * each, in[r] + at + i, (size_t)each);
    at += scales, out += kept * MK_TILE;
    for (int r = 0; r < rows && bits; r++) {
        const uint32_t fifth = pack_bits(mk_word(in[r] + at));
        memcpy(out + 64 * words + 4 * r, &fifth, 4);
    }
    at += bits;
    for (int g = 0; g < words; g += 4)
        if (rows == MK_TILE) interleave(in, at + 4 * g, out + 64 * g);
        else
            for (int r = 0; r < rows; r++)
                for (int i = g; i < g + 4; i++) memcpy(out + 64 * i + 4 * r, in[r] + at + 4 * i, 4);
}

/* ggml's 8 scales and 8 minima of 6 bits: scales 0-3, minima 0-3, scales 4-7, minima 4-7. */
MK_INLINE words six_bits(words w) {
    words low = w & 0x3f3f3f3fu, high = w >> 2 & 0x30303030u, last = SHUFFLE(words, w, w, 2, 2, 2, 2);
    last = (last >> (words){0, 0, 0, 4} & 0x0f0f0f0fu) | SHUFFLE(words, high, high, 0, 1, 0, 1);
    return SHUFFLE(words, low, last, 0, 1, 6, 7);
}

/* Q3_K's 16 scales of 6 bits, with 32 more than they stand for, as signed bytes. */
MK_INLINE words six_bits_signed(const uint8_t *q) {
    const uint32_t first = mk_word(q), second = mk_word(q + 4), high = mk_word(q + 8);
    words w = (words){first, second, first >> 4, second >> 4} & 0x0f0f0f0fu;
    w |= ((words){high, high >> 2, high >> 4, high >> 6} & 0x03030303u) << 4;
    return (w & 0x1f1f1f1fu) | (~w & 0x20202020u) * 7;
}

/* The scales of 16 rows' blocks: part by part those of all rows, the first ones and the second ones (super.h). */
MK_INLINE void pack_scales(const int type, const uint8_t *const *in, uint8_t *out) {
    const int at = type == MK_Q6_K ? 192 : type == MK_Q2_K ? 0 : 4;
    octets v[MK_TILE];
    for (int r = 0; r < MK_TILE; r++)
        if (type == MK_Q3_K) v[r] = (octets)six_bits_signed(in[r] + 96);
        else v[r] = (octets)(mk_halved(type) ? load(in[r] + at) : six_bits(load(in[r] + at)));
    transpose_bytes(v);
    for (int s = 0; s < MK_PARTS; s++)
        for (int h = 0; h < 2; h++)
            memcpy(out + 32 * s + 16 * h, &v[mk_halved(type) ? 2 * s + h : s / 4 * 8 + 4 * h + s % 4], 16);
}

/* Two parts' nibbles lie in the halves of 32 bytes at `from`: their first 16 values, then the other 16 (mk_halves). */
MK_INLINE void pack_low(const uint8_t *const *in, int from, uint8_t *first, uint8_t *second) {
    words low[4], high[4];
    for (int r = 0; r < 4; r++) {
        words a = load(in[r] + from), b = load(in[r] + from + 16);
        low[r] = (a & 0x0f0f0f0fu) | (b << 4 & 0xf0f0f0f0u), high[r] = (a >> 4 & 0x0f0f0f0fu) | (b & 0xf0f0f0f0u);
    }
    transpose_words(low), transpose_words(high);
    for (int g = 0; g < 4; g++) memcpy(first + 64 * g, &low[g], 16), memcpy(second + 64 * g, &high[g], 16);
}

/* Bit s of byte 4g + b of four rows' 32 at `from` becomes bit g of byte b of word s. */
MK_INLINE void pack_one_bit(const uint8_t *const *in, int from, const int part_bytes, uint8_t *out) {
    words v[8];
    for (int r = 0; r < 4; r++) v[r] = load(in[r] + from), v[4 + r] = load(in[r] + from + 16);
    transpose_words(v), transpose_words(v + 4);
    for (int g = 0; g < 8; g += 2) trade(v + g, v + g + 1, 1, 0x55555555u);
    for (int g = 0; g < 8; g++)
        if (!(g & 2)) trade(v + g, v + g + 2, 2, 0x33333333u);
    for (int g = 0; g < 4; g++) trade(v + g, v + g + 4, 4, 0x0f0f0f0fu);
    for (int s = 0; s < MK_PARTS; s++) memcpy(out + part_bytes * s, &v[s], 16);
}

/* Bits 2s and 2s + 1 of byte 4g + b of four rows' 16 at `from` become bits 2g and 2g + 1 of byte b of word s. */
MK_INLINE void pack_two_bits_of_16(const uint8_t *const *in, int from, const int part_bytes, uint8_t *out) {
    words v[4] = {load(in[0] + from), load(in[1] + from), load(in[2] + from), load(in[3] + from)};
    transpose_words(v);
    for (int g = 0; g < 4; g += 2) trade(v + g, v + g + 1, 2, 0x33333333u);
    for (int g = 0; g < 2; g++) trade(v + g, v + g + 2, 4, 0x0f0f0f0fu);
    for (int s = 0; s < 4; s++) memcpy(out + part_bytes * s, &v[s], 16);
}

/* The same of 64 bytes, of which 32 belong to four parts. */
MK_INLINE void pack_two_bits(const uint8_t *const *in, int from, const int part_bytes, uint8_t *out) {
    for (int i = 0; i < 4; i++)
        pack_two_bits_of_16(in, from + 16 * i, part_bytes, out + part_bytes * (i / 2 * 4) + 64 * (i % 2));
}

/* A block of IQ4_XS: nibbles lie as they do in a tile, and each part has one scale. */
MK_INLINE void pack_iq4_xs(const uint8_t *const *in, uint8_t *out) {
    for (int r = 0; r < MK_TILE; r++)
        for (int s = 0; s < MK_PARTS; s++) {
            mk_part part;
            mk_split(MK_IQ4_XS, in[r], s, &part);
            out[mk_scales_at(MK_IQ4_XS) + MK_TILE * s + r] = (uint8_t)part.scale[0];
        }
    for (int s = 0; s < MK_PARTS; s++)
        interleave(in, 8 + 16 * s, out + mk_values_at(MK_IQ4_XS) + mk_part_bytes(MK_IQ4_XS) * s);
}

/* A block of IQ2 or IQ3: the bytes of a part of each row after the others. */
MK_INLINE void pack_grid(const int type, const uint8_t *const *in, uint8_t *out) {
    const int bytes = mk_grid_bytes(type), part = mk_part_bytes(type), scales = mk_part_scales(type);
    for (int s = 0; s < MK_PARTS; s++)
        for (int r = 0; r < MK_TILE; r++) {
            const uint8_t small = mk_grid_take(type, in[r], s, out + mk_values_at(type) + part * s + bytes * r);
            if (scales) out[mk_scales_at(type) + scales * s + r] = small;
        }
}

MK_INLINE void pack_super(const int type, const uint8_t *const *rows_in, long at, int rows, uint8_t *out) {
    static const uint8_t nothing[210];
    const int part = mk_part_bytes(type), nibbles = type == MK_Q4_K ? 16 : type == MK_Q5_K ? 48 : 0;
    const uint8_t *in[MK_TILE];
    for (int r = 0; r < MK_TILE; r++) {
        in[r] = r < rows ? rows_in[r] + at : nothing;
        for (int i = 0; i < mk_f16s(type); i++) memcpy(out + 32 * i + 2 * r, in[r] + mk_d_at(type) + 2 * i, 2);
    }
    if (mk_is_grid(type)) {
        pack_grid(type, in, out);
        return;
    }
    if (type == MK_IQ4_XS) {
        pack_iq4_xs(in, out);
        return;
    }
    pack_scales(type, in, out + mk_scales_at(type));
    out += mk_values_at(type);
    for (int r = 0; r < MK_TILE; r += 4, out += 16) {
        const uint8_t *const *four = in + r;
        for (int i = 0; i < 4 && mk_bits(type) > 3; i++) { /* of Q6_K, parts s and s + 2 share bytes; of the others, */
            int first = type == MK_Q6_K ? i / 2 * 4 + i % 2 : 2 * i, second = first + (type == MK_Q6_K ? 2 : 1); /* s + 1 */
            pack_low(four, nibbles + 32 * i, out + part * first, out + part * second);
        }
        if (type == MK_Q5_K) pack_one_bit(four, 16, part, out + 256);
        if (type == MK_Q6_K) pack_two_bits(four, 128, part, out + 256);
        if (type == MK_Q3_K) pack_one_bit(four, 0, part, out + 128);
        if (type == MK_Q3_K || type == MK_Q2_K) pack_two_bits(four, type == MK_Q3_K ? 32 : 16, part, out);
    }
}

/* `count` blocks of a tile's rows. */
MK_INLINE void pack_rows(const int type, const uint8_t *const *in, long at, int rows, long count, uint8_t *out) {
    const int bytes = mk_block_bytes(type), packed = mk_packed_bytes(type) * MK_TILE;
    if (mk_is_float(type)) /* as they are, row by row */
        for (int r = 0; r < rows; r++) memcpy(out + r * count * bytes, in[r] + at, (size_t)(count * bytes));
    else
        for (long b = 0; b < count; b++)
            if (mk_is_super(type)) pack_super(type, in, at + b * bytes, rows, out + b * packed);
            else pack_block(type, in, at + b * bytes, rows, out + b * packed);
}

static void pack_blocks(int type, const uint8_t *const *in, long at, int rows, long count, uint8_t *out) {
    switch (type) {
#define CASE(name, ...) case MK_##name: pack_rows(MK_##name, in, at, rows, count, out); break;
        MK_BLOCK_TYPES(CASE)
#undef CASE
    }
}

void mk_pack_panel(int type, const uint8_t *const *in, long at, int rows, long count, uint8_t *out) {
    memset(out, 0, (size_t)mk_head_bytes(type));
    if (mk_head_bytes(type) && count)
        for (int r = 0; r < rows; r++) memcpy(out + 4 * r, in[r] + at, 4);
    pack_blocks(type, in, at, rows, count, out + mk_head_bytes(type));
}

/* `width` columns from `first` on of a row of floats. */
static void read_piece(const mk_pack_job *job, const uint8_t *row, long first, long width, float *values) {
    mk_rows_job read = {.type = job->stored, .k = width, .in = row + first * mk_block_bytes(job->stored),
                        .values = values};
    mk_active->of_rows->dequantize(&read, 0, 1);
}

/* The scale of a row's panel for a PANEL type, as quantise_whole of body_quant.h finds it. */
static float scale_of(const mk_pack_job *job, const uint8_t *row, long begin, long end) {
    uint32_t peak = 0; /* the bits of sizes are in their order, and NaNs come last */
    for (long first = begin; first < end; first += PIECE) {
        float values[PIECE];
        const long width = end - first < PIECE ? end - first : PIECE;
        read_piece(job, row, first, width, values);
        for (long i = 0; i < width; i++) {
            const uint32_t size = mk_float_bits(values[i]) & 0x7fffffffu;
            peak = size > peak ? size : peak;
        }
    }
    return peak < 0x7f800000u ? mk_bits_float(peak) / 127.0f : mk_bits_float(0x7fc00000u);
}

/* Columns begin..end-1 of a tile's rows of floats, quantised on the way. */
static void quantise_panel(const mk_pack_job *job, const uint8_t *const *in, int rows, long begin, long end,
                           uint8_t *out) {
    float values[PIECE], scales[MK_TILE] = {0};
    uint8_t made[MK_TILE][PIECE / MK_BLOCK * 36];
    const uint8_t *blocks[MK_TILE];
    for (int r = 0; r < MK_TILE; r++) blocks[r] = made[r];
    if (mk_is_panel(job->type)) {
        for (int r = 0; r < rows; r++) scales[r] = scale_of(job, in[r], begin, end);
        memcpy(out, scales, sizeof scales);
        out += sizeof scales;
    }
    for (long first = begin; first < end; first += PIECE) {
        long width = end - first < PIECE ? end - first : PIECE, count = mk_blocks(width, MK_BLOCK);
        for (int r = 0; r < rows; r++) {
            mk_rows_job write = {.type = job->type, .k = width, .x = values, .out = made[r], .values = scales + r};
            read_piece(job, in[r], first, width, values);
            mk_active->of_rows->quantize(&write, 0, 1);
        }
        pack_blocks(job->type, blocks, 0, rows, count, out);
        out += count * mk_packed_bytes(job->type) * MK_TILE;
    }
}

/* Where a row lies; in llama.cpp's order row (head, half, j) of q and k lies at (head, j, half). */
static long stored_row(long row, long head) {
    if (!head) return row;
    long inside = row % head, half = head / 2;
    return row - inside + 2 * (inside % half) + inside / half;
}

static void pack_tiles(const void *argument, long begin, long end) {
    const mk_pack_job *job = argument;
    int block = mk_block(job->type);
    long bytes = mk_block_bytes(job->type);
    long tiles = mk_blocks(job->whole, MK_TILE), before = job->first / MK_TILE;
    for (long tile = begin; tile < end; tile++) {
        const uint8_t *in[MK_TILE];
        int rows = job->n - tile * MK_TILE < MK_TILE ? (int)(job->n - tile * MK_TILE) : MK_TILE;
        for (int r = 0; r < rows; r++) in[r] = job->in + stored_row(tile * MK_TILE + r, job->head) * job->stride;
        uint8_t *out = job->out;
        const long columns = job->bounds[job->panels] - job->bounds[0];
        if (!job->head && job->stride <= 2 * mk_row_bytes(job->stored, columns)) mk_look_at(in[0], rows, job->stride);
        for (int p = 0; p < job->panels; p++) {
            long first = job->bounds[p], last = job->bounds[p + 1], count = mk_blocks(last - first, block);
            const long size = mk_tile_bytes(job->type, last - first);
            uint8_t *to = out + (before + tile) * size;
            if (mk_is_coded(job->type)) {
                if (!mk_code_tile(in, first, rows, count, to)) __atomic_store_n(job->misfit, 1, __ATOMIC_RELAXED);
                out += tiles * size;
                continue;
            }
            if (job->stored != job->type) quantise_panel(job, in, rows, first, last, to);
            else mk_pack_panel(job->type, in, first / block * bytes, rows, count, to);
            out += mk_is_float(job->type) ? job->whole * count * bytes : tiles * size;
        }
    }
}

void mk_pack(mk_work *work, int type, int stored, const uint8_t *canonical, long stride, long n, long head, const
             int32_t *bounds, int panels, uint8_t *out, long first, long whole, int *misfit) {
    mk_step_of(work, pack_tiles, mk_blocks(n, MK_TILE), 1, 0)->pack =
        (mk_pack_job){type, stored, panels, n, head, stride, first, whole, bounds, canonical, out, misfit};
}
