/* The 16-lane vector layer in plain C.  Every other vec_*.h must give the same bits.
 *
 * vf: 16 floats; vi: 16 int32; vb: 64 bytes, 4 of each of 16 rows. */
#ifndef MK_VEC_H
#define MK_VEC_H

#include <math.h>

#include "half.h"
#include "path.h"

typedef struct { float f[16]; } vf;
typedef struct { int32_t i[16]; } vi;
typedef struct { int8_t b[64]; } vb;

#define VEC_ROWS 4 /* sums of a product in registers at a time */
enum { VEC_FETCHES = 1 };
enum { VEC_SUMS = 4 /* of floats, in registers at a time */ };
#define VEC_QUERIES 4 /* of attention, with their sums in registers */
/* Whether products of bytes cost the same whatever their bits. */
#define VEC_ALIKE 1
enum { VEC_Q8_BIAS = 0 };

#define UNROLL /* 16 lanes are loop enough */
#define HOT static __attribute__((noinline)) /* nor does it gain from copies */
#define LANES for (int j = 0; j < 16; j++)
#define VF(name, args, value) MK_INLINE vf name args { vf r; LANES r.f[j] = (value); return r; }
#define VI(name, args, value) MK_INLINE vi name args { vi r; LANES r.i[j] = (int32_t)(value); return r; }

VF(vf_load, (const float *p), p[j])
VF(vf_load_f16, (const uint16_t *p), mk_from_f16(p[j]))
VF(vf_load_bf16, (const uint16_t *p), mk_from_bf16(p[j]))
VF(vf_odd, (const uint16_t *p), mk_from_bf16(p[2 * j + 1])) /* of 32 BF16 */
VF(vf_even, (const uint16_t *p), mk_from_bf16(p[2 * j]))
VF(vf_load_u8, (const uint8_t *p), (float)p[j])
VF(vf_load_i8, (const uint8_t *p), (float)(int8_t)p[j])
MK_INLINE void vf_store(float *p, vf a) { LANES p[j] = a.f[j]; }
MK_INLINE void vf_store_f16(uint16_t *p, vf a) { LANES p[j] = mk_to_f16(a.f[j]); }
MK_INLINE vf vf_keep(vf a) { return a; } /* in registers, where several uses should share a load */
VF(vf_set1, (float x), x)
VF(vf_add, (vf a, vf b), a.f[j] + b.f[j])
VF(vf_sub, (vf a, vf b), a.f[j] - b.f[j])
VF(vf_mul, (vf a, vf b), a.f[j] * b.f[j])
VF(vf_div, (vf a, vf b), a.f[j] / b.f[j])
VF(vf_fma, (vf a, vf b, vf c), fmaf(a.f[j], b.f[j], c.f[j]))
VF(vf_abs, (vf a), mk_bits_float(mk_float_bits(a.f[j]) & 0x7fffffffu))
VF(vf_max, (vf a, vf b), a.f[j] > b.f[j] ? a.f[j] : b.f[j])
VF(vf_min, (vf a, vf b), a.f[j] < b.f[j] ? a.f[j] : b.f[j])
VF(vf_gt, (vf a, vf b, vf x, vf y), a.f[j] > b.f[j] ? x.f[j] : y.f[j]) /* a > b ? x : y */
VF(vf_from, (vi a), (float)a.i[j])
VF(vf_pow2, (vi a), mk_bits_float((uint32_t)(a.i[j] + 127) << 23)) /* 2^a, -126 <= a <= 127 */
MK_INLINE int vf_any_gt(vf a, vf b) { int any = 0; LANES any |= a.f[j] > b.f[j]; return any; }

VI(vi_set1, (int32_t x), x)
VI(vi_add, (vi a, vi b), (uint32_t)a.i[j] + (uint32_t)b.i[j])
VI(vi_sub, (vi a, vi b), (uint32_t)a.i[j] - (uint32_t)b.i[j])
VI(vi_half, (vi a), a.i[j] >> 1) /* arithmetic shift */
VI(vi_trunc, (vf a), a.f[j])     /* |a| < 2^31 */
VI(vi_bits, (vf a), mk_float_bits(a.f[j]))
MK_INLINE void vi_store_i8(int8_t *p, vi a) { LANES p[j] = (int8_t)a.i[j]; } /* |a| <= 127 */
/* p[j]: the sum of lanes j, j + 4, j + 8, j + 12. */
MK_INLINE void vi_store_sums(int32_t *p, vi a) { for (int j = 0; j < 4; j++) p[j] = a.i[j] + a.i[j + 4] + a.i[j + 8] + a.i[j + 12]; }

/* Lane j with lane j + 8, then + 4, + 2, + 1. */
#define FOLD(expression) for (int w = 8; w; w /= 2) for (int j = 0; j < w; j++) a.f[j] = (expression); return a.f[0];
MK_INLINE float vf_hadd(vf a) { FOLD(a.f[j] + a.f[j + w]) }
MK_INLINE float vf_hmax(vf a) { FOLD(a.f[j] > a.f[j + w] ? a.f[j] : a.f[j + w]) }

/* sum, whose upper half is zero, plus the first step of it. */
VF(vf_add_halves, (vf sum, vf a), j < 8 ? sum.f[j] + (a.f[j] + a.f[(j + 8) & 15]) : 0.0f)
VF(vf_sums, (const vf *a, int step), vf_hadd(a[j * step])) /* of 16 vectors that lie so far apart */

MK_INLINE vb vb_load(const uint8_t *p) { vb r; memcpy(&r, p, 64); return r; }
/* In every byte: the bits from `from` on, as many as `mask` has, moved to `to`. */
MK_INLINE vb vb_bits(vb a, int from, int mask, int to) {
    for (int j = 0; j < 64; j++) a.b[j] = (int8_t)(((uint8_t)a.b[j] >> from & mask) << to);
    return a;
}
MK_INLINE vb vb_or(vb a, vb b) { for (int j = 0; j < 64; j++) a.b[j] |= b.b[j]; return a; }
MK_INLINE vb vb_table(const int8_t *table, vb nibbles) { /* table [16] */
    for (int j = 0; j < 64; j++) nibbles.b[j] = table[nibbles.b[j]];
    return nibbles;
}
/* For each 16 bytes: interleave the first 8 of a and b into a, and the last 8 into b. */
MK_INLINE void vb_zip(vb low, vb high, uint8_t *a, uint8_t *b) {
    for (int j = 0; j < 64; j++) {
        uint8_t *to = (j % 16 < 8 ? a : b) + j / 16 * 16 + j % 8 * 2;
        to[0] = (uint8_t)low.b[j], to[1] = (uint8_t)high.b[j];
    }
}
MK_INLINE vb vb_signed(vb a) { return a; } /* a signed operand as vb_multiply takes it: q + VEC_Q8_BIAS */

MK_INLINE void vb_store(uint8_t *p, vb a) { memcpy(p, &a, 64); }
MK_INLINE vb vb_raise(vb a, int by) { for (int j = 0; j < 64; j++) a.b[j] = (int8_t)(a.b[j] + by); return a; }

/* *dot += w * x of group g of 4 columns of x, of which `last` is the last one.  |x| <= 127; w: 0 to 15 with 4 bits, 0 to 63 with
 * 6, with 8 what vb_signed makes; size: with 8, what vb_size makes of w.  A sum may be on its way in *pairs in between. */
typedef struct { char none; } vp;
MK_INLINE void vb_multiply(int bits, int g, int last, vb w, vb size, const int8_t *x, vi *dot, vp *pairs) {
    (void)bits, (void)last, (void)size, (void)pairs;
    LANES for (int b = 0; b < 4; b++) dot->i[j] += w.b[4 * j + b] * x[4 * g + b];
}

#endif
