/* Products with float weights, whose rows lie as in files.  The 16 lanes of a vector are columns.
 *
 * Lane j sums columns j, j + 16, ... of a panel with one chain of fma.  At the end of the panel the lanes are added in the fixed
 * tree.
 *
 * With BF16 weights x is rounded to BF16 too, and denormals are zeros.  The columns are divided into blocks of 256.  In each
 * block the chain of lane j begins at zero.  It takes columns 2 j + 1 and 2 j of the first 32, then of the next 32, and so on.
 * At the end of a block lane j + 8 is added to lane j, and the result is added to the sums of the blocks before it.  At the end
 * of the panel these 8 sums are added in the tree.  VDPBF16PS computes such chains in its lanes, and AMX's TDPBF16PS adds two
 * chains of 16 to its sum (both: Intel's manual).  Any fma computes them as well, because a product of two BF16 is exact.
 *
 * With weights in blocks with scales (body_scaled.h) a lane's chain begins at zero in each block.  At the end of a block one fma
 * adds the chain times the block's scale to the lane's sum. */

/* w: `rows` (1..16) rows of W, at a distance of `stride` bytes.  ahead: how many bytes after each line of W the line begins that
 * is prefetched (0: as ahead_of says, or that of the next rows; FETCHED: none, because W is in the cache).  x: T rows, as
 * float_rows of api.c has made them; their groups have a distance of x_stride bytes.  sums [T]: lane r is the product with row r of W. */
typedef void (*float_function)(const uint8_t *w, long stride, long ahead, int rows, const uint8_t *x, long x_stride,
                               long columns, vf *sums);

#ifdef VEC_BF16
enum { BF16_STEP = MK_BF16_PAIRS };
#else
enum { BF16_STEP = MK_BF16_HALVES };
#endif
enum { DEPTH = 1024 /* columns of a few rows of x that fit into the first-level cache */ };
enum { FETCHED = -1 };
enum { MAX_STREAMS = 4 /* rows of W that are read at a time */, MAX_FLOAT_SUMS = 24 /* sums of these rows and rows of x */ };
enum { FLOAT_ROWS = VEC_ROWS > 4 ? 8 : 4 /* rows of x that are computed at a time, at most */ };

/* How many rows of W are multiplied with T rows of x at a time, so that there are VEC_SUMS sums. */
#define STREAMS(T) (VEC_SUMS / (T) < 1 ? 1 : VEC_SUMS / (T) > MAX_STREAMS ? (int)MAX_STREAMS : VEC_SUMS / (T))
/* With one or two rows of x memory is the limit, and x86 reads one row of W after the other up to twice as fast as four at a
 * time (Zen 4).  Blocks with scales take longer to compute. */
#define IN_ORDER(type, T) (VEC_FETCHES && (T) <= 2 && !mk_is_scaled(type))
/* With two rows of x Zen 4 reads F16 1.0 (AVX-512) to 1.5 times (AVX2) as fast if the line that is read now is prefetched. */
#define AS_READ(type, T) ((type) == MK_F16 && (T) == 2 && unaided(T))
#ifdef VEC_HALF_ROWS /* with a group of rows of x, in halves of vectors (half_steps) */
#define STREAMS_OF(type, T) \
    (IN_ORDER(type, T) ? 1 : (T) == MK_GROUP && !mk_is_scaled(type) ? VEC_HALF_ROWS : STREAMS(T))
#else
#define STREAMS_OF(type, T) (IN_ORDER(type, T) ? 1 : STREAMS(T))
#endif

MK_INLINE vf float_row(const int type, const int halves, const int half, const uint8_t *w) {
    return type == MK_F16 ? vf_load_f16((const void *)w)
           : halves == 1  ? vf_load((const void *)w)
           : half         ? vf_even((const void *)w)
                          : vf_odd((const void *)w);
}

/* One step of the columns: 32 for BF16, 16 for other types.  With one row of x, a row of W is loaded where it is used, because
 * NEON has too few registers for four rows of W and their sums. */
MK_INLINE void float_step(const int type, const int R, const int T, const uint8_t *const *w, const uint8_t *x,
                          long x_stride, vf *acc) {
    const int halves = type == MK_BF16 ? BF16_STEP / 64 : 1;
    UNROLL
    for (int half = 0; half < halves; half++) {
        vf rows[MAX_STREAMS];
        UNROLL
        for (int r = 0; r < R; r++)
            if (T > 1) rows[r] = float_row(type, halves, half, w[r]);
        UNROLL
        for (int t = 0; t < T; t++) {
            vf values = vf_load((const void *)(ROW(T, t, x, x_stride, 64) + 64 * GROUP(T) * half));
            if (R > 1) values = vf_keep(values);
            UNROLL
            for (int r = 0; r < R; r++) {
                const vf row = T > 1 ? rows[r] : float_row(type, halves, half, w[r]);
                vf *to = &acc[r * T + t];
#ifdef VEC_BF16
                *to = type == MK_BF16 ? vf_pairs(row, values, *to) : vf_fma(row, values, *to);
#else
                *to = vf_fma(row, values, *to);
#endif
            }
        }
    }
}

/* `steps` steps of R rows of W.  The pointers to the rows are advanced, and the products are added to acc [R][T]. */
MK_INLINE void float_steps(const int type, const int R, const int T, const uint8_t **rows, long ahead, const uint8_t *x,
                           long x_stride, long steps, vf *acc) {
    const int bytes = type == MK_F16 ? 32 : 64, x_bytes = (type == MK_BF16 ? BF16_STEP : 64) * GROUP(T);
    for (; steps > 0; steps--, x += x_bytes) {
        float_step(type, R, T, rows, x, x_stride, acc);
        UNROLL
        for (int r = 0; r < R; r++) {
            /* The pages of a mapped file are small, so each row may be in its own page. */
            if (ahead || T >= MK_GROUP) __builtin_prefetch(rows[r] + ahead);
            rows[r] += bytes;
        }
    }
}

#ifdef VEC_HALF_ROWS
/* The same for a group of rows of x, one half of the lanes after the other.  The registers hold R * 4 sums, R vectors of W and
 * one of x, so loads take no longer than products.  The odd and the even columns of a step are two iterations of one loop,
 * because gcc keeps sums in memory if the body of the loop has both. */
MK_INLINE void half_steps(const int type, const int R, const uint8_t **rows, long ahead, const uint8_t *x, long steps,
                          vf *sums) {
    const unsigned bytes = type == MK_F16 ? 32 : 64, parts = type == MK_BF16 ? 2 : 1;
    UNROLL
    for (int half = 0; half < 2; half++) {
        vr acc[MAX_STREAMS * MK_GROUP];
        UNROLL
        for (int i = 0; i < R * MK_GROUP; i++) acc[i] = *vr_of(sums + i, half);
        const uint8_t *values = x + half * 32;
        long at = half * bytes / 2;
        for (unsigned long turn = 0, part = 0; turn < (unsigned long)steps * parts; turn++) {
            vr w[MAX_STREAMS];
            UNROLL
            for (int r = 0; r < R; r++) {
                const void *from = rows[r] + at;
                w[r] = type == MK_F16 ? vr_load_f16(from) : type == MK_F32 ? vr_load(from) : vr_bf16(from, part);
                if (!half) __builtin_prefetch(rows[r] + at + ahead);
            }
            UNROLL
            for (int t = 0; t < MK_GROUP; t++) {
                const vr value = vr_keep(vr_load((const void *)(values + t * 64)));
                UNROLL
                for (int r = 0; r < R; r++) acc[r * MK_GROUP + t] = vr_fma(w[r], value, acc[r * MK_GROUP + t]);
            }
            values += MK_GROUP * 64;
            at += parts == 1 ? bytes : part * bytes;
            part ^= parts - 1;
            if (parts > 1) __asm__("" : "+r"(part)); /* gcc must not know its value, or it unrolls the loop */
        }
        UNROLL
        for (int i = 0; i < R * MK_GROUP; i++) *vr_of(sums + i, half) = acc[i];
    }
    UNROLL
    for (int r = 0; r < R; r++) rows[r] += steps * bytes;
}
#define FLOAT_STEPS(type, R, T, rows, ahead, x, x_stride, steps, acc)                 \
    if ((R) > 1 && (T) == MK_GROUP) half_steps(type, R, rows, ahead, x, steps, acc); \
    else float_steps(type, R, T, rows, ahead, x, x_stride, steps, acc)
#else
#define FLOAT_STEPS float_steps
#endif

/* Add the products of `columns` columns of R rows of W to sums [R][T]; for BF16 these are at most one block. */
HOT void float_run(const int type, const int R, const int T, const uint8_t **rows, long ahead, const uint8_t *x,
                   long x_stride, long columns, vf *sums) {
    const int x_bytes = (type == MK_BF16 ? BF16_STEP : 64) * GROUP(T);
    const long step = mk_float_step(type), steps = columns / step, rest = columns % step;
    vf acc[MAX_FLOAT_SUMS];
    UNROLL
    for (int i = 0; i < R * T; i++) acc[i] = type == MK_BF16 ? vf_set1(0.0f) : sums[i];
    FLOAT_STEPS(type, R, T, rows, ahead, x, x_stride, steps, acc);
    if (rest) {
        uint8_t padded[MAX_STREAMS][64] = {{0}};
        UNROLL
        for (int r = 0; r < R; r++) {
            memcpy(padded[r], rows[r], (size_t)(rest * mk_block_bytes(type)));
            rows[r] = padded[r];
        }
        float_step(type, R, T, rows, x + steps * x_bytes, x_stride, acc);
    }
    UNROLL
    for (int i = 0; i < R * T; i++) sums[i] = type == MK_BF16 ? vf_add_halves(sums[i], acc[i]) : acc[i];
}

/* The same for weights in blocks with scales. */
HOT void scaled_run(const int type, const int R, const int T, const uint8_t **rows, long ahead, const uint8_t *x,
                    long x_stride, long columns, vf *sums) {
    const int block = mk_block(type), bytes = mk_block_bytes(type);
    float scales[MAX_STREAMS][MK_TILE];
    for (; columns > 0; columns -= block) {
        const int steps = (int)mk_blocks(columns < block ? columns : block, MK_TILE);
        vf acc[MAX_FLOAT_SUMS];
        UNROLL
        for (int i = 0; i < R * T; i++) acc[i] = vf_set1(0.0f);
        UNROLL
        for (int r = 0; r < R; r++) {
            scaled_parts(type, rows[r], scales[r]);
            for (int line = 0; line < bytes; line += 64) __builtin_prefetch(rows[r] + line + ahead);
        }
        for (int pair = 0; 2 * pair < steps; pair++)
            UNROLL
            for (int half = 0; half < 2; half++, x += 64 * GROUP(T)) {
                vf numbers[MAX_STREAMS];
                if (2 * pair + half == steps) break;
                UNROLL
                for (int r = 0; r < R; r++) numbers[r] = scaled_numbers(type, rows[r], scales[r], pair, half);
                UNROLL
                for (int t = 0; t < T; t++) {
                    vf values = vf_load((const void *)ROW(T, t, x, x_stride, 64));
                    if (R > 1) values = vf_keep(values);
                    UNROLL
                    for (int r = 0; r < R; r++) acc[r * T + t] = vf_fma(numbers[r], values, acc[r * T + t]);
                }
            }
        UNROLL
        for (int r = 0; r < R; r++) {
            const vf unit = vf_set1(scaled_unit(type, rows[r]));
            UNROLL
            for (int t = 0; t < T; t++) sums[r * T + t] = vf_fma(acc[r * T + t], unit, sums[r * T + t]);
            rows[r] += bytes;
        }
    }
}

HOT void float_rows(const int type, const int R, const int T, const uint8_t *w, long stride, long ahead,
                    const uint8_t *x, long x_stride, long columns, vf *sums) {
    const long piece = type == MK_BF16 ? MK_BF16_BLOCK : columns;
    const uint8_t *rows[MAX_STREAMS];
    UNROLL
    for (int r = 0; r < R; r++) rows[r] = w + r * stride;
    if (mk_is_scaled(type)) {
        scaled_run(type, R, T, rows, ahead, x, x_stride, columns, sums);
        return;
    }
    for (; columns > piece; columns -= piece, x += piece / 32 * BF16_STEP * GROUP(T))
        float_run(type, R, T, rows, ahead, x, x_stride, piece, sums);
    float_run(type, R, T, rows, ahead, x, x_stride, columns, sums);
}

HOT void float_tile(const int type, const int R, const int T, const uint8_t *w, long stride, long ahead, int rows,
                    const uint8_t *x, long x_stride, long columns, vf *sums) {
    const int step = mk_float_step(type);
    const long depth = T < MK_GROUP ? columns : DEPTH; /* with few rows of x, a row of W is read from its beginning to its end */
    vf acc[MK_TILE * FLOAT_ROWS];
    if (!ahead) ahead = !IN_ORDER(type, T) ? R * stride : AS_READ(type, T) ? 1 : ahead_of(type, T);
    for (int i = 0; i < MK_TILE * T; i++) acc[i] = vf_set1(0.0f);
    for (long begin = 0; begin < columns; begin += depth) {
        const long count = columns - begin < depth ? columns - begin : depth;
        const uint8_t *from = w + mk_row_bytes(type, begin);
        int row = 0;
        for (; row + R <= rows; row += R)
            float_rows(type, R, T, from + row * stride, stride, ahead, x, x_stride, count, acc + row * T);
        for (; row < rows; row++)
            float_rows(type, 1, T, from + row * stride, stride, ahead, x, x_stride, count, acc + row * T);
        x += depth / step * (type == MK_BF16 ? BF16_STEP : 64) * GROUP(T);
    }
    for (int t = 0; t < T; t++) sums[t] = vf_sums(acc + t, T);
}

#ifdef VEC_BF16
#include "body_pairs.h"
#else
#define PAIRS_FIT(type, rows, n, columns) 0
#define pairs_tile(...) (void)0
#endif
#define FLOAT_TILE(type, T)                                                                                        \
    static void type##_##T(const uint8_t *w, long stride, long ahead, int rows, const uint8_t *x, long x_stride,   \
                           long columns, vf *sums) {                                                               \
        float_tile(type, STREAMS_OF(type, T), T, w, stride, ahead, rows, x, x_stride, columns, sums);                       \
    }
#if VEC_ROWS > 4
#define MORE_FLOATS(type) FLOAT_TILE(type, 8)
#define MORE_FLOAT_FUNCTIONS(type) , [7] = type##_8
#else
#define MORE_FLOATS(type)
#define MORE_FLOAT_FUNCTIONS(type)
#endif
#define FLOAT_TILES(type) \
    MORE_FLOATS(type) FLOAT_TILE(type, 4) FLOAT_TILE(type, 3) FLOAT_TILE(type, 2) FLOAT_TILE(type, 1)
#define FLOAT_FUNCTIONS(type) {type##_1, type##_2, type##_3, type##_4 MORE_FLOAT_FUNCTIONS(type)}
typedef float_function float_functions[FLOAT_ROWS];
#ifdef LIKE
extern const float_functions OF(LIKE, floats)[MK_TYPES];
#ifdef VEC_BF16
FLOAT_TILES(MK_BF16)
static const float_functions PAIRS_FUNCTIONS = FLOAT_FUNCTIONS(MK_BF16);
#define FLOAT_TILE_FUNCTIONS(type) ((type) == MK_BF16 ? PAIRS_FUNCTIONS : OF(LIKE, floats)[type])
#else
#define FLOAT_TILE_FUNCTIONS(type) OF(LIKE, floats)[type]
#endif
#else
#define FLOAT_TILES_FLOAT(type) FLOAT_TILES(type)
#define FLOAT_TILES_SCALED(type) FLOAT_TILES(type)
#define FLOAT_TILES_PLAIN(type)
#define FLOAT_TILES_SUPER(type)
#define FLOAT_TILES_CODED(type)
#define FLOAT_TILES_PANEL(type)
#define FLOAT_TILES_OF(name, kind, ...) FLOAT_TILES_##kind(MK_##name)
MK_BLOCK_TYPES(FLOAT_TILES_OF)

#define FLOAT_ROW_FLOAT(type) [type] = FLOAT_FUNCTIONS(type),
#define FLOAT_ROW_SCALED(type) FLOAT_ROW_FLOAT(type)
#define FLOAT_ROW_PLAIN(type)
#define FLOAT_ROW_SUPER(type)
#define FLOAT_ROW_CODED(type)
#define FLOAT_ROW_PANEL(type)
#define FLOAT_ROW_OF(name, kind, ...) FLOAT_ROW_##kind(MK_##name)
extern const float_functions OF(NAME, floats)[MK_TYPES];
const float_functions OF(NAME, floats)[MK_TYPES] = {MK_BLOCK_TYPES(FLOAT_ROW_OF)};
#define FLOAT_TILE_FUNCTIONS(type) OF(NAME, floats)[type]
#endif
