/* Reads blocks of the KV cache of one head, and converts rows to F16 and Q8_0 to store them.  A block has 32 tokens, keys
 * by dimension, values by token, as F32, F16 or Q8_0 (mk_kv_bytes). */

/* Blocks of heads with more dimensions are not transposed; each tile reads them directly. */
enum { MAX_FLOAT_DIM = 256 };

/* Vector `vector` of the keys of dimension i; scale: the scales of the tokens' Q8_0 blocks. */
MK_INLINE vf load_keys(const int type, const uint8_t *keys, int hd, long i, int vector, vf scale) {
    long at = i * MK_KV_BLOCK + vector * MK_TILE;
    if (type == MK_F32) return vf_load((const float *)keys + at);
    if (type == MK_F16) return vf_load_f16((const uint16_t *)keys + at);
    if (type == MK_Q8_0_INT8) { /* every fourth byte */
        uint8_t bytes[MK_TILE];
        for (int t = 0; t < MK_TILE; t++) bytes[t] = keys[2 * hd + i / 4 * 4 * MK_KV_BLOCK + (vector * MK_TILE + t) * 4 + i % 4];
        return vf_mul(scale, vf_load_i8(bytes));
    }
    return vf_mul(scale, vf_load_i8(keys + 2 * hd + at));
}

/* 16 dimensions of a token's value from i on; with `rest` fewer, padded with zeros. */
MK_INLINE vf load_values(const int type, const int rest, const uint8_t *values, int hd, long token, long i,
                         const float *scales) {
    long at = token * hd + i;
    if (type == MK_Q8_0) return vf_mul(vf_set1(scales[token]), vf_load_i8(values + 2 * hd + at));
    const float *floats = (const float *)values + at;
    if (type == MK_F32) return rest ? vf_load_part(floats, hd - i, 0.0f) : vf_load(floats);
    if (!rest) return vf_load_f16((const uint16_t *)values + at);
    uint16_t half[MK_TILE] = {0};
    memcpy(half, (const uint16_t *)values + at, (size_t)(hd - i) * 2);
    return vf_load_f16(half);
}

/* Convert a head's block to floats, in the same order. */
HOT void block_floats(const int type, const int is_keys, const uint8_t *block, const uint8_t *next, int hd,
                      float *out) {
    const long count = (long)hd * MK_KV_BLOCK;
    for (long i = 0; i < mk_kv_bytes(type, hd); i += 64) FETCH(next + i);
    if (type == MK_F16) {
        for (long i = 0; i < count; i += MK_TILE) vf_store(out + i, vf_load_f16((const uint16_t *)block + i));
        return;
    }
    const uint8_t *q = block + 2 * hd;
    for (long begin = 0; begin < hd; begin += MK_BLOCK) {
        const uint16_t *of_tokens = (const uint16_t *)block + begin;
        const vf scale[2] = {vf_load_f16(of_tokens), vf_load_f16(of_tokens + MK_TILE)};
        float scales[MK_KV_BLOCK];
        for (int half = 0; half < 2; half++) vf_store(scales + half * MK_TILE, scale[half]);
        for (int i = 0; i < MK_BLOCK; i++) /* dimensions of keys, or tokens of values */
            for (int half = 0; half < 2; half++) {
                const long at = (is_keys ? (begin + i) * MK_KV_BLOCK : i * hd + begin) + half * MK_TILE;
                vf_store(out + at, vf_mul(is_keys ? scale[half] : vf_set1(scales[i]), vf_load_i8(q + at)));
            }
    }
}

static void to_floats(int type, int is_keys, const uint8_t *block, const uint8_t *next, int hd, float *out) {
    if (type == MK_F16) block_floats(MK_F16, 0, block, next, hd, out);
    else if (is_keys) block_floats(MK_Q8_0, 1, block, next, hd, out);
    else block_floats(MK_Q8_0, 0, block, next, hd, out);
}

/* Convert the first vd dimensions of a head's keys to its values: floats, token by token. */
HOT void keys_as_values(const int type, const uint8_t *keys, int hd, int vd, float *out) {
    float part[MK_TILE][MK_KV_BLOCK];
    for (int begin = 0; begin < vd; begin += MK_TILE) {
        int count = vd - begin < MK_TILE ? vd - begin : MK_TILE;
        for (int i = 0; i < count; i++)
            for (int vector = 0; vector < MK_KV_BLOCK / MK_TILE; vector++) {
                vf scale = vf_set1(1.0f);
                if (mk_is_kv_int8(type))
                    scale = vf_load_f16((const uint16_t *)keys + begin / MK_BLOCK * MK_BLOCK + vector * MK_TILE);
                vf_store(part[i] + vector * MK_TILE, load_keys(type, keys, hd, begin + i, vector, scale));
            }
        for (int token = 0; token < MK_KV_BLOCK; token++)
            for (int i = 0; i < count; i++) out[(long)token * vd + begin + i] = part[i][token];
    }
}

static void values_of_keys(int type, const uint8_t *keys, int hd, int vd, float *out) {
    if (type == MK_F32) keys_as_values(MK_F32, keys, hd, vd, out);
    else if (type == MK_F16) keys_as_values(MK_F16, keys, hd, vd, out);
    else if (type == MK_Q8_0) keys_as_values(MK_Q8_0, keys, hd, vd, out);
    else keys_as_values(MK_Q8_0_INT8, keys, hd, vd, out);
}

static void to_f16(const float *x, uint16_t *out, long count) {
    for (long i = 0; i < count; i += MK_TILE) {
        uint16_t half[MK_TILE];
        vf_store_f16(half, vf_row(x, i, count, 0.0f));
        memcpy(out + i, half, (size_t)(count - i < MK_TILE ? count - i : MK_TILE) * 2);
    }
}

/* Whole Q8_0 blocks: integers q [count], scales d [count / 32] as F16. */
static void to_q8(const float *x, int8_t *q, uint16_t *d, long count) {
    for (long i = 0; i < count; i += MK_BLOCK) {
        float scale;
        int32_t sums[2][4];
        quantise_q8(vf_load(x + i), vf_load(x + i + MK_TILE), q + i, &scale, sums);
        d[i / MK_BLOCK] = mk_to_f16(scale);
    }
}
