/* The layer for AVX-512 (F, BW, VL, DQ); with VEC_VNNI the integer products are VNNI's. */
#ifndef MK_VEC_H
#define MK_VEC_H

#include <immintrin.h>
#include <string.h>

#include "path.h"

typedef __m512 vf;
typedef __m512i vi;
typedef __m512i vb;

#ifdef VEC_VNNI
#define VEC_ROWS 16
#define VEC_ALIKE 1
enum { VEC_Q8_BIAS = 128 };
#else
#define VEC_ROWS 8
#define VEC_ALIKE 0
enum { VEC_Q8_BIAS = 0 };
#endif

enum { VEC_FETCHES = 1 };
enum { VEC_SUMS = 24 };
#define VEC_QUERIES 12 /* 32 registers of 16 floats */

#ifdef VEC_BF16 /* y + x's odd * w's odd + x's even * w's even, of pairs */
MK_INLINE vf vf_pairs(vf w, vf x, vf y) {
    return _mm512_dpbf16_ps(y, (__m512bh)_mm512_castps_si512(w), (__m512bh)_mm512_castps_si512(x));
}
#endif

MK_INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
MK_INLINE vf vf_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
MK_INLINE vf vf_load_bf16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
MK_INLINE __m512i zmm_pairs(const uint16_t *p) { return _mm512_loadu_si512(p); }
MK_INLINE vf vf_odd(const uint16_t *p) { /* of 32 BF16 */
    return _mm512_castsi512_ps(_mm512_and_si512(zmm_pairs(p), _mm512_set1_epi32((int)0xffff0000)));
}
MK_INLINE vf vf_even(const uint16_t *p) { return _mm512_castsi512_ps(_mm512_slli_epi32(zmm_pairs(p), 16)); }
MK_INLINE vf vf_load_u8(const uint8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p)));
}
MK_INLINE vf vf_load_i8(const uint8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)));
}
#define VEC_LOOKUP
MK_INLINE vf vf_lookup(const float *table, const uint8_t *p, const int shift) { /* the lowest four bits count */
    __m512i at = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p));
    return _mm512_permutexvar_ps(shift ? _mm512_srli_epi32(at, 4) : at, _mm512_loadu_ps(table));
}
MK_INLINE void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
MK_INLINE void vf_store_f16(uint16_t *p, vf a) {
    _mm256_storeu_si256((void *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
MK_INLINE vf vf_keep(vf a) { __asm__("" : "+v"(a)); return a; } /* in a register: one load serves several uses */
MK_INLINE vf vf_set1(float x) { return _mm512_set1_ps(x); }
MK_INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
MK_INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
MK_INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
MK_INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
MK_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
#define VEC_PARTS 1 /* of a vector, each in a register */
typedef __m512 vr;
MK_INLINE vr *vr_of(vf *a, const int part) { (void)part; return a; }
MK_INLINE vr vr_zero(void) { return _mm512_setzero_ps(); }
MK_INLINE vr vr_set1(float x) { return vf_set1(x); }
MK_INLINE vr vr_load(const float *p) { return vf_load(p); }
MK_INLINE vr vr_keep(vr a) { return vf_keep(a); }
MK_INLINE vr vr_fma(vr a, vr b, vr c) { return vf_fma(a, b, c); }
MK_INLINE vf vf_abs(vf a) { return _mm512_abs_ps(a); }
MK_INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
MK_INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
#define VEC_SCALE /* y * 2^n for whole n, rounded once */
MK_INLINE vf vf_scale(vf y, vf n) { return _mm512_scalef_ps(y, n); }
MK_INLINE vf vf_gt(vf a, vf b, vf x, vf y) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x); }
MK_INLINE int vf_any_gt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
MK_INLINE vf vf_from(vi a) { return _mm512_cvtepi32_ps(a); }

MK_INLINE vi vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
MK_INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
MK_INLINE vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
MK_INLINE vi vi_half(vi a) { return _mm512_srai_epi32(a, 1); }
MK_INLINE vi vi_trunc(vf a) { return _mm512_cvttps_epi32(a); }
MK_INLINE vi vi_bits(vf a) { return _mm512_castps_si512(a); }
MK_INLINE vf vf_pow2(vi a) { return _mm512_castsi512_ps(_mm512_slli_epi32(vi_add(a, vi_set1(127)), 23)); }
MK_INLINE void vi_store_i8(int8_t *p, vi a) { _mm_storeu_si128((void *)p, _mm512_cvtepi32_epi8(a)); }
MK_INLINE void vi_store_sums(int32_t *p, vi a) {
    const __m256i w = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    _mm_storeu_si128((void *)p, _mm_add_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
}

#define ZMM_FOLD(op)                                                                                  \
    __m256 w = _mm256_##op##_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));             \
    __m128 x = _mm_##op##_ps(_mm256_castps256_ps128(w), _mm256_extractf128_ps(w, 1));                 \
    x = _mm_##op##_ps(x, _mm_movehl_ps(x, x));                                                        \
    return _mm_cvtss_f32(_mm_##op##_ss(x, _mm_movehdup_ps(x)));
MK_INLINE float vf_hadd(vf a) { ZMM_FOLD(add) }
MK_INLINE float vf_hmax(vf a) { ZMM_FOLD(max) }

MK_INLINE vf vf_add_halves(vf sum, vf a) {
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    return _mm512_zextps256_ps512(_mm256_add_ps(_mm512_castps512_ps256(sum), halves));
}

/* The steps of vf_sums (vec_common.h): the lanes of vectors are added, and one vector has what remains of several. */
#define VEC_FOLDS
#define ZMM_ADD(shuffle, a, b, low, high) _mm512_add_ps(shuffle(a, b, low), shuffle(a, b, high))
MK_INLINE vf vf_both_halves(vf a, vf b) { /* 8 of each */
    const __m512i outer = _mm512_mask_blend_epi64(0xf0, _mm512_castps_si512(a), _mm512_castps_si512(b));
    const __m512i inner = _mm512_alignr_epi64(_mm512_castps_si512(b), _mm512_castps_si512(a), 4);
    return _mm512_add_ps(_mm512_castsi512_ps(outer), _mm512_castsi512_ps(inner));
}
MK_INLINE vf vf_quarters(vf a, vf b) { return ZMM_ADD(_mm512_shuffle_f32x4, a, b, 0x88, 0xdd); } /* of two such: 4 of each */
MK_INLINE vf vf_eighths(vf a, vf b) { return ZMM_ADD(_mm512_shuffle_ps, a, b, 0x44, 0xee); } /* of two such: 2 of each */
MK_INLINE vf vf_sixteenths(vf a, vf b) { return ZMM_ADD(_mm512_shuffle_ps, a, b, 0x88, 0xdd); }

MK_INLINE vb vb_load(const uint8_t *p) { return _mm512_loadu_si512(p); }
MK_INLINE vb vb_bits(vb a, const int from, const int mask, const int to) {
    a = from < to ? _mm512_slli_epi16(a, to - from) : _mm512_srli_epi16(a, from - to);
    return _mm512_and_si512(a, _mm512_set1_epi8((char)(mask << to)));
}
MK_INLINE vb vb_or(vb a, vb b) { return _mm512_or_si512(a, b); }
MK_INLINE vb vb_table(const int8_t *table, vb nibbles) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const void *)table)), nibbles);
}
MK_INLINE void vb_zip(vb low, vb high, uint8_t *a, uint8_t *b) {
    _mm512_storeu_si512(a, _mm512_unpacklo_epi8(low, high));
    _mm512_storeu_si512(b, _mm512_unpackhi_epi8(low, high));
}
MK_INLINE __m512i zmm_x4(const int8_t *x) { int32_t v; memcpy(&v, x, 4); return _mm512_set1_epi32(v); }

MK_INLINE void vb_store(uint8_t *p, vb a) { _mm512_storeu_si512(p, a); }
MK_INLINE vb vb_raise(vb a, const int by) { return _mm512_add_epi8(a, _mm512_set1_epi8((char)by)); }

#ifdef VEC_VNNI
MK_INLINE vb vb_signed(vb a) { return _mm512_xor_si512(a, _mm512_set1_epi8(-128)); }
typedef struct { char none; } vp;
MK_INLINE void vb_multiply(const int bits, const int g, const int last, vb w, vb size, const int8_t *x, vi *dot,
                           vp *pairs) {
    (void)bits, (void)last, (void)size, (void)pairs;
    *dot = _mm512_dpbusd_epi32(*dot, w, zmm_x4(x + 4 * g));
}
#else
MK_INLINE vb vb_signed(vb a) { return a; }
MK_INLINE vb vb_size(vb a) { return _mm512_abs_epi8(a); }
MK_INLINE vb vb_negative(vb a) { return _mm512_movm_epi8(_mm512_movepi8_mask(a)); } /* -1, or 0 */
typedef __m512i vp;
MK_INLINE vp vp_set(const int16_t *pair) { return zmm_x4((const void *)pair); }
MK_INLINE vi vp_times(vp a, vi words) { return _mm512_madd_epi16(a, words); }
MK_INLINE vi vi_words(vi a) { return _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(a, 16)); } /* the lower in both */
MK_INLINE __m512i zmm_keep(__m512i a) { __asm__("" : "+v"(a)); return a; }
MK_INLINE void vb_multiply(const int bits, const int g, const int last, vb w, vb size, const int8_t *x, vi *dot,
                           vp *pairs) {
    __m512i xg = zmm_x4(x + 4 * g);
    if (bits == 8) { /* |w| times x with w's sign */
        xg = _mm512_mask_sub_epi8(xg, _mm512_movepi8_mask(w), _mm512_setzero_si512(), xg);
        w = size;
    }
    if (bits == MK_FLIPPED) xg = _mm512_xor_si512(xg, w), w = size;
    const __m512i products = _mm512_maddubs_epi16(w, xg);
    *pairs = MK_FIRST_PAIRS(bits, g) ? products : zmm_keep(_mm512_add_epi16(*pairs, products));
    if (MK_LAST_PAIRS(bits, g, last)) *dot = zmm_keep(vi_add(*dot, _mm512_madd_epi16(*pairs, _mm512_set1_epi16(1))));
}
#endif

#endif
