/* Products of many rows of x with weights that are multiplied as floats.
 *
 * Columns of a tile of W become floats once for up to WIDE_ROWS rows of x, and stay in the first cache while these pass by,
 * WIDE_X at a time.  WIDE_W rows of W and WIDE_X rows of x have as many sums as registers hold beside WIDE_X parts of vectors
 * of x and one of W.  A register holds a whole vector, or a half: then one half is computed after the other.  The chains are
 * those of body_float.h. */

#ifdef VEC_PARTS
enum { WIDE_W = 4, WIDE_X = 3, WIDE_FOURS = MK_TILE / WIDE_W };
enum { WIDE_COLUMNS = MK_BF16_BLOCK, WIDE_STEPS = WIDE_COLUMNS / MK_TILE, WIDE_BLOCKS = 4 /* with scales, at most */ };
enum { WIDE_ROWS = 96, WIDE_FROM = 20 /* fewer rows take less time in body_float.h */ };

/* The number of `rows` rows of x that are computed together; 0 if there are too few, or if the type has other products. */
static int wide_rows(int type, long rows) {
    if (mk_is_quantised(type) || rows < WIDE_FROM) return 0;
#ifdef VEC_BF16
    if (mk_is_bf16(type)) return 0;
#endif
    return rows < WIDE_ROWS ? (int)rows / MK_GROUP * MK_GROUP : WIDE_ROWS;
}

#ifdef LIKE
#define wide_panel OF(LIKE, wide_panel)
#else
#define wide_panel OF(NAME, wide_panel)
#endif
void wide_panel(const mk_matmul_job *job, int rows, int p, long tile, int tiles, int again, const uint8_t *x, vf *sums);

#ifndef LIKE
/* values: [part of the lanes][rows of W][step][row]; units: what chains of a block with scales are multiplied with.  Four
 * rows whose lanes are added together are neighbours (vf_quarters). */
typedef struct {
    vr values[VEC_PARTS][WIDE_FOURS][WIDE_STEPS][WIDE_W];
    float units[WIDE_BLOCKS][MK_TILE];
} wide_block;
#define WIDE_PLACE(r) ((r) % WIDE_FOURS * WIDE_W + (r) / WIDE_FOURS)

/* What becomes of a chain at its end: both halves of it are added to 8 sums (BF16), it is multiplied by the block's scale and
 * added to 16 sums, or it goes on. */
enum { WIDE_HALVES, WIDE_SCALED, WIDE_CHAIN };
static int wide_form(int type) { return mk_is_bf16(type) ? WIDE_HALVES : mk_is_scaled(type) ? WIDE_SCALED : WIDE_CHAIN; }
#define WIDE_SUMS(form) ((form) == WIDE_HALVES ? WIDE_W / 2 : WIDE_W) /* vectors of a row of x and four rows of W */
/* There are too few registers to hold sums from block to block. */
#define WIDE_IN_MEMORY(sums) __asm__("" : : "r"(sums) : "memory")

/* The first or the second half of 32 columns of a row; for BF16 the odd ones or the even ones. */
MK_INLINE vf wide_numbers(const int type, const uint8_t *w, const float *scales, int pair, const int half) {
    if (mk_is_scaled(type)) return scaled_numbers(type, w, scales, pair, half);
    return type == MK_BF16 ? float_row(type, 2, half, w) : float_row(type, 1, 0, w + half * mk_row_bytes(type, MK_TILE));
}

/* Columns of a row, at most WIDE_COLUMNS; what is missing of the last 32 becomes zero. */
HOT void widen_row(const int type, const uint8_t *w, int place, long columns, wide_block *to) {
    const int block = mk_is_scaled(type) ? mk_block(type) : 32;
    for (long begin = 0; begin < columns; begin += block, w += mk_row_bytes(type, block)) {
        float scales[MK_TILE];
        uint8_t padded[128] = {0};
        const uint8_t *from = w;
        if (mk_is_scaled(type)) scaled_parts(type, w, scales), to->units[begin / block][place] = scaled_unit(type, w);
        else if (columns - begin < block) from = memcpy(padded, w, (size_t)mk_row_bytes(type, columns - begin));
        for (int pair = 0; pair < block / 32; pair++)
            UNROLL
            for (int half = 0; half < 2; half++) {
                vf numbers = wide_numbers(type, from, scales, pair, half);
                const long step = begin / MK_TILE + 2 * pair + half;
                UNROLL
                for (int part = 0; part < VEC_PARTS; part++)
                    to->values[part][place / WIDE_W][step][place % WIDE_W] = *vr_of(&numbers, part);
            }
    }
}

/* Columns of `rows` rows; if there are fewer than 16, the last one takes the places of the others. */
static void widen(int type, const uint8_t *w, long stride, int rows, long columns, wide_block *to) {
    for (int r = 0; r < MK_TILE; r++) {
        const uint8_t *row = w + (r < rows ? r : rows - 1) * stride;
        switch (type) {
#define WIDEN(type) case type: widen_row(type, row, WIDE_PLACE(r), columns, to); break;
#define WIDEN_FLOAT(type) WIDEN(type)
#define WIDEN_SCALED(type) WIDEN(type)
#define WIDEN_PLAIN(type)
#define WIDEN_SUPER(type)
#define WIDEN_CODED(type)
#define WIDEN_PANEL(type)
#define WIDEN_OF(name, kind, ...) WIDEN_##kind(MK_##name)
            MK_BLOCK_TYPES(WIDEN_OF)
        }
    }
}

/* acc [WIDE_W][T] += the products of `steps` steps of rows of W with T rows of x, in a part of the lanes.  For the first part,
 * a line `ahead` bytes after each of the first row of x is fetched. */
MK_INLINE void wide_chains(const int part, const int T, const vr (*w)[WIDE_W], const uint8_t *const *x, long at, long ahead,
                           long steps, vr *acc) {
    at += MK_TILE * 4 / VEC_PARTS * part;
    do {
        vr values[WIDE_X];
        UNROLL
        for (int t = 0; t < T; t++) values[t] = vr_load((const void *)(x[t] + at));
        if (!part) __builtin_prefetch(*x + at + ahead);
        UNROLL
        for (int r = 0; r < WIDE_W; r++) {
            const vr row = vr_keep((*w)[r]);
            UNROLL
            for (int t = 0; t < T; t++) acc[r * T + t] = vr_fma(row, values[t], acc[r * T + t]);
        }
        w++, at += MK_TILE * 4 * MK_GROUP;
    } while (--steps);
}

/* A block of W times T rows of x.  Their sums [four rows of W][.][T] begin or go on.  At the panel's end the lanes of four rows
 * are added until one vector has them all.  Chains have `chain` steps.  x: those rows, and then the WIDE_X rows that are
 * fetched meanwhile. */
HOT void wide_tile(const int form, const int T, const wide_block *w, const uint8_t *const *x, long steps, long chain,
                   int begins, int ends, vf *sums) {
    const int count = WIDE_SUMS(form) * T;
    vf *folded = sums;
    _Pragma("GCC unroll 1") /* else the compiler keeps sums of two turns in memory */
    for (int four = 0; four < WIDE_FOURS; four++, sums += count, folded += T) {
        const long ahead = x[WIDE_X + four % WIDE_X] - *x;
        vf all[WIDE_W * WIDE_X], halves[WIDE_W * WIDE_X];
        if (begins)
            UNROLL
            for (int i = 0; i < count; i++) all[i] = vf_set1(0.0f);
        else
            UNROLL
            for (int i = 0; i < count; i++) all[i] = vf_load((const float *)&sums[i]);
        UNROLL
        for (int part = 0; part < VEC_PARTS; part++) {
            const float *units = w->units[0] + four * WIDE_W;
            long begin = 0;
            do {
                vr acc[WIDE_W * WIDE_X];
                UNROLL
                for (int i = 0; i < WIDE_W * T; i++) acc[i] = form == WIDE_CHAIN ? *vr_of(all + i, part) : vr_zero();
                wide_chains(part, T, w->values[part][four] + begin, x, begin * (MK_TILE * 4 * MK_GROUP), ahead,
                            steps - begin < chain ? steps - begin : chain, acc);
                UNROLL
                for (int i = 0; i < WIDE_W * T; i++) {
                    vr *sum = vr_of((form == WIDE_HALVES ? halves : all) + i, part);
                    *sum = form == WIDE_SCALED ? vr_fma(acc[i], vr_set1(units[i / T]), *sum) : acc[i];
                }
                if (form == WIDE_SCALED && VEC_PARTS > 1) WIDE_IN_MEMORY(all);
                units += MK_TILE, begin += chain;
            } while (form == WIDE_SCALED && begin < steps);
        }
        if (form == WIDE_HALVES)
            UNROLL
            for (int i = 0; i < count; i++) {
                const vf *of = halves + i / T * 2 * T + i % T;
                all[i] = vf_add(all[i], vf_both_halves(of[0], of[T]));
            }
        if (!ends) {
            UNROLL
            for (int i = 0; i < count; i++) vf_store((float *)&sums[i], all[i]);
            continue;
        }
        UNROLL
        for (int t = 0; t < T; t++) {
            const vf *of = all + t;
            folded[t] = form == WIDE_HALVES ? vf_quarters(of[0], of[T])
                                            : vf_quarters(vf_both_halves(of[0], of[T]), vf_both_halves(of[2 * T], of[3 * T]));
        }
    }
}
#define WIDE_ARGUMENTS \
    const wide_block *w, const uint8_t *const *x, long steps, long chain, int begins, int ends, vf *sums
typedef void (*wide_function)(WIDE_ARGUMENTS);
#define WIDE_TILE(form, T) \
    static void form##_##T(WIDE_ARGUMENTS) { wide_tile(form, T, w, x, steps, chain, begins, ends, sums); }
#define WIDE_TILES(form) WIDE_TILE(form, 1) WIDE_TILE(form, 2) WIDE_TILE(form, 3)
#define WIDE_FUNCTIONS(form) [form] = {form##_1, form##_2, form##_3}
WIDE_TILES(WIDE_HALVES) WIDE_TILES(WIDE_SCALED) WIDE_TILES(WIDE_CHAIN)

/* A block of W times `rows` rows of x, while `bytes` bytes of each of the next block's rows are fetched. */
static void wide_times(int form, const wide_block *w, long steps, long chain, const uint8_t *x, long x_stride, int rows,
                       const uint8_t *next, long stride, long bytes, int begins, int ends, vf *sums) {
    static const wide_function of_form[][WIDE_X] = {
        WIDE_FUNCTIONS(WIDE_HALVES), WIDE_FUNCTIONS(WIDE_SCALED), WIDE_FUNCTIONS(WIDE_CHAIN)};
    for (int t = 0, T; t < rows; t += T) {
        const uint8_t *of[2 * WIDE_X];
        T = rows - t < WIDE_X ? rows - t : WIDE_X;
        for (int i = 0; i < 2 * WIDE_X; i++) of[i] = ROW(WIDE_ROWS, t + i, x, x_stride, 64);
        for (int r = MK_TILE * t / rows; r < MK_TILE * (t + T) / rows; r++)
            for (long at = 0; at < bytes; at += 64) __builtin_prefetch(next + r * stride + at);
        of_form[form][T - 1](w, of, steps, chain, begins, ends, sums + t * WIDE_FOURS * WIDE_SUMS(form));
    }
}

/* A panel, like float_panel and coded_panel. */
void wide_panel(const mk_matmul_job *job, int rows, int p, long tile, int tiles, int again, const uint8_t *x, vf *sums) {
    const int type = job->type, coded = mk_is_coded(type), form = wide_form(type), step = mk_float_step(type);
    const long columns = job->bounds[p + 1] - job->bounds[p], x_stride = MK_GROUP * job->x_stride;
    const long stride = job->row_bytes ? job->row_bytes : mk_row_bytes(type, columns);
    const long chain = form == WIDE_SCALED ? mk_block(type) / MK_TILE : WIDE_STEPS;
    const unsigned mode = form == WIDE_HALVES ? mk_flush_denormals() : 0;
    wide_block wide;
    decoded_rows decoded;
    vf all[WIDE_ROWS * MK_TILE];
    for (long first = tile * MK_TILE; tiles--; first += MK_TILE, sums += rows) {
        const int n = job->n - first < MK_TILE ? (int)(job->n - first) : MK_TILE;
        const uint8_t *w = job->at[p] + (coded ? first / MK_TILE * mk_coded_bytes(columns) : first * stride);
        if (!columns) memset(all, 0, sizeof all);
        for (long c = 0; c < columns; c += WIDE_COLUMNS) {
            const long width = columns - c < WIDE_COLUMNS ? columns - c : WIDE_COLUMNS, steps = mk_blocks(width, step);
            const uint8_t *next = w + mk_coded_bytes(width);
            long apart = MK_CODED_STEP / MK_TILE * steps;
            if (coded) {
                decode_block(w, steps, decoded);
                widen(MK_BF16, decoded, 64 * steps, n, width, &wide);
            } else {
                widen(type, w, stride, n, width, &wide);
                next = c + width < columns ? w + mk_row_bytes(type, width) : job->at[p] + (first + MK_TILE) * stride;
                apart = stride;
            }
            wide_times(form, &wide, steps * (step / MK_TILE), chain, x + 4 * MK_GROUP * c, x_stride, rows, next, apart,
                       again ? 0 : coded ? apart : mk_row_bytes(type, WIDE_COLUMNS), !c, c + width == columns, all);
            w = next;
        }
        for (int t = 0; t < rows; t++) {
            const int left = rows - t / WIDE_X * WIDE_X, T = left < WIDE_X ? left : WIDE_X; /* rows whose sums lie together */
            sums[t] = vf_sums_of_quarters(all + t / WIDE_X * WIDE_X * WIDE_FOURS * WIDE_SUMS(form) + t % WIDE_X, T);
        }
    }
    if (form == WIDE_HALVES) mk_restore(mode);
}
#endif
#else
#define wide_rows(type, rows) 0
#define wide_panel NULL
#endif
