/* The layer for AVX2 + FMA + F16C; with VEC_VNNI the integer products are AVX-VNNI's. */
#ifndef MK_VEC_H
#define MK_VEC_H

#include "vec_ymm.h"

typedef struct { __m256i lo, hi; } vi;
typedef vi vb;

#ifdef VEC_VNNI
#define VEC_ROWS 4
#define VEC_ALIKE 1
enum { VEC_Q8_BIAS = 128 };
#else
#define VEC_ROWS 4
#define VEC_ALIKE 0
enum { VEC_Q8_BIAS = 0 };
#endif
#define VEC_HALF_ROWS 3 /* of W beside 4 of x: 12 sums of 8 floats */
#define VEC_QUERIES 6 /* 12 sums in 16 registers of 8 floats */

MK_INLINE __m128i ymm_load(const void *p) { return _mm_loadu_si128(p); }
MK_INLINE vf vf_load_f16(const uint16_t *p) {
    return (vf){_mm256_cvtph_ps(ymm_load(p)), _mm256_cvtph_ps(ymm_load(p + 8))};
}
MK_INLINE void vf_store_f16(uint16_t *p, vf a) {
    _mm_storeu_si128((void *)p, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((void *)(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}
#define YMM_BYTES(cvt, p)                                                                          \
    (vf) { _mm256_cvtepi32_ps(cvt(_mm_loadl_epi64((const void *)(p)))),                              \
           _mm256_cvtepi32_ps(cvt(_mm_loadl_epi64((const void *)((p) + 8)))) }
MK_INLINE vf vf_load_u8(const uint8_t *p) { return YMM_BYTES(_mm256_cvtepu8_epi32, p); }
MK_INLINE vf vf_load_i8(const uint8_t *p) { return YMM_BYTES(_mm256_cvtepi8_epi32, p); }
#define VEC_LOOKUP
MK_INLINE __m256 ymm_lookup(__m256 low, __m256 high, const uint8_t *p, const int shift) { /* bit 3 says which half */
    __m256i at = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p));
    __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28 - shift));
    if (shift) at = _mm256_srli_epi32(at, shift);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, at), _mm256_permutevar8x32_ps(high, at), upper);
}
MK_INLINE vf vf_lookup(const float *table, const uint8_t *p, const int shift) {
    const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
    return (vf){ymm_lookup(low, high, p, shift), ymm_lookup(low, high, p + 8, shift)};
}
#define YMM_BF16(p) _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(ymm_load(p)), 16))
MK_INLINE vf vf_load_bf16(const uint16_t *p) { return (vf){YMM_BF16(p), YMM_BF16(p + 8)}; }
MK_INLINE __m256 ymm_even(const uint16_t *p) { /* of 16 BF16 */
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const void *)p), 16));
}
MK_INLINE vf vf_even(const uint16_t *p) { return (vf){ymm_even(p), ymm_even(p + 16)}; }
MK_INLINE vf vf_fma(vf a, vf b, vf c) {
    return (vf){_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
#define VEC_PARTS 2 /* of a vector, each in a register */
typedef __m256 vr;
MK_INLINE vr *vr_of(vf *a, const int part) { return part ? &a->hi : &a->lo; }
MK_INLINE vr vr_zero(void) { return _mm256_setzero_ps(); }
MK_INLINE vr vr_set1(float x) { return _mm256_set1_ps(x); }
MK_INLINE vr vr_load(const float *p) { return _mm256_loadu_ps(p); }
MK_INLINE vr vr_keep(vr a) { __asm__("" : "+x"(a)); return a; } /* in a register: one load serves several uses */
MK_INLINE vr vr_fma(vr a, vr b, vr c) { return _mm256_fmadd_ps(a, b, c); }
MK_INLINE vr vr_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(ymm_load(p)); }
MK_INLINE vr vr_bf16(const uint16_t *p, const long even) { /* of 16 BF16 the odd ones or the even ones */
#define YMM_PLACES(a, b) -1, -1, a, b, -1, -1, 4 + a, 4 + b, -1, -1, 8 + a, 8 + b, -1, -1, 12 + a, 12 + b
    static const int8_t places[2][32] = {{YMM_PLACES(2, 3), YMM_PLACES(2, 3)}, {YMM_PLACES(0, 1), YMM_PLACES(0, 1)}};
    const __m256i of = _mm256_loadu_si256((const void *)places[even]);
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_loadu_si256((const void *)p), of));
}
MK_INLINE vf vf_from(vi a) { return (vf){_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
MK_INLINE vi vi_trunc(vf a) { return (vi){_mm256_cvttps_epi32(a.lo), _mm256_cvttps_epi32(a.hi)}; }
MK_INLINE vi vi_bits(vf a) { return (vi){_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
MK_INLINE vi vi_set1(int32_t x) { __m256i v = _mm256_set1_epi32(x); return (vi){v, v}; }
MK_INLINE vi vi_add(vi a, vi b) { return (vi){_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
MK_INLINE vi vi_sub(vi a, vi b) { return (vi){_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
MK_INLINE vi vi_half(vi a) { return (vi){_mm256_srai_epi32(a.lo, 1), _mm256_srai_epi32(a.hi, 1)}; }
MK_INLINE vf vf_pow2(vi a) {
    a = vi_add(a, vi_set1(127));
    return (vf){_mm256_castsi256_ps(_mm256_slli_epi32(a.lo, 23)), _mm256_castsi256_ps(_mm256_slli_epi32(a.hi, 23))};
}
MK_INLINE void vi_store_i8(int8_t *p, vi a) {
    __m256i pairs = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), _MM_SHUFFLE(3, 1, 2, 0));
    _mm_storeu_si128((void *)p, _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
}
MK_INLINE void vi_store_sums(int32_t *p, vi a) {
    const __m256i w = _mm256_add_epi32(a.lo, a.hi);
    _mm_storeu_si128((void *)p, _mm_add_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
}

MK_INLINE vb vb_load(const uint8_t *p) {
    return (vb){_mm256_loadu_si256((const void *)p), _mm256_loadu_si256((const void *)(p + 32))};
}
MK_INLINE __m256i ymm_bits(__m256i a, const int from, const int mask, const int to) {
    a = from < to ? _mm256_slli_epi16(a, to - from) : _mm256_srli_epi16(a, from - to);
    return _mm256_and_si256(a, _mm256_set1_epi8((char)(mask << to)));
}
MK_INLINE vb vb_bits(vb a, const int from, const int mask, const int to) {
    return (vb){ymm_bits(a.lo, from, mask, to), ymm_bits(a.hi, from, mask, to)};
}
MK_INLINE vb vb_or(vb a, vb b) { return (vb){_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
MK_INLINE vb vb_table(const int8_t *table, vb nibbles) {
    __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)table));
    return (vb){_mm256_shuffle_epi8(all, nibbles.lo), _mm256_shuffle_epi8(all, nibbles.hi)};
}
MK_INLINE void vb_zip(vb low, vb high, uint8_t *a, uint8_t *b) {
    _mm256_storeu_si256((void *)a, _mm256_unpacklo_epi8(low.lo, high.lo));
    _mm256_storeu_si256((void *)(a + 32), _mm256_unpacklo_epi8(low.hi, high.hi));
    _mm256_storeu_si256((void *)b, _mm256_unpackhi_epi8(low.lo, high.lo));
    _mm256_storeu_si256((void *)(b + 32), _mm256_unpackhi_epi8(low.hi, high.hi));
}
MK_INLINE __m256i ymm_x4(const int8_t *x) { int32_t v; memcpy(&v, x, 4); return _mm256_set1_epi32(v); }

MK_INLINE void vb_store(uint8_t *p, vb a) {
    _mm256_storeu_si256((void *)p, a.lo);
    _mm256_storeu_si256((void *)(p + 32), a.hi);
}
MK_INLINE vb vb_raise(vb a, const int by) {
    __m256i all = _mm256_set1_epi8((char)by);
    return (vb){_mm256_add_epi8(a.lo, all), _mm256_add_epi8(a.hi, all)};
}

#ifdef VEC_VNNI
MK_INLINE vb vb_signed(vb a) {
    __m256i flip = _mm256_set1_epi8(-128);
    return (vb){_mm256_xor_si256(a.lo, flip), _mm256_xor_si256(a.hi, flip)};
}
typedef struct { char none; } vp;
MK_INLINE void vb_multiply(const int bits, const int g, const int last, vb w, vb size, const int8_t *x, vi *dot,
                           vp *pairs) {
    (void)bits, (void)last, (void)size, (void)pairs;
    __m256i xg = ymm_x4(x + 4 * g);
    dot->lo = _mm256_dpbusd_avx_epi32(dot->lo, w.lo, xg);
    dot->hi = _mm256_dpbusd_avx_epi32(dot->hi, w.hi, xg);
}
#else
/* Added one after the other: if a compiler adds them as a tree, it spills all products first. */
MK_INLINE __m256i ymm_keep(__m256i a) { __asm__("" : "+x"(a)); return a; }
MK_INLINE vb vb_signed(vb a) { return a; }
MK_INLINE vb vb_size(vb a) { return (vb){_mm256_abs_epi8(a.lo), _mm256_abs_epi8(a.hi)}; }
MK_INLINE vb vb_negative(vb a) { /* -1, or 0 */
    const __m256i zero = _mm256_setzero_si256();
    return (vb){_mm256_cmpgt_epi8(zero, a.lo), _mm256_cmpgt_epi8(zero, a.hi)};
}
typedef vi vp;
MK_INLINE void ymm_multiply(const int bits, const int g, const int last, __m256i w, __m256i size, __m256i x,
                            __m256i *dot, __m256i *pairs) {
    if (bits == 8) x = _mm256_sign_epi8(x, w), w = size;
    if (bits == MK_FLIPPED) x = _mm256_xor_si256(x, w), w = size;
    const __m256i products = _mm256_maddubs_epi16(w, x);
    *pairs = MK_FIRST_PAIRS(bits, g) ? products : ymm_keep(_mm256_add_epi16(*pairs, products));
    if (MK_LAST_PAIRS(bits, g, last))
        *dot = ymm_keep(_mm256_add_epi32(*dot, _mm256_madd_epi16(*pairs, _mm256_set1_epi16(1))));
}
MK_INLINE vp vp_set(const int16_t *pair) { const __m256i all = ymm_x4((const void *)pair); return (vp){all, all}; }
MK_INLINE vi vp_times(vp a, vi words) { return (vi){_mm256_madd_epi16(a.lo, words.lo), _mm256_madd_epi16(a.hi, words.hi)}; }
MK_INLINE vi vi_words(vi a) { /* the lower word in both */
    return (vi){_mm256_blend_epi16(a.lo, _mm256_slli_epi32(a.lo, 16), 0xaa),
                _mm256_blend_epi16(a.hi, _mm256_slli_epi32(a.hi, 16), 0xaa)};
}
MK_INLINE void vb_multiply(const int bits, const int g, const int last, vb w, vb size, const int8_t *x, vi *dot,
                           vp *pairs) {
    __m256i xg = ymm_x4(x + 4 * g);
    ymm_multiply(bits, g, last, w.lo, size.lo, xg, &dot->lo, &pairs->lo);
    ymm_multiply(bits, g, last, w.hi, size.hi, xg, &dot->hi, &pairs->hi);
}
#endif

#endif
