/* K-quants: blocks of 256 values in 8 parts of 32.  A part has a scale and a minimum (Q4_K, Q5_K), two scales (Q6_K, Q3_K),
 * two scales and two minima (Q2_K), or one scale (IQ4_XS).  The types of grids.h are K-quants too. */
#ifndef MK_SUPER_H
#define MK_SUPER_H

#include <stdint.h>
#include <string.h>

#include "grids.h"

/* A part of a row: a value is d * scale[h] * q - dmin * minimum[h], where h is the half of its column. */
typedef struct {
    int8_t q[MK_BLOCK];
    int16_t scale[2];
    uint8_t minimum[2];
} mk_part;

enum { MK_PARTS = MK_SUPER / MK_BLOCK };

/* Whether each half of a part has its own scale. */
static inline int mk_halved(int type) {
    return type == MK_Q2_K || type == MK_Q3_K || type == MK_Q6_K || type == MK_IQ2_XS || type == MK_IQ2_S;
}

#define MK_AS_IT_IS(value) value,
static const int8_t mk_iq4[16] = {MK_IQ4_VALUES(MK_AS_IT_IS)};

static inline uint32_t mk_word(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return v; }

/* Part s of a block of Q4_K or Q5_K: d and dmin, 8 scales and 8 minima of 6 bits, fifth bits (Q5_K), nibbles. */
static inline void mk_split_q45(int type, const uint8_t *in, int s, mk_part *part) {
    const uint8_t *nibbles = in + (type == MK_Q4_K ? 16 : 48) + 32 * (s / 2), *first = in + 4 + s % 4, *last = first + 8;
    part->scale[0] = part->scale[1] = (int16_t)(s < 4 ? first[0] & 63 : (last[0] & 15) | first[0] >> 6 << 4);
    part->minimum[0] = part->minimum[1] = (uint8_t)(s < 4 ? first[4] & 63 : last[0] >> 4 | first[4] >> 6 << 4);
    for (int j = 0; j < MK_BLOCK; j++) {
        const int fifth = type == MK_Q5_K ? in[16 + j] >> s & 1 : 0;
        part->q[j] = (int8_t)((nibbles[j] >> 4 * (s % 2) & 15) | fifth << 4);
    }
}

/* Q6_K: nibbles, two bits of each value, scales, d. */
static inline void mk_split_q6(const uint8_t *in, int s, mk_part *part) {
    const int half = s / 4, turn = s % 4;
    for (int h = 0; h < 2; h++) part->scale[h] = (int8_t)in[192 + 2 * s + h];
    for (int j = 0; j < MK_BLOCK; j++) {
        const int low = in[64 * half + 32 * (turn % 2) + j] >> 4 * (turn / 2) & 15;
        part->q[j] = (int8_t)((low | (in[128 + 32 * half + j] >> 2 * turn & 3) << 4) - 32);
    }
}

/* Q2_K: scales and minima of 4 bits, two bits of each value, d and dmin. */
static inline void mk_split_q2(const uint8_t *in, int s, mk_part *part) {
    for (int h = 0; h < 2; h++) part->scale[h] = in[2 * s + h] & 15, part->minimum[h] = in[2 * s + h] >> 4;
    for (int j = 0; j < MK_BLOCK; j++) part->q[j] = (int8_t)(in[16 + s / 4 * 32 + j] >> 2 * (s % 4) & 3);
}

/* Q3_K: the third bit of each value, the lower two, four low bits of scales, two high ones, d. */
static inline void mk_split_q3(const uint8_t *in, int s, mk_part *part) {
    for (int h = 0, i = 2 * s; h < 2; h++, i++) {
        const int low = in[96 + i % 8] >> i / 8 * 4 & 15, high = in[104 + i % 4] >> i / 4 * 2 & 3;
        part->scale[h] = (int16_t)((low | high << 4) - 32);
    }
    for (int j = 0; j < MK_BLOCK; j++)
        part->q[j] = (int8_t)(((in[32 + s / 4 * 32 + j] >> 2 * (s % 4) & 3) | (in[j] >> s & 1) << 2) - 4);
}

/* IQ4_XS: d, two high bits of each part's scale, four low ones, nibbles. */
static inline void mk_split_iq4(const uint8_t *in, int s, mk_part *part) {
    const int low = in[4 + s / 2] >> 4 * (s % 2) & 15, high = in[2 + s / 4] >> 2 * (s % 4) & 3;
    part->scale[0] = part->scale[1] = (int16_t)((low | high << 4) - 32);
    for (int j = 0; j < MK_BLOCK; j++) part->q[j] = mk_iq4[in[8 + 16 * s + j % 16] >> j / 16 * 4 & 15];
}

/* IQ2 and IQ3. */
static inline void mk_split_grid(int type, const uint8_t *in, int s, mk_part *part) {
    uint8_t raw[16];
    const uint8_t scales = mk_grid_take(type, in, s, raw);
    for (int h = 0; h < 2; h++) part->scale[h] = (int16_t)mk_grid_scale(type, raw, scales, mk_halved(type) ? h : 0);
    for (int i = 0; i < 4; i++) {
        const uint64_t eight = mk_grid_eight(type, raw, i);
        for (int j = 0; j < 8; j++) part->q[8 * i + j] = (int8_t)(eight >> 8 * j);
    }
}

/* Part s of a row's block. */
static inline void mk_split(int type, const uint8_t *in, int s, mk_part *part) {
    part->minimum[0] = part->minimum[1] = 0;
    if (mk_is_grid(type)) {
        mk_split_grid(type, in, s, part);
        return;
    }
    switch (type) {
    case MK_Q2_K: mk_split_q2(in, s, part); break;
    case MK_Q3_K: mk_split_q3(in, s, part); break;
    case MK_Q6_K: mk_split_q6(in, s, part); break;
    case MK_IQ4_XS: mk_split_iq4(in, s, part); break;
    default: mk_split_q45(type, in, s, part);
    }
}

/* The offsets of d and dmin in a row's block. */
static inline int mk_d_at(int type) { return type == MK_Q2_K ? 80 : type == MK_Q3_K ? 108 : type == MK_Q6_K ? 208 : 0; }

/* The offsets in a tile's block: d (and dmin) of 16 rows, then the small scales by part, then the values. */
static inline int mk_scales_at(int type) { return 32 * mk_f16s(type); }
static inline int mk_part_scales(int type) {
    if (type == MK_IQ2_XXS || type == MK_IQ3_XXS) return 0;
    return mk_is_grid(type) || type == MK_IQ4_XS ? MK_TILE : 2 * MK_TILE;
}
static inline int mk_values_at(int type) { return mk_scales_at(type) + mk_part_scales(type) * MK_PARTS; }
static inline int mk_part_bytes(int type) { return mk_is_grid(type) ? MK_TILE * mk_grid_bytes(type) : 64 * mk_bits(type); }

#endif
