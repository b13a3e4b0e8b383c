/* IEEE half precision in integers, equal to the hardware's conversions: nearest even, subnormals, quiet NaNs. */
#ifndef MK_HALF_H
#define MK_HALF_H

#include <stdint.h>
#include <string.h>

static inline uint32_t mk_float_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

static inline float mk_bits_float(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

static inline float mk_from_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) /* inf, NaN */
        return mk_bits_float(sign | 0x7f800000u | rest << 13 | (rest > 0x7c00 ? 0x400000u : 0));
    if (rest < 0x0400) { /* subnormal: a multiple of 2^-24 */
        float x = (float)rest * 0x1p-24f;
        return sign ? -x : x;
    }
    return mk_bits_float(sign | ((rest << 13) + 0x38000000u));
}

/* 2^(e - 128): half of the scale of an MX block, because the table has doubled e2m1 numbers. */
static inline float mk_from_e8m0(uint8_t e) {
    return mk_bits_float(e < 2 ? 0x00200000u << e : (uint32_t)(e - 1) << 23);
}

static inline uint16_t mk_to_f16(float x) {
    uint32_t u = mk_float_bits(x), sign = u >> 16 & 0x8000;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return (uint16_t)(sign | 0x7e00 | (u >> 13 & 0x3ff));
    if (u >= 0x47800000u) return (uint16_t)(sign | 0x7c00); /* 65536 and more */
    if (u < 0x38800000u) /* below 2^-14: let the addition round to multiples of 2^-24 */
        return (uint16_t)(sign | (mk_float_bits(mk_bits_float(u) + 0.5f) - 0x3f000000u));
    return (uint16_t)(sign | ((u - 0x38000000u + 0xfff + (u >> 13 & 1)) >> 13));
}

static inline float mk_from_bf16(uint16_t h) { return mk_bits_float((uint32_t)h << 16); }

#endif
