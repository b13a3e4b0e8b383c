/* Floats of the vector layer in two 256-bit halves, shared by AVX and AVX2. */
#include <immintrin.h>
#include <string.h>

#include "path.h"

typedef struct { __m256 lo, hi; } vf;

enum { VEC_FETCHES = 1 };
enum { VEC_SUMS = 4 };

MK_INLINE vf vf_keep(vf a) { __asm__("" : "+x"(a.lo), "+x"(a.hi)); return a; }
#define YMM(name, op) MK_INLINE vf name(vf a, vf b) { return (vf){op(a.lo, b.lo), op(a.hi, b.hi)}; }

MK_INLINE vf vf_load(const float *p) { return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
MK_INLINE __m256 ymm_odd(const uint16_t *p) { /* of 16 BF16 */
    return _mm256_and_ps(_mm256_loadu_ps((const void *)p), _mm256_castsi256_ps(_mm256_set1_epi32((int)0xffff0000)));
}
MK_INLINE vf vf_odd(const uint16_t *p) { return (vf){ymm_odd(p), ymm_odd(p + 16)}; }
MK_INLINE void vf_store(float *p, vf a) { _mm256_storeu_ps(p, a.lo); _mm256_storeu_ps(p + 8, a.hi); }
MK_INLINE vf vf_set1(float x) { __m256 v = _mm256_set1_ps(x); return (vf){v, v}; }
YMM(vf_add, _mm256_add_ps)
YMM(vf_sub, _mm256_sub_ps)
YMM(vf_mul, _mm256_mul_ps)
YMM(vf_div, _mm256_div_ps)
YMM(vf_max, _mm256_max_ps)
YMM(vf_min, _mm256_min_ps)

MK_INLINE vf vf_abs(vf a) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return (vf){_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}

#define YMM_GT(a, b) _mm256_cmp_ps(a, b, _CMP_GT_OQ)
MK_INLINE vf vf_gt(vf a, vf b, vf x, vf y) {
    return (vf){_mm256_blendv_ps(y.lo, x.lo, YMM_GT(a.lo, b.lo)), _mm256_blendv_ps(y.hi, x.hi, YMM_GT(a.hi, b.hi))};
}
MK_INLINE int vf_any_gt(vf a, vf b) {
    return _mm256_movemask_ps(_mm256_or_ps(YMM_GT(a.lo, b.lo), YMM_GT(a.hi, b.hi))) != 0;
}

#define YMM_FOLD(op)                                                                                  \
    __m256 w = _mm256_##op##_ps(a.lo, a.hi);                                                          \
    __m128 x = _mm_##op##_ps(_mm256_castps256_ps128(w), _mm256_extractf128_ps(w, 1));                 \
    x = _mm_##op##_ps(x, _mm_movehl_ps(x, x));                                                        \
    return _mm_cvtss_f32(_mm_##op##_ss(x, _mm_movehdup_ps(x)));
MK_INLINE float vf_hadd(vf a) { YMM_FOLD(add) }
MK_INLINE float vf_hmax(vf a) { YMM_FOLD(max) }

/* sum, whose upper half is zero, plus lanes j + (j + 8) of a: the first step of vf_hadd. */
MK_INLINE vf vf_add_halves(vf sum, vf a) { return (vf){_mm256_add_ps(sum.lo, _mm256_add_ps(a.lo, a.hi)), sum.hi}; }

/* The steps of vf_sums (vec_common.h): the lanes of vectors are added, and one vector has what remains of several. */
#define VEC_FOLDS
#define YMM_ADD(shuffle, a, b, low, high) _mm256_add_ps(shuffle(a, b, low), shuffle(a, b, high))
MK_INLINE vf vf_both_halves(vf a, vf b) { /* 8 of each */
    return (vf){_mm256_add_ps(a.lo, a.hi), _mm256_add_ps(b.lo, b.hi)};
}
MK_INLINE vf vf_quarters(vf a, vf b) { /* of two such vectors: 4 of each */
    return (vf){YMM_ADD(_mm256_permute2f128_ps, a.lo, a.hi, 0x20, 0x31),
                YMM_ADD(_mm256_permute2f128_ps, b.lo, b.hi, 0x20, 0x31)};
}
#define YMM_BOTH(a, b, low, high) \
    (vf) { YMM_ADD(_mm256_shuffle_ps, a.lo, b.lo, low, high), YMM_ADD(_mm256_shuffle_ps, a.hi, b.hi, low, high) }
MK_INLINE vf vf_eighths(vf a, vf b) { return YMM_BOTH(a, b, 0x44, 0xee); } /* of two such vectors: 2 of each */
MK_INLINE vf vf_sixteenths(vf a, vf b) { return YMM_BOTH(a, b, 0x88, 0xdd); }
