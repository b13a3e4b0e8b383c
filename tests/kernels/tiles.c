/* The tile instructions of AMX on a processor without them, for tests: linked into the harness with
 * -Wl,--wrap=mk_set_path, it gives any x86-64 Linux with AVX-512 VNNI the path `amx`.  The compiled kernels run unchanged:
 * such a processor raises SIGILL at each tile instruction, and the handler computes what Intel's manual says.  It ends the
 * program where a processor would refuse (shapes that do not fit, a tile that is not configured). */
#define _GNU_SOURCE /* REG_RIP */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include "active.h"

int __real_mk_set_path(const char *name);
int __wrap_mk_set_path(const char *name);

#ifndef MK_AMX /* a compiler that does not know them */
int __wrap_mk_set_path(const char *name) { return __real_mk_set_path(name); }
#else
enum { TILES = 8, ROWS = 16, BYTES = 64 };

typedef union {
    uint8_t u8[ROWS][BYTES];
    int8_t i8[ROWS][BYTES];
    int32_t i32[ROWS][BYTES / 4];
    uint32_t u32[ROWS][BYTES / 4];
    float f32[ROWS][BYTES / 4];
} tile;

static struct {
    int rows, bytes; /* of a row */
    tile is;
} tiles[TILES];

/* An instruction: VEX with the opcode map 0F38, of 128 bits. */
typedef struct {
    const uint8_t *end;         /* of what has been read of it */
    int prefix, opcode;         /* prefix: 0 none, 1 66, 2 F3, 3 F2 */
    int mode, reg, rm, other;   /* ModRM, and the register in VEX itself */
    int high_index, high_base;
} instruction;

static long products;

static void report(void) { fprintf(stderr, "%ld products of tiles\n", products); }

static void need(int right, const char *why) {
    if (right) return;
    fprintf(stderr, "tiles: %s\n", why);
    _Exit(2);
}

static instruction decode(const uint8_t *at) {
    instruction i = {0};
    need(at[0] == 0xc4 && (at[1] & 0x1f) == 2 && !(at[2] & 0x84), "an instruction that is none of AMX");
    i.high_index = ~at[1] >> 6 & 1, i.high_base = ~at[1] >> 5 & 1;
    i.other = ~at[2] >> 3 & 15, i.prefix = at[2] & 3, i.opcode = at[3];
    i.mode = at[4] >> 6, i.reg = (at[4] >> 3 & 7) | (~at[1] >> 7 & 1) << 3, i.rm = at[4] & 7;
    i.end = at + 5;
    return i;
}

static long long value(const ucontext_t *context, int number) {
    static const int REGISTERS[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                    REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return context->uc_mcontext.gregs[REGISTERS[number]];
}

/* The address of a memory operand without its index, and the index times its scale, which is the stride of a tile's rows. */
static uint8_t *operand(instruction *i, const ucontext_t *context, long long *stride) {
    int base = i->rm, relative = 0;
    long long address = 0;
    int32_t displacement = 0;
    *stride = 0;
    if (i->rm == 4) {
        const int sib = *i->end++, index = (sib >> 3 & 7) | i->high_index << 3;
        base = sib & 7;
        if (index != 4) *stride = value(context, index) * (1 << (sib >> 6));
    } else if (i->rm == 5 && !i->mode) relative = 1;
    const int none = !i->mode && base == 5; /* no base register, but 32 bits */
    if (!none) address = value(context, base | i->high_base << 3);
    if (i->mode == 1) displacement = (int8_t)*i->end++;
    if (i->mode == 2 || none) memcpy(&displacement, i->end, 4), i->end += 4;
    if (relative) address = (long long)(intptr_t)i->end;
    return (uint8_t *)(intptr_t)(address + displacement);
}

static void configure(const uint8_t *from) {
    need(from[0] == 1 && !from[1], "a palette other than 1, or a start row");
    memset(tiles, 0, sizeof tiles);
    for (int t = 0; t < TILES; t++) {
        uint16_t bytes;
        memcpy(&bytes, from + 16 + 2 * t, 2);
        tiles[t].bytes = bytes, tiles[t].rows = from[48 + t];
        need(bytes <= BYTES && tiles[t].rows <= ROWS && !bytes == !tiles[t].rows, "a shape that no tile has");
    }
}

/* What is beyond the rows and bytes of a tile becomes zero. */
static void load(int t, const uint8_t *from, long long stride) {
    memset(&tiles[t].is, 0, sizeof tiles[t].is);
    for (int row = 0; row < tiles[t].rows; row++) memcpy(tiles[t].is.u8[row], from + row * stride, (size_t)tiles[t].bytes);
}

static void store(int t, uint8_t *to, long long stride) {
    for (int row = 0; row < tiles[t].rows; row++) memcpy(to + row * stride, tiles[t].is.u8[row], (size_t)tiles[t].bytes);
}

/* c += products of bytes, four at a time; modulo 2^32. */
static void multiply_bytes(tile *c, int rows, int columns, const tile *a, int a_signed, int depth, const tile *b,
                           int b_signed) {
    for (int m = 0; m < rows; m++)
        for (int k = 0; k < depth; k++)
            for (int n = 0; n < columns; n++)
                for (int j = 4 * k; j < 4 * k + 4; j++) {
                    const int x = a_signed ? a->i8[m][j] : a->u8[m][j], at = 4 * n + j % 4;
                    c->u32[m][n] += (uint32_t)(x * (b_signed ? b->i8[k][at] : b->u8[k][at]));
                }
}

static float widened(uint32_t high) { float x; memcpy(&x, &high, 4); return x; }

/* c += of pairs of BF16 the chain of the even ones plus the chain of the odd ones, each of fma from zero; denormals are
 * zeros. */
__attribute__((target("fma"))) static void multiply_pairs(tile *c, int rows, int columns, const tile *a, int depth,
                                                          const tile *b) {
    const unsigned mode = mk_flush_denormals();
    for (int m = 0; m < rows; m++) {
        float chains[2][BYTES / 4] = {{0}};
        for (int k = 0; k < depth; k++)
            for (int n = 0; n < columns; n++)
                for (int odd = 0; odd < 2; odd++) {
                    const uint32_t x = a->u32[m][k], y = b->u32[k][n], high = 0xffff0000u;
                    chains[odd][n] = __builtin_fmaf(widened(odd ? x & high : x << 16), widened(odd ? y & high : y << 16),
                                                    chains[odd][n]);
                }
        for (int n = 0; n < columns; n++) c->f32[m][n] += chains[0][n] + chains[1][n];
    }
    mk_restore(mode);
}

/* c += a times b; their numbers are all different. */
static void multiply(const instruction *i) {
    const int c = i->reg, a = i->rm, b = i->other, depth = tiles[a].bytes / 4, columns = tiles[c].bytes / 4;
    need(c < TILES && b < TILES && c != a && a != b && b != c, "tiles of a product that are not three");
    need(tiles[c].rows && tiles[c].rows == tiles[a].rows && tiles[c].bytes == tiles[b].bytes && tiles[b].rows == depth &&
         tiles[a].bytes % 4 == 0 && tiles[c].bytes % 4 == 0, "tiles of a product whose shapes do not fit");
    if (i->opcode == 0x5e) { /* F2: both signed, F3: a, 66: b */
        multiply_bytes(&tiles[c].is, tiles[c].rows, columns, &tiles[a].is, i->prefix >= 2, depth, &tiles[b].is,
                       i->prefix % 2);
    } else {
        need(i->prefix == 2, "a product other than of BF16");
        multiply_pairs(&tiles[c].is, tiles[c].rows, columns, &tiles[a].is, depth, &tiles[b].is);
    }
}

static void emulate(int signal, siginfo_t *info, void *argument) {
    ucontext_t *context = argument;
    instruction i = decode((const uint8_t *)context->uc_mcontext.gregs[REG_RIP]);
    long long stride;
    (void)signal, (void)info;
    if (i.opcode == 0x5c || i.opcode == 0x5e) {
        need(i.mode == 3, "a product with memory");
        multiply(&i);
        products++;
    } else if (i.opcode == 0x49 && i.mode == 3) {
        need(i.prefix == 0 || (i.prefix == 3 && i.reg < TILES && tiles[i.reg].rows), "an unknown instruction, or tilezero of no tile");
        if (i.prefix) memset(&tiles[i.reg].is, 0, sizeof tiles[i.reg].is);
        else memset(tiles, 0, sizeof tiles);
    } else if (i.opcode == 0x49) {
        need(!i.prefix, "an instruction that is none of AMX");
        configure(operand(&i, context, &stride));
    } else {
        need(i.opcode == 0x4b && i.prefix >= 1 && i.mode < 3 && i.rm == 4, "an instruction that is none of AMX");
        need(i.reg < TILES && tiles[i.reg].rows, "a tile that is not configured");
        uint8_t *memory = operand(&i, context, &stride);
        if (i.prefix == 2) store(i.reg, memory, stride);
        else load(i.reg, memory, stride);
    }
    context->uc_mcontext.gregs[REG_RIP] = (greg_t)(intptr_t)i.end;
}

int __wrap_mk_set_path(const char *name) {
    const struct sigaction action = {.sa_sigaction = emulate, .sa_flags = SA_SIGINFO};
    if (strcmp(name, "amx")) return __real_mk_set_path(name);
    if (__real_mk_set_path("avx512vnni") || sigaction(SIGILL, &action, NULL) || atexit(report)) return -1;
    mk_active = &mk_amx;
    return 0;
}
#endif
