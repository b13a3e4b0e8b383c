/* The C interface of the compute kernels, for kernels.pyx and the tests' harness.
 *
 * Shapes and layouts are those of mpillm/kernels (types.py, reference/); the caller has checked the arguments.  Functions
 * with an argument `work` add a step to it; mk_run computes the steps with at most `threads` threads.  The bits of the
 * results depend neither on the number of threads nor on the path. */
#ifndef MK_KERNELS_H
#define MK_KERNELS_H

#include <stddef.h>
#include <stdint.h>

/* Block types, in the order of their numbers: X(name, kind, values of a block, bytes of a block in ggml's form, bytes of
 * a block in a tile, F16 numbers of a block, bits of a value). The bits are 0 if values are looked up in a grid.
 *
 * The kind determines how a type is packed and multiplied. Rows of FLOAT types are stored unchanged (body_float.h), and
 * so are rows of SCALED blocks, which have an F32 scale and codes that stand for floats (body_scaled.h). A PLAIN block
 * has F16 numbers, or the byte of an exponent if it has none, and then its values (body_plain.h). SUPER blocks are
 * K-quants (super.h, body_super.h). CODED rows are BF16 in files; a tile decodes to the same bits (coded.h). Blocks of a
 * PANEL type have an F32 scale, the same in all blocks of a row within a column panel: a tile has it once (body_panel.h).
 *
 * A new type needs a row here and in mpillm/kernels/types.py. If the bodies of its kind do not fit, it also needs its own
 * in pack.c, in dequantise of body_quant.h, in load_groups of body_plain.h, in raised_by of body_unpacked.h, and in the
 * tile of its kind. */
#define MK_BLOCK_TYPES(X)                 \
    X(F32, FLOAT, 1, 4, 4, 0, 32)         \
    X(F16, FLOAT, 1, 2, 2, 0, 16)         \
    X(BF16, FLOAT, 1, 2, 2, 0, 16)        \
    X(Q8_0, PLAIN, 32, 34, 34, 1, 8)      \
    X(Q4_0, PLAIN, 32, 18, 18, 1, 4)      \
    X(Q4_1, PLAIN, 32, 20, 20, 2, 4)      \
    X(Q4_K, SUPER, 256, 144, 148, 2, 4)   \
    X(Q5_K, SUPER, 256, 176, 180, 2, 5)   \
    X(Q6_K, SUPER, 256, 210, 210, 1, 6)   \
    X(MXFP4, PLAIN, 32, 17, 17, 0, 4)     \
    X(IQ4_NL, PLAIN, 32, 18, 18, 1, 4)    \
    X(Q5_0, PLAIN, 32, 22, 22, 1, 5)      \
    X(Q5_1, PLAIN, 32, 24, 24, 2, 5)      \
    X(IQ4_XS, SUPER, 256, 136, 138, 1, 4) \
    X(Q3_K, SUPER, 256, 110, 114, 1, 3)   \
    X(Q2_K, SUPER, 256, 84, 84, 2, 2)     \
    X(IQ3_S, SUPER, 256, 110, 114, 1, 0)  \
    X(IQ3_XXS, SUPER, 256, 98, 98, 1, 0)  \
    X(IQ2_S, SUPER, 256, 82, 82, 1, 0)    \
    X(IQ2_XS, SUPER, 256, 74, 74, 1, 0)   \
    X(IQ2_XXS, SUPER, 256, 66, 66, 1, 0)  \
    X(BF12, CODED, 1, 2, 2, 0, 12)        \
    X(FP8, SCALED, 128, 132, 132, 0, 8)   \
    X(NVFP4, SCALED, 128, 76, 76, 0, 4)   \
    X(NF4, SCALED, 64, 36, 36, 0, 4)      \
    X(W8A8, PANEL, 32, 36, 32, 0, 8)
#define MK_TYPE(name, ...) MK_##name,
enum { MK_BLOCK_TYPES(MK_TYPE) MK_TYPES };
enum { MK_KIND_FLOAT, MK_KIND_PLAIN, MK_KIND_SUPER, MK_KIND_CODED, MK_KIND_SCALED, MK_KIND_PANEL };
enum {
    MK_TILE = 16,            /* rows of W that are interleaved */
    MK_BLOCK = 32,           /* values that share a scale */
    MK_SUPER = 256,          /* values of a K-quant's block */
    MK_BF16_BLOCK = 256,     /* columns of BF16 weights whose sum begins at zero */
    MK_ACTIVATION = 56,      /* bytes of mk_activation */
    MK_PANEL_ROW = 32,       /* bytes of mk_panel_row */
    MK_PANEL_HEAD = 64,      /* bytes of a PANEL type's tile before its values: the scales of the rows */
    MK_OUTLIER = 16256,      /* what the largest of a panel's integers may be: 127 * 128 */
    MK_PANEL_COLUMNS = 1 << 17, /* of a panel of a PANEL type, at most: 128 * 127 times as many are below 2^31 */
    MK_GROUP = 4,            /* rows of x that are interleaved */
    MK_KV_BLOCK = 32,        /* tokens */
    MK_MAX_LEVELS = 7,       /* levels of the tree over panels */
    MK_MAX_PANELS = 64,
    MK_STORED_TILE = 1 << 18, /* bytes: what a tile of quantised rows that lie as in a file takes, packed, at most */
    MK_MAX_HEAD_DIM = 2048,
};

/* Activations of an MLP (mpillm.kernels.types.Activation): X(name), in the order of their numbers. */
#define MK_ACTIVATIONS(X) \
    X(MK_SILU) X(MK_GELU) X(MK_GELU_TANH) X(MK_RELU2) X(MK_SIGMOID) X(MK_SWIGLU_CLAMPED) X(MK_IDENTITY) \
    X(MK_SILU_SCALED) X(MK_RELU)
#define MK_NUMBER(name) name,
enum { MK_ACTIVATIONS(MK_NUMBER) MK_ACTIVATION_COUNT };

/* The columns of the table of block types, as functions of the type. */
#define MK_TRAIT(trait, column)                                                        \
    static inline int trait(int type) {                                                \
        static const signed short values_of[MK_TYPES] = {MK_BLOCK_TYPES(column)};      \
        return values_of[type];                                                        \
    }
#define MK_KIND_OF(name, kind, ...) MK_KIND_##kind,
#define MK_VALUES_OF(name, kind, values, ...) values,
#define MK_BYTES_OF(name, kind, values, bytes, ...) bytes,
#define MK_PACKED_OF(name, kind, values, bytes, packed, ...) packed,
#define MK_F16S_OF(name, kind, values, bytes, packed, f16s, bits) f16s,
#define MK_BITS_OF(name, kind, values, bytes, packed, f16s, bits) bits,
MK_TRAIT(mk_kind, MK_KIND_OF)
MK_TRAIT(mk_block, MK_VALUES_OF)
MK_TRAIT(mk_block_bytes, MK_BYTES_OF)
MK_TRAIT(mk_packed_bytes, MK_PACKED_OF) /* bytes of a block in a tile, in which 6-bit scales take a byte */
MK_TRAIT(mk_f16s, MK_F16S_OF)
MK_TRAIT(mk_bits, MK_BITS_OF)

static inline int mk_is_scaled(int type) { return mk_kind(type) == MK_KIND_SCALED; }
/* Whether rows of W are stored separately, and x is in floats. */
static inline int mk_is_float(int type) { return mk_kind(type) == MK_KIND_FLOAT || mk_is_scaled(type); }
static inline int mk_is_super(int type) { return mk_kind(type) == MK_KIND_SUPER; }
static inline int mk_is_coded(int type) { return mk_kind(type) == MK_KIND_CODED; }
static inline int mk_is_panel(int type) { return mk_kind(type) == MK_KIND_PANEL; }
/* Whether products take activations as integers (mk_quantize_rows), else as floats (mk_float_rows). */
static inline int mk_is_quantised(int type) {
    return mk_kind(type) == MK_KIND_PLAIN || mk_is_super(type) || mk_is_panel(type);
}

/* Bytes before the values of a PLAIN block, or of one of a PANEL type. */
static inline int mk_scale_bytes(int type) { return mk_is_panel(type) ? 4 : mk_f16s(type) ? 2 * mk_f16s(type) : 1; }

/* The 16 values of a nibble, X(value): for MXFP4 the e2m1 numbers times 2; for IQ4_NL and IQ4_XS ggml's kvalues_iq4nl. */
#define MK_E2M1_VALUES(X) X(0) X(1) X(2) X(3) X(4) X(6) X(8) X(12) X(0) X(-1) X(-2) X(-3) X(-4) X(-6) X(-8) X(-12)
#define MK_IQ4_VALUES(X) \
    X(-127) X(-104) X(-83) X(-65) X(-49) X(-35) X(-22) X(-10) X(1) X(13) X(25) X(38) X(53) X(69) X(89) X(113)

/* Whether activations are rounded to BF16, and how many columns a step of a product has. */
static inline int mk_is_bf16(int type) { return type == MK_BF16 || type == MK_BF12; }
static inline int mk_float_step(int type) { return mk_is_bf16(type) ? 32 : 16; }

/* The 16 numbers of bitsandbytes' nf4, X(value). */
#define MK_NF4_VALUES(X)                                                                                              \
    X(-1.0f) X(-0.6961928009986877f) X(-0.5250730514526367f) X(-0.39491748809814453f) X(-0.28444138169288635f)       \
    X(-0.18477343022823334f) X(-0.09105003625154495f) X(0.0f) X(0.07958029955625534f) X(0.16093020141124725f)        \
    X(0.24611230194568634f) X(0.33791524171829224f) X(0.44070982933044434f) X(0.5626170039176941f)                   \
    X(0.7229568362236023f) X(1.0f)

/* A KV cache has the types F32, F16, Q8_0 and this one, which is Q8_0 whose keys are multiplied with queries that are rounded
 * to int8 too: four dimensions of a token lie together. */
enum { MK_Q8_0_INT8 = MK_TYPES };
static inline int mk_is_kv_int8(int type) { return type == MK_Q8_0 || type == MK_Q8_0_INT8; }

/* Bytes of one head's keys or values in a block.  A block of int8 has first the scales,
 * [hd / 32][token], then the integers. */
static inline long mk_kv_bytes(int type, int hd) { return (long)hd * (type == MK_F32 ? 128 : type == MK_F16 ? 64 : 34); }

static inline long mk_blocks(long columns, int block) { return (columns + block - 1) / block; }

/* Bytes of `columns` columns of a row in ggml's form. */
static inline long mk_row_bytes(int type, long columns) { return mk_blocks(columns, mk_block(type)) * mk_block_bytes(type); }

/* A tile of a CODED type: blocks of 256 columns, each with a head and steps of 32 columns of 16 rows (coded.h). */
enum { MK_CODED_HEAD = 48, MK_CODED_STEP = 768 /* bytes */ };
static inline long mk_coded_bytes(long columns) {
    return mk_blocks(columns, MK_BF16_BLOCK) * MK_CODED_HEAD + mk_blocks(columns, 32) * MK_CODED_STEP;
}

/* Bytes before the values of a tile's panel. */
static inline long mk_head_bytes(int type) { return mk_is_panel(type) ? MK_PANEL_HEAD : 0; }

/* Bytes of `columns` columns of a tile, of types whose rows are interleaved. */
static inline long mk_tile_bytes(int type, long columns) {
    if (mk_is_coded(type)) return mk_coded_bytes(columns);
    return mk_head_bytes(type) + mk_blocks(columns, mk_block(type)) * mk_packed_bytes(type) * MK_TILE;
}

/* A block of 32 activations, with the sums at which a product begins. Rows of x are stored in groups of MK_GROUP rows: the
 * first block of each row, then the second block of each row, and so on. The last group may have fewer rows. */
typedef struct {
    int8_t q[MK_BLOCK];
    float scale, total;   /* scale * sum(q) */
    /* Stored weights are larger by 8, 128 or 32; these offsets correct a product. */
    int32_t offset8, offset128; /* -8 * sum(q), -128 * sum(q) */
    int16_t offset32[2][2];     /* of each half of q: -32 times the sums of columns 4 i, 4 i + 1 and of 4 i + 2, 4 i + 3 */
} mk_activation;

/* What a row of x has for a panel of a PANEL type.  Those of a group's rows are followed by their int8, of which 32 columns
 * of each row lie one after the other.  The scale is that of all values but the largest one, whose integer is that of its
 * column, and 128 times the only one of `high`, which belongs to its place in its group of four columns. */
typedef struct {
    float scale;
    int32_t offset128, high128; /* -128 times the sum of the int8, and -128 times that of high */
    int32_t group;
    int8_t high[16];
} mk_panel_row;

/* Bytes of a panel of `columns` columns of a row of x, as integers. */
static inline long mk_activation_bytes(int type, long columns) {
    const long blocks = mk_blocks(columns, MK_BLOCK);
    return mk_is_panel(type) ? MK_PANEL_ROW + MK_BLOCK * blocks : MK_ACTIVATION * blocks;
}

/* Paths: the instruction sets that this build has and this machine can run, slowest first. */
int mk_path_count(void);
const char *mk_path_name(int index); /* NULL past the end */
int mk_set_path(const char *name);   /* 0, or -1 if this machine cannot run it */

/* Scores of the query at position p are multiplied by 1 + beta ln(1 + floor((p + offset) / length)). */
typedef struct {
    float beta;
    int32_t length, offset;
} mk_tuning;

/* Work: begin, add at most MK_STEPS steps, run; after a run it is empty and may be filled again. */
enum { MK_STEPS = 48, MK_MAX_PRODUCTS = 32 /* of one activation */ };
typedef struct mk_work mk_work;
typedef struct mk_step mk_step;
typedef struct mk_product mk_product;
void mk_begin(mk_work *work);
void mk_begin_in(mk_work *work, mk_step *steps, long capacity); /* the caller owns the list of steps */
void mk_join(mk_work *work, int on); /* whether the next steps may run concurrently with the step before them */
enum { MK_NO_MEMORY = 1, MK_TOO_MANY_STEPS, MK_NO_THREADS };
int mk_run(mk_work *work, int threads); /* 0, or one of these errors; nothing was computed then */
long mk_capacity(const mk_work *work); /* the number of steps that its list holds */
/* Write to each page of new memory, the threads in turn, so that every matrix is spread over the NUMA nodes of the
 * threads.  Does nothing with one thread. */
void mk_first_touch(uint8_t *memory, long bytes, int threads);
int mk_regions(void); /* the number of runs since the start of the process, by any thread */
long mk_weights_read(void); /* the bytes of matrices that their products read */

/* Strides are in elements.  bounds: int32 [panels + 1]. */
/* Pack `n` canonical rows of type `stored` (`type` or a float type), at a distance of `stride` bytes, as the rows from
 * `first` on of `whole` rows.  head > 0: the halves of `head` rows are interleaved, as llama.cpp stores q and k.  *misfit
 * becomes 1 if rows have too many exceptions for a CODED type; `out` is undefined then. */
void mk_pack(mk_work *work, int type, int stored, const uint8_t *canonical, long stride, long n, long head, const
             int32_t *bounds, int panels, uint8_t *out, long first, long whole, int *misfit);
void mk_quantize(mk_work *work, int type, const float *x, long stride, long n, long k, uint8_t *out);
void mk_dequantize(mk_work *work, int type, const uint8_t *canonical, long n, long k, float *out, long stride);
/* Activations for weights of a quantised type.  at: the indices of m rows of x; NULL: the first m rows */
void mk_quantize_rows(mk_work *work, int type, const float *x, long stride, const int32_t *at, long m, const int32_t *bounds,
                      int panels, uint8_t *out, long out_bytes);
/* The same for weights of a float type: out_bytes is mk_float_bytes. */
void mk_float_rows(mk_work *work, int type, const float *x, long stride, const int32_t *at, long m,
                   const int32_t *bounds, int panels, uint8_t *out, long out_bytes);
long mk_float_bytes(int type, const int32_t *bounds, int panels);
/* Where the panels of a matrix begin; returns its bytes.  row_bytes: rows lie so far apart, in ggml's form, with all of
 * their panels; 0: packed. */
long mk_panels(int type, const uint8_t *w, long n, long row_bytes, const int32_t *bounds, int panels, const uint8_t **at);
/* at: where each panel begins; x: activations for the type, grouped, x_stride bytes a row.
 * panel_stride: 0 folds the panels. */
void mk_matmul(mk_work *work, int type, const uint8_t *const *at, long n, long row_bytes, const int32_t *bounds,
               int panels, const void *x, long x_stride, long m, float *out, long out_stride, long panel_stride);
/* x += scale * rows; rows_stride 0: the same row for all */
void mk_add_rows(mk_work *work, float *x, long stride, const float *rows, long rows_stride, float scale, long m, long d);
void mk_copy_rows(mk_work *work, const float *x, long x_stride, long m, long d, float *out, long out_stride);
/* A product of a mixture: row rows[i] of out += weights[i] * row i of the result of mk_matmul.  With a bias [n], the same
 * row of the first panel += weights[i] * bias before that.  The products of a step have the same number of rows of W, and
 * are added one after the other. */
void mk_weigh(mk_work *work, mk_product *product, int type, const uint8_t *const *at, long n, long row_bytes,
              const int32_t *bounds, int panels, const void *x, long x_stride, long m, float *out, long out_stride,
              long panel_stride, const int32_t *rows, const float *weights, const float *bias);
void mk_mixture(mk_work *work, const mk_product *products, long count);
void mk_fold(mk_work *work, const float *parts, int panels, long m, long d, float *out, long stride);
void mk_square_sums(mk_work *work, const float *x, long stride, long m, long d, float *out);
/* w: NULL is all ones.  The squares of each of `groups` equal parts of a row are summed separately. */
void mk_rms_norm(mk_work *work, const float *x, long x_stride, const float *w, float eps, int groups, long m, long d,
                 float *out, long out_stride);
/* w, bias: NULL is all ones, all zeros */
void mk_layer_norm(mk_work *work, const float *x, long x_stride, const float *w, const float *bias, float eps, long m,
                   long d, float *out, long out_stride);
/* cosine, sine [m, rotary / 2].  Rotates the first `rotary` of each head's hd dimensions, in pairs (i, i + rotary / 2),
 * or (2i, 2i + 1) if interleaved. */
void mk_rope(mk_work *work, float *x, long stride, const float *cosine, const float *sine, long m, int heads, int hd,
             int rotary, int interleaved);
/* out = f(gate) * up, or f(gate) if up is NULL; MK_SWIGLU_CLAMPED uses limit and alpha, MK_SILU_SCALED uses alpha. */
void mk_activate(mk_work *work, int kind, const float *gate, long gate_stride, const float *up, long up_stride,
                 float limit, float alpha, long m, long d, float *out, long out_stride);
void mk_softcap(mk_work *work, float *x, long stride, float cap, long m, long d); /* x = cap * tanh(x / cap) */
void mk_softmax(mk_work *work, float *x, long stride, long m, long d);
void mk_top_k(mk_work *work, const float *x, long stride, long m, long n, long k, float *values, int32_t *ids);
void mk_lse_parts(mk_work *work, const float *x, long stride, const float *inv_t, long m, const int32_t *bounds, int
                  panels,
                  float *out);
/* v: NULL with vd 0 */
void mk_kv_store(mk_work *work, int kv_type, const float *k, long k_stride, const float *v, long v_stride, const
                 int32_t *block,
                 const int32_t *offset, long m, void *kpool, void *vpool, int kvh, int hd, int vd);
/* vpool: NULL if a head's values are the first vd dimensions of its keys.  chunked: a row attends to its own chunk of
 * `window` positions.  bidirectional: a row attends to as many positions after it as before it, up to the last row of its
 * sequence.  tuning: NULL, or a further factor of the scores. */
void mk_attention(mk_work *work, int kv_type, const float *q, long q_stride, float *out, long out_stride, const void
                  *kpool,
                 const void *vpool, const int32_t *pos, const int32_t *table, const int32_t *table_start,
                 const int32_t *kv_of_head, long m, int heads, int kvh, int hd, int vd, float scale, int window,
                 const float *sinks, float softcap, int chunked, int bidirectional, const mk_tuning *tuning);
/* steps = softplus(scale * x + bias) within low .. high, out = e^(rates * steps); rates, bias [d]; steps may be NULL. */
void mk_decays(mk_work *work, const float *x, float scale, const float *rates, const float *bias, float low, float high,
               long m, long d, float *steps, float *out);
/* Rows first_rows[s] .. first_rows[s + 1] - 1 (for the last sequence: m - 1) belong to sequence s, whose state is in slot
 * slots[s].  A causal convolution of each channel, then SiLU if `silu`.  w [taps, channels], whose last tap belongs to the
 * row itself; bias: NULL is all zeros; tails [slot], at a distance of tail_stride: the preceding rows
 * [taps - 1, channels]. */
void mk_short_conv(mk_work *work, const float *x, long x_stride, const float *w, const float *bias, float *tails,
                   long tail_stride, const int32_t *first_rows, const int32_t *slots, long sequences, long m,
                   long channels, int taps, int silu, float *out, long out_stride);
/* For each row and head: S *= decay; S += k (beta * (v - k S)); out [m, heads * dv] = q S.  q, k [m, keys * dk], of
 * which a head uses number key_of_head[head]; v [m, heads * dv]; decay, beta [m, heads]; states [slot], at a distance of
 * state_stride: [heads, pieces of 16 columns, dk, 16]. */
void mk_delta_rule(mk_work *work, const float *q, const float *k, const float *v, const float *decay, const float *beta,
                   float *states, long state_stride, const int32_t *first_rows, const int32_t *slots, long sequences,
                   const int32_t *key_of_head, long m, int keys, int heads, int dk, int dv, float *out);
/* For each row and head: S = decay S + b (step * x); out [m, heads * dv] = c S + skip * x.  b, c [m, groups * dk], of
 * which a head uses number group_of_head[head]; x [m, heads * dv]; step, decay [m, heads]; skip [heads]; states as in
 * mk_delta_rule. */
void mk_selective_scan(mk_work *work, const float *c, const float *b, const float *x, const float *decay,
                       const float *step, const float *skip, float *states, long state_stride,
                       const int32_t *first_rows, const int32_t *slots, long sequences, const int32_t *group_of_head,
                       long m, int groups, int heads, int dk, int dv, float *out);

#endif
