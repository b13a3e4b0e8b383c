/* Steps that write and read the KV cache. */
#include <stdlib.h>
#include <string.h>

#include "active.h"

/* Store a token's numbers in a head's Q8_0 block: `together` dimensions lie together, the next ones `step` bytes further, and
 * its scales. */
static void put_q8(const float *x, uint8_t *block, int hd, long offset, long at, int together, long step) {
    int8_t q[MK_MAX_HEAD_DIM];
    uint16_t scales[MK_MAX_HEAD_DIM / MK_BLOCK];
    mk_active->of_rows->to_q8(x, q, scales, hd);
    for (int i = 0; i < hd; i++) block[2 * hd + at + i / together * step + i % together] = (uint8_t)q[i];
    for (int i = 0; i < hd / MK_BLOCK; i++) memcpy(block + 2 * (i * MK_KV_BLOCK + offset), &scales[i], 2);
}

/* A row of K is stored in a column of its block, a row of V in a row; vd 0 means that there is no V. */
static void store(const void *argument, long begin, long end) {
    const mk_store_job *job = argument;
    int hd = job->hd, vd = job->vd;
    uint16_t half[MK_MAX_HEAD_DIM];
    for (long row = begin; row < end; row++)
        for (int head = 0; head < job->kvh; head++) {
            long offset = job->offset[row], at = (long)job->block[row] * job->kvh + head;
            const float *key = job->k + row * job->k_stride + (long)head * hd;
            uint8_t *keys = (uint8_t *)job->kpool + at * mk_kv_bytes(job->type, hd);
            if (mk_is_kv_int8(job->type)) {
                const int together = job->type == MK_Q8_0_INT8 ? 4 : 1;
                put_q8(key, keys, hd, offset, offset * together, together, MK_KV_BLOCK * together);
            } else if (job->type == MK_F16) {
                uint16_t *to = (uint16_t *)keys + offset;
                mk_active->of_rows->to_f16(key, half, hd);
                for (int i = 0; i < hd; i++) to[(long)i * MK_KV_BLOCK] = half[i];
            } else {
                float *to = (float *)keys + offset;
                for (int i = 0; i < hd; i++) to[(long)i * MK_KV_BLOCK] = key[i];
            }
            if (!vd) continue;
            const float *value = job->v + row * job->v_stride + (long)head * vd;
            uint8_t *values = (uint8_t *)job->vpool + at * mk_kv_bytes(job->type, vd);
            if (mk_is_kv_int8(job->type)) put_q8(value, values, vd, offset, offset * vd, vd, 0);
            else if (job->type == MK_F16) mk_active->of_rows->to_f16(value, (uint16_t *)values + offset * vd, vd);
            else memcpy((float *)values + offset * vd, value, (size_t)vd * sizeof *value);
        }
}

void mk_kv_store(mk_work *work, int kv_type, const float *k, long k_stride, const float *v, long v_stride,
                 const int32_t *block, const int32_t *offset, long m, void *kpool, void *vpool, int kvh, int hd,
                 int vd) {
    mk_step_of(work, store, m, 1, 0)->store = (mk_store_job){
        .type = kv_type, .kvh = kvh, .hd = hd, .vd = vd, .k = k, .v = v, .k_stride = k_stride, .v_stride = v_stride,
        .block = block, .offset = offset, .kpool = kpool, .vpool = vpool};
}

/* Divide the queries into groups: consecutive rows of a sequence times heads of one KV head, as fit on a thread's stack. */
static long group_queries(mk_query_group *groups, const int32_t *table_start, const int32_t *kv_of_head, long m,
                          int heads, int hd) {
    /* A group converts its keys and values once for all of its queries.  Models have few wide heads, so their groups use the
     * whole capacity; those of others do if there are many, and are smaller otherwise, so that each thread gets some. */
    int large = hd > MK_WIDE_HEAD || m * heads >= MK_MANY_QUERIES, most = large ? MK_MAX_QUERIES : MK_FEWER_QUERIES;
    int maximum = (large ? MK_ATTENTION_SUMS : MK_ATTENTION_SUMS / 2) / MK_LANES(hd);
    long count = 0;
    if (maximum > most) maximum = most;
    if (maximum >= MK_QUERY_TILE) maximum -= maximum % MK_QUERY_TILE;
    else maximum = maximum >= 8 ? 8 : 4; /* heads have at most MK_MAX_HEAD_DIM dimensions */
    for (int head = 0; head < heads;) {
        int width = 1;
        while (width < maximum && head + width < heads && kv_of_head[head + width] == kv_of_head[head]) width++;
        for (long row = 0, end = 0; row < m;) {
            int rows = 1;
            while (end < m && (end <= row || table_start[end] == table_start[row])) end++;
            while ((rows + 1) * width <= maximum && row + rows < end) rows++;
            groups[count++] = (mk_query_group){rows, width, row, end, head, kv_of_head[head]};
            row += rows;
        }
        head += width;
    }
    return count;
}

void mk_attention(mk_work *work, int kv_type, const float *q, long q_stride, float *out, long out_stride,
                  const void *kpool, const void *vpool, const int32_t *pos, const int32_t *table,
                  const int32_t *table_start, const int32_t *kv_of_head, long m, int heads, int kvh, int hd, int vd,
                  float scale, int window, const float *sinks, float softcap, int chunked, int bidirectional,
                  const mk_tuning *tuning) {
    if (m < 1 || heads < 1) return;
    mk_query_groups *groups = malloc(sizeof *groups + (size_t)m * (size_t)heads * sizeof *groups->items);
    if (!groups) {
        work->failed = MK_NO_MEMORY;
        return;
    }
    groups->next = work->groups;
    work->groups = groups;
    long count = group_queries(groups->items, table_start, kv_of_head, m, heads, hd > vd ? hd : vd);
    mk_step_of(work, mk_active->of_rows->attention, count, 1, 1)->attention = (mk_attention_job){
        .type = kv_type, .kvh = kvh, .hd = hd, .vd = vd, .window = window, .scale = scale, .sinks = sinks,
        .softcap = softcap, .chunked = chunked, .bidirectional = bidirectional, .free_f16 = mk_f16_is_free(),
        .tuning = tuning ? *tuning : (mk_tuning){0}, .q = q, .out = out, .q_stride = q_stride,
        .out_stride = out_stride, .kpool = kpool, .vpool = vpool, .pos = pos, .table = table,
        .table_start = table_start, .groups = groups->items};
}
