/* The codes of blocks with an F32 scale and codes that stand for floats.
 *
 * FP8: e4m3 numbers.  NVFP4: e2m1 numbers with an e4m3 scale for each 16 columns.  NF4: numbers of bitsandbytes' table.
 * Nibbles: the low halves of 16 bytes are the first 16 of 32 columns, the high ones the others.  The bits of an e4m3
 * number are those of the F16 number 2^-8 times as large.  So the looked-up numbers of FP8 and NVFP4 are 2^-8 times their
 * values, and the scale of a block is multiplied by 2^8.  Both are exact. */

static const float NF4_NUMBERS[16] = {MK_NF4_VALUES(MK_AS_IT_IS)};
#define HALVED(value) (value) * 0.5f,
static const float E2M1_NUMBERS[16] = {MK_E2M1_VALUES(HALVED)};

/* 16 e4m3 numbers times 2^-8; the codes of NaN stand for 480. */
MK_INLINE vf vf_load_e4m3(const uint8_t *p) {
    uint16_t half[MK_TILE];
    for (int j = 0; j < MK_TILE; j++) half[j] = (uint16_t)((int16_t)(uint16_t)(p[j] << 8) >> 1 & 0xbfff);
    return vf_load_f16(half);
}

/* The factor of the numbers of a block's codes. */
MK_INLINE float scaled_unit(const int type, const uint8_t *block) {
    float d;
    memcpy(&d, block, 4);
    return type == MK_NF4 ? d : d * 256.0f;
}

/* The scales of an NVFP4 block, each for 16 columns. */
MK_INLINE void scaled_parts(const int type, const uint8_t *block, float *scales) {
    if (type == MK_NVFP4) vf_store(scales, vf_load_e4m3(block + 4));
}

/* The first or the second 16 of 32 columns of a block. */
MK_INLINE vf scaled_numbers(const int type, const uint8_t *block, const float *scales, int pair, const int half) {
    if (type == MK_FP8) return vf_load_e4m3(block + 4 + MK_BLOCK * pair + MK_TILE * half);
    const uint8_t *nibbles = block + (type == MK_NVFP4 ? 12 : 4) + MK_TILE * pair;
    const vf numbers = vf_lookup(type == MK_NF4 ? NF4_NUMBERS : E2M1_NUMBERS, nibbles, 4 * half);
    return type == MK_NVFP4 ? vf_mul(numbers, vf_set1(scales[2 * pair + half])) : numbers;
}
