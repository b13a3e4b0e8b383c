/* Attention over the blocked KV cache: lanes are tokens for q.k, head dimensions for p.v, and the softmax streams over
 * a sequence's blocks of 32 positions in their order.  An item is a group of queries (rows x heads) that share a
 * sequence and a KV head.  They are worked on in tiles of queries that stay in registers against a block of keys or
 * values; where a group has several tiles, a block is transposed to floats once for all of them.  None of this changes an
 * output: every score is one chain of fma over dimensions, every sum one over tokens, whatever the tile. */

#if VEC_WIDE
enum { MANY_QUERIES = 12, KEY_VECTORS = 2, MAX_COLUMNS = 4, QUERY_SHAPES = 5 };
static const int QUERIES[QUERY_SHAPES] = {1, 2, 4, 8, 12};
#define COLUMNS(Q) ((Q) > 4 ? 2 : 4)
#else
enum { MANY_QUERIES = 4, KEY_VECTORS = 1, MAX_COLUMNS = 2, QUERY_SHAPES = 3 };
static const int QUERIES[QUERY_SHAPES] = {1, 2, 4};
#define COLUMNS(Q) ((Q) > 2 ? 1 : 2)
#endif

/* Into the second-level cache: the first level allows fewer misses at a time, and memory would wait for them. */
#define FETCH(p) __builtin_prefetch(p, 0, 2)

/* The blocks of heads with more dimensions are not transposed: each tile reads them as they are. */
enum { MAX_FLOAT_DIM = 256 };

/* Vector `vector` of the keys of dimension i; scale: of these tokens' Q8_0 blocks. */
MK_INLINE vf load_keys(const int type, const uint8_t *keys, int hd, long i, int vector, vf scale) {
    long at = i * MK_KV_BLOCK + vector * MK_TILE;
    if (type == MK_F32) return vf_load((const float *)keys + at);
    if (type == MK_F16) return vf_load_f16((const uint16_t *)keys + at);
    return vf_mul(scale, vf_load_i8(keys + 2 * hd + at));
}

/* p [Q][32] = the block's scores: q [hd][Q] times keys.  `next` is fetched meanwhile. */
HOT void scores(const int type, const int Q, const float *q, const uint8_t *keys, const uint8_t *next, int hd,
                float *p) {
    const int part = type == MK_Q8_0 ? MK_BLOCK : hd, line = mk_kv_bytes(type, 1);
    for (int vector = 0; vector < MK_KV_BLOCK / MK_TILE; vector += KEY_VECTORS) {
        vf acc[MANY_QUERIES][KEY_VECTORS];
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

/* Dimensions i .. of a token's value: 16, or with `rest` as many as there are, and zeros. */
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

/* Columns i .. of C vectors: sums [Q][lanes] += p [Q][32] times values, token by token. */
HOT void mix_columns(const int type, const int Q, const int C, const int rest, const float *p, const uint8_t *values,
                     const uint8_t *next, int hd, long from, long to, float *sums, long lanes, long i) {
    const int bytes = type == MK_F32 ? 4 : type == MK_F16 ? 2 : 1;
    float scales[MAX_COLUMNS][MK_KV_BLOCK];
    vf acc[MANY_QUERIES][MAX_COLUMNS];
    if (type == MK_Q8_0)
        for (int c = 0; c < C; c++)
            for (int t = 0; t < MK_KV_BLOCK; t += MK_TILE)
                vf_store(scales[c] + t,
                         vf_load_f16((const uint16_t *)values + (i + c * MK_TILE) / MK_BLOCK * MK_BLOCK + t));
    UNROLL
    for (int j = 0; j < Q; j++)
        UNROLL
        for (int c = 0; c < C; c++) acc[j][c] = vf_load(sums + j * lanes + i + c * MK_TILE);
    for (long token = from; token <= to; token++) {
        vf value[MAX_COLUMNS];
        for (int line = 0; line < C * MK_TILE * bytes; line += 64)
            FETCH(next + (token * hd + i) * bytes + line);
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
#define QUERY_PAIR(type, Q) {scores_##type##_##Q, mix_##type##_##Q}
#if VEC_WIDE
#define QUERY_TILES(type) \
    QUERY_TILE(type, 1) QUERY_TILE(type, 2) QUERY_TILE(type, 4) QUERY_TILE(type, 8) QUERY_TILE(type, 12)
#define QUERY_PAIRS(type) \
    {QUERY_PAIR(type, 1), QUERY_PAIR(type, 2), QUERY_PAIR(type, 4), QUERY_PAIR(type, 8), QUERY_PAIR(type, 12)}
#else
#define QUERY_TILES(type) QUERY_TILE(type, 1) QUERY_TILE(type, 2) QUERY_TILE(type, 4)
#define QUERY_PAIRS(type) {QUERY_PAIR(type, 1), QUERY_PAIR(type, 2), QUERY_PAIR(type, 4)}
#endif
QUERY_TILES(MK_F32)
QUERY_TILES(MK_F16)
QUERY_TILES(MK_Q8_0)
static const query_tile QUERY_TILE_FUNCTIONS[MK_TYPES][QUERY_SHAPES] = {
    [MK_F32] = QUERY_PAIRS(MK_F32), [MK_F16] = QUERY_PAIRS(MK_F16), [MK_Q8_0] = QUERY_PAIRS(MK_Q8_0),
};

/* A head's block as floats, in its own order. */
HOT void block_floats(const int type, const int is_keys, const uint8_t *block, const uint8_t *next, int hd,
                      float *out) {
    const long count = (long)hd * MK_KV_BLOCK;
    float scales[MAX_FLOAT_DIM];
    for (long i = 0; i < mk_kv_bytes(type, hd); i += 64) FETCH(next + i);
    if (type == MK_F16) {
        for (long i = 0; i < count; i += MK_TILE) vf_store(out + i, vf_load_f16((const uint16_t *)block + i));
        return;
    }
    const uint8_t *q = block + 2 * hd;
    for (int i = 0; i < hd; i += MK_TILE) vf_store(scales + i, vf_load_f16((const uint16_t *)block + i));
    for (long i = 0; i < count; i += MK_TILE) {
        long dim = is_keys ? i / MK_KV_BLOCK : i % hd, token = is_keys ? i % MK_KV_BLOCK : i / hd;
        const float *scale = scales + dim / MK_BLOCK * MK_BLOCK + token; /* of a dimension's block, by token */
        vf_store(out + i, vf_mul(is_keys ? vf_load(scale) : vf_set1(*scale), vf_load_i8(q + i)));
    }
}

static void to_floats(int type, int is_keys, const uint8_t *block, const uint8_t *next, int hd, float *out) {
    if (type == MK_F16) block_floats(MK_F16, 0, block, next, hd, out);
    else if (is_keys) block_floats(MK_Q8_0, 1, block, next, hd, out);
    else block_floats(MK_Q8_0, 0, block, next, hd, out);
}

typedef struct {
    long first, last; /* positions it attends to */
    long from, to;    /* of those, the ones in the block at hand; from > to if none is */
    float *out;
    float top;        /* largest score so far */
    vf total;         /* sum of p in lanes */
} query;

typedef struct {
    const mk_attention_job *job;
    int count, shape; /* queries; tiles have QUERIES[shape] each, of which the last tile may leave some unused */
    long lanes;
    float q[MK_ATTENTION_SUMS];    /* tiles [hd][Q], scaled */
    float sums[MK_ATTENTION_SUMS]; /* tiles [Q][lanes] */
    float p[MK_MAX_QUERIES][MK_KV_BLOCK];
    query queries[MK_MAX_QUERIES];
} query_group;

/* Scores to probabilities relative to the largest score so far; what was summed before is brought to that scale.
 * cap: of the scores, or 0. */
MK_INLINE void stream_softmax(query *q, float *p, float *sums, int vd, float cap) {
    static const float index[MK_KV_BLOCK] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                             16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    vf part[2] = {vf_load(p), vf_load(p + MK_TILE)};
    if (cap > 0.0f)
        for (int j = 0; j < 2; j++) part[j] = capped(part[j], vf_set1(cap));
    if (q->from > 0 || q->to < MK_KV_BLOCK - 1) {
        vf out = vf_set1(-INFINITY), first = vf_set1((float)q->from), last = vf_set1((float)q->to);
        for (int j = 0; j < 2; j++) {
            vf i = vf_load(index + j * MK_TILE);
            part[j] = vf_gt(i, last, out, vf_gt(first, i, out, part[j]));
        }
    }
    vf maximum = vf_max(part[0], part[1]);
    if (vf_any_gt(maximum, vf_set1(q->top))) {
        float top = vf_hmax(maximum);
        vf factor = vf_exp(vf_set1(q->top - top));
        for (long i = 0; i < vd; i += MK_TILE) vf_store(sums + i, vf_mul(vf_load(sums + i), factor));
        q->total = vf_mul(q->total, factor);
        q->top = top;
    }
    for (int j = 0; j < 2; j++) {
        part[j] = vf_exp(vf_sub(part[j], vf_set1(q->top)));
        vf_store(p + j * MK_TILE, part[j]);
    }
    q->total = vf_add(q->total, vf_add(part[0], part[1]));
}

/* One tile against one block of keys and one of values, each of a type. */
static void visit(query_group *group, int tile, int type, int value_type, long start, const uint8_t *keys,
                  const uint8_t *values, const uint8_t *next_keys, const uint8_t *next_values) {
    const query_tile *many = &QUERY_TILE_FUNCTIONS[value_type][group->shape];
    const query_tile *one = &QUERY_TILE_FUNCTIONS[value_type][0];
    int Q = QUERIES[group->shape], hd = group->job->hd, vd = group->job->vd;
    int count = group->count - tile * Q < Q ? group->count - tile * Q : Q;
    long lanes = group->lanes, from = 0, to = MK_KV_BLOCK - 1;
    query *queries = group->queries + tile * Q;
    float *p = group->p[tile * Q], *sums = group->sums + tile * Q * lanes;
    QUERY_TILE_FUNCTIONS[type][group->shape].scores(group->q + (long)tile * Q * hd, keys, next_keys, hd, p);
    for (int j = 0; j < count; j++) {
        query *q = queries + j;
        q->from = q->first > start ? q->first - start : 0;
        q->to = q->last - start < MK_KV_BLOCK - 1 ? q->last - start : MK_KV_BLOCK - 1;
        from = q->from > from ? q->from : from;
        to = q->to < to ? q->to : to;
        if (q->from <= q->to) stream_softmax(q, p + j * MK_KV_BLOCK, sums + j * lanes, vd, group->job->softcap);
    }
    /* Tokens at the edges, to which only some queries attend, are taken query by query. */
    int together = from <= to;
    for (int j = 0; j < count; j++) {
        long end = together ? from - 1 : queries[j].to;
        if (queries[j].from <= end)
            one->mix(p + j * MK_KV_BLOCK, values, values, vd, queries[j].from, end, sums + j * lanes, lanes);
    }
    if (!together) return;
    many->mix(p, values, next_values, vd, from, to, sums, lanes);
    for (int j = 0; j < count; j++)
        if (queries[j].to > to)
            one->mix(p + j * MK_KV_BLOCK, values, values, vd, to + 1, queries[j].to, sums + j * lanes, lanes);
}

static float tuned(const mk_tuning *tuning, long position) {
    long stretch = (position + tuning->offset) / tuning->length;
    return (float)(1.0 + (double)tuning->beta * log(1.0 + (double)stretch));
}

/* Lay a group's queries out; returns its first and last position.  A sink is a score that was there before all others,
 * whose value is zero. */
static void gather(query_group *group, const mk_query_group *item, long *low, long *high) {
    static const float first_lane[MK_TILE] = {1.0f};
    const mk_attention_job *job = group->job;
    int hd = job->hd, shape = 0, count = 0;
    group->count = item->rows * item->heads;
    while (QUERIES[shape] < group->count && shape < QUERY_SHAPES - 1) shape++;
    group->shape = shape;
    int Q = QUERIES[shape];
    long padded = mk_blocks(group->count, Q) * Q;
    memset(group->q, 0, (size_t)(padded * hd) * sizeof *group->q);
    memset(group->sums, 0, (size_t)(padded * group->lanes) * sizeof *group->sums);
    *low = INT32_MAX, *high = 0;
    for (int r = 0; r < item->rows; r++)
        for (int h = 0; h < item->heads; h++, count++) {
            long row = item->row + r, head = item->head + h, at = job->pos[row], last = at;
            long first = job->window && at >= job->window ? at - job->window + 1 : 0;
            if (job->chunked) first = at - at % job->window;
            if (job->bidirectional) {
                last = job->pos[item->end - 1];
                if (job->window && last - at >= job->window) last = at + job->window - 1;
            }
            float scale = job->scale;
            if (job->tuning.length) scale *= tuned(&job->tuning, at);
            const float *from = job->q + row * job->q_stride + head * hd;
            float *to = group->q + (long)(count / Q) * Q * hd + count % Q;
            for (int i = 0; i < hd; i++) to[(long)i * Q] = from[i] * scale;
            group->queries[count] = (query){.first = first, .last = last,
                                            .top = job->sinks ? job->sinks[head] : -INFINITY,
                                            .total = job->sinks ? vf_load(first_lane) : vf_set1(0.0f),
                                            .out = job->out + row * job->out_stride + head * job->vd};
            *low = first < *low ? first : *low;
            *high = last > *high ? last : *high;
        }
}

/* The first vd dimensions of a head's block of keys as its values: floats, token by token. */
HOT void keys_as_values(const int type, const uint8_t *keys, int hd, int vd, float *out) {
    float part[MK_TILE][MK_KV_BLOCK];
    for (int begin = 0; begin < vd; begin += MK_TILE) {
        int count = vd - begin < MK_TILE ? vd - begin : MK_TILE;
        for (int i = 0; i < count; i++)
            for (int vector = 0; vector < MK_KV_BLOCK / MK_TILE; vector++) {
                vf scale = vf_set1(1.0f);
                if (type == MK_Q8_0)
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
    else keys_as_values(MK_Q8_0, keys, hd, vd, out);
}

static void attend(const mk_attention_job *job, const mk_query_group *item) {
    query_group group;
    float key_floats[MAX_FLOAT_DIM * MK_KV_BLOCK], value_floats[MK_MAX_HEAD_DIM * MK_KV_BLOCK];
    long low, high, key_bytes = mk_kv_bytes(job->type, job->hd), value_bytes = mk_kv_bytes(job->type, job->vd);
    group.job = job;
    group.lanes = MK_LANES(job->vd);
    gather(&group, item, &low, &high);
    int tiles = (int)mk_blocks(group.count, QUERIES[group.shape]);
    int shared = !job->vpool;
    int floats = tiles > 1 && !shared && job->type != MK_F32 && job->hd <= MAX_FLOAT_DIM && job->vd <= MAX_FLOAT_DIM;
    const int32_t *table = job->table + job->table_start[item->row];
    for (long block = low / MK_KV_BLOCK, last = high / MK_KV_BLOCK; block <= last; block++) {
        long at = (long)table[block] * job->kvh + item->kv_head;
        long ahead = (long)table[block < last ? block + 1 : block] * job->kvh + item->kv_head;
        const uint8_t *keys = (const uint8_t *)job->kpool + at * key_bytes;
        const uint8_t *next_keys = (const uint8_t *)job->kpool + ahead * key_bytes;
        const uint8_t *values = NULL, *next_values = NULL;
        int type = job->type, value_type = type;
        if (shared) {
            values_of_keys(type, keys, job->hd, job->vd, value_floats);
            values = next_values = (const uint8_t *)value_floats;
            value_type = MK_F32;
        } else {
            values = (const uint8_t *)job->vpool + at * value_bytes;
            next_values = (const uint8_t *)job->vpool + ahead * value_bytes;
        }
        if (floats) {
            to_floats(type, 1, keys, next_keys, job->hd, key_floats);
            to_floats(type, 0, values, next_values, job->vd, value_floats);
            keys = next_keys = (const uint8_t *)key_floats;
            values = next_values = (const uint8_t *)value_floats;
            type = value_type = MK_F32;
        }
        for (int tile = 0; tile < tiles; tile++)
            visit(&group, tile, type, value_type, block * MK_KV_BLOCK, keys, values, next_keys, next_values);
    }
    for (int j = 0; j < group.count; j++) {
        vf total = vf_set1(vf_hadd(group.queries[j].total));
        for (long i = 0; i < job->vd; i += MK_TILE)
            vf_row_store(group.queries[j].out, i, job->vd, vf_div(vf_load(group.sums + j * group.lanes + i), total));
    }
}

static void attention(const void *argument, long begin, long end) {
    const mk_attention_job *job = argument;
    for (long item = begin; item < end; item++) attend(job, &job->groups[item]);
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
        int32_t sums[2];
        quantise_q8(vf_load(x + i), vf_load(x + i + MK_TILE), q + i, &scale, sums);
        d[i / MK_BLOCK] = mk_to_f16(scale);
    }
}
