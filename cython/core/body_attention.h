/* Attention over the blocked KV cache: lanes are tokens for q.k, head dimensions for p.v, and the softmax streams over
 * a sequence's blocks of 32 positions in their order.  An item is a group of queries (rows x heads) that share a
 * sequence and a KV head, so that they share the loads; each query's arithmetic depends on its positions alone. */

enum { QUERY_TILE = 4 };

typedef struct {
    const float *q;
    float *out, *sums;  /* sums: hd, padded to lanes */
    float *p;           /* [32] probabilities of the block at hand, not yet divided */
    long first, last;   /* positions it attends to */
    float top;          /* largest score so far */
    vf total;           /* sum of p in lanes */
} query;

MK_INLINE vf load_kv(int f16, const void *base, long i) {
    return f16 ? vf_load_f16((const uint16_t *)base + i) : vf_load((const float *)base + i);
}

static inline vf load_kv_part(int f16, const void *base, long i, long count) {
    if (!f16) return vf_load_part((const float *)base + i, count, 0.0f);
    uint16_t half[MK_TILE] = {0};
    memcpy(half, (const uint16_t *)base + i, (size_t)count * 2);
    return vf_load_f16(half);
}

/* Raw scores of Q queries with the block's 32 keys. */
HOT void scores(const int f16, const int Q, const query *queries, const void *keys, int hd) {
    vf lo[QUERY_TILE], hi[QUERY_TILE];
    UNROLL
    for (int j = 0; j < Q; j++) lo[j] = hi[j] = vf_set1(0.0f);
    for (long i = 0; i < hd; i++) {
        vf a = load_kv(f16, keys, i * MK_KV_BLOCK), b = load_kv(f16, keys, i * MK_KV_BLOCK + MK_TILE);
        UNROLL
        for (int j = 0; j < Q; j++) {
            vf q = vf_set1(queries[j].q[i]);
            lo[j] = vf_fma(q, a, lo[j]);
            hi[j] = vf_fma(q, b, hi[j]);
        }
    }
    UNROLL
    for (int j = 0; j < Q; j++) {
        vf_store(queries[j].p, lo[j]);
        vf_store(queries[j].p + MK_TILE, hi[j]);
    }
}

/* sums += p[from..to] * values, token by token; for hd's last part the values beyond it are not read. */
HOT void mix(const int f16, const int Q, const query *queries, const void *values, int hd, long from, long to) {
    for (long i = 0; i < hd; i += MK_TILE) {
        vf acc[QUERY_TILE];
        UNROLL
        for (int j = 0; j < Q; j++) acc[j] = vf_load(queries[j].sums + i);
        for (long token = from; token <= to; token++) {
            long at = token * hd + i;
            vf v = i + MK_TILE <= hd ? load_kv(f16, values, at) : load_kv_part(f16, values, at, hd - i);
            UNROLL
            for (int j = 0; j < Q; j++) acc[j] = vf_fma(vf_set1(queries[j].p[token]), v, acc[j]);
        }
        UNROLL
        for (int j = 0; j < Q; j++) vf_store(queries[j].sums + i, acc[j]);
    }
}

/* Scores to probabilities relative to the largest score so far; what was summed before is brought to that scale. */
static void soften(query *q, long from, long to, float scale, int hd) {
    static const float index[MK_KV_BLOCK] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                             16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    vf part[2], out = vf_set1(-INFINITY), first = vf_set1((float)from), last = vf_set1((float)to);
    for (int j = 0; j < 2; j++) {
        vf i = vf_load(index + j * MK_TILE), s = vf_mul(vf_load(q->p + j * MK_TILE), vf_set1(scale));
        part[j] = vf_gt(i, last, out, vf_gt(first, i, out, s));
    }
    float top = vf_hmax(vf_max(part[0], part[1]));
    if (top > q->top) {
        vf factor = vf_exp(vf_set1(q->top - top));
        for (long i = 0; i < hd; i += MK_TILE) vf_store(q->sums + i, vf_mul(vf_load(q->sums + i), factor));
        q->total = vf_mul(q->total, factor);
        q->top = top;
    }
    for (int j = 0; j < 2; j++) {
        part[j] = vf_exp(vf_sub(part[j], vf_set1(q->top)));
        vf_store(q->p + j * MK_TILE, part[j]);
    }
    q->total = vf_add(q->total, vf_add(part[0], part[1]));
}

/* One block of a group: `count` queries, of which those whose range misses the block pass it by. */
HOT void visit(const int f16, const mk_attention_job *job, query *all, int count, long block, const void *keys,
                     const void *values) {
    query *queries[MK_MAX_QUERIES];
    int live = 0;
    long start = block * MK_KV_BLOCK;
    for (int j = 0; j < count; j++)
        if (all[j].first < start + MK_KV_BLOCK && all[j].last >= start) queries[live++] = &all[j];
    for (int j = 0; j < live;) {
        int n = live - j >= QUERY_TILE ? QUERY_TILE : 1, same = 1;
        query tile[QUERY_TILE];
        long from[QUERY_TILE], to[QUERY_TILE];
        for (int i = 0; i < n; i++) tile[i] = *queries[j + i];
        if (n == QUERY_TILE) scores(f16, QUERY_TILE, tile, keys, job->hd);
        else scores(f16, 1, tile, keys, job->hd);
        for (int i = 0; i < n; i++) {
            from[i] = tile[i].first > start ? tile[i].first - start : 0;
            to[i] = tile[i].last - start < MK_KV_BLOCK - 1 ? tile[i].last - start : MK_KV_BLOCK - 1;
            same = same && from[i] == from[0] && to[i] == to[0];
            soften(queries[j + i], from[i], to[i], job->scale, job->hd);
        }
        if (same && n == QUERY_TILE) mix(f16, QUERY_TILE, tile, values, job->hd, from[0], to[0]);
        else
            for (int i = 0; i < n; i++) mix(f16, 1, &tile[i], values, job->hd, from[i], to[i]);
        j += n;
    }
}

HOT void attend(const int f16, const mk_attention_job *job, const mk_query_group *group) {
    float sums[MK_ATTENTION_SUMS], p[MK_MAX_QUERIES][MK_KV_BLOCK];
    query queries[MK_MAX_QUERIES];
    int hd = job->hd, lanes = MK_LANES(hd), count = 0;
    long low = INT32_MAX, high = 0;
    for (int r = 0; r < group->rows; r++)
        for (int h = 0; h < group->heads; h++, count++) {
            long row = group->row + r, column = (long)(group->head + h) * hd, last = job->pos[row];
            long first = job->window && last >= job->window ? last - job->window + 1 : 0;
            queries[count] = (query){job->q + row * job->q_stride + column, job->out + row * job->out_stride + column,
                                     sums + (long)count * lanes, p[count], first, last, -INFINITY, vf_set1(0.0f)};
            low = first < low ? first : low;
            high = last > high ? last : high;
        }
    memset(sums, 0, (size_t)count * (size_t)lanes * sizeof *sums);
    for (long block = low / MK_KV_BLOCK; block <= high / MK_KV_BLOCK; block++) {
        long at = job->table[job->table_start[group->row] + block];
        long offset = (at * job->kvh + group->kv_head) * hd * MK_KV_BLOCK * (f16 ? 2 : 4);
        visit(f16, job, queries, count, block, (const uint8_t *)job->kpool + offset,
              (const uint8_t *)job->vpool + offset);
    }
    for (int j = 0; j < count; j++) {
        vf total = vf_set1(vf_hadd(queries[j].total));
        for (long i = 0; i < hd; i += MK_TILE)
            vf_row_store(queries[j].out, i, hd, vf_div(vf_load(queries[j].sums + i), total));
    }
}

static void attention(const void *argument, long begin, long end) {
    const mk_attention_job *job = argument;
    for (long item = begin; item < end; item++)
        if (job->f16) attend(1, job, &job->groups[item]);
        else attend(0, job, &job->groups[item]);
}
