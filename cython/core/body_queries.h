/* Computes scores of keys and sums of values for a tile of queries and one block of the KV cache.  The queries of a tile
 * stay in registers; their number depends on the path. */

/* p [Q][32] = the scores of the block: q [hd][Q] times keys.  Prefetches `next`. */
HOT void scores(const int type, const int Q, const float *q, const uint8_t *keys, const uint8_t *next, int hd,
                float *p) {
    const int part = type == MK_Q8_0 ? MK_BLOCK : hd, line = mk_kv_bytes(type, 1);
    for (int vector = 0; vector < MK_KV_BLOCK / MK_TILE; vector += KEY_VECTORS) {
        vf acc[VEC_QUERIES][KEY_VECTORS];
        UNROLL
        for (int j = 0; j < Q; j++)
            for (int v = 0; v < KEY_VECTORS; v++) acc[j][v] = vf_set1(0.0f);
        for (long begin = 0; begin < hd; begin += part) {
            vf scale[KEY_VECTORS];
            for (int v = 0; v < KEY_VECTORS; v++)
                scale[v] = type != MK_Q8_0 ? vf_set1(1.0f)
                                           : vf_load_f16((const uint16_t *)keys + begin + (vector + v) * MK_TILE);
            for (long i = begin; i < begin + part; i++) {
                vf key[KEY_VECTORS];
                if (!vector) FETCH(next + i * line);
                UNROLL
                for (int v = 0; v < KEY_VECTORS; v++) key[v] = load_keys(type, keys, hd, i, vector + v, scale[v]);
                UNROLL
                for (int j = 0; j < Q; j++) {
                    vf x = vf_set1(q[i * Q + j]);
                    UNROLL
                    for (int v = 0; v < KEY_VECTORS; v++) acc[j][v] = vf_fma(x, key[v], acc[j][v]);
                }
            }
        }
        UNROLL
        for (int j = 0; j < Q; j++)
            for (int v = 0; v < KEY_VECTORS; v++) vf_store(p + j * MK_KV_BLOCK + (vector + v) * MK_TILE, acc[j][v]);
    }
}

/* Columns i .. of C vectors: sums [Q][lanes] += p [Q][32] times values, token by token. */
HOT void mix_columns(const int type, const int Q, const int C, const int rest, const float *p, const uint8_t *values,
                     const uint8_t *next, int hd, long from, long to, float *sums, long lanes, long i) {
    const int bytes = type == MK_F32 ? 4 : type == MK_F16 ? 2 : 1, scale_bytes = type == MK_Q8_0 ? 2 * hd : 0;
    float scales[MAX_COLUMNS][MK_KV_BLOCK];
    vf acc[VEC_QUERIES][MAX_COLUMNS];
    if (type == MK_Q8_0)
        for (int c = 0; c < C; c++)
            for (int t = 0; t < MK_KV_BLOCK; t += MK_TILE)
                vf_store(scales[c] + t,
                         vf_load_f16((const uint16_t *)values + (i + c * MK_TILE) / MK_BLOCK * MK_BLOCK + t));
    UNROLL
    for (int j = 0; j < Q; j++)
        UNROLL
        for (int c = 0; c < C; c++) acc[j][c] = vf_load(sums + j * lanes + i + c * MK_TILE);
    if (!i)
        for (int line = 0; line < scale_bytes; line += 64) FETCH(next + line);
    for (long token = from; token <= to; token++) {
        vf value[MAX_COLUMNS];
        for (int line = 0; line < C * MK_TILE * bytes; line += 64)
            FETCH(next + scale_bytes + (token * hd + i) * bytes + line);
        UNROLL
        for (int c = 0; c < C; c++) value[c] = load_values(type, rest, values, hd, token, i + c * MK_TILE, scales[c]);
        UNROLL
        for (int j = 0; j < Q; j++) {
            vf x = vf_set1(p[j * MK_KV_BLOCK + token]);
            UNROLL
            for (int c = 0; c < C; c++) acc[j][c] = vf_fma(x, value[c], acc[j][c]);
        }
    }
    UNROLL
    for (int j = 0; j < Q; j++)
        UNROLL
        for (int c = 0; c < C; c++) vf_store(sums + j * lanes + i + c * MK_TILE, acc[j][c]);
}

HOT void mix(const int type, const int Q, const float *p, const uint8_t *values, const uint8_t *next, int hd,
             long from, long to, float *sums, long lanes) {
    long i = 0;
    for (; i + COLUMNS(Q) * MK_TILE <= hd; i += COLUMNS(Q) * MK_TILE)
        mix_columns(type, Q, COLUMNS(Q), 0, p, values, next, hd, from, to, sums, lanes, i);
    for (; i + MK_TILE <= hd; i += MK_TILE)
        mix_columns(type, Q, 1, 0, p, values, next, hd, from, to, sums, lanes, i);
    if (type != MK_Q8_0 && i < hd) mix_columns(type, Q, 1, 1, p, values, next, hd, from, to, sums, lanes, i);
}

typedef struct {
    void (*scores)(const float *q, const uint8_t *keys, const uint8_t *next, int hd, float *p);
    void (*mix)(const float *p, const uint8_t *values, const uint8_t *next, int hd, long from, long to, float *sums,
                long lanes);
} query_tile;

#define QUERY_TILE(type, Q)                                                                                        \
    static void scores_##type##_##Q(const float *q, const uint8_t *keys, const uint8_t *next, int hd, float *p) {  \
        scores(type, Q, q, keys, next, hd, p);                                                                     \
    }                                                                                                              \
    static void mix_##type##_##Q(const float *p, const uint8_t *values, const uint8_t *next, int hd, long from,    \
                                 long to, float *sums, long lanes) {                                               \
        mix(type, Q, p, values, next, hd, from, to, sums, lanes);                                                  \
    }
#define QUERY_PAIR(type, Q) {scores_##type##_##Q, mix_##type##_##Q},
EACH_SHAPE(QUERY_TILE, MK_F32)
EACH_SHAPE(QUERY_TILE, MK_F16)
EACH_SHAPE(QUERY_TILE, MK_Q8_0)
static const query_tile QUERY_TILE_FUNCTIONS[MK_TYPES][QUERY_SHAPES] = {
    [MK_F32] = {EACH_SHAPE(QUERY_PAIR, MK_F32)},
    [MK_F16] = {EACH_SHAPE(QUERY_PAIR, MK_F16)},
    [MK_Q8_0] = {EACH_SHAPE(QUERY_PAIR, MK_Q8_0)},
};
