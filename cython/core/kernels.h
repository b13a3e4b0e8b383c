/* The compute kernels' C interface: what kernels.pyx and the tests' harness call.
 *
 * Shapes and layouts are those of mpillm/kernels (types.py, reference.py); arguments have been checked by the caller.
 * Every function splits its items over at most `threads` threads and gives the same bits for any number of them, on
 * every path. */
#ifndef MK_KERNELS_H
#define MK_KERNELS_H

#include <stddef.h>
#include <stdint.h>

enum { MK_F32, MK_F16, MK_BF16, MK_Q8_0, MK_Q4_0, MK_Q4_1, MK_TYPES };
enum {
    MK_TILE = 16,            /* rows of W that are interleaved */
    MK_BLOCK = 32,           /* values that share a scale */
    MK_ACTIVATION = 40,      /* bytes: int8 q[32], f32 scale, i32 sum(q) */
    MK_KV_BLOCK = 32,        /* tokens */
    MK_MAX_LEVELS = 7,       /* of the tree over panels: 64 panels */
    MK_MAX_HEAD_DIM = 2048,
};

static inline int mk_block(int type) { return type >= MK_Q8_0 ? MK_BLOCK : 1; }

static inline int mk_block_bytes(int type) {
    static const int bytes[MK_TYPES] = {4, 2, 2, 34, 18, 20};
    return bytes[type];
}

static inline long mk_blocks(long columns, int block) { return (columns + block - 1) / block; }

/* Paths: names of the instruction sets that this build has and this machine can run, slowest first. */
int mk_path_count(void);
const char *mk_path_name(int index); /* NULL past the end */
int mk_set_path(const char *name);   /* 0, or -1: not on this machine */

/* Strides are in elements.  bounds: int32 [panels + 1]. */
void mk_pack(int type, const uint8_t *canonical, long n, long k, const int32_t *bounds, int panels, uint8_t *out,
             int threads);
void mk_quantize(int type, const float *x, long stride, long n, long k, uint8_t *out, int threads);
void mk_dequantize(int type, const uint8_t *canonical, long n, long k, float *out, long stride, int threads);
void mk_quantize_rows(const float *x, long stride, long m, const int32_t *bounds, int panels, uint8_t *out,
                      long out_bytes, int threads);
/* x: activations (x_stride in bytes) for quantised types, else f32.  panel_stride: 0 folds the panels. */
void mk_matmul(int type, const uint8_t *w, long n, const int32_t *bounds, int panels, const void *x, long x_stride,
               long m, float *out, long out_stride, long panel_stride, int threads);
void mk_fold(const float *parts, int panels, long m, long d, float *out, long stride, int threads);
void mk_rms_norm(const float *x, long x_stride, const float *w, float eps, long m, long d, float *out,
                 long out_stride, int threads);
void mk_rope(float *x, long stride, const float *cosine, const float *sine, long m, int heads, int hd, int threads);
void mk_silu_mul(const float *gate, long gate_stride, const float *up, long up_stride, long m, long d, float *out,
                 long out_stride, int threads);
void mk_softmax(float *x, long stride, long m, long d, int threads);
void mk_top_k(const float *x, long stride, long m, long n, long k, float *values, int32_t *ids, int threads);
void mk_lse_parts(const float *x, long stride, const float *inv_t, long m, const int32_t *bounds, int panels,
                  float *out, int threads);
void mk_kv_store(int kv_type, const float *k, long k_stride, const float *v, long v_stride, const int32_t *block,
                 const int32_t *offset, long m, void *kpool, void *vpool, int kvh, int hd);
/* 0, or -1: no memory */
int mk_attention(int kv_type, const float *q, long q_stride, float *out, long out_stride, const void *kpool,
                 const void *vpool, const int32_t *pos, const int32_t *table, const int32_t *table_start,
                 const int32_t *kv_of_head, long m, int heads, int kvh, int hd, float scale, int window, int threads);

#endif
