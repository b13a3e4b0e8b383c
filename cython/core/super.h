/* K-quants: 256 values in 8 parts of 32, each with a scale and a minimum (Q4_K, Q5_K), two scales (Q6_K) or one scale
 * (IQ4_XS) of its own. */
#ifndef MK_SUPER_H
#define MK_SUPER_H

#include <stdint.h>
#include <string.h>

#include "kernels.h"

/* A row's part as it lies in a tile, in groups of 4 columns.  Byte 4g + b of `low` has the low halves of columns
 * 4g + b and 16 + 4g + b.  Q5_K: bit g of high[b] belongs to column 4g + b.  Q6_K: bits 2g and 2g + 1 of high[4h + b]
 * belong to column 16h + 4g + b. */
typedef struct {
    uint8_t scales[2], low[16], high[8];
} mk_part;

enum { MK_PARTS = MK_SUPER / MK_BLOCK };

static inline uint32_t mk_word(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return v; }

/* The halves of 32 bytes, `shift` bits up: 0 low ones, 4 high ones. */
static inline void mk_halves(const uint8_t *q, int shift, uint8_t *low) {
    for (int i = 0; i < 16; i++) low[i] = (uint8_t)((q[i] >> shift & 15) | (q[16 + i] >> shift & 15) << 4);
}

/* ggml's 12 bytes of 8 scales and 8 minima of 6 bits. */
static inline void mk_six_bits(const uint8_t *q, mk_part *parts) {
    for (int j = 0; j < 4; j++) {
        parts[j].scales[0] = q[j] & 63;
        parts[j].scales[1] = q[4 + j] & 63;
        parts[4 + j].scales[0] = (uint8_t)((q[8 + j] & 15) | q[j] >> 6 << 4);
        parts[4 + j].scales[1] = (uint8_t)(q[8 + j] >> 4 | q[4 + j] >> 6 << 4);
    }
}

/* Bytes 0..7 of x as the rows of 8 x 8 bits, transposed. */
static inline uint64_t mk_transpose(uint64_t x) {
    uint64_t t = (x ^ x >> 7) & 0x00aa00aa00aa00aau;
    x ^= t ^ t << 7;
    t = (x ^ x >> 14) & 0x0000cccc0000ccccu;
    x ^= t ^ t << 14;
    t = (x ^ x >> 28) & 0x00000000f0f0f0f0u;
    return x ^ t ^ t << 28;
}

/* A block of Q4_K or Q5_K: d and dmin, scales, (a bit of each value,) nibbles. */
static inline void mk_split_q45(int type, const uint8_t *in, mk_part *parts) {
    const uint8_t *nibbles = in + (type == MK_Q4_K ? 16 : 48);
    mk_six_bits(in + 4, parts);
    for (int s = 0; s < MK_PARTS; s++) mk_halves(nibbles + 32 * (s / 2), 4 * (s % 2), parts[s].low);
    for (int b = 0; b < 4 && type == MK_Q5_K; b++) {
        uint64_t bits = 0;
        for (int g = 0; g < 8; g++) bits |= (uint64_t)in[16 + 4 * g + b] << 8 * g;
        bits = mk_transpose(bits);
        for (int s = 0; s < MK_PARTS; s++) parts[s].high[b] = (uint8_t)(bits >> 8 * s);
    }
}

/* A block of Q6_K: nibbles, two bits of each value, scales, d. */
static inline void mk_split_q6(const uint8_t *in, mk_part *parts) {
    for (int s = 0; s < MK_PARTS; s++) {
        const int half = s / 4, turn = s % 4;
        const uint8_t *high = in + 128 + 32 * half;
        mk_halves(in + 64 * half + 32 * (turn % 2), 4 * (turn / 2), parts[s].low);
        for (int h = 0; h < 2; h++) {
            uint32_t bits = 0;
            for (int g = 0; g < 4; g++) bits |= (mk_word(high + 16 * h + 4 * g) >> 2 * turn & 0x03030303u) << 2 * g;
            memcpy(parts[s].high + 4 * h, &bits, 4);
        }
        memcpy(parts[s].scales, in + 192 + 2 * s, 2);
    }
}

/* A block of IQ4_XS: d, two high bits of each part's scale, four low ones, nibbles. */
static inline void mk_split_iq4(const uint8_t *in, mk_part *parts) {
    for (int s = 0; s < MK_PARTS; s++) {
        const int low = in[4 + s / 2] >> 4 * (s % 2) & 15, high = in[2 + s / 4] >> 2 * (s % 4) & 3;
        parts[s].scales[0] = (uint8_t)((low | high << 4) - 32);
        memcpy(parts[s].low, in + 8 + 16 * s, 16);
    }
}

static inline void mk_split(int type, const uint8_t *in, mk_part *parts) {
    if (type == MK_Q6_K) mk_split_q6(in, parts);
    else if (type == MK_IQ4_XS) mk_split_iq4(in, parts);
    else mk_split_q45(type, in, parts);
}

/* Where the parts of a tile's block lie: 16 rows' d (and dmin), their scales, part by part, then the values. */
static inline int mk_scales_at(int type) { return 32 * mk_f16s(type); }
static inline int mk_part_scales(int type) { return type == MK_IQ4_XS ? MK_TILE : 2 * MK_TILE; }
static inline int mk_values_at(int type) { return mk_scales_at(type) + mk_part_scales(type) * MK_PARTS; }
static inline int mk_part_bytes(int type) { return 64 * (4 + mk_high_bits(type)); }

#endif
