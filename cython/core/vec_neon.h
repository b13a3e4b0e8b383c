/* The layer for 64-bit Arm; with VEC_DOT the integer products are the dotprod extension's, with VEC_I8MM those
 * of tiles i8mm's. */
#ifndef MK_VEC_H
#define MK_VEC_H

#include <arm_neon.h>
#include <string.h>

#include "path.h"

#if defined(__GNUC__) && !defined(__clang__) /* gcc spills all sums of a tile if it moves loads before products */
#pragma GCC optimize("no-schedule-insns")
#endif

typedef struct { float32x4_t q[4]; } vf;
typedef struct { int32x4_t q[4]; } vi;
typedef struct { int8x16_t q[4]; } vb;

#define VEC_ROWS 4
enum { VEC_FETCHES = 0 };
enum { VEC_SUMS = 4 };
#define VEC_QUERIES 4 /* 16 sums in 32 registers of 4 floats: with 6 queries gcc keeps some of them in memory */
#define VEC_ALIKE 1
enum { VEC_Q8_BIAS = 0 };

#define QUARTERS for (int j = 0; j < 4; j++)
#define VF(name, args, value) MK_INLINE vf name args { vf r; QUARTERS r.q[j] = (value); return r; }
#define VI(name, args, value) MK_INLINE vi name args { vi r; QUARTERS r.q[j] = (value); return r; }
#define VB(name, args, value) MK_INLINE vb name args { vb r; QUARTERS r.q[j] = (value); return r; }

VF(vf_load, (const float *p), vld1q_f32(p + 4 * j))
VF(vf_load_f16, (const uint16_t *p), vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * j))))
VF(vf_load_bf16, (const uint16_t *p), vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * j), 16)))
MK_INLINE uint32x4_t neon_pairs(const uint16_t *p) { return vreinterpretq_u32_u16(vld1q_u16(p)); }
VF(vf_odd, (const uint16_t *p), vreinterpretq_f32_u32(vandq_u32(neon_pairs(p + 8 * j), vdupq_n_u32(0xffff0000u))))
VF(vf_even, (const uint16_t *p), vreinterpretq_f32_u32(vshlq_n_u32(neon_pairs(p + 8 * j), 16)))
MK_INLINE vf vf_load_u8(const uint8_t *p) {
    uint8x16_t b = vld1q_u8(p);
    uint16x8_t lo = vmovl_u8(vget_low_u8(b)), hi = vmovl_high_u8(b);
    return (vf){{vcvtq_f32_u32(vmovl_u16(vget_low_u16(lo))), vcvtq_f32_u32(vmovl_high_u16(lo)),
                 vcvtq_f32_u32(vmovl_u16(vget_low_u16(hi))), vcvtq_f32_u32(vmovl_high_u16(hi))}};
}
MK_INLINE vf vf_load_i8(const uint8_t *p) {
    int8x16_t b = vreinterpretq_s8_u8(vld1q_u8(p));
    int16x8_t lo = vmovl_s8(vget_low_s8(b)), hi = vmovl_high_s8(b);
    return (vf){{vcvtq_f32_s32(vmovl_s16(vget_low_s16(lo))), vcvtq_f32_s32(vmovl_high_s16(lo)),
                 vcvtq_f32_s32(vmovl_s16(vget_low_s16(hi))), vcvtq_f32_s32(vmovl_high_s16(hi))}};
}
#define VEC_LOOKUP
MK_INLINE vf vf_lookup(const float *table, const uint8_t *p, const int shift) { /* of a number its four bytes */
    const uint8_t *bytes = (const uint8_t *)table;
    const uint8x16x4_t all = {{vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}};
    const uint8x16_t four = vreinterpretq_u8_u32(vdupq_n_u32(0x03020100u));
    const uint8x16_t each = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    uint8x16_t at = vld1q_u8(p);
    at = vshlq_n_u8(shift ? vshrq_n_u8(at, 4) : vandq_u8(at, vdupq_n_u8(15)), 2);
    vf found;
    QUARTERS {
        uint8x16_t own = vqtbl1q_u8(at, vaddq_u8(each, vdupq_n_u8((uint8_t)(4 * j))));
        found.q[j] = vreinterpretq_f32_u8(vqtbl4q_u8(all, vaddq_u8(own, four)));
    }
    return found;
}
MK_INLINE void vf_store(float *p, vf a) { QUARTERS vst1q_f32(p + 4 * j, a.q[j]); }
MK_INLINE void vf_store_f16(uint16_t *p, vf a) {
    QUARTERS vst1_u16(p + 4 * j, vreinterpret_u16_f16(vcvt_f16_f32(a.q[j])));
}
MK_INLINE vf vf_keep(vf a) { return a; }
VF(vf_set1, (float x), vdupq_n_f32(x))
VF(vf_add, (vf a, vf b), vaddq_f32(a.q[j], b.q[j]))
VF(vf_sub, (vf a, vf b), vsubq_f32(a.q[j], b.q[j]))
VF(vf_mul, (vf a, vf b), vmulq_f32(a.q[j], b.q[j]))
VF(vf_div, (vf a, vf b), vdivq_f32(a.q[j], b.q[j]))
VF(vf_fma, (vf a, vf b, vf c), vfmaq_f32(c.q[j], a.q[j], b.q[j]))
VF(vf_abs, (vf a), vabsq_f32(a.q[j]))
MK_INLINE float32x4_t neon_max(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); } /* as x86 */
VF(vf_max, (vf a, vf b), neon_max(a.q[j], b.q[j]))
MK_INLINE float32x4_t neon_min(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
VF(vf_min, (vf a, vf b), neon_min(a.q[j], b.q[j]))
VF(vf_gt, (vf a, vf b, vf x, vf y), vbslq_f32(vcgtq_f32(a.q[j], b.q[j]), x.q[j], y.q[j]))
VF(vf_from, (vi a), vcvtq_f32_s32(a.q[j]))
VF(vf_pow2, (vi a), vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(a.q[j], vdupq_n_s32(127)), 23)))
MK_INLINE int vf_any_gt(vf a, vf b) {
    uint32x4_t lo = vorrq_u32(vcgtq_f32(a.q[0], b.q[0]), vcgtq_f32(a.q[1], b.q[1]));
    uint32x4_t hi = vorrq_u32(vcgtq_f32(a.q[2], b.q[2]), vcgtq_f32(a.q[3], b.q[3]));
    return vmaxvq_u32(vorrq_u32(lo, hi)) != 0;
}

VI(vi_set1, (int32_t x), vdupq_n_s32(x))
VI(vi_add, (vi a, vi b), vaddq_s32(a.q[j], b.q[j]))
VI(vi_sub, (vi a, vi b), vsubq_s32(a.q[j], b.q[j]))
VI(vi_half, (vi a), vshrq_n_s32(a.q[j], 1))
VI(vi_trunc, (vf a), vcvtq_s32_f32(a.q[j]))
VI(vi_bits, (vf a), vreinterpretq_s32_f32(a.q[j]))
MK_INLINE void vi_store_i8(int8_t *p, vi a) {
    int16x8_t lo = vcombine_s16(vmovn_s32(a.q[0]), vmovn_s32(a.q[1]));
    int16x8_t hi = vcombine_s16(vmovn_s32(a.q[2]), vmovn_s32(a.q[3]));
    vst1q_s8(p, vcombine_s8(vmovn_s16(lo), vmovn_s16(hi)));
}
MK_INLINE void vi_store_sums(int32_t *p, vi a) {
    vst1q_s32(p, vaddq_s32(vaddq_s32(a.q[0], a.q[1]), vaddq_s32(a.q[2], a.q[3])));
}

/* Lane j with lane j + 8, then + 4, + 2, + 1. */
#define NEON_FOLD(op)                                                                  \
    float32x4_t x = op(op(a.q[0], a.q[2]), op(a.q[1], a.q[3]));                        \
    x = op(x, vextq_f32(x, x, 2));                                                     \
    return vgetq_lane_f32(op(x, vextq_f32(x, x, 1)), 0);
MK_INLINE float vf_hadd(vf a) { NEON_FOLD(vaddq_f32) }
MK_INLINE float vf_hmax(vf a) { NEON_FOLD(neon_max) }

/* sum, whose upper half is zero, plus lanes j + (j + 8) of a: the first step of vf_hadd. */
VF(vf_add_halves, (vf sum, vf a), j < 2 ? vaddq_f32(sum.q[j], vaddq_f32(a.q[j], a.q[(j + 2) & 3])) : sum.q[j])

/* Lane r is vf_hadd(a[r * step]): four of them share their shuffles. */
MK_INLINE float32x4_t neon_halves(vf a, vf b) { /* lanes j + (j + 2) of both, when four are left of each */
    float32x4_t x = vaddq_f32(vaddq_f32(a.q[0], a.q[2]), vaddq_f32(a.q[1], a.q[3]));
    float32x4_t y = vaddq_f32(vaddq_f32(b.q[0], b.q[2]), vaddq_f32(b.q[1], b.q[3]));
    float64x2_t low = vtrn1q_f64(vreinterpretq_f64_f32(x), vreinterpretq_f64_f32(y));
    float64x2_t high = vtrn2q_f64(vreinterpretq_f64_f32(x), vreinterpretq_f64_f32(y));
    return vaddq_f32(vreinterpretq_f32_f64(low), vreinterpretq_f32_f64(high));
}
VF(vf_sums, (const vf *a, const int step), vpaddq_f32(neon_halves(a[4 * j * step], a[(4 * j + 1) * step]),
                                                      neon_halves(a[(4 * j + 2) * step], a[(4 * j + 3) * step])))

VB(vb_load, (const uint8_t *p), vreinterpretq_s8_u8(vld1q_u8(p + 16 * j)))
MK_INLINE vb vb_bits(vb a, const int from, const int mask, const int to) {
    QUARTERS {
        uint8x16_t b = vshlq_u8(vreinterpretq_u8_s8(a.q[j]), vdupq_n_s8((int8_t)(to - from)));
        if (to || mask != 255 >> from) b = vandq_u8(b, vdupq_n_u8((uint8_t)(mask << to))); /* else they are all that is left */
        a.q[j] = vreinterpretq_s8_u8(b);
    }
    return a;
}
VB(vb_or, (vb a, vb b), vorrq_s8(a.q[j], b.q[j]))
VB(vb_table, (const int8_t *table, vb a), vqtbl1q_s8(vld1q_s8(table), vreinterpretq_u8_s8(a.q[j])))
MK_INLINE void vb_zip(vb low, vb high, uint8_t *a, uint8_t *b) {
    QUARTERS {
        vst1q_s8((int8_t *)a + 16 * j, vzip1q_s8(low.q[j], high.q[j]));
        vst1q_s8((int8_t *)b + 16 * j, vzip2q_s8(low.q[j], high.q[j]));
    }
}
MK_INLINE vb vb_signed(vb a) { return a; }
MK_INLINE int8x16_t neon_x4(const int8_t *x) { int32_t v; memcpy(&v, x, 4); return vreinterpretq_s8_s32(vdupq_n_s32(v)); }

MK_INLINE void vb_store(uint8_t *p, vb a) { QUARTERS vst1q_s8((int8_t *)p + 16 * j, a.q[j]); }
VB(vb_raise, (vb a, const int by), vaddq_s8(a.q[j], vdupq_n_s8((int8_t)by)))

#ifdef VEC_DOT
/* vdotq_laneq_s32, which compilers give only to files (clang) or architectures (gcc) that have dotprod throughout. */
#define NEON_DOT(lane) \
    __asm__(".arch armv8.2-a+dotprod\n\tsdot %0.4s, %1.16b, %2.4b[" #lane "]" : "+w"(*sum) : "w"(w), "w"(x))
MK_INLINE void neon_dot(int32x4_t *sum, int8x16_t w, int8x16_t x, const int lane) {
    switch (lane) {
    case 0: NEON_DOT(0); break;
    case 1: NEON_DOT(1); break;
    case 2: NEON_DOT(2); break;
    default: NEON_DOT(3);
    }
}
#ifdef VEC_I8MM
/* vmmlaq_s32: sum [2][2] += two rows of 8 bytes of x times two of w. */
MK_INLINE void neon_mmla(int32x4_t *sum, int8x16_t x, int8x16_t w) {
    __asm__(".arch armv8.2-a+i8mm\n\tsmmla %0.4s, %1.16b, %2.16b" : "+w"(*sum) : "w"(x), "w"(w));
}
#endif
/* Load all before any is used, so that compilers emit pair loads. */
#define VEC_KEEPS
MK_INLINE vb vb_keep(vb a) { __asm__("" : "+w"(a.q[0]), "+w"(a.q[1]), "+w"(a.q[2]), "+w"(a.q[3])); return a; }
typedef struct { char none; } vp;
MK_INLINE void vb_multiply(const int bits, const int g, const int last, vb w, vb size, const int8_t *x, vi *dot,
                           vp *pairs) {
    (void)bits, (void)last, (void)size, (void)pairs;
    const int8x16_t xs = vld1q_s8(x + g / 4 * 16);
    QUARTERS neon_dot(&dot->q[j], w.q[j], xs, g % 4);
}
#else
typedef struct { int32x4_t lo[4], hi[4]; } vp; /* of the rows 0, 1 and 2, 3 of each quarter */
MK_INLINE void vb_multiply(const int bits, const int g, const int last, vb w, vb size, const int8_t *x, vi *dot,
                           vp *pairs) {
    (void)bits, (void)size;
    int8x16_t xg = neon_x4(x + 4 * g);
    QUARTERS {
        if (!g) pairs->lo[j] = pairs->hi[j] = vdupq_n_s32(0);
        pairs->lo[j] = vpadalq_s16(pairs->lo[j], vmull_s8(vget_low_s8(w.q[j]), vget_low_s8(xg)));
        pairs->hi[j] = vpadalq_s16(pairs->hi[j], vmull_high_s8(w.q[j], xg));
        if (g == last) dot->q[j] = vaddq_s32(dot->q[j], vpaddq_s32(pairs->lo[j], pairs->hi[j]));
    }
}
#endif

#endif
