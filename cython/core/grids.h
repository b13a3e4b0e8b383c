/* IQ2 and IQ3: an index into a table gives the magnitudes of 8 (IQ3: 4) neighbouring columns, and each column has a sign.
 * Parts of 32 columns have an odd scale, or one for each half. */
#ifndef MK_GRIDS_H
#define MK_GRIDS_H

#include <stdint.h>
#include <string.h>

#include "kernels.h"

extern const uint64_t mk_iq2_xxs_grid[256], mk_iq2_xs_grid[512], mk_iq2_s_grid[1024];
extern const uint32_t mk_iq3_xxs_grid[256], mk_iq3_s_grid[512];

static inline int mk_is_grid(int type) { return mk_is_super(type) && !mk_bits(type); }

/* Bytes of a row's part in a tile, without its scales: indices, then signs, then high bits of indices. */
static inline int mk_grid_bytes(int type) {
    return type == MK_IQ3_S ? 13 : type == MK_IQ3_XXS ? 12 : type == MK_IQ2_S ? 9 : 8;
}

/* The factor of the block scales. */
static inline float mk_grid_unit(int type) { return type == MK_IQ3_S ? 1.0f : type == MK_IQ3_XXS ? 0.25f : 0.125f; }

/* Copy part s of a row's block in the form of a tile; returns the byte of its scales, if they are stored apart. */
static inline uint8_t mk_grid_take(int type, const uint8_t *in, int s, uint8_t *out) {
    const int wide = type == MK_IQ2_S ? 4 : 8; /* bytes of indices */
    memcpy(out, in + 2 + wide * s, (size_t)wide);
    switch (type) {
    case MK_IQ2_XS: return in[66 + s];
    case MK_IQ2_S: memcpy(out + 4, in + 34 + 4 * s, 4), out[8] = in[66 + s]; return in[74 + s];
    case MK_IQ3_XXS: memcpy(out + 8, in + 66 + 4 * s, 4); return 0;
    case MK_IQ3_S: memcpy(out + 8, in + 74 + 4 * s, 4), out[12] = in[66 + s]; return in[106 + s / 2] >> 4 * (s % 2) & 15;
    default: return 0;
    }
}

/* The scale of half h of a part, from the part and the byte of its scales: 2 s + 1, where s has four bits. */
static inline int mk_grid_scale(int type, const uint8_t *part, uint8_t scales, int h) {
    int s = scales >> 4 * h & 15;
    if (type == MK_IQ2_XXS) s = part[7] >> 4;
    if (type == MK_IQ3_XXS) s = part[11] >> 4;
    if (type == MK_IQ3_S) s = scales;
    return 2 * s + 1;
}

/* Seven signs, and an eighth that makes the number of negative ones even. */
static inline unsigned mk_even_signs(unsigned seven) {
    const unsigned folded = seven ^ seven >> 4;
    return seven | (0x6996u >> (folded & 15) & 1) << 7;
}

/* Columns 8 i .. 8 i + 7 of a part, the first in the lowest byte. */
static inline uint64_t mk_grid_eight(int type, const uint8_t *part, int i) {
    uint64_t size;
    unsigned signs;
    uint32_t word;
    switch (type) {
    case MK_IQ2_XXS:
        memcpy(&word, part + 4, 4);
        size = mk_iq2_xxs_grid[part[i]], signs = mk_even_signs(word >> 7 * i & 127);
        break;
    case MK_IQ2_XS:
        word = part[2 * i] | (uint32_t)part[2 * i + 1] << 8;
        size = mk_iq2_xs_grid[word & 511], signs = mk_even_signs(word >> 9);
        break;
    case MK_IQ2_S:
        size = mk_iq2_s_grid[part[i] | (part[8] >> 2 * i & 3) << 8], signs = part[4 + i];
        break;
    case MK_IQ3_XXS:
        memcpy(&word, part + 8, 4);
        size = mk_iq3_xxs_grid[part[2 * i]] | (uint64_t)mk_iq3_xxs_grid[part[2 * i + 1]] << 32;
        signs = mk_even_signs(word >> 7 * i & 127);
        break;
    default:
        word = part[12] >> 2 * i;
        size = mk_iq3_s_grid[part[2 * i] | (word & 1) << 8];
        size |= (uint64_t)mk_iq3_s_grid[part[2 * i + 1] | (word >> 1 & 1) << 8] << 32;
        signs = part[8 + i];
    }
    /* A byte of `negative` is 1 if the sign bit is set; no magnitude is 0, so the negation carries into no other byte. */
    const uint64_t bits = signs * 0x0101010101010101u & 0x8040201008040201u;
    const uint64_t negative = (bits + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
    return (size ^ negative * 255) + negative;
}

#endif
