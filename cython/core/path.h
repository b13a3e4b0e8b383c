/* A path is a table of range functions.  Each computes items begin .. end - 1 of a job; run.c divides jobs into ranges. */
#ifndef MK_PATH_H
#define MK_PATH_H

#include <stdatomic.h>

#include "kernels.h"

typedef void (*mk_range)(const void *job, long begin, long end);

typedef struct {
    int type, stored, panels;
    long n, head, stride; /* n: the given rows; items are their tiles */
    long first, whole;    /* the first given row, and the number of rows of the matrix */
    const int32_t *bounds;
    const uint8_t *in;
    uint8_t *out;
    int *misfit;
} mk_pack_job;

typedef struct {
    int type, panels;
    long n, k;
    const uint8_t *in;
    const float *x;
    uint8_t *out;
    float *values;
    const int32_t *bounds, *at; /* at: which rows of x, or NULL */
    long stride, out_bytes;
} mk_rows_job; /* quantize (of a PANEL type with the scales `values`), dequantize, quantize_rows: items are rows */

struct mk_product {
    int type, skip, panels; /* of the panels the first `skip` are passed over */
    int in_tiles;            /* x is what the path's tile_rows makes */
    long tiles, n, m, chunk; /* items are (chunk of rows of x, tile of W) */
    const int32_t *bounds;
    const uint8_t *const *at; /* the panels of W */
    long row_bytes;           /* from one row, as in a file, to the next; 0: W is packed */
    const uint8_t *x;
    long x_stride; /* bytes */
    float *out;
    long out_stride, panel_stride;
    const int32_t *rows;  /* NULL, or row i is added to this row of out, */
    const float *weights; /* times its weight */
    const float *bias;    /* NULL, or [n]: added likewise, to the first panel */
};
typedef mk_product mk_matmul_job;

/* Pack a panel of `count` blocks, from byte `at` on, of a tile's rows (pack.c). */
void mk_pack_panel(int type, const uint8_t *const *in, long at, int rows, long count, uint8_t *out);
void mk_stored(const void *job, long begin, long end); /* products with rows as in a file, whatever the path (stored.c) */

/* Have a tile's rows in the second cache, if it holds them: one after the other they come two to three times as fast as
 * from all rows in turn. */
static inline void mk_look_at(const uint8_t *first, int rows, long stride) {
    enum { CACHE = 1 << 19 };
    const long bytes = (rows - 1) * stride;
    for (long i = 0; i < bytes && bytes < CACHE; i += 64) (void)*(const volatile uint8_t *)(first + i);
}

typedef struct {
    const mk_product *products; /* with as many panels and rows of W each; items are (panel, tile) */
    long count;
} mk_mixture_job;

typedef struct {
    const float *a, *b, *c;
    float *out, *steps;
    const int32_t *bounds;
    int32_t *ids;
    long a_stride, b_stride, out_stride, m, d, k;
    int panels, heads, hd, kind;
    float eps, limit, alpha;
} mk_small_job; /* the operations on rows: items are rows, for lse_parts (row, panel) */

typedef struct {
    int rows, heads;     /* queries of this item: rows x heads */
    long row, end;       /* end: one after the last row of the sequence */
    int head, kv_head;
} mk_query_group;

typedef struct mk_query_groups { /* the groups of one attention */
    struct mk_query_groups *next; /* those of another attention of the same work */
    mk_query_group items[];
} mk_query_groups;

typedef struct {
    int type, kvh, hd, vd, window, chunked, bidirectional; /* hd, vd: dimensions of a head's keys and of its values */
    int free_f16; /* mk_f16_is_free */
    float scale, softcap;
    mk_tuning tuning; /* length 0: none */
    const float *q, *sinks; /* sinks [heads], or NULL */
    float *out;
    long q_stride, out_stride;
    const void *kpool, *vpool; /* vpool NULL: a value is the first vd dimensions of its key */
    const int32_t *pos, *table, *table_start;
    const mk_query_group *groups; /* items */
} mk_attention_job;

typedef struct {
    int type, kvh, hd, vd;
    const float *k, *v;
    long k_stride, v_stride;
    const int32_t *block, *offset;
    void *kpool, *vpool;
} mk_store_job; /* items are rows */

typedef struct { /* the sequences of a step: the rows of one are neighbours, and it has a slot for its state */
    const int32_t *first_rows, *slots;
    long count, rows;
} mk_sequences;

typedef struct {
    mk_sequences of;
    const float *x, *w, *bias; /* w [taps, channels] */
    float *out, *tails;        /* tails: the preceding inputs of each slot, [taps - 1, channels] */
    long x_stride, out_stride, tail_stride, channels;
    int taps, silu;
} mk_conv_job; /* items are (16 channels, sequence) */

typedef struct {
    mk_sequences of;
    const float *q, *k, *v, *decay, *beta, *skip;
    float *out, *states;
    const int32_t *key_of_head;
    long state_stride;
    int keys, heads, dk, dv;
} mk_state_job; /* items are (head, 16 value dimensions, sequence) */

typedef union {
    mk_pack_job pack;
    mk_rows_job rows;
    mk_matmul_job matmul;
    mk_mixture_job mixture;
    mk_small_job small;
    mk_attention_job attention;
    mk_store_job store;
    mk_conv_job conv;
    mk_state_job state;
} mk_job;

struct mk_step {
    mk_range range;
    mk_job job;
    long items, grain, parts; /* `grain` items stay together */
    long minimum;             /* the least items of a part, if each thread gets a part */
    int uneven;               /* items differ much in cost, so each is a part */
    int joined;               /* does not depend on the step before it, and is in the same set */
    long before;              /* the number of parts of earlier steps of its set */
    long set, all;            /* in the first step of a set: the numbers of its steps and of its parts */
    atomic_long next;         /* likewise: the next part to be taken */
};

/* The work of one call: sets of steps.  The threads share the parts of a set, and complete it before the next begins. */
struct mk_work {
    long count, capacity;
    int joining, failed;    /* failed: 0, or the error that mk_run returns */
    long weights;           /* bytes of weights that products read */
    mk_query_groups *groups; /* groups of all attentions; freed after the run */
    mk_step *steps, own[MK_STEPS], spare; /* spare: filled instead of a step if the list is full */
    mk_step *last;          /* the step that was added last */
    char apart[64];         /* threads that wait for one of these look at no line that others write meanwhile */
    atomic_long now;        /* the first step of the announced set; -1: none yet; count: all sets are done */
    char apart_too[64];
    atomic_long done;       /* the parts of this set that are done */
};

/* The operations on rows of a path, named like the functions of its body: X(name).  Paths that differ only in their
 * products share them. */
#define MK_OPERATIONS(X)                                                                                         \
    X(quantize) X(dequantize) X(quantize_rows) X(fold) X(square_sums) X(rms_norm) X(layer_norm) X(rope)          \
    X(rope_interleaved) X(activate) X(softcap) X(softmax) X(top_k) X(lse_parts) X(attention) X(decays)           \
    X(short_conv) X(delta_rule) X(selective_scan)

typedef struct {
#define MK_MEMBER(operation) mk_range operation;
    MK_OPERATIONS(MK_MEMBER)
#undef MK_MEMBER
    void (*to_f16)(const float *x, uint16_t *out, long count);
    void (*to_q8)(const float *x, int8_t *q, uint16_t *d, long count);
} mk_operations;

/* Scores of a block of int8 keys and of a tile of queries (body_scores.h). */
typedef void (*mk_scores)(const mk_activation *x, const uint8_t *keys, const uint8_t *next, int hd, float *p);

typedef struct {
    const char *name;
    const mk_operations *of_rows;
    mk_range matmul, mixture;
    const mk_scores *int8_scores; /* by the shape of a tile of queries */
    int bf16_step;       /* bytes of 32 values of x for BF16 weights */
    mk_range tile_rows;  /* NULL, or what lays out MK_IN_TILES rows of x and more in tiles, for BF16 weights */
} mk_path;

/* The queries and running sums of a group are on a thread's stack, MK_ATTENTION_SUMS floats each.  MK_QUERY_TILE is a
 * multiple of the tile sizes of all paths.  A step of MK_MANY_QUERIES has enough groups for all threads, however large. */
enum {
    MK_ATTENTION_SUMS = 16384, MK_MAX_QUERIES = 96, MK_FEWER_QUERIES = 48, MK_QUERY_TILE = 12, MK_WIDE_HEAD = 256,
    MK_MANY_QUERIES = 8192,
};

enum { MK_ROWS = 16 /* a multiple of every path's rows of x in a tile */ };

enum { MK_IN_TILES = 9 };

/* Bytes of 32 values of x for BF16 weights: 16 floats of odd columns (of all rows of a group), then 16 of even ones, or BF16
 * in the order of columns. */
enum { MK_BF16_HALVES = 128, MK_BF16_PAIRS = 64 };

/* -32 times the sum of half of a block of activations. */
static inline int32_t mk_offset32(const mk_activation *a, int half) { return a->offset32[half][0] + a->offset32[half][1]; }

/* If pairs of products of bytes are summed in 16 bits: whether group g of 4 columns begins such a sum, or ends it.  The
 * sums are at most 2 * 2 * 63 * 127, 4 * 2 * 31 * 127, 8 * 2 * 15 * 127, and 2 * 128 * 127, and do not overflow.  With
 * MK_CENTRED bits the caller begins and ends them (body_centred.h); with MK_FLIPPED bits w is what x is flipped with, and the
 * caller adds what is missing (body_flipped.h). */
enum { MK_CENTRED = 7, MK_FLIPPED = 9 };
#define MK_CHAIN(bits) ((bits) == 8 || (bits) == MK_FLIPPED ? 1 : (bits) == 6 ? 2 : (bits) == 5 ? 4 : 8)
#define MK_FIRST_PAIRS(bits, g) ((bits) != MK_CENTRED && (g) % MK_CHAIN(bits) == 0)
#define MK_LAST_PAIRS(bits, g, last) \
    ((bits) != MK_CENTRED && ((g) % MK_CHAIN(bits) == MK_CHAIN(bits) - 1 || (g) == (last)))

#define MK_LANES(d) (((d) + MK_TILE - 1) / MK_TILE * MK_TILE)

/* Add a step of `items` items, and return its job, all zeros.  If the list is full, the job never runs and mk_run returns
 * an error, so callers need not check. */
mk_job *mk_step_of(mk_work *work, mk_range range, long items, long grain, int uneven);

#if defined(__x86_64__) || defined(__i386__)
#define MK_X86 1
#elif defined(__aarch64__)
#define MK_ARM 1
#endif
/* AMX needs an assembler that knows it, and Linux, which must permit its use. */
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define MK_AMX 1
#define MK_AMX_PATH(X) X(amx, MK_HAS_AMX)
#else
#define MK_AMX_PATH(X)
#endif

/* The paths of this architecture, slowest first: X(name, required feature).  A new instruction set needs a row here, its
 * test in detect.c, and a file path_NAME.c with a header of the vector layer; nothing else lists the paths.  Processors
 * with AMX compute one VDPBF16PS in two cycles, half the rate of fma; others compute it at twice the rate of fma. */
#ifdef MK_X86
enum {
    MK_HAS_SCALAR = 1, MK_HAS_AVX = 2, MK_HAS_AVX2 = 4, MK_HAS_AVX_VNNI = 8, MK_HAS_AVX512 = 16, MK_HAS_SLOW_BF16 = 32,
    MK_HAS_AVX512_VNNI = 64, MK_HAS_FAST_BF16 = 128, MK_HAS_AMX = 256,
};
#define MK_PATHS(X)                                                                                          \
    X(scalar, MK_HAS_SCALAR) X(avx, MK_HAS_AVX) X(avx2, MK_HAS_AVX2) X(avx2vnni, MK_HAS_AVX_VNNI)            \
    X(avx512, MK_HAS_AVX512) X(avx512bf16, MK_HAS_SLOW_BF16) X(avx512vnni, MK_HAS_AVX512_VNNI)               \
    X(avx512bf16, MK_HAS_FAST_BF16) MK_AMX_PATH(X)
/* Whether this is a Zen 4, for which kernels prefetch less (body_rows.h). */
extern int mk_is_zen4;
int mk_pairs_are_chains(void); /* whether this processor's VDPBF16PS equals the two fma of body_float.h */
#elif defined(MK_ARM)
#define mk_is_zen4 0
enum { MK_HAS_SCALAR = 1, MK_HAS_NEON = 2, MK_HAS_DOTPROD = 4, MK_HAS_I8MM = 8 };
#define MK_PATHS(X) \
    X(scalar, MK_HAS_SCALAR) X(neon, MK_HAS_NEON) X(neondot, MK_HAS_DOTPROD) X(neoni8mm, MK_HAS_I8MM)
#else
#define mk_is_zen4 0
enum { MK_HAS_SCALAR = 1 };
#define MK_PATHS(X) X(scalar, MK_HAS_SCALAR)
#endif
#define MK_DECLARE(name, needs) extern const mk_path mk_##name;
MK_PATHS(MK_DECLARE)

/* MK_TARGET("avx2") ... MK_TARGET_END selects the instruction set of a file without compiler flags. */
#define MK_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define MK_TARGET(set) MK_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define MK_TARGET_END MK_PRAGMA(clang attribute pop)
#else
#define MK_TARGET(set) MK_PRAGMA(GCC target(set))
#define MK_TARGET_END
#endif

#define MK_INLINE static inline __attribute__((always_inline))

/* Treat denormal operands as zeros and flush denormal results to zero, in this thread, until mk_restore. */
#ifdef __SSE__
#include <xmmintrin.h>
static inline unsigned mk_flush_denormals(void) {
    unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040); /* FTZ, DAZ */
    return mode;
}
static inline void mk_restore(unsigned mode) { _mm_setcsr(mode); }
#elif defined(MK_ARM)
static inline unsigned mk_flush_denormals(void) {
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    __asm__ volatile("msr fpcr, %0" : : "r"(mode | 1ul << 24) : "memory"); /* FZ */
    return (unsigned)mode;
}
static inline void mk_restore(unsigned mode) { __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)mode) : "memory"); }
#else /* other processors keep denormals, and their sums may differ by them */
static inline unsigned mk_flush_denormals(void) { return 0; }
static inline void mk_restore(unsigned mode) { (void)mode; }
#endif

#endif
