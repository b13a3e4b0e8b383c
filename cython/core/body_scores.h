/* Shapes of tiles of queries, and scores of keys and queries in int8, which every path computes with its products of bytes:
 * keys lie as Q8_0 weights do, 16 tokens as the rows of a tile. */

/* Prefetch into the second-level cache, because the first level allows fewer outstanding misses. */
#define FETCH(p) __builtin_prefetch(p, 0, 2)

#if VEC_QUERIES == 12
enum { KEY_VECTORS = 2, MAX_COLUMNS = 4, QUERY_SHAPES = 5 };
#define COLUMNS(Q) ((Q) > 4 ? 2 : 4)
#define EACH_SHAPE(X, type) X(type, 1) X(type, 2) X(type, 4) X(type, 8) X(type, 12)
#else
enum { KEY_VECTORS = 1, MAX_COLUMNS = 2 };
#define COLUMNS(Q) ((Q) > 2 ? 1 : 2)
#if VEC_QUERIES == 6
enum { QUERY_SHAPES = 4 };
#define EACH_SHAPE(X, type) X(type, 1) X(type, 2) X(type, 4) X(type, 6)
#else
enum { QUERY_SHAPES = 3 };
#define EACH_SHAPE(X, type) X(type, 1) X(type, 2) X(type, 4)
#endif
#endif
#define QUERY_COUNT(type, Q) Q,
static const int QUERIES[QUERY_SHAPES] = {EACH_SHAPE(QUERY_COUNT, )};

/* p [Q][32] = the scores of a block of Q8_0_INT8 keys and of queries x [hd / 32][Q]: exact sums of 32 dimensions, times both
 * scales.  Prefetches `next`. */
HOT void int8_scores(const int Q, const mk_activation *x, const uint8_t *keys, const uint8_t *next, int hd, float *p) {
    const int V = Q > 4 ? 1 : KEY_VECTORS, line = mk_kv_bytes(MK_Q8_0_INT8, MK_BLOCK);
    for (int vector = 0; vector < MK_KV_BLOCK / MK_TILE; vector += V) {
        vf acc[VEC_QUERIES * KEY_VECTORS];
        UNROLL
        for (int j = 0; j < Q * V; j++) acc[j] = vf_set1(0.0f);
        for (long b = 0; b < hd / MK_BLOCK; b++) {
            const uint8_t *q = keys + 2 * hd + b * MK_BLOCK * MK_KV_BLOCK + vector * 64;
            const mk_activation *a = x + b * Q;
            vf scale[KEY_VECTORS];
            vi dots[VEC_QUERIES * KEY_VECTORS];
            vp parts[VEC_QUERIES * KEY_VECTORS];
            for (int at = 0; !vector && at < line; at += 64) FETCH(next + b * line + at);
            for (int v = 0; v < V; v++)
                scale[v] = vf_load_f16((const uint16_t *)keys + b * MK_KV_BLOCK + (vector + v) * MK_TILE);
            UNROLL
            for (int j = 0; j < Q * V; j++) dots[j] = vi_set1(VEC_Q8_BIAS ? a[j / V].offset128 : 0);
            UNROLL
            for (int g = 0; g < 8; g++)
                UNROLL
                for (int v = 0; v < V; v++) {
                    const vb group = vb_signed(vb_load(q + g * 4 * MK_KV_BLOCK + v * 64)), size = vb_size(group);
                    UNROLL
                    for (int j = v; j < Q * V; j += V) vb_multiply(8, g, 7, group, size, a[j / V].q, &dots[j], &parts[j]);
                }
            UNROLL
            for (int j = 0; j < Q * V; j++)
                acc[j] = vf_fma(vf_from(dots[j]), vf_mul(scale[j % V], vf_set1(a[j / V].scale)), acc[j]);
        }
        UNROLL
        for (int j = 0; j < Q * V; j++) vf_store(p + j / V * MK_KV_BLOCK + (vector + j % V) * MK_TILE, acc[j]);
    }
}

#define INT8_SCORES(type, Q)                                                                                         \
    static void int8_scores_##Q(const mk_activation *x, const uint8_t *keys, const uint8_t *next, int hd, float *p) { \
        int8_scores(Q, x, keys, next, hd, p);                                                                        \
    }
#define INT8_SCORES_OF(type, Q) int8_scores_##Q,
EACH_SHAPE(INT8_SCORES, )
static const mk_scores INT8_SCORES_OF_SHAPES[QUERY_SHAPES] = {EACH_SHAPE(INT8_SCORES_OF, )};
