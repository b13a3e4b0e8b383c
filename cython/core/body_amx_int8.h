/* Products of quantised weights with many rows of x, on the tiles of AMX, with the bits of body_matmul.h.
 *
 * A tile instruction gives the 16 x 16 dot products of 32 columns as exact integers, from W as it is interleaved and 16
 * rows of x that are copied together.  Scaling and sums are those of the other paths: for each output one fma after the
 * other.  They take more than half of the time, because tile instructions occupy the vectors' second port. */

#include "body_amx_panel.h"
#include "body_amx_tiles.h"

enum { AMX_SLAB = 8 /* blocks that pass together */ };
/* The capacity for sums, which as many tiles share as it allows, because rows of x are copied again for other tiles; and
 * the maximum of tiles where more rows follow, for which W should still be in the cache. */
enum { AMX_SUMS = 7168, AMX_TILES = 16 };

/* 32 columns of 16 rows of W: bytes of any type, their scales, and their minima. */
typedef struct {
    int8_t q[8][64];
    vf scale, minimum;
} wide_block;

/* 32 columns of 16 rows of x. */
typedef struct __attribute__((aligned(64))) {
    int8_t q[AMX_ROWS][MK_BLOCK];
    struct {
        float scale, total;
    } of[AMX_ROWS];
} row_block;

/* Tiles 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 columns of W. */
static const tile_shapes INT8_TILES = {
    1, 0, {0}, {64, 64, 64, 64, MK_BLOCK, MK_BLOCK, 64, 64}, {16, 16, 16, 16, 16, 16, 8, 8}};

/* Tile `c` = rows of x times columns of W, by way of tiles `a` and `b`.  In assembly, because compilers differ in what
 * their intrinsics order. */
#define MULTIPLY(c, a, b, x, w)                                                                                   \
    __asm__ volatile("tilezero %%tmm" #c "\n\ttileloadd (%0,%2,1), %%tmm" #a "\n\ttileloadd (%1,%3,1), %%tmm" #b  \
                     "\n\ttdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #c                                             \
                     ::"r"((x)->q), "r"((w)->q), "r"((long)MK_BLOCK), "r"(64l) : "memory")
#define STORE(c, dots) __asm__ volatile("tilestored %%tmm" #c ", (%0,%1,1)" ::"r"(dots), "r"(64l) : "memory")

MK_INLINE void add_block(const int minima, const wide_block *w, const row_block *x, const dot_products dots, vf *sums) {
    UNROLL
    for (int t = 0; t < AMX_ROWS; t++) {
        vf dot = vf_from(vb_load((const uint8_t *)dots[t]));
        sums[t] = vf_fma(dot, vf_mul(w->scale, vf_set1(x->of[t].scale)), sums[t]);
        if (minima) sums[t] = vf_fma(w->minimum, vf_set1(x->of[t].total), sums[t]);
    }
}

/* The chains of 16 x 16 outputs go on over `count` blocks; products are four blocks ahead of the sums, because
 * tile instructions take long.  With each block `step` bytes from `ahead` on are fetched. */
HOT void add_blocks(const int minima, const wide_block *w, const row_block *x, long count, const uint8_t *ahead,
                    long step, vf *sums) {
    dot_products dots[4];
    vf acc[AMX_ROWS];
    UNROLL
    for (int t = 0; t < AMX_ROWS; t++) acc[t] = sums[t];
    MULTIPLY(0, 4, 6, x, w);
    if (count > 1) MULTIPLY(1, 5, 7, x + 1, w + 1);
    if (count > 2) MULTIPLY(2, 4, 6, x + 2, w + 2);
    if (count > 3) MULTIPLY(3, 5, 7, x + 3, w + 3);
#define ADD_BLOCK(i, a, b)                                                       \
    if (i < count) {                                                             \
        STORE(i, dots[i]);                                                       \
        if (i + 4 < count) MULTIPLY(i, a, b, x + i + 4, w + i + 4);              \
        add_block(minima, w + i, x + i, dots[i], acc);                           \
    }
    for (; count > 0; count -= 4, x += 4, w += 4) {
        for (const uint8_t *end = ahead + 4 * step; ahead < end; ahead += 64) __builtin_prefetch(ahead);
        ADD_BLOCK(0, 4, 6)
        ADD_BLOCK(1, 5, 7)
        ADD_BLOCK(2, 4, 6)
        ADD_BLOCK(3, 5, 7)
    }
#undef ADD_BLOCK
    UNROLL
    for (int t = 0; t < AMX_ROWS; t++) sums[t] = acc[t];
}

HOT void widen_bytes(const int type, const uint8_t *q, wide_block *to) {
    vb groups[8];
    load_groups(type, q, groups);
    UNROLL
    for (int g = 0; g < 8; g++) {
        if (type == MK_Q8_0) groups[g] = vb_signed(groups[g]); /* as it was */
        if (type == MK_Q4_0) groups[g] = _mm512_sub_epi8(groups[g], _mm512_set1_epi8(8));
        _mm512_store_si512(to->q[g], groups[g]);
    }
}

/* `count` blocks of a tile of W. */
HOT void widen(const int type, const uint8_t *w, long count, wide_block *to) {
    for (; count > 0; count--, w += mk_packed_bytes(type) * MK_TILE) {
        const vf d = vf_load_f16((const void *)w);
        const vf m = mk_f16s(type) == 1 ? d : vf_load_f16((const void *)(w + 32));
        if (!mk_is_super(type)) {
            widen_bytes(type, w + 32 * mk_f16s(type), to);
            to->scale = d;
            to++->minimum = m;
            continue;
        }
        const uint8_t *scales = w + mk_scales_at(type), *values = w + mk_values_at(type);
        for (int s = 0; s < MK_PARTS; s++, scales += 32, values += mk_part_bytes(type)) {
            widen_bytes(type, values, to);
            to->scale = vf_mul(d, vf_load_u8(scales));
            to++->minimum = vf_mul(vf_sub(vf_set1(0.0f), m), vf_load_u8(scales + 16));
        }
    }
}

typedef struct {
    void (*widen)(const uint8_t *w, long count, wide_block *to);
    void (*add_blocks)(const wide_block *w, const row_block *x, long count, const uint8_t *ahead, long step, vf *sums);
} amx_functions;

/* The types that use tiles: X(type).  Q6_K gains nothing from them; types with a table have not been tried. */
#define AMX_TYPES(X) X(MK_Q8_0) X(MK_Q4_0) X(MK_Q4_1) X(MK_Q4_K) X(MK_Q5_K)
#define AMX_FUNCTIONS_OF(type)                                                                                    \
    static void widen_##type(const uint8_t *w, long count, wide_block *to) { widen(type, w, count, to); }         \
    static void add_##type(const wide_block *w, const row_block *x, long count, const uint8_t *ahead, long step,  \
                           vf *sums) {                                                                            \
        add_blocks(mk_f16s(type) > 1, w, x, count, ahead, step, sums);                                            \
    }
#define AMX_ROW(type) [type] = {widen_##type, add_##type},
AMX_TYPES(AMX_FUNCTIONS_OF)
static const amx_functions AMX_FUNCTIONS[MK_TYPES] = {AMX_TYPES(AMX_ROW)};

/* `count` blocks of 16 rows of x, whose groups are x_stride bytes apart. */
static void copy_rows(const uint8_t *x, long x_stride, long count, row_block *to) {
    for (int first = 0; first < AMX_ROWS; first += MK_GROUP, x += x_stride)
        for (long b = 0; b < count; b++) {
            const mk_activation *from = (const mk_activation *)x + b * MK_GROUP;
            UNROLL
            for (int t = 0; t < MK_GROUP; t++) {
                memcpy(to[b].q[first + t], from[t].q, MK_BLOCK);
                memcpy(&to[b].of[first + t], &from[t].scale, sizeof *to->of); /* and total, which follows */
            }
        }
}

/* A panel, like `panel`, for whole groups of 16 rows. */
static void amx_panel(const mk_matmul_job *job, int rows, int p, long tile, int tiles, int again, const uint8_t *x,
                           vf *sums) {
    (void)again;
    const amx_functions *of_type = &AMX_FUNCTIONS[job->type];
    const long count = mk_blocks(job->bounds[p + 1] - job->bounds[p], mk_block(job->type));
    const long stride = count * mk_packed_bytes(job->type) * MK_TILE;
    const uint8_t *w = job->at[p] + tile * stride;
    const int each = mk_block(job->type) / MK_BLOCK, groups = rows / AMX_ROWS;
    row_block copies[AMX_GROUPS][AMX_SLAB];
    wide_block wide[AMX_SLAB];
    for (int i = 0; i < tiles * rows; i++) sums[i] = vf_set1(0.0f);
    for (long begin = 0, blocks; begin < count; begin += blocks) {
        blocks = count - begin < AMX_SLAB / each ? count - begin : AMX_SLAB / each;
        const long slab = blocks * mk_packed_bytes(job->type) * MK_TILE, step = slab / (groups * blocks * each);
        for (int g = 0; g < groups; g++)
            copy_rows(x + g * AMX_ROWS * job->x_stride, MK_GROUP * job->x_stride, blocks * each, copies[g]);
        for (int i = 0; i < tiles; i++) {
            of_type->widen(w + i * stride, blocks, wide);
            for (int g = 0; g < groups; g++)
                of_type->add_blocks(wide, copies[g], blocks * each, w + (i + 1) * stride + g * (slab / groups), step,
                                    sums + i * rows + g * AMX_ROWS);
        }
        w += slab;
        x += blocks * each * MK_GROUP * MK_ACTIVATION;
    }
}

/* How many of `left` rows go through tiles: whole groups, two at least, because one does not pay for the set-up. */
static int rows_for_tiles(const mk_matmul_job *job, long left) {
    if (mk_is_panel(job->type)) return panel_rows(job, left);
    if (!AMX_FUNCTIONS[job->type].widen) return 0;
    long groups = left / AMX_ROWS < AMX_GROUPS ? left / AMX_ROWS : AMX_GROUPS;
    return groups > 1 ? (int)groups * AMX_ROWS : 0;
}

/* How many sums of panels wait for their neighbours at most, with the one that is added up. */
static int levels_of(const mk_matmul_job *job) {
    int levels = 1;
    for (int rest = job->panel_stride ? 0 : job->panels; rest > 1; rest = (rest + 1) / 2) levels++;
    return levels;
}

static void int8_matmul(const mk_matmul_job *job, long begin, long end) {
    vf pending[AMX_SUMS];
    const long capacity = AMX_SUMS / levels_of(job); /* of a level */
    const panel_function of_type = mk_is_panel(job->type) ? amx_whole_panel : amx_panel;
    begin_tiles(mk_is_panel(job->type) ? &FULL_TILES : &INT8_TILES);
    for (long item = begin, tiles; item < end; item += tiles) {
        long tile = item % job->tiles, row = item / job->tiles * job->chunk;
        long limit = row + job->chunk < job->m ? row + job->chunk : job->m;
        tiles = end - item < job->tiles - tile ? end - item : job->tiles - tile;
        const int all = rows_for_tiles(job, limit - row) == limit - row;
        if (tiles > (all ? capacity / (limit - row) : AMX_TILES)) tiles = all ? capacity / (limit - row) : AMX_TILES;
        for (int rows; (rows = rows_for_tiles(job, limit - row)); row += rows)
            product(job, of_type, pending, capacity, rows, tile, (int)tiles, row);
        for (long done = 0; row < limit && done < tiles;)
            done += some_tiles(job, tile + done, tiles - done, row, limit);
    }
    end_tiles();
}
