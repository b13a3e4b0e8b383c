/* The layer for AVX alone (no FMA, no 256-bit integers, no F16C). */
#ifndef MK_VEC_H
#define MK_VEC_H

#include "half.h"
#include "vec_ymm.h"

typedef struct { __m128i q[4]; } vi;
typedef vi vb;

#define VEC_ROWS 4
#define VEC_QUERIES 4
#define VEC_ALIKE 0
enum { VEC_Q8_BIAS = 0 };

#define QUARTERS for (int j = 0; j < 4; j++)
#define XMM(name, args, value) MK_INLINE vi name args { vi r; QUARTERS r.q[j] = (value); return r; }
#define WIDEN(a, b) _mm256_insertf128_si256(_mm256_castsi128_si256(a), b, 1)
#define NARROW(a) {_mm256_castsi256_si128((a).lo), _mm256_extractf128_si256((a).lo, 1), \
                   _mm256_castsi256_si128((a).hi), _mm256_extractf128_si256((a).hi, 1)}

MK_INLINE vf vf_load_f16(const uint16_t *p) {
    float x[16];
    for (int j = 0; j < 16; j++) x[j] = mk_from_f16(p[j]);
    return vf_load(x);
}
MK_INLINE void vf_store_f16(uint16_t *p, vf a) {
    float x[16];
    vf_store(x, a);
    for (int j = 0; j < 16; j++) p[j] = mk_to_f16(x[j]);
}
MK_INLINE vf vf_load_bf16(const uint16_t *p) {
    __m128i zero = _mm_setzero_si128(), a = _mm_loadu_si128((const void *)p), b = _mm_loadu_si128((const void *)(p + 8));
    return (vf){_mm256_castsi256_ps(WIDEN(_mm_unpacklo_epi16(zero, a), _mm_unpackhi_epi16(zero, a))),
                _mm256_castsi256_ps(WIDEN(_mm_unpacklo_epi16(zero, b), _mm_unpackhi_epi16(zero, b)))};
}
MK_INLINE __m256 avx_even(const uint16_t *p) { /* of 16 BF16 */
    __m128i a = _mm_loadu_si128((const void *)p), b = _mm_loadu_si128((const void *)(p + 8));
    return _mm256_castsi256_ps(WIDEN(_mm_slli_epi32(a, 16), _mm_slli_epi32(b, 16)));
}
MK_INLINE vf vf_even(const uint16_t *p) { return (vf){avx_even(p), avx_even(p + 16)}; }

/* fma of four floats.  In double precision the product is exact.  The sum is rounded to odd (its error, exact by TwoSum,
 * decides in which direction); rounding that to 24 bits equals rounding the exact sum (Boldo and Melquiond). */
MK_INLINE __m128 avx_fma4(__m128 a, __m128 b, __m128 c) {
    __m256d p = _mm256_mul_pd(_mm256_cvtps_pd(a), _mm256_cvtps_pd(b)), d = _mm256_cvtps_pd(c);
    __m256d s = _mm256_add_pd(p, d), t = _mm256_sub_pd(s, p);
    __m256d error = _mm256_add_pd(_mm256_sub_pd(p, _mm256_sub_pd(s, t)), _mm256_sub_pd(d, t));
    __m256i inexact = _mm256_castpd_si256(_mm256_cmp_pd(error, _mm256_setzero_pd(), _CMP_NEQ_OQ));
    __m256i away = _mm256_castpd_si256(_mm256_xor_pd(error, s)), bits = _mm256_castpd_si256(s);
    __m128i half[2];
    for (int j = 0; j < 2; j++) {
        __m128i u = j ? _mm256_extractf128_si256(bits, 1) : _mm256_castsi256_si128(bits);
        __m128i mask = j ? _mm256_extractf128_si256(inexact, 1) : _mm256_castsi256_si128(inexact);
        __m128i sign = j ? _mm256_extractf128_si256(away, 1) : _mm256_castsi256_si128(away);
        __m128i step = _mm_and_si128(_mm_andnot_si128(u, mask), _mm_set_epi32(0, 1, 0, 1)); /* 1 where even, inexact */
        sign = _mm_shuffle_epi32(_mm_srai_epi32(sign, 31), _MM_SHUFFLE(3, 3, 1, 1));        /* -1: towards zero */
        half[j] = _mm_add_epi64(u, _mm_sub_epi64(_mm_xor_si128(step, sign), sign));
    }
    return _mm256_cvtpd_ps(_mm256_castsi256_pd(WIDEN(half[0], half[1])));
}
/* Not inlined, because it is long. */
static __attribute__((noinline)) __m256 avx_fma8(__m256 a, __m256 b, __m256 c) {
    __m128 lo = avx_fma4(_mm256_castps256_ps128(a), _mm256_castps256_ps128(b), _mm256_castps256_ps128(c));
    __m128 hi = avx_fma4(_mm256_extractf128_ps(a, 1), _mm256_extractf128_ps(b, 1), _mm256_extractf128_ps(c, 1));
    return _mm256_insertf128_ps(_mm256_castps128_ps256(lo), hi, 1);
}
MK_INLINE vf vf_fma(vf a, vf b, vf c) { return (vf){avx_fma8(a.lo, b.lo, c.lo), avx_fma8(a.hi, b.hi, c.hi)}; }

MK_INLINE vf vf_from(vi a) {
    return (vf){_mm256_cvtepi32_ps(WIDEN(a.q[0], a.q[1])), _mm256_cvtepi32_ps(WIDEN(a.q[2], a.q[3]))};
}
MK_INLINE vi vi_trunc(vf a) {
    struct { __m256i lo, hi; } r = {_mm256_cvttps_epi32(a.lo), _mm256_cvttps_epi32(a.hi)};
    return (vi){NARROW(r)};
}
MK_INLINE vi vi_bits(vf a) {
    struct { __m256i lo, hi; } r = {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)};
    return (vi){NARROW(r)};
}
MK_INLINE __m128i avx_word(const uint8_t *p) { int32_t v; memcpy(&v, p, 4); return _mm_cvtsi32_si128(v); }
MK_INLINE vf vf_load_u8(const uint8_t *p) {
    vi r;
    QUARTERS r.q[j] = _mm_cvtepu8_epi32(avx_word(p + 4 * j));
    return vf_from(r);
}
MK_INLINE vf vf_load_i8(const uint8_t *p) {
    vi r;
    QUARTERS r.q[j] = _mm_cvtepi8_epi32(avx_word(p + 4 * j));
    return vf_from(r);
}
XMM(vi_set1, (int32_t x), _mm_set1_epi32(x))
XMM(vi_add, (vi a, vi b), _mm_add_epi32(a.q[j], b.q[j]))
XMM(vi_sub, (vi a, vi b), _mm_sub_epi32(a.q[j], b.q[j]))
XMM(vi_half, (vi a), _mm_srai_epi32(a.q[j], 1))
MK_INLINE vf vf_pow2(vi a) {
    QUARTERS a.q[j] = _mm_slli_epi32(_mm_add_epi32(a.q[j], _mm_set1_epi32(127)), 23);
    return (vf){_mm256_castsi256_ps(WIDEN(a.q[0], a.q[1])), _mm256_castsi256_ps(WIDEN(a.q[2], a.q[3]))};
}
MK_INLINE void vi_store_i8(int8_t *p, vi a) {
    __m128i lo = _mm_packs_epi32(a.q[0], a.q[1]), hi = _mm_packs_epi32(a.q[2], a.q[3]);
    _mm_storeu_si128((void *)p, _mm_packs_epi16(lo, hi));
}
MK_INLINE void vi_store_sums(int32_t *p, vi a) {
    _mm_storeu_si128((void *)p, _mm_add_epi32(_mm_add_epi32(a.q[0], a.q[1]), _mm_add_epi32(a.q[2], a.q[3])));
}

XMM(vb_load, (const uint8_t *p), _mm_loadu_si128((const void *)(p + 16 * j)))
MK_INLINE vb vb_bits(vb a, const int from, const int mask, const int to) {
    QUARTERS {
        a.q[j] = from < to ? _mm_slli_epi16(a.q[j], to - from) : _mm_srli_epi16(a.q[j], from - to);
        a.q[j] = _mm_and_si128(a.q[j], _mm_set1_epi8((char)(mask << to)));
    }
    return a;
}
XMM(vb_or, (vb a, vb b), _mm_or_si128(a.q[j], b.q[j]))
XMM(vb_table, (const int8_t *table, vb a), _mm_shuffle_epi8(_mm_loadu_si128((const void *)table), a.q[j]))
MK_INLINE void vb_zip(vb low, vb high, uint8_t *a, uint8_t *b) {
    QUARTERS {
        _mm_storeu_si128((void *)(a + 16 * j), _mm_unpacklo_epi8(low.q[j], high.q[j]));
        _mm_storeu_si128((void *)(b + 16 * j), _mm_unpackhi_epi8(low.q[j], high.q[j]));
    }
}
MK_INLINE vb vb_signed(vb a) { return a; }
XMM(vb_size, (vb a), _mm_abs_epi8(a.q[j]))
XMM(vb_negative, (vb a), _mm_cmpgt_epi8(_mm_setzero_si128(), a.q[j])) /* -1, or 0 */
MK_INLINE __m128i avx_x4(const int8_t *x) { int32_t v; memcpy(&v, x, 4); return _mm_set1_epi32(v); }

MK_INLINE void vb_store(uint8_t *p, vb a) { QUARTERS _mm_storeu_si128((void *)(p + 16 * j), a.q[j]); }
XMM(vb_raise, (vb a, const int by), _mm_add_epi8(a.q[j], _mm_set1_epi8((char)by)))

typedef vi vp;
MK_INLINE vp vp_set(const int16_t *pair) { const __m128i all = avx_x4((const void *)pair); return (vp){{all, all, all, all}}; }
XMM(vp_times, (vp a, vi words), _mm_madd_epi16(a.q[j], words.q[j]))
XMM(vi_words, (vi a), _mm_blend_epi16(a.q[j], _mm_slli_epi32(a.q[j], 16), 0xaa)) /* the lower word in both */
MK_INLINE void vb_multiply(const int bits, const int g, const int last, vb w, vb size, const int8_t *x, vi *dot,
                           vp *pairs) {
    const __m128i xg = avx_x4(x + 4 * g), one = _mm_set1_epi16(1);
    QUARTERS {
        __m128i products = _mm_maddubs_epi16(w.q[j], xg);
        if (bits == 8) products = _mm_maddubs_epi16(size.q[j], _mm_sign_epi8(xg, w.q[j]));
        if (bits == MK_FLIPPED) products = _mm_maddubs_epi16(size.q[j], _mm_xor_si128(xg, w.q[j]));
        pairs->q[j] = MK_FIRST_PAIRS(bits, g) ? products : _mm_add_epi16(pairs->q[j], products);
        if (MK_LAST_PAIRS(bits, g, last)) dot->q[j] = _mm_add_epi32(dot->q[j], _mm_madd_epi16(pairs->q[j], one));
    }
}

#endif
