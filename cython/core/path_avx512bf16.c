#include "path.h"

#ifdef MK_X86
MK_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma,f16c")
#define VEC_VNNI
#define VEC_BF16
#include "vec_avx512.h"

#define NAME avx512bf16
#define LIKE avx512
#include "body.h"

static uint32_t next(uint32_t *state) { return *state = *state * 1664525u + 1013904223u; }

/* Operands for the check below: 32 BF16 or 16 floats with random bits and a range of exponents. */
static vf some(uint32_t *state, uint32_t exponents, int first) {
    uint32_t bits[MK_TILE];
    for (int j = 0; j < MK_TILE; j++) {
        uint32_t low = next(state) >> 16, high = next(state) & 0xffff0000u;
        bits[j] = high | low;
        for (int half = 0; half < 32; half += 16) {
            uint32_t exponent = (uint32_t)first + (next(state) >> 8) % exponents;
            bits[j] = (bits[j] & ~(0x7f80u << half)) | exponent << 7 << half;
        }
    }
    return vf_load((const float *)(const void *)bits);
}

/* Compares VDPBF16PS with two fma on ties, cancelling sums, denormal operands and denormal products. */
int mk_pairs_are_chains(void) {
    static const int FROM[] = {0, 60, 120, 126, 150}, UP_TO[] = {60, 10, 14, 3, 12};
    uint32_t state = 1;
    unsigned mode = mk_flush_denormals(), same = 1;
    for (int round = 0; round < 1000 && same; round++) {
        int kind = round % 5;
        vf w = some(&state, (uint32_t)UP_TO[kind], FROM[kind]), x = some(&state, (uint32_t)UP_TO[kind], FROM[kind]);
        float ws[MK_TILE], xs[MK_TILE];
        vf_store(ws, w), vf_store(xs, x);
        vf w_odd = vf_odd((const void *)ws), x_odd = vf_odd((const void *)xs);
        vf w_even = vf_even((const void *)ws), x_even = vf_even((const void *)xs);
        vf y = some(&state, (uint32_t)UP_TO[kind], FROM[kind]);
        if (round & 8) y = vf_sub(vf_set1(0.0f), vf_fma(w_odd, x_odd, vf_mul(w_even, x_even))); /* cancels */
        vf want = vf_fma(w_even, x_even, vf_fma(w_odd, x_odd, y)), got = vf_pairs(w, x, y);
        same &= _mm512_cmpeq_epi32_mask(_mm512_castps_si512(want), _mm512_castps_si512(got)) == 0xffff;
    }
    mk_restore(mode);
    return (int)same;
}
MK_TARGET_END
#endif
