/* Products of packed weights with several rows of x.  Blocks of W are unpacked once for up to UNPACKED_ROWS of them, and
 * UNPACKED_TILES tiles of W share what is loaded of x: with one tile, loads take longer than products.  Integer sums are
 * exact and each output's chain of fma is that of body_plain.h or body_super.h, so the bits are theirs. */

enum { UNPACKED_ROWS = 64, UNPACKED_PARTS = MK_PARTS /* of 32 columns, at a time */ };
enum { UNPACKED_TILES = VEC_ROWS > 4 ? 2 : 1, UNPACKED_SUMS = UNPACKED_TILES * MK_GROUP };
enum { UNPACKED_FROM = 2 * MK_GROUP /* rows of x */ };
/* Where in `groups` the sizes of flipped values are, after what x is flipped with (body_flipped.h). */
enum { UNPACKED_SIZES = VEC_ALIKE ? 0 : 8 };

/* 32 columns of 16 rows of W. */
typedef struct {
    uint8_t groups[8 + UNPACKED_SIZES][64];
    vf d, m;
    part_scales of;
#if !VEC_ALIKE
    vi words[2];  /* the scales of both halves (body_centred.h) */
    vi starts[2]; /* of sums over both halves, or over each (body_flipped.h) */
#endif
} unpacked;

/* Bits of unpacked values.  Those of the forms without minima are raised by the same for all types: 8 of 4 bits, 16 of 5, 32
 * of 6; of 8 as vb_signed does. */
MK_INLINE int is_raised(const int type) { return form_of(type) == SCALED || form_of(type) == HALVED; }
MK_INLINE int unpacked_bits(const int type) {
    if (VEC_ALIKE && is_raised(type)) return 8;
    if (VEC_ALIKE) return 4;
    return form_of(type) == HALVED && !is_signed(type) ? 6 : value_bits(type);
}

/* What load_groups has raised the values of a type by. */
MK_INLINE int raised_by(const int type) {
    switch (type) {
    case MK_Q4_0: return 8;
    case MK_Q5_0: return 16;
    case MK_MXFP4: return 12;
    case MK_Q6_K: return 32;
    case MK_Q3_K: return 4;
    default: return VEC_Q8_BIAS;
    }
}

#ifdef VEC_DOT
#include "body_quarters.h"
#else
#define VEC_PUT(to, g, groups) vb_store((to)[g], (groups)[g])
#endif

/* The start of a sum over columns of half h, or of both. */
MK_INLINE int32_t unpacked_start(const int form, const int bits, const mk_activation *a, const int h) {
    if (form == MINIMUM || form == MINIMA || (bits == 8 && !VEC_Q8_BIAS)) return 0;
    if (form == HALVED) return 4 * mk_offset32(a, h);
    return bits == 8 ? a->offset128 : bits == 5 ? 2 * a->offset8 : a->offset8;
}

#include "body_flipped.h"

MK_INLINE void unpack_groups(const int type, const uint8_t *w, unpacked *to) {
    const int bits = unpacked_bits(type), wanted = bits == 8 ? VEC_Q8_BIAS : 1 << (bits - 1);
    vb groups[8];
    load_groups(type, w, groups);
    if (IS_FLIPPED(bits)) {
        FLIPPED(halves_of(form_of(type)), groups, to);
        return;
    }
    UNROLL
    for (int g = 0; g < 8; g++) {
        if (is_raised(type)) groups[g] = vb_raise(groups[g], wanted - raised_by(type));
        VEC_PUT(to->groups, g, groups);
    }
}

/* Store what a form needs of a part's factors; stores may take longer than the rest of unpacking. */
MK_INLINE void put_scales(const int form, const part_scales *of, const super_scales *all, unpacked *to) {
    const int halves = halves_of(form);
    for (int h = 0; h < halves; h++) to->of.scale[h] = of->scale[h];
    for (int h = 0; h < halves && (form == MINIMUM || form == MINIMA); h++) to->of.minimum[h] = of->minimum[h];
    if (halves == 2) to->d = all->d;
    if (form == MINIMA) to->m = all->m;
}

/* Unpack `count` parts, which for K-quants are those of a block. */
HOT void unpack(const int type, const uint8_t *w, long count, unpacked *to) {
    if (!mk_is_super(type)) {
        for (; count--; to++, w += mk_packed_bytes(type) * MK_TILE) {
            unpack_groups(type, w + mk_scale_bytes(type) * MK_TILE, to);
            const part_scales of = load_plain_scales(type, w);
            put_scales(form_of(type), &of, NULL, to);
        }
        return;
    }
    const super_scales all = load_super_scales(type, w);
    for (int s = 0; s < MK_PARTS; s++, to++) {
        const uint8_t *part = w + mk_values_at(type) + s * mk_part_bytes(type);
        unpack_groups(type, part, to);
        const part_scales of = load_scales(type, w + mk_scales_at(type) + s * mk_part_scales(type), part, all.d, all.m);
        if (IS_CENTRED(form_of(type), unpacked_bits(type))) CENTRED_SCALES(&of, &all, to);
        else put_scales(form_of(type), &of, &all, to);
    }
}

#ifdef VEC_TILE
#define unpacked_tile VEC_TILE
#else
/* The products of T rows of x with `count` parts of R tiles of W, added to sums [R][rows].  Each part fetches `fetched` bytes
 * from `ahead` on into the second-level cache. */
HOT void unpacked_tile(const int form, const int bits, const int R, const int T, const unpacked *w, long count,
                       const uint8_t *x, const uint8_t *ahead, long fetched, vf *sums, int rows) {
    const int halves = halves_of(form), last = 8 / halves - 1;
    const int centred = IS_CENTRED(form, bits), flipped = IS_FLIPPED(bits);
    vf acc[UNPACKED_SUMS];
    UNROLL
    for (int i = 0; i < R * T; i++) acc[i] = sums[i / T * rows + i % T];
    for (; count--; w++, x += MK_GROUP * MK_ACTIVATION) {
        const mk_activation *a = (const void *)x;
        vi dots[2][UNPACKED_SUMS];
        vp parts[UNPACKED_SUMS];
        for (const uint8_t *end = ahead + fetched; ahead < end; ahead += 64) __builtin_prefetch(ahead, 0, 2);
        UNROLL
        for (int h = 0; h < halves; h++) {
            UNROLL
            for (int i = 0; i < R * T; i++)
                if (centred) parts[i] = CENTRED_START(a[i % T].offset32[h]);
                else if (flipped) dots[h][i] = FLIPPED_START(w + i / T * UNPACKED_PARTS, h);
                else dots[h][i] = vi_set1(unpacked_start(form, bits, a + i % T, h));
            UNROLL
            for (int g = 0; g <= last; g++)
                UNROLL
                for (int i = 0; i < R * T; i++) {
                    const uint8_t(*values)[64] = w[i / T * UNPACKED_PARTS].groups + h * 4 + g;
                    vb_multiply(centred ? MK_CENTRED : flipped ? MK_FLIPPED : bits, g, last, vb_load(*values),
                                vb_load(values[flipped ? UNPACKED_SIZES : 0]), a[i % T].q + h * 16, &dots[h][i], &parts[i]);
                }
            if (centred)
                UNROLL
                for (int i = 0; i < R * T; i++) {
                    const vi sum = CENTRED_END(parts[i], w[i / T * UNPACKED_PARTS].words[h]);
                    dots[0][i] = h ? vi_add(dots[0][i], sum) : sum;
                }
        }
        UNROLL
        for (int i = 0; i < R * T; i++) {
            const unpacked *of = w + i / T * UNPACKED_PARTS;
            if (centred) acc[i] = vf_fma(vf_from(dots[0][i]), vf_mul(of->d, vf_set1(a[i % T].scale)), acc[i]);
            else acc[i] = add_part(form, acc[i], dots[0][i], dots[halves - 1][i], &of->of, of->d, of->m, a + i % T);
        }
    }
    UNROLL
    for (int i = 0; i < R * T; i++) sums[i / T * rows + i % T] = acc[i];
}

#endif

typedef void (*unpack_function)(const uint8_t *w, long count, unpacked *to);
typedef void (*unpacked_function)(const unpacked *w, long count, const uint8_t *x, const uint8_t *ahead, long fetched,
                                  vf *sums, int rows);

#define UNPACK(type) \
    static void unpack_##type(const uint8_t *w, long count, unpacked *to) { unpack(type, w, count, to); }
#define UNPACK_FLOAT(type)
#define UNPACK_SCALED(type)
#define UNPACK_CODED(type)
#define UNPACK_PANEL(type)
#define UNPACK_PLAIN(type) UNPACK(type)
#define UNPACK_SUPER(type) UNPACK(type)
#define UNPACK_OF(name, kind, ...) UNPACK_##kind(MK_##name)
MK_BLOCK_TYPES(UNPACK_OF)
#define UNPACKED_FLOAT(type)
#define UNPACKED_SCALED(type)
#define UNPACKED_CODED(type)
#define UNPACKED_PANEL(type)
#define UNPACKED_PLAIN(type) [type] = unpack_##type,
#define UNPACKED_SUPER(type) [type] = unpack_##type,
#define UNPACKED_OF(name, kind, ...) UNPACKED_##kind(MK_##name)
static const unpack_function UNPACK_FUNCTIONS[MK_TYPES] = {MK_BLOCK_TYPES(UNPACKED_OF)};

/* X(form, bits): those that unpacked_bits gives. */
#if VEC_ALIKE
#define UNPACKED_SHAPES(X) X(SCALED, 8) X(HALVED, 8) X(MINIMUM, 4) X(MINIMA, 4)
#else
#define UNPACKED_SHAPES(X) \
    X(SCALED, 8) X(SCALED, 5) X(SCALED, 4) X(HALVED, 8) X(HALVED, 6) X(MINIMUM, 4) X(MINIMUM, 5) X(MINIMA, 4)
#endif
#define UNPACKED_TILE(form, bits, R)                                                                             \
    static void form##_##bits##_##R(const unpacked *w, long count, const uint8_t *x, const uint8_t *ahead,       \
                                    long fetched, vf *sums, int rows) {                                          \
        unpacked_tile(form, bits, R, MK_GROUP, w, count, x, ahead, fetched, sums, rows);                         \
    }
#if VEC_ROWS > 4
#define UNPACKED_BOTH(form, bits) UNPACKED_TILE(form, bits, 1) UNPACKED_TILE(form, bits, 2)
#define UNPACKED_ROW(form, bits) [form][bits - 4] = {form##_##bits##_1, form##_##bits##_2},
#else
#define UNPACKED_BOTH(form, bits) UNPACKED_TILE(form, bits, 1)
#define UNPACKED_ROW(form, bits) [form][bits - 4] = {form##_##bits##_1},
#endif
UNPACKED_SHAPES(UNPACKED_BOTH)
static const unpacked_function UNPACKED_FUNCTIONS[4][5][UNPACKED_TILES] = {UNPACKED_SHAPES(UNPACKED_ROW)};

/* The number of `rows` rows of x that are computed together; 0 if there are too few. */
static int unpacked_rows(long rows) {
    if (rows < UNPACKED_FROM) return 0;
    return rows < UNPACKED_ROWS ? (int)rows / MK_GROUP * MK_GROUP : UNPACKED_ROWS;
}

static void unpacked_panel(const mk_matmul_job *job, int rows, int p, long tile, int tiles, int again, const uint8_t *x,
                           vf *sums) {
    (void)again;
    const int type = job->type;
    const long blocks = mk_blocks(job->bounds[p + 1] - job->bounds[p], mk_block(type));
    const long stride = blocks * mk_packed_bytes(type) * MK_TILE, parts = blocks * (mk_block(type) / MK_BLOCK);
    const long step = mk_packed_bytes(type) * MK_TILE * MK_BLOCK / mk_block(type); /* bytes of 32 columns of a tile */
    const uint8_t *w = job->at[p] + tile * stride;
    unpacked of[UNPACKED_TILES][UNPACKED_PARTS];
    for (int R; tiles; tiles -= R, w += R * stride, sums += R * rows) {
        R = tiles < UNPACKED_TILES ? tiles : UNPACKED_TILES;
        const unpacked_function times = UNPACKED_FUNCTIONS[form_of(type)][unpacked_bits(type) - 4][R - 1];
        /* Rows with which the next parts of one tile are fetched, and bytes of it with each part. */
        const int each = (int)mk_blocks(rows, R * MK_GROUP) * MK_GROUP;
        const long fetched = mk_blocks(step * MK_GROUP, each * 64) * 64;
        for (int i = 0; i < R * rows; i++) sums[i] = vf_set1(0.0f);
        for (long part = 0; part < parts; part += UNPACKED_PARTS) {
            const long count = parts - part < UNPACKED_PARTS ? parts - part : UNPACKED_PARTS;
            const uint8_t *from = x + part * MK_GROUP * MK_ACTIVATION;
            const uint8_t *next = w + (part + count < parts ? (part + count) * step : R * stride);
            for (int r = 0; r < R; r++) UNPACK_FUNCTIONS[type](w + r * stride + part * step, count, of[r]);
            for (int t = 0; t < rows; t += MK_GROUP) {
                const uint8_t *ahead = next + t / each * stride + t % each / MK_GROUP * UNPACKED_PARTS * fetched;
                times(*of, count, from + t * job->x_stride, ahead, fetched, sums + t, rows);
            }
        }
    }
}
