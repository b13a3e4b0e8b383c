/* Products with quantised weights: lanes are 16 rows of W, and each output is one chain of fma over a panel's blocks.
 *
 * A tile function does R tiles of W (64-byte lanes x R) for T rows of x over one panel; R, T and the type are constants
 * in it, so its sums stay in registers.  How the work is cut never changes an output's chain.  Float weights have
 * their own tiles (body_float.h) and share the rest. */

/* w: R tiles, w_stride bytes apart; x: T rows, whose groups are x_stride bytes apart; sums [R][T]. */
typedef void (*tile_function)(const uint8_t *w, long w_stride, const uint8_t *x, long x_stride, long count, vf *sums);

enum { MANY_TILES = MK_MANY_TILES, MAX_SUMS = VEC_ROWS > MK_MANY_TILES ? VEC_ROWS : MK_MANY_TILES };
enum { RUN_SUMS = 64 /* of tiles that lie one after the other: so many tiles with one row, fewer with more */ };
/* With few rows, memory is the limit.  Several tiles at once prefetch a little of each: more would take the core's
 * line-fill buffers from lines that are needed sooner.  A single tile is one stream, which goes on in the next tile: it
 * prefetches far ahead into the second-level cache, which takes more lines at a time. */
enum { NEAR = 1024, FAR = 8192, FEW = 4 };

MK_INLINE void fetch_ahead(const int R, const int T, const uint8_t *w) {
    if (R == 1 && T <= FEW) __builtin_prefetch(w + FAR, 0, 2);
    else __builtin_prefetch(w + NEAR);
}

/* Row t of T in a block of groups, and how many rows a group has. */
#define ROW(T, t, x, x_stride, bytes) ((x) + (t) / MK_GROUP * (x_stride) + (t) % MK_GROUP * (long)(bytes))
#define GROUP(T) ((T) < MK_GROUP ? (T) : MK_GROUP)

#include "body_float.h"

/* The values of nibbles as the products' operands: MXFP4's begin at 0, IQ4's have the bias that vb_dot_s8 expects. */
#define FROM_ZERO(value) (value) + 12,
#define BIASED(value) (int8_t)((value) + VEC_Q8_BIAS),
static const int8_t E2M1_OPERANDS[16] = {MK_E2M1_VALUES(FROM_ZERO)}, IQ4_OPERANDS[16] = {MK_IQ4_VALUES(BIASED)};

MK_INLINE int is_iq4(int type) { return type == MK_IQ4_NL || type == MK_IQ4_XS; }
MK_INLINE int is_signed(int type) { return type == MK_Q8_0 || is_iq4(type) || mk_is_grid(type); }

/* Bits of the values of group g of 4 columns: two of each in a byte, or one. */
MK_INLINE vb two_bits(const uint8_t *w, const int g, const int to) {
    return vb_bits(vb_load(w + 64 * (g / 4)), g % 4 * 2, 3, to);
}
MK_INLINE vb one_bit(const uint8_t *w, const int g, const int to) { return vb_bits(vb_load(w), g, 1, to); }

/* Row by row, because table look-ups are gathers on every path.  Not copied into each tile: the code is too long. */
MK_INLINE void grid_rows(const int type, const uint8_t *w, uint32_t (*words)[MK_TILE]) {
    for (int r = 0; r < MK_TILE; r++)
        for (int i = 0; i < 4; i++) {
            const uint64_t eight = mk_grid_eight(type, w + r * mk_grid_bytes(type), i);
            words[2 * i][r] = (uint32_t)eight, words[2 * i + 1][r] = (uint32_t)(eight >> 32);
        }
}
static __attribute__((noinline)) void grid_words(int type, const uint8_t *w, uint32_t (*words)[MK_TILE]) {
    switch (type) {
    case MK_IQ2_XXS: grid_rows(MK_IQ2_XXS, w, words); break;
    case MK_IQ2_XS: grid_rows(MK_IQ2_XS, w, words); break;
    case MK_IQ2_S: grid_rows(MK_IQ2_S, w, words); break;
    case MK_IQ3_XXS: grid_rows(MK_IQ3_XXS, w, words); break;
    default: grid_rows(MK_IQ3_S, w, words);
    }
}

/* One block of 16 rows of W: its 8 groups of 4 columns. */
MK_INLINE void load_groups(int type, const uint8_t *w, vb *groups) {
    if (mk_is_grid(type)) {
        uint32_t words[8][MK_TILE];
        grid_words(type, w, words);
        UNROLL
        for (int g = 0; g < 8; g++) groups[g] = vb_signed(vb_load((const uint8_t *)words[g]));
        return;
    }
    UNROLL
    for (int g = 0; g < 8; g++)
        if (type == MK_Q8_0) groups[g] = vb_signed(vb_load(w + 64 * g));
        else if (type == MK_Q2_K || type == MK_Q3_K) groups[g] = two_bits(w, g, 0);
        else groups[g] = vb_bits(vb_load(w + 64 * (g % 4)), g / 4 * 4, 15, 0);
    UNROLL
    for (int g = 0; g < 8; g++)
        if (type == MK_MXFP4) groups[g] = vb_table(E2M1_OPERANDS, groups[g]);
        else if (is_iq4(type)) groups[g] = vb_table(IQ4_OPERANDS, groups[g]);
        else if (mk_bits(type) == 5) groups[g] = vb_or(groups[g], one_bit(w + 256, g, 4));
        else if (type == MK_Q6_K) groups[g] = vb_or(groups[g], two_bits(w + 256, g, 4));
        else if (type == MK_Q3_K) groups[g] = vb_or(groups[g], one_bit(w + 128, g, 2));
}

/* The start of a block's sum of products: it takes away what stored weights have been raised by (mk_activation). */
MK_INLINE int32_t start_of(int type, const mk_activation *a) {
    if (type == MK_Q4_0) return a->offset8;
    if (type == MK_Q5_0) return 2 * a->offset8;
    if (type == MK_MXFP4) return a->offset8 / 2 * 3;
    return is_signed(type) && VEC_Q8_BIAS ? a->offset128 : 0;
}

MK_INLINE vi dot_of(int type, vi start, const vb *groups, const int8_t *q) {
    if (is_signed(type)) return vb_dot_s8(start, groups, q, 8);
    if (type == MK_Q4_0 || type == MK_Q4_1 || type == MK_Q4_K) return vb_dot_u4(start, groups, q);
    return vb_dot_u6(vb_dot_u6(start, groups, q), groups + 4, q + 16);
}

HOT void quantised_tile(const int type, const int R, const int T, const uint8_t *w, long w_stride,
                              const uint8_t *x, long x_stride, long count, vf *sums) {
    const int scales = mk_scale_bytes(type) * MK_TILE;
    const long bytes = (long)mk_block_bytes(type) * MK_TILE;
    vf acc[MAX_SUMS];
    UNROLL
    for (int i = 0; i < R * T; i++) acc[i] = vf_set1(0.0f);
    for (long b = 0; b < count; b++, w += bytes, x += GROUP(T) * MK_ACTIVATION) {
        UNROLL
        for (int r = 0; r < R; r++) {
            const uint8_t *tile = w + r * w_stride;
            for (int line = 0; line < bytes; line += 64) fetch_ahead(R, T, tile + line);
            vb groups[8];
            load_groups(type, tile + scales, groups);
            vf d = type == MK_MXFP4 ? vf_load_e8m0(tile) : vf_load_f16((const void *)tile), m = d;
            if (mk_f16s(type) == 2) m = vf_load_f16((const void *)(tile + 32));
            UNROLL
            for (int t = 0; t < T; t++) {
                const mk_activation *a = (const void *)ROW(T, t, x, x_stride, MK_ACTIVATION);
                vi dot = dot_of(type, vi_set1(start_of(type, a)), groups, a->q);
                vf *to = &acc[r * T + t];
                *to = vf_fma(vf_from(dot), vf_mul(d, vf_set1(a->scale)), *to);
                if (mk_f16s(type) == 2) *to = vf_fma(m, vf_set1(a->total), *to);
            }
        }
    }
    UNROLL
    for (int i = 0; i < R * T; i++) sums[i] = acc[i];
}

/* The scales and minima of a part of 16 rows, as products take them: one of each for the part, or one for each half. */
typedef struct {
    vf scale[2], minimum[2];
} part_scales;

MK_INLINE part_scales load_scales(const int type, const uint8_t *small, const uint8_t *part, vf d, vf m) {
    part_scales of;
    UNROLL
    for (int h = 0; h < 2; h++) of.scale[h] = of.minimum[h] = vf_set1(0.0f);
    if (mk_is_grid(type)) {
        uint8_t odd[2][MK_TILE];
        for (int h = 0; h < 1 + mk_halved(type); h++) {
            for (int r = 0; r < MK_TILE; r++) {
                const uint8_t scales = mk_part_scales(type) ? small[r] : 0;
                odd[h][r] = (uint8_t)mk_grid_scale(type, part + r * mk_grid_bytes(type), scales, h);
            }
            of.scale[h] = mk_halved(type) ? vf_load_u8(odd[h]) : vf_mul(d, vf_load_u8(odd[h]));
        }
    } else if (type == MK_IQ4_XS) {
        of.scale[0] = vf_mul(d, vf_load_i8(small));
    } else if (!mk_halved(type)) {
        of.scale[0] = vf_mul(d, vf_load_u8(small));
        of.minimum[0] = vf_mul(m, vf_load_u8(small + 16));
    } else {
        UNROLL
        for (int h = 0; h < 2; h++)
            if (type == MK_Q2_K) { /* a byte has both */
                vf both = vf_load_u8(small + 16 * h);
                of.minimum[h] = vf_from(vi_trunc(vf_mul(both, vf_set1(0.0625f))));
                of.scale[h] = vf_fma(of.minimum[h], vf_set1(-16.0f), both);
            } else {
                of.scale[h] = vf_load_i8(small + 16 * h);
            }
    }
    return of;
}

/* As `start_of`, for the half h of a part. */
MK_INLINE int32_t start_of_half(const int type, const mk_activation *a, const int h) {
    if (mk_is_grid(type)) return VEC_Q8_BIAS ? a->offset32[h] * 4 : 0;
    return type == MK_Q6_K ? a->offset32[h] : type == MK_Q3_K ? a->offset32[h] / 8 : 0;
}

MK_INLINE vi dot_of_half(const int type, const mk_activation *a, const int h, const vb *groups) {
    const vi start = vi_set1(start_of_half(type, a, h));
    if (mk_is_grid(type)) return vb_dot_s8(start, groups + 4 * h, a->q + 16 * h, 4);
    return vb_dot_u6(start, groups + 4 * h, a->q + 16 * h);
}

/* K-quants, 32 columns at a time.  A scale of 4, 6 or 8 bits times an f16 is exact, and so is the sum of both halves
 * times their scales: these are integers below 2^24.  Roundings are those of the other types: one fma for the columns,
 * and one for their minima. */
HOT void super_tile(const int type, const int R, const int T, const uint8_t *w, long w_stride, const uint8_t *x,
                          long x_stride, long count, vf *sums) {
    const int bytes = mk_part_bytes(type), step = mk_part_scales(type);
    vf acc[MAX_SUMS], d[MANY_TILES], m[MANY_TILES];
    UNROLL
    for (int i = 0; i < R * T; i++) acc[i] = vf_set1(0.0f);
    for (long block = 0; block < count; block++, w += mk_packed_bytes(type) * MK_TILE) {
        UNROLL
        for (int r = 0; r < R; r++) {
            d[r] = vf_load_f16((const void *)(w + r * w_stride));
            m[r] = vf_set1(0.0f);
            if (mk_is_grid(type)) d[r] = vf_mul(d[r], vf_set1(mk_grid_unit(type)));
            if (mk_f16s(type) == 2) m[r] = vf_sub(m[r], vf_load_f16((const void *)(w + r * w_stride + 32)));
            if (type == MK_Q2_K) m[r] = vf_mul(m[r], vf_set1(-1.0f / 32)); /* offset32 is -32 times a sum */
        }
        const uint8_t *scales = w + mk_scales_at(type), *values = w + mk_values_at(type);
        for (int s = 0; s < MK_PARTS; s++, x += GROUP(T) * MK_ACTIVATION, scales += step, values += bytes) {
            UNROLL
            for (int r = 0; r < R; r++) {
                const uint8_t *small = scales + r * w_stride, *part = values + r * w_stride;
                fetch_ahead(R, T, small);
                for (int line = 0; line < bytes; line += 64) fetch_ahead(R, T, part + line);
                vb groups[8];
                load_groups(type, part, groups);
                const part_scales of = load_scales(type, small, part, d[r], m[r]);
                UNROLL
                for (int t = 0; t < T; t++) {
                    const mk_activation *act = (const void *)ROW(T, t, x, x_stride, MK_ACTIVATION);
                    const vf scale = vf_set1(act->scale);
                    vf *to = &acc[r * T + t];
                    if (mk_halved(type)) {
                        vi first = dot_of_half(type, act, 0, groups), second = dot_of_half(type, act, 1, groups);
                        vf dot = vf_fma(vf_from(second), of.scale[1], vf_mul(vf_from(first), of.scale[0]));
                        *to = vf_fma(dot, vf_mul(d[r], scale), *to);
                        if (type != MK_Q2_K) continue;
                        vf minimum = vf_mul(of.minimum[0], vf_set1((float)act->offset32[0]));
                        minimum = vf_fma(of.minimum[1], vf_set1((float)act->offset32[1]), minimum);
                        *to = vf_fma(minimum, vf_mul(m[r], scale), *to);
                    } else {
                        vi dot = dot_of(type, vi_set1(start_of(type, act)), groups, act->q);
                        *to = vf_fma(vf_from(dot), vf_mul(of.scale[0], scale), *to);
                        if (mk_f16s(type) == 2) *to = vf_fma(of.minimum[0], vf_set1(act->total), *to);
                    }
                }
            }
        }
    }
    UNROLL
    for (int i = 0; i < R * T; i++) sums[i] = acc[i];
}

/* How many tiles of W are computed at once with T rows of x.  With few rows, memory is the limit, and one stream of
 * weights keeps fewer lines in flight than memory can deliver; with more rows, registers are the limit. */
#define AT_ONCE(T) ((T) > FEW || VEC_ROWS < 2 * (T) ? 1 : VEC_ROWS / (T) < MANY_TILES ? VEC_ROWS / (T) : MANY_TILES)

#define TILE(kind, type, name, R, T)                                                                            \
    static void type##_##name##_##T(const uint8_t *w, long w_stride, const uint8_t *x, long x_stride, long count, \
                                    vf *sums) {                                                                 \
        kind##_tile(type, R, T, w, w_stride, x, x_stride, count, sums);                                         \
    }
#define BOTH(kind, type, T) TILE(kind, type, one, 1, T) TILE(kind, type, many, AT_ONCE(T), T)
#if VEC_ROWS > 8
#define MORE_TILES(kind, type) TILE(kind, type, one, 1, 16) TILE(kind, type, one, 1, 8)
#define MORE_FUNCTIONS(type) type##_one_16, type##_one_8,
#define MORE_ROWS 16, 8,
#elif VEC_ROWS > 4
#define MORE_TILES(kind, type) TILE(kind, type, one, 1, 8)
#define MORE_FUNCTIONS(type) type##_one_8,
#define MORE_ROWS 8,
#else
#define MORE_TILES(kind, type)
#define MORE_FUNCTIONS(type)
#define MORE_ROWS
#endif
#define TILES(kind, type) \
    MORE_TILES(kind, type) BOTH(kind, type, 4) BOTH(kind, type, 3) BOTH(kind, type, 2) BOTH(kind, type, 1)
#define TILES_FLOAT(type)
#define TILES_SCALED(type)
#define TILES_PLAIN(type) TILES(quantised, type)
#define TILES_SUPER(type) TILES(super, type)
#define TILES_CODED(type)
#define TILES_OF(name, kind, ...) TILES_##kind(MK_##name)
MK_BLOCK_TYPES(TILES_OF)

static const int ROWS[] = {MORE_ROWS 4, 3, 2, 1};
enum { SHAPES = sizeof ROWS / sizeof *ROWS, FIRST_FLOATS = VEC_ROWS > 8 /* of float weights */ };
#define FUNCTIONS(type, name) \
    [type] = {MORE_FUNCTIONS(type) type##_##name##_4, type##_##name##_3, type##_##name##_2, type##_##name##_1},
#define FUNCTIONS_FLOAT(type, name)
#define FUNCTIONS_SCALED(type, name)
#define FUNCTIONS_PLAIN(type, name) FUNCTIONS(type, name)
#define FUNCTIONS_SUPER(type, name) FUNCTIONS(type, name)
#define FUNCTIONS_CODED(type, name)
#define ONE_TILE_OF(name, kind, ...) FUNCTIONS_##kind(MK_##name, one)
#define MANY_OF(name, kind, ...) FUNCTIONS_##kind(MK_##name, many)
static const tile_function ONE_TILE[MK_TYPES][SHAPES] = {MK_BLOCK_TYPES(ONE_TILE_OF)};
static const tile_function MANY_AT_ONCE[MK_TYPES][SHAPES] = {MK_BLOCK_TYPES(MANY_OF)};

static void store_tiles(const mk_matmul_job *job, const vf *sums, long tile, int tiles, long row, int rows, float *out) {
    for (int r = 0; r < tiles; r++)
        for (int t = 0; t < rows; t++) {
            const long i = (tile + r) * MK_TILE;
            vf sum = sums[r * rows + t];
            float *to = out + (job->rows ? job->rows[row + t] : row + t) * job->out_stride;
            if (job->rows) sum = vf_add(vf_row(to, i, job->n, 0.0f), vf_mul(vf_set1(job->weights[row + t]), sum));
            vf_row_store(to, i, job->n, sum);
        }
}

/* Tiles `tile`... of panel p, for `rows` rows of x: sums [tiles][rows]. */
typedef void (*panel_function)(const mk_matmul_job *job, int rows, int p, long tile, int tiles, const uint8_t *x,
                               vf *sums);

/* The index in ROWS of this number of rows, or of the next smaller one. */
static int shape_of(long rows) {
    int shape = 0;
    while (ROWS[shape] > rows) shape++;
    return shape;
}

/* Whether the panels of a tile lie in the same rows, and should be read one after the other. */
static int side_by_side(const mk_matmul_job *job) { return job->row_bytes && job->panels > 1; }

static void float_panel(const mk_matmul_job *job, int rows, int p, long tile, int tiles, const uint8_t *x, vf *sums) {
    const int type = job->type;
    const long columns = job->bounds[p + 1] - job->bounds[p], x_stride = MK_GROUP * job->x_stride;
    const long stride = job->row_bytes ? job->row_bytes : mk_row_bytes(type, columns);
    const unsigned mode = type == MK_BF16 ? mk_flush_denormals() : 0;
    long ahead = 0;
    if (side_by_side(job)) /* the next panel, or the next tile's first one */
        ahead = p + 1 < job->panels ? job->at[p + 1] - job->at[p] : job->at[0] - job->at[p] + MK_TILE * stride;
    const float_function of_shape = FLOAT_TILE_FUNCTIONS[type][shape_of(rows) - FIRST_FLOATS];
    for (long first = tile * MK_TILE; tiles--; first += MK_TILE, sums += rows) {
        const int n = job->n - first < MK_TILE ? (int)(job->n - first) : MK_TILE;
        of_shape(job->at[p] + first * stride, stride, ahead, n, x, x_stride, columns, sums);
    }
    if (type == MK_BF16) mk_restore(mode);
}

static void panel(const mk_matmul_job *job, int rows, int p, long tile, int tiles, const uint8_t *x, vf *sums) {
    const int type = job->type, shape = shape_of(rows), many = AT_ONCE(rows);
    const long count = mk_blocks(job->bounds[p + 1] - job->bounds[p], mk_block(type));
    const long stride = count * mk_packed_bytes(type) * MK_TILE, x_stride = MK_GROUP * job->x_stride;
    const uint8_t *w = job->at[p] + tile * stride;
    int done = 0;
    for (; stride >= MK_LONG_TILE && done + many <= tiles; done += many)
        MANY_AT_ONCE[type][shape](w + done * stride, stride, x, x_stride, count, sums + done * rows);
    for (; done < tiles; done++) ONE_TILE[type][shape](w + done * stride, stride, x, x_stride, count, sums + done * rows);
}

#include "body_coded.h"

/* Bytes of columns of a panel of activations: of the rows that lie together. */
static long x_bytes(const mk_matmul_job *job, long columns, int rows) {
    const int type = job->type;
    if (job->in_tiles) return mk_blocks(columns, MK_BF16_BLOCK) * MK_BF16_BLOCK * 2 * MK_TILE;
    if (!mk_is_quantised(type))
        return mk_blocks(columns, mk_float_step(type)) * (mk_is_bf16(type) ? BF16_STEP : 64) * GROUP(rows);
    return mk_blocks(columns, mk_block(type)) * (mk_block(type) / MK_BLOCK) * MK_ACTIVATION * GROUP(rows);
}

/* Outputs of `tiles` tiles for `rows` rows of x: panel by panel, folded in the binary tree ((p0 + p1) + (p2 + p3)).
 * All tiles' parts of a panel come before the next panel, so that weights are read as they lie in memory.
 * pending [levels][capacity]: sums of 2^i panels that wait for their neighbour. */
static void product(const mk_matmul_job *job, panel_function panel, vf *pending, long capacity, int rows, long tile,
                    int tiles, long row) {
    const uint8_t *x = job->x + row * job->x_stride;
    int depth = 0;
    for (int p = 0; p < job->panels; p++) {
        const long bytes = x_bytes(job, job->bounds[p + 1] - job->bounds[p], rows);
        if (p < job->skip) {
            x += bytes;
            continue;
        }
        vf *sums = pending + depth++ * capacity;
        panel(job, rows, p, tile, tiles, x, sums);
        x += bytes;
        if (job->panel_stride) {
            store_tiles(job, sums, tile, tiles, row, rows, job->out + p * job->panel_stride);
            depth--;
            continue;
        }
        for (int carry = p; carry & 1; carry >>= 1, sums -= capacity) {
            depth--;
            for (int i = 0; i < tiles * rows; i++) sums[i - capacity] = vf_add(sums[i - capacity], sums[i]);
        }
    }
    if (!job->panel_stride) store_tiles(job, pending, tile, tiles, row, rows, job->out);
}

/* Compute rows row .. limit - 1 of up to `tiles` tiles, as many as the sums on the stack allow; return how many. */
static int some_tiles(const mk_matmul_job *job, long tile, long tiles, long row, long limit) {
    const int floats = mk_is_float(job->type);
    vf pending[MK_MAX_LEVELS][RUN_SUMS];
    if (mk_is_coded(job->type)) {
        if (tiles > RUN_SUMS / coded_rows(limit - row)) tiles = RUN_SUMS / coded_rows(limit - row);
        for (int rows; row < limit; row += rows) {
            rows = coded_rows(limit - row);
            product(job, coded_panel, *pending, RUN_SUMS, rows, tile, (int)tiles, row);
        }
        return (int)tiles;
    }
    int shape = shape_of(limit - row);
    if (floats && shape < FIRST_FLOATS) shape = FIRST_FLOATS;
    if (tiles > RUN_SUMS / ROWS[shape]) tiles = RUN_SUMS / ROWS[shape];
    if (side_by_side(job)) tiles = 1;
    for (; shape < SHAPES; shape++)
        for (int rows = ROWS[shape]; row + rows <= limit; row += rows)
            product(job, floats ? float_panel : panel, *pending, RUN_SUMS, rows, tile, (int)tiles, row);
    return (int)tiles;
}

static void matmul(const void *argument, long begin, long end) {
    const mk_matmul_job *job = argument;
    for (long item = begin, tiles; item < end; item += tiles) {
        long tile = item % job->tiles, row = item / job->tiles * job->chunk;
        long limit = row + job->chunk < job->m ? row + job->chunk : job->m;
        tiles = end - item < job->tiles - tile ? end - item : job->tiles - tile;
        tiles = some_tiles(job, tile, tiles, row, limit);
    }
}

static void add_bias(const mk_product *job, long tile, long tiles) {
    const long first = tile * MK_TILE, last = (tile + tiles) * MK_TILE < job->n ? (tile + tiles) * MK_TILE : job->n;
    for (long row = 0; row < job->m; row++) {
        float *to = job->out + job->rows[row] * job->out_stride;
        for (long i = first; i < last; i++) to[i] += job->weights[row] * job->bias[i];
    }
}

/* The experts of a row are added one after the other, so one item has a panel's tile for the rows of all experts. */
static void mixture_of(mk_range matmul, const mk_mixture_job *job, long begin, long end) {
    for (long item = begin, tiles; item < end; item += tiles) {
        long panel = item / job->products->tiles, tile = item % job->products->tiles;
        tiles = job->products->tiles - tile;
        if (tiles > end - item) tiles = end - item;
        for (long i = 0; i < job->count; i++) {
            mk_product product = job->products[i];
            if (product.bias && !panel) add_bias(&product, tile, tiles);
            product.skip = (int)panel;
            product.panels = (int)panel + 1;
            for (long row = 0, from = tile; row < product.m; row += product.chunk, from += product.tiles)
                matmul(&product, from, from + tiles);
        }
    }
}

static void mixture(const void *argument, long begin, long end) { mixture_of(matmul, argument, begin, end); }
