/* Tiles of BF12: BF16 whose low bytes are stored unchanged, and whose high bytes (sign and upper seven bits of the exponent)
 * are coded in 4 bits.  The codes of a block stand for its 16 most frequent high bytes.  Values with other high bytes are
 * exceptions, which the block lists: up to 10.  A matrix with more exceptions in any block stays BF16.  Trained weights have
 * about one exception in 10^4, because 16 high bytes cover a range of 2^16.  (Related codes of exponents: DFloat11,
 * arXiv:2504.11651; ZipNN, arXiv:2411.05239.)
 *
 * A block has 16 rows of up to 256 columns.  Its head has 16 high bytes, the number of exceptions, an unused byte, and 10
 * times the column, row and high byte of an exception.  Then follow, for each 4 rows, steps of 32 columns: the low bytes of
 * rows 0 and 1, those of rows 2 and 3, and the codes of all four, where low nibbles belong to rows 0 and 1.  The 64 bytes
 * of two rows alternate 8 columns of the first row and 8 of the second, so that interleaving the bytes of 128-bit lanes
 * restores the rows. */
#ifndef MK_CODED_H
#define MK_CODED_H

#include <string.h>

#include "kernels.h"

enum { MK_CODED_CODES = 16, MK_CODED_COUNT = 16, MK_CODED_LIST = 18, MK_CODED_EXCEPTIONS = 10, MK_CODED_FOUR = 192 };

/* Find the most frequent high bytes of a block; of two that are equally frequent, the lower one comes first. */
static inline void mk_code_table(const uint8_t *const *in, int rows, long columns, uint8_t *table) {
    uint16_t counts[4][256] = {{0}};
    uint8_t found[256];
    int distinct = 0;
    for (int r = 0; r < rows; r++)
        for (long c = 0; c < columns; c++) counts[c & 3][in[r][2 * c + 1]]++;
    for (int byte = 0; byte < 256; byte++) {
        counts[0][byte] = (uint16_t)(counts[0][byte] + counts[1][byte] + counts[2][byte] + counts[3][byte]);
        if (counts[0][byte]) found[distinct++] = (uint8_t)byte;
    }
    for (int code = 0; code < MK_CODED_CODES; code++) {
        int best = -1;
        for (int i = 0; i < distinct; i++)
            if (counts[0][found[i]] && (best < 0 || counts[0][found[i]] > counts[0][best])) best = found[i];
        table[code] = best < 0 ? 0 : (uint8_t)best;
        if (best >= 0) counts[0][best] = 0;
    }
}

/* Store low bytes and codes of up to 32 columns of a row; returns whether all high bytes have a code. */
__attribute__((always_inline)) static inline int mk_code_step(const uint8_t *in, long columns, const uint8_t *codes, uint8_t *low, uint8_t *code) {
    uint8_t all = 0;
    for (long c = 0; c < columns; c++) {
        low[c] = in[2 * c];
        code[c] = codes[in[2 * c + 1]];
        all |= code[c];
    }
    return all < MK_CODED_CODES;
}

/* Code one block of `rows` rows; returns the number of its exceptions. */
static inline int mk_code_block(const uint8_t *const *in, int rows, long columns, uint8_t *out) {
    uint8_t codes[256];
    const long steps = mk_blocks(columns, 32);
    int exceptions = 0;
    memset(out, 0, (size_t)(MK_CODED_HEAD + steps * MK_CODED_STEP));
    mk_code_table(in, rows, columns, out);
    memset(codes, MK_CODED_CODES, sizeof codes);
    for (int code = MK_CODED_CODES - 1; code >= 0; code--) codes[out[code]] = (uint8_t)code;
    for (int r = 0; r < rows; r++)
        for (long s = 0; s < steps; s++) {
            uint8_t low[32] = {0}, code[32] = {0};
            const long first = 32 * s, width = columns - first < 32 ? columns - first : 32;
            const uint8_t *from = in[r] + 2 * first;
            const int whole = width == 32 ? mk_code_step(from, 32, codes, low, code) : mk_code_step(from, width, codes, low, code);
            for (long c = 0; c < width && !whole; c++) {
                if (code[c] < MK_CODED_CODES) continue;
                if (exceptions < MK_CODED_EXCEPTIONS) {
                    uint8_t *to = out + MK_CODED_LIST + 3 * exceptions;
                    to[0] = (uint8_t)(first + c), to[1] = (uint8_t)r, to[2] = from[2 * c + 1];
                }
                exceptions++;
                code[c] = 0;
            }
            uint8_t *four = out + MK_CODED_HEAD + (r / 4 * steps + s) * MK_CODED_FOUR + r % 2 * 8;
            for (int i = 0; i < 4; i++) {
                uint64_t eight, others;
                memcpy(four + r % 4 / 2 * 64 + 16 * i, low + 8 * i, 8);
                memcpy(&eight, code + 8 * i, 8), memcpy(&others, four + 128 + 16 * i, 8);
                eight = eight << r % 4 / 2 * 4 | others;
                memcpy(four + 128 + 16 * i, &eight, 8);
            }
        }
    out[MK_CODED_COUNT] = (uint8_t)(exceptions < MK_CODED_EXCEPTIONS ? exceptions : MK_CODED_EXCEPTIONS);
    return exceptions;
}

/* Code columns first .. first + columns - 1 of a tile's BF16 rows; returns 0 if a block has too many exceptions. */
static inline int mk_code_tile(const uint8_t *const *in, long first, int rows, long columns, uint8_t *out) {
    int fits = 1;
    for (long c = 0; c < columns; c += MK_BF16_BLOCK) {
        const uint8_t *at[MK_TILE];
        const long width = columns - c < MK_BF16_BLOCK ? columns - c : MK_BF16_BLOCK;
        for (int r = 0; r < rows; r++) at[r] = in[r] + 2 * (first + c);
        fits &= mk_code_block(at, rows, width, out) <= MK_CODED_EXCEPTIONS;
        out += mk_coded_bytes(width);
    }
    return fits;
}

#endif
