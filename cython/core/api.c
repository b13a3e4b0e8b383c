/* kernels.h on top of the active path: fill in a job, say how many items it has, run it. */
#include <stdlib.h>
#include <string.h>

#include "active.h"
#include "half.h"

enum { CHUNK = 256 /* rows of x that pass by a tile of W while it is in the cache */ };

void mk_quantize(int type, const float *x, long stride, long n, long k, uint8_t *out, int threads) {
    mk_rows_job job = {.type = type, .k = k, .x = x, .stride = stride, .out = out};
    mk_run(mk_active->quantize, &job, n, threads, 0);
}

void mk_dequantize(int type, const uint8_t *canonical, long n, long k, float *out, long stride, int threads) {
    mk_rows_job job = {.type = type, .k = k, .in = canonical, .values = out, .stride = stride};
    mk_run(mk_active->dequantize, &job, n, threads, 0);
}

void mk_quantize_rows(const float *x, long stride, long m, const int32_t *bounds, int panels, uint8_t *out,
                      long out_bytes, int threads) {
    mk_rows_job job = {.panels = panels, .x = x, .out = out, .bounds = bounds, .stride = stride, .out_bytes = out_bytes};
    mk_run(mk_active->quantize_rows, &job, m, threads, 0);
}

void mk_matmul(int type, const uint8_t *w, long n, const int32_t *bounds, int panels, const void *x, long x_stride,
               long m, float *out, long out_stride, long panel_stride, int threads) {
    mk_matmul_job job = {.type = type, .panels = panels, .tiles = mk_blocks(n, MK_TILE), .n = n, .m = m,
                         .chunk = CHUNK, .bounds = bounds, .w = w, .x = x, .x_stride = x_stride, .out = out,
                         .out_stride = out_stride, .panel_stride = panel_stride};
    if (type < MK_Q8_0) job.x_stride *= 4;
    if (job.tiles < 4l * threads) job.chunk = CHUNK / 8; /* few tiles: share out the rows too */
    mk_run(mk_active->matmul, &job, job.tiles * mk_blocks(m, (int)job.chunk), threads, 0);
}

void mk_fold(const float *parts, int panels, long m, long d, float *out, long stride, int threads) {
    mk_small_job job = {.a = parts, .panels = panels, .m = m, .d = d, .out = out, .out_stride = stride};
    mk_run(mk_active->fold, &job, m, threads, 0);
}

void mk_rms_norm(const float *x, long x_stride, const float *w, float eps, long m, long d, float *out,
                 long out_stride, int threads) {
    mk_small_job job = {.a = x, .a_stride = x_stride, .b = w, .eps = eps, .d = d, .out = out, .out_stride = out_stride};
    mk_run(mk_active->rms_norm, &job, m, threads, 0);
}

void mk_rope(float *x, long stride, const float *cosine, const float *sine, long m, int heads, int hd, int threads) {
    mk_small_job job = {.a = cosine, .b = sine, .out = x, .out_stride = stride, .heads = heads, .hd = hd};
    mk_run(mk_active->rope, &job, m, threads, 0);
}

void mk_silu_mul(const float *gate, long gate_stride, const float *up, long up_stride, long m, long d, float *out,
                 long out_stride, int threads) {
    mk_small_job job = {.a = gate, .a_stride = gate_stride, .b = up, .b_stride = up_stride, .d = d, .out = out,
                        .out_stride = out_stride};
    mk_run(mk_active->silu_mul, &job, m, threads, 0);
}

void mk_softmax(float *x, long stride, long m, long d, int threads) {
    mk_small_job job = {.out = x, .out_stride = stride, .d = d};
    mk_run(mk_active->softmax, &job, m, threads, 0);
}

void mk_top_k(const float *x, long stride, long m, long n, long k, float *values, int32_t *ids, int threads) {
    mk_small_job job = {.a = x, .a_stride = stride, .d = n, .k = k, .out = values, .ids = ids};
    mk_run(mk_active->top_k, &job, m, threads, 0);
}

void mk_lse_parts(const float *x, long stride, const float *inv_t, long m, const int32_t *bounds, int panels,
                  float *out, int threads) {
    mk_small_job job = {.a = x, .a_stride = stride, .b = inv_t, .bounds = bounds, .panels = panels, .out = out};
    mk_run(mk_active->lse_parts, &job, m * panels, threads, 0);
}

/* One row of K goes to one column of its block, one row of V to one row. */
void mk_kv_store(int kv_type, const float *k, long k_stride, const float *v, long v_stride, const int32_t *block,
                 const int32_t *offset, long m, void *kpool, void *vpool, int kvh, int hd) {
    uint16_t half[MK_MAX_HEAD_DIM];
    for (long row = 0; row < m; row++)
        for (int head = 0; head < kvh; head++) {
            long at = ((long)block[row] * kvh + head) * hd * MK_KV_BLOCK;
            const float *from = k + row * k_stride + (long)head * hd, *value = v + row * v_stride + (long)head * hd;
            if (kv_type == MK_F32) {
                float *to = (float *)kpool + at + offset[row];
                for (int i = 0; i < hd; i++) to[(long)i * MK_KV_BLOCK] = from[i];
                memcpy((float *)vpool + at + (long)offset[row] * hd, value, (size_t)hd * sizeof *value);
            } else {
                uint16_t *to = (uint16_t *)kpool + at + offset[row];
                mk_active->to_f16(from, half, hd);
                for (int i = 0; i < hd; i++) to[(long)i * MK_KV_BLOCK] = half[i];
                mk_active->to_f16(value, (uint16_t *)vpool + at + (long)offset[row] * hd, hd);
            }
        }
}

/* Groups: runs of rows of one sequence times runs of heads of one KV head, as many as a thread's stack holds. */
static long group_queries(mk_query_group *groups, const int32_t *table_start, const int32_t *kv_of_head, long m,
                          int heads, int hd) {
    int most = MK_ATTENTION_SUMS / MK_LANES(hd);
    long count = 0;
    if (most > MK_MAX_QUERIES) most = MK_MAX_QUERIES;
    for (int head = 0; head < heads;) {
        int width = 1;
        while (width < most && head + width < heads && kv_of_head[head + width] == kv_of_head[head]) width++;
        for (long row = 0; row < m;) {
            int rows = 1;
            while ((rows + 1) * width <= most && row + rows < m && table_start[row + rows] == table_start[row]) rows++;
            groups[count++] = (mk_query_group){rows, width, row, head, kv_of_head[head]};
            row += rows;
        }
        head += width;
    }
    return count;
}

int mk_attention(int kv_type, const float *q, long q_stride, float *out, long out_stride, const void *kpool,
                 const void *vpool, const int32_t *pos, const int32_t *table, const int32_t *table_start,
                 const int32_t *kv_of_head, long m, int heads, int kvh, int hd, float scale, int window, int threads) {
    if (m < 1 || heads < 1) return 0;
    mk_query_group *groups = malloc((size_t)m * (size_t)heads * sizeof *groups);
    if (!groups) return -1;
    long count = group_queries(groups, table_start, kv_of_head, m, heads, hd);
    mk_attention_job job = {.f16 = kv_type == MK_F16, .kvh = kvh, .hd = hd, .window = window, .scale = scale, .q = q,
                            .out = out, .q_stride = q_stride, .out_stride = out_stride, .kpool = kpool, .vpool = vpool,
                            .pos = pos, .table = table, .table_start = table_start, .groups = groups};
    mk_run(mk_active->attention, &job, count, threads, 1);
    free(groups);
    return 0;
}

/* --- packing: moves bytes only, so one form serves all paths; items are tiles --- */

typedef struct {
    int type, panels;
    long n, blocks;
    const int32_t *bounds;
    const uint8_t *in;
    uint8_t *out;
} pack_job;

static void pack_block(int type, const uint8_t *in, long row_bytes, int rows, uint8_t *out) {
    int bytes = mk_block_bytes(type), head = type < MK_Q8_0 ? bytes : 2, heads = type == MK_Q4_1 ? 2 : 1;
    memset(out, 0, (size_t)bytes * MK_TILE);
    for (int r = 0; r < rows; r++, in += row_bytes) {
        for (int h = 0; h < heads; h++) memcpy(out + h * 32 + r * head, in + h * head, (size_t)head);
        for (int g = 0; heads * head + 4 * g < bytes; g++)
            memcpy(out + heads * head * MK_TILE + 64 * g + 4 * r, in + heads * head + 4 * g, 4);
    }
}

static void pack_tiles(const void *argument, long begin, long end) {
    const pack_job *job = argument;
    int block = mk_block(job->type);
    long bytes = mk_block_bytes(job->type), tiles = mk_blocks(job->n, MK_TILE);
    for (long tile = begin; tile < end; tile++) {
        int rows = job->n - tile * MK_TILE < MK_TILE ? (int)(job->n - tile * MK_TILE) : MK_TILE;
        uint8_t *out = job->out;
        for (int p = 0; p < job->panels; p++) {
            long first = job->bounds[p] / block, count = mk_blocks(job->bounds[p + 1] - job->bounds[p], block);
            for (long b = 0; b < count; b++)
                pack_block(job->type, job->in + (tile * MK_TILE * job->blocks + first + b) * bytes, job->blocks * bytes,
                           rows, out + (tile * count + b) * bytes * MK_TILE);
            out += tiles * count * bytes * MK_TILE;
        }
    }
}

void mk_pack(int type, const uint8_t *canonical, long n, long k, const int32_t *bounds, int panels, uint8_t *out,
             int threads) {
    pack_job job = {type, panels, n, mk_blocks(k, mk_block(type)), bounds, canonical, out};
    mk_run(pack_tiles, &job, mk_blocks(n, MK_TILE), threads, 0);
}
