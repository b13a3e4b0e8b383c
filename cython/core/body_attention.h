/* Attention over the blocked KV cache: lanes are tokens for q.k, head dimensions for p.v, and the softmax streams over
 * a sequence's blocks of 32 positions in their order.  An item is a group of queries (rows x heads) that share a
 * sequence and a KV head.  They are computed in tiles of queries, which stay in registers, for one block of keys or values
 * at a time; if a group has several tiles, a block is converted to floats once for all of them, where that gains.  Tiles
 * do not change the output: every score is one chain of fma over dimensions, and every sum one over tokens. */

#include "body_kv_blocks.h"
#include "body_queries.h"

/* Queries whose softmax is computed side by side, as registers allow. */
enum { TOGETHER = VEC_QUERIES == 12 ? 3 : 1 };

/* Whether one instruction loads and converts F16. */
enum { F16_LOADS = VEC_QUERIES >= 6 };

typedef struct {
    long first, last; /* the positions to which it attends */
    long from, to;    /* those of them in the current block; from > to if there are none */
    float *out;
    float top;        /* largest score so far */
    vf total;         /* sum of p in lanes */
} query;

typedef struct {
    const mk_attention_job *job;
    int count, shape; /* the number of queries; tiles have QUERIES[shape] queries, of which the last may use fewer */
    long lanes;
    long first, last; /* the positions to which all of the queries attend */
    float q[MK_ATTENTION_SUMS];    /* tiles [hd][Q], scaled; for Q8_0_INT8 mk_activation [hd / 32][Q] */
    float sums[MK_ATTENTION_SUMS]; /* tiles [Q][lanes] */
    float p[MK_QUERY_TILE][MK_KV_BLOCK]; /* of the tile that is computed */
    query queries[MK_MAX_QUERIES];
} query_group;

/* Rescale the earlier sums if a score exceeds all before it. */
MK_INLINE void raise_top(query *q, vf scores, float *sums, int vd) {
    if (!vf_any_gt(scores, vf_set1(q->top))) return;
    float top = vf_hmax(scores);
    vf factor = vf_exp(vf_set1(q->top - top));
    for (long i = 0; i < vd; i += MK_TILE) vf_store(sums + i, vf_mul(vf_load(sums + i), factor));
    q->total = vf_mul(q->total, factor);
    q->top = top;
}

/* The scores that count; cap: their soft cap, or 0. */
MK_INLINE void change_scores(const query *q, vf *part, float cap) {
    static const float index[MK_KV_BLOCK] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                             16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    if (cap > 0.0f)
        for (int j = 0; j < 2; j++) part[j] = capped(part[j], vf_set1(cap));
    if (q->from > 0 || q->to < MK_KV_BLOCK - 1) {
        vf out = vf_set1(-INFINITY), first = vf_set1((float)q->from), last = vf_set1((float)q->to);
        for (int j = 0; j < 2; j++) {
            vf i = vf_load(index + j * MK_TILE);
            part[j] = vf_gt(i, last, out, vf_gt(first, i, out, part[j]));
        }
    }
}

/* Turn the scores of `count` queries into probabilities relative to the largest score so far of each, and rescale their
 * earlier sums.  With `whole` all scores count, as they are. */
HOT void stream_softmax(const int count, const int whole, query *queries, float *p, float *sums, long lanes, int vd,
                        float cap) {
    vf part[MAX_EXPS];
    int small = 0;
    UNROLL
    for (int j = 0; j < count; j++) {
        query *q = queries + j;
        vf *of = part + 2 * j;
        of[0] = vf_load(p + j * MK_KV_BLOCK);
        of[1] = vf_load(p + j * MK_KV_BLOCK + MK_TILE);
        if (!whole) change_scores(q, of, cap);
        raise_top(q, vf_max(of[0], of[1]), sums + j * lanes, vd);
        of[0] = vf_sub(of[0], vf_set1(q->top));
        of[1] = vf_sub(of[1], vf_set1(q->top));
        small |= vf_any_gt(vf_set1(-87.0f), vf_min(of[0], of[1]));
    }
    if (small) exp_in(0, 2 * count, part);
    else exp_in(1, 2 * count, part);
    UNROLL
    for (int j = 0; j < count; j++) {
        vf_store(p + j * MK_KV_BLOCK, part[2 * j]);
        vf_store(p + j * MK_KV_BLOCK + MK_TILE, part[2 * j + 1]);
        queries[j].total = vf_add(queries[j].total, vf_add(part[2 * j], part[2 * j + 1]));
    }
}

/* Compute one tile of queries with one block of keys and one of values; each block has a type. */
static void visit(query_group *group, int tile, int type, int value_type, long start, const uint8_t *keys,
                  const uint8_t *values, const uint8_t *next_keys, const uint8_t *next_values) {
    const query_tile *many = &QUERY_TILE_FUNCTIONS[value_type][group->shape];
    const query_tile *one = &QUERY_TILE_FUNCTIONS[value_type][0];
    int Q = QUERIES[group->shape], hd = group->job->hd, vd = group->job->vd;
    int count = group->count - tile * Q < Q ? group->count - tile * Q : Q;
    long lanes = group->lanes, from = 0, to = MK_KV_BLOCK - 1;
    query *queries = group->queries + tile * Q;
    float *p = group->p[0], *sums = group->sums + tile * Q * lanes;
    const float *q = group->q + (long)tile * Q * hd;
    if (type == MK_Q8_0_INT8) mk_active->int8_scores[group->shape]((const mk_activation *)(const void *)q, keys, next_keys, hd, p);
    else QUERY_TILE_FUNCTIONS[type][group->shape].scores(q, keys, next_keys, hd, p);
    if (start >= group->first && start + MK_KV_BLOCK <= group->last + 1 && !(group->job->softcap > 0.0f)) {
        int j = 0;
        for (; j + TOGETHER <= count; j += TOGETHER)
            stream_softmax(TOGETHER, 1, queries + j, p + j * MK_KV_BLOCK, sums + j * lanes, lanes, vd, 0.0f);
        for (; TOGETHER > 1 && j < count; j++)
            stream_softmax(1, 1, queries + j, p + j * MK_KV_BLOCK, sums + j * lanes, lanes, vd, 0.0f);
        many->mix(p, values, next_values, vd, 0, MK_KV_BLOCK - 1, sums, lanes);
        return;
    }
    for (int j = 0; j < count; j++) {
        query *q = queries + j;
        q->from = q->first > start ? q->first - start : 0;
        q->to = q->last - start < MK_KV_BLOCK - 1 ? q->last - start : MK_KV_BLOCK - 1;
        from = q->from > from ? q->from : from;
        to = q->to < to ? q->to : to;
        if (q->from <= q->to)
            stream_softmax(1, 0, q, p + j * MK_KV_BLOCK, sums + j * lanes, lanes, vd, group->job->softcap);
    }
    /* Tokens to which only some of the queries attend are computed query by query. */
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

/* The number of queries, rounded up to whole tiles. */
static long padded(int count, int shape) { return mk_blocks(count, QUERIES[shape]) * QUERIES[shape]; }

/* A query of a tile of Q, as int8. */
static void round_query(const float *q, int hd, float scale, int Q, mk_activation *to) {
    for (int i = 0; i < hd; i += MK_BLOCK, to += Q) {
        int32_t sums[2][4];
        const vf factor = vf_set1(scale), low = vf_mul(vf_load(q + i), factor), high = vf_mul(vf_load(q + i + MK_TILE), factor);
        quantise_q8(low, high, to->q, &to->scale, sums);
        to->offset128 = -128 * (sum_of_4(sums[0]) + sum_of_4(sums[1]));
    }
}

/* Arrange a group's queries in tiles; returns its first and last position.  A sink counts as an earlier score whose value
 * is zero. */
static void gather(query_group *group, const mk_query_group *item, long *low, long *high) {
    static const float first_lane[MK_TILE] = {1.0f};
    const mk_attention_job *job = group->job;
    int hd = job->hd, shape = 0, count = 0;
    group->count = item->rows * item->heads;
    while (QUERIES[shape] < group->count && shape < QUERY_SHAPES - 1) shape++;
    if (shape == QUERY_SHAPES - 1 && padded(group->count, shape - 1) < padded(group->count, shape)) shape--;
    group->shape = shape;
    int Q = QUERIES[shape];
    long places = padded(group->count, shape);
    memset(group->q, 0, (size_t)(places * hd) * sizeof *group->q);
    memset(group->sums, 0, (size_t)(places * group->lanes) * sizeof *group->sums);
    *low = group->last = INT32_MAX, *high = group->first = 0;
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
            float *to = group->q + (long)(count / Q) * Q * hd;
            if (job->type == MK_Q8_0_INT8) round_query(from, hd, scale, Q, (mk_activation *)(void *)to + count % Q);
            else
                for (int i = 0; i < hd; i++) to[(long)i * Q + count % Q] = from[i] * scale;
            group->queries[count] = (query){.first = first, .last = last,
                                            .top = job->sinks ? job->sinks[head] : -INFINITY,
                                            .total = job->sinks ? vf_load(first_lane) : vf_set1(0.0f),
                                            .out = job->out + row * job->out_stride + head * job->vd};
            group->first = first > group->first ? first : group->first;
            group->last = last < group->last ? last : group->last;
            *low = first < *low ? first : *low;
            *high = last > *high ? last : *high;
        }
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
    int direct = job->type == MK_F32 || (job->type == MK_F16 && F16_LOADS && job->free_f16);
    int floats = tiles > 1 && !shared && !direct && job->hd <= MAX_FLOAT_DIM && job->vd <= MAX_FLOAT_DIM;
    const int32_t *table = job->table + job->table_start[item->row];
    for (long block = low / MK_KV_BLOCK, last = high / MK_KV_BLOCK; block <= last; block++) {
        long at = (long)table[block] * job->kvh + item->kv_head;
        /* With few queries a block is computed faster than the next one arrives, so the one after it is prefetched. */
        long ahead = (long)table[block + 2 < last ? block + 2 : last] * job->kvh + item->kv_head;
        const uint8_t *keys = (const uint8_t *)job->kpool + at * key_bytes;
        const uint8_t *next_keys = (const uint8_t *)job->kpool + ahead * key_bytes;
        const uint8_t *values = NULL, *next_values = NULL;
        int type = job->type, value_type = type == MK_Q8_0_INT8 ? MK_Q8_0 : type;
        if (shared) {
            values_of_keys(type, keys, job->hd, job->vd, value_floats);
            values = next_values = (const uint8_t *)value_floats;
            value_type = MK_F32;
        } else {
            values = (const uint8_t *)job->vpool + at * value_bytes;
            next_values = (const uint8_t *)job->vpool + ahead * value_bytes;
        }
        if (floats) {
            if (type != MK_Q8_0_INT8) {
                to_floats(type, 1, keys, next_keys, job->hd, key_floats);
                keys = next_keys = (const uint8_t *)key_floats;
                type = MK_F32;
            }
            to_floats(value_type, 0, values, next_values, job->vd, value_floats);
            values = next_values = (const uint8_t *)value_floats;
            value_type = MK_F32;
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
