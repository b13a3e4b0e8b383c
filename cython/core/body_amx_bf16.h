/* Products of BF16 weights with many rows of x, on the tiles of AMX, with the bits of body_float.h.
 *
 * There is a tile for each pair of lanes j and j + 8.  A row of the tile has the columns of a block that the chains of these
 * lanes take, of one row of W: the odd column of the first 32, the even one, those of the next 32, and so on.  A word of 32 bits
 * has the column of lane j in its lower half and that of lane j + 8 in its upper half.  TDPBF16PS computes both chains from zero
 * and adds them to the sum.  tile_rows writes x in this layout, with the rows of x side by side.  The rows of W are rearranged
 * during the product, once for all rows of x that are multiplied with them. */

#include "body_amx_tiles.h"

enum { LANE_PAIRS = 8, RUNS = 8 /* runs of 32 columns of a block */ };
enum { APART = 1088 /* bytes from a tile to the next one, so that they do not share the sets of a cache */ };
enum { WIDE = 2 /* tiles of W, and of x, that are multiplied at a time */ };
enum { TRANSPOSED = 16 /* blocks of W that are rearranged at a time */, MAX_ROWS = 256 /* rows of x, at a time */ };

typedef uint8_t transposed_blocks[TRANSPOSED][APART] __attribute__((aligned(64)));
typedef float pair_sums[WIDE][WIDE][MK_TILE][MK_TILE] __attribute__((aligned(64))); /* [W][x][row of W][row of x] */

/* Transpose a matrix of 8 x 8 words of 64 bits: word i of row r becomes word r of row i. */
MK_INLINE void transpose_8(__m512i *a) {
    __m512i b[8];
    UNROLL
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 1]);
    }
    UNROLL
    for (int i = 0; i < 2; i++) {
        __m512i low = _mm512_shuffle_i64x2(b[i], b[2 + i], 0x44), high = _mm512_shuffle_i64x2(b[i], b[2 + i], 0xee);
        __m512i low_4 = _mm512_shuffle_i64x2(b[4 + i], b[6 + i], 0x44);
        __m512i high_4 = _mm512_shuffle_i64x2(b[4 + i], b[6 + i], 0xee);
        a[i] = _mm512_shuffle_i64x2(low, low_4, 0x88), a[2 + i] = _mm512_shuffle_i64x2(low, low_4, 0xdd);
        a[4 + i] = _mm512_shuffle_i64x2(high, high_4, 0x88), a[6 + i] = _mm512_shuffle_i64x2(high, high_4, 0xdd);
    }
}

/* Transpose a matrix of 16 x 16 words of 32 bits. */
MK_INLINE void transpose_16(__m512i *a) {
    __m512i low[8], high[8];
    UNROLL
    for (int i = 0; i < 8; i++) {
        low[i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        high[i] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
    transpose_8(low);
    transpose_8(high);
    UNROLL
    for (int i = 0; i < 16; i++) a[i] = (i % 4 < 2 ? low : high)[i / 4 * 2 + i % 2];
}

/* Put 32 columns into the order of the pairs of lanes: for each pair the two odd columns, then the two even ones. */
MK_INLINE __m512i lane_pairs(__m512i columns) {
    static const uint16_t ORDER[32] = {1, 17, 0, 16, 3,  19, 2,  18, 5,  21, 4,  20, 7,  23, 6,  22,
                                       9, 25, 8, 24, 11, 27, 10, 26, 13, 29, 12, 28, 15, 31, 14, 30};
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(ORDER), columns);
}

/* The nearest BF16, ties to even; NaNs stay NaNs. */
MK_INLINE __m256i rounded_16(vf x) {
    const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
    __m512i sum = _mm512_add_epi32(_mm512_and_si512(_mm512_srli_epi32(bits, 16), one), _mm512_set1_epi32(0x7fff));
    sum = _mm512_add_epi32(sum, bits);
    sum = _mm512_mask_or_epi32(sum, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
}

/* Activations for BF16 weights, in tiles: [16 rows][panel][pair of lanes][block][word][row].  Items are 16 rows. */
static void tile_rows(const void *argument, long begin, long end) {
    const mk_rows_job *job = argument;
    for (long group = begin; group < end; group++) {
        uint8_t *out = job->out + group * MK_TILE * job->out_bytes;
        for (int p = 0; p < job->panels; p++) {
            const long last = job->bounds[p + 1], blocks = mk_blocks(last - job->bounds[p], MK_BF16_BLOCK);
            for (long run = 0, i = job->bounds[p]; run < blocks * RUNS; run++, i += 32) {
                __m512i words[MK_TILE];
                for (int r = 0; r < MK_TILE; r++) {
                    const long row = group * MK_TILE + r;
                    words[r] = _mm512_setzero_si512();
                    if (row >= job->n || i >= last) continue;
                    const float *x = job->x + (job->at ? job->at[row] : row) * job->stride;
                    __m256i low = rounded_16(vf_row(x, i, last, 0.0f)), high = _mm256_setzero_si256();
                    if (i + MK_TILE < last) high = rounded_16(vf_row(x, i + MK_TILE, last, 0.0f));
                    words[r] = lane_pairs(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
                }
                transpose_16(words);
                for (int i = 0; i < MK_TILE; i++)
                    _mm512_store_si512(out + (i / 2 * blocks + run / RUNS) * TILE_BYTES + (run % RUNS * 2 + i % 2) * 64,
                                       words[i]);
            }
            out += blocks * LANE_PAIRS * TILE_BYTES;
        }
    }
}

/* Write a block of a row of W to the tiles of the pairs of lanes.  columns: how many the row still has; absent ones are zero. */
MK_INLINE void transpose_block(const uint8_t *from, long columns, uint8_t *out) {
    uint8_t padded[MK_BF16_BLOCK * 2];
    __m512i words[RUNS];
    if (columns < MK_BF16_BLOCK) {
        memset(padded, 0, sizeof padded);
        from = memcpy(padded, from, (size_t)columns * 2);
    }
    UNROLL
    for (int j = 0; j < RUNS; j++) words[j] = lane_pairs(_mm512_loadu_si512(from + 64 * j));
    transpose_8(words);
    UNROLL
    for (int t = 0; t < LANE_PAIRS; t++) _mm512_store_si512(out + t * (long)sizeof(transposed_blocks), words[t]);
}

/* The same for up to TRANSPOSED blocks of `rows` rows of W.  MAX_STREAMS rows are read at a time, which the processor prefetches
 * as streams.  The following rows are prefetched here, because each row may be in its own page. */
static void transpose_rows(const uint8_t *w, long stride, int rows, long columns, transposed_blocks *out) {
    for (int first = 0; first < rows; first += MAX_STREAMS)
        for (long b = 0; b < TRANSPOSED && b * MK_BF16_BLOCK < columns; b++)
            for (int r = first; r < rows && r < first + MAX_STREAMS; r++) {
                const uint8_t *from = w + r * stride + b * MK_BF16_BLOCK * 2;
                for (int j = 0; j < RUNS; j++) __builtin_prefetch(from + MAX_STREAMS * stride + 64 * j);
                transpose_block(from, columns - b * MK_BF16_BLOCK, out[0][b] + 64 * r);
            }
}

/* The same for a tile of BF12. */
static void transpose_coded(const uint8_t *w, long columns, transposed_blocks *out) {
    decoded_rows decoded;
    for (long b = 0; b < TRANSPOSED && columns > 0; b++, columns -= MK_BF16_BLOCK) {
        const long width = columns < MK_BF16_BLOCK ? columns : MK_BF16_BLOCK, steps = mk_blocks(width, 32);
        decode_block(w, steps, decoded);
        for (int r = 0; r < MK_TILE; r++) transpose_block(decoded + r * steps * 64, width, out[0][b] + 64 * r);
        w += mk_coded_bytes(width);
    }
}

#define FOUR_TILES(instruction)                                                                     \
    __asm__ volatile(instruction("0", "0") instruction("1", "1024") instruction("2", "2048")        \
                     instruction("3", "3072")::"r"(sums), "r"(64l) : "memory")
#define ZERO_TILE(c, at) "tilezero %%tmm" c "\n\t"
#define LOAD_TILE(c, at) "tileloadd " at "(%0,%1,1), %%tmm" c "\n\t"
#define STORE_TILE(c, at) "tilestored %%tmm" c ", " at "(%0,%1,1)\n\t"

/* Add the products of `count` blocks to the sums of one pair of lanes.  begin: the sums are zero before.  Registers tmm4 and tmm5
 * have rows of W, tmm6 and tmm7 rows of x. */
static void add_pairs(const uint8_t *w0, const uint8_t *w1, const uint8_t *x0, const uint8_t *x1, long count, int begin,
                      pair_sums sums) {
    if (begin) FOUR_TILES(ZERO_TILE);
    else FOUR_TILES(LOAD_TILE);
    for (; count--; w0 += APART, w1 += APART, x0 += TILE_BYTES, x1 += TILE_BYTES)
        __asm__ volatile("tileloadd (%0,%4,1), %%tmm4\n\ttileloadd (%2,%4,1), %%tmm6\n\t"
                         "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\ttileloadd (%3,%4,1), %%tmm7\n\t"
                         "tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\ttileloadd (%1,%4,1), %%tmm5\n\t"
                         "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\ttdpbf16ps %%tmm7, %%tmm5, %%tmm3"
                         ::"r"(w0), "r"(w1), "r"(x0), "r"(x1), "r"(64l) : "memory");
    FOUR_TILES(STORE_TILE);
}

/* Add the sums of the 8 pairs of lanes in the tree, for 16 rows of W and `rows` rows of x; `out` gets a vector for each of
 * these. */
static void add_lanes(pair_sums *sums, int i, int g, int rows, vf *out) {
    __m512i words[MK_TILE];
    UNROLL
    for (int n = 0; n < MK_TILE; n++) {
        vf two[4];
        UNROLL
        for (int j = 0; j < 4; j++) two[j] = vf_add(vf_load(sums[j][i][g][n]), vf_load(sums[j + 4][i][g][n]));
        words[n] = _mm512_castps_si512(vf_add(vf_add(two[0], two[2]), vf_add(two[1], two[3])));
    }
    transpose_16(words);
    for (int t = 0; t < rows; t++) out[t] = _mm512_castsi512_ps(words[t]);
}

/* The panel function (see float_panel) for up to WIDE tiles of W and rows of x in tiles. */
static void bf16_panel(const mk_matmul_job *job, int rows, int p, long tile, int tiles, int again, const uint8_t *x,
                           vf *sums) {
    (void)again;
    const long columns = job->bounds[p + 1] - job->bounds[p], blocks = mk_blocks(columns, MK_BF16_BLOCK);
    const long stride = job->row_bytes ? job->row_bytes : columns * 2, first = tile * MK_TILE;
    const long coded = mk_is_coded(job->type) ? mk_coded_bytes(columns) : 0;
    const int pairs = (rows + WIDE * MK_TILE - 1) / (WIDE * MK_TILE);
    const uint8_t *w = job->at[p] + (coded ? tile * coded : first * stride);
    transposed_blocks transposed[WIDE][LANE_PAIRS];
    pair_sums parts[MAX_ROWS / MK_TILE / WIDE][LANE_PAIRS];
    const unsigned mode = mk_flush_denormals();
    for (int i = blocks ? tiles * rows : 0; i < tiles * rows; i++) sums[i] = vf_set1(0.0f);
    for (long begin = 0, count; begin < blocks; begin += count) {
        count = blocks - begin < TRANSPOSED ? blocks - begin : TRANSPOSED;
        for (int i = 0; i < tiles && coded; i++)
            transpose_coded(w + i * coded + mk_coded_bytes(begin * MK_BF16_BLOCK), columns - begin * MK_BF16_BLOCK,
                            transposed[i]);
        for (int i = 0; i < tiles && !coded; i++) {
            const long left = job->n - first - i * MK_TILE;
            transpose_rows(w + i * MK_TILE * stride + begin * MK_BF16_BLOCK * 2, stride, left < MK_TILE ? (int)left : MK_TILE,
                      columns - begin * MK_BF16_BLOCK, transposed[i]);
        }
        for (int t = 0; t < LANE_PAIRS; t++)
            for (int i = 0; i < pairs; i++) {
                const uint8_t *x0 = x + i * WIDE * MK_TILE * job->x_stride + (t * blocks + begin) * TILE_BYTES;
                const uint8_t *x1 = i * WIDE * MK_TILE + MK_TILE < rows ? x0 + MK_TILE * job->x_stride : x0;
                add_pairs(*transposed[0][t], *transposed[tiles - 1][t], x0, x1, count, !begin, parts[i][t]);
            }
    }
    for (int i = 0; i < tiles && blocks; i++)
        for (int row = 0; row < rows; row += MK_TILE)
            add_lanes(parts[row / MK_TILE / WIDE], i, row / MK_TILE % WIDE, rows - row < MK_TILE ? rows - row : MK_TILE,
                      sums + i * rows + row);
    mk_restore(mode);
}

static void bf16_matmul(const mk_matmul_job *job, long begin, long end) {
    vf pending[MK_MAX_LEVELS][WIDE * MAX_ROWS];
    begin_tiles(&FULL_TILES);
    for (long item = begin, tiles; item < end; item += tiles) {
        long tile = item % job->tiles, row = item / job->tiles * job->chunk;
        long limit = row + job->chunk < job->m ? row + job->chunk : job->m;
        tiles = end - item < job->tiles - tile ? end - item : job->tiles - tile;
        if (tiles > WIDE) tiles = WIDE;
        for (int rows; row < limit; row += rows) {
            rows = limit - row < MAX_ROWS ? (int)(limit - row) : MAX_ROWS;
            product(job, bf16_panel, *pending, WIDE * MAX_ROWS, rows, tile, (int)tiles, row);
        }
    }
    end_tiles();
}
