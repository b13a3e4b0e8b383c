/* Blocks of codes that stand for floats, behind the F32 scale of all of them: what the codes are.
 *
 * FP8: e4m3 numbers.  NVFP4: e2m1 numbers, behind an e4m3 scale for each 16 columns.  NF4: numbers of bitsandbytes' table.
 * Nibbles: the low halves of 16 bytes are the first 16 of 32 columns, the high ones the others.  The bits of an e4m3
 * number are those of an F16 number that is 2^-8 of it, so what is looked up is 2^-8 of what the codes of FP8 and NVFP4
 * stand for, and the block's scale is 2^8 times as large.  Both are exact. */

static const float NF4_NUMBERS[16] = {MK_NF4_VALUES(MK_AS_IT_IS)};
#define HALVED(value) (value) * 0.5f,
static const float E2M1_NUMBERS[16] = {MK_E2M1_VALUES(HALVED)};

/* 2^-8 of 16 e4m3 numbers; the codes of NaN count as 480. */
MK_INLINE vf vf_load_e4m3(const uint8_t *p) {
    uint16_t half[MK_TILE];
    for (int j = 0; j < MK_TILE; j++) half[j] = (uint16_t)((int16_t)(uint16_t)(p[j] << 8) >> 1 & 0xbfff);
    return vf_load_f16(half);
}

/* What the scale of a block of a row is multiplied by its codes' numbers. */
MK_INLINE float scaled_unit(const int type, const uint8_t *block) {
    float d;
    memcpy(&d, block, 4);
    return type == MK_NF4 ? d : d * 256.0f;
}

/* The scales of 16 columns each that a block of NVFP4 has. */
MK_INLINE void scaled_parts(const int type, const uint8_t *block, float *scales) {
    if (type == MK_NVFP4) vf_store(scales, vf_load_e4m3(block + 4));
}

/* The first 16 of 32 columns of a block, or the others. */
MK_INLINE vf scaled_numbers(const int type, const uint8_t *block, const float *scales, int pair, const int half) {
    if (type == MK_FP8) return vf_load_e4m3(block + 4 + MK_BLOCK * pair + MK_TILE * half);
    const uint8_t *nibbles = block + (type == MK_NVFP4 ? 12 : 4) + MK_TILE * pair;
    const vf numbers = vf_lookup(type == MK_NF4 ? NF4_NUMBERS : E2M1_NUMBERS, nibbles, 4 * half);
    return type == MK_NVFP4 ? vf_mul(numbers, vf_set1(scales[2 * pair + half])) : numbers;
}
