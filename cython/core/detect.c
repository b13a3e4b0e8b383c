/* Detects the paths that this machine can run, and selects one. */
#define _DEFAULT_SOURCE /* syscall */
#include <string.h>

#include "active.h"

#ifdef MK_X86
#include <cpuid.h>
#ifdef MK_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { XMM_YMM = 0x6, ZMM = 0xe6, TILES = 0x60000 }; /* bits of XCR0: registers that the operating system saves */

static int bit(unsigned word, int index) { return word >> index & 1; }

static unsigned saved_registers(void) {
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    (void)high;
    return low;
}

/* Linux saves tile registers only for a process that asks for it; returns 0 if it is refused. */
static int may_have_tiles(void) {
#ifdef MK_AMX
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 };
    return !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA);
#else
    return 0;
#endif
}

static int is_amd(void) {
    unsigned a, b, c, d;
    return __get_cpuid(0, &a, &b, &c, &d) && c == 0x444d4163; /* AuthenticAMD */
}

int mk_is_zen4;

/* Returns the features of this machine that paths need. */
static unsigned look(void) {
    unsigned a, b, c, d, c1, b7 = 0, c7 = 0, d7 = 0, a71 = 0, found = MK_HAS_SCALAR;
    if (!__get_cpuid(1, &a, &b, &c1, &d) || !bit(c1, 27)) return found; /* OSXSAVE */
    unsigned xcr0 = saved_registers();
    if ((xcr0 & XMM_YMM) != XMM_YMM || !bit(c1, 28)) return found;
    found |= MK_HAS_AVX;
    const unsigned family = (a >> 8 & 0xf) + (a >> 20 & 0xff);
    if (__get_cpuid_count(7, 0, &a, &b7, &c7, &d7) && a >= 1) __get_cpuid_count(7, 1, &a71, &b, &c, &d);
    mk_is_zen4 = is_amd() && family == 25 && bit(b7, 16); /* the Zen 3 of this family have no AVX-512 */
    if (!(bit(b7, 5) && bit(c1, 12) && bit(c1, 29))) return found; /* AVX2, FMA, F16C */
    found |= MK_HAS_AVX2;
    if (bit(a71, 4)) found |= MK_HAS_AVX_VNNI;
    if ((xcr0 & ZMM) != ZMM || !(bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31))) return found;
    found |= MK_HAS_AVX512; /* F, DQ, BW, VL */
    if (!bit(c7, 11)) return found; /* VNNI */
    found |= MK_HAS_AVX512_VNNI;
    if (bit(a71, 5) && mk_pairs_are_chains()) found |= bit(d7, 22) /* AMX-BF16 */ ? MK_HAS_SLOW_BF16 : MK_HAS_FAST_BF16;
    if ((xcr0 & TILES) == TILES && bit(d7, 22) && bit(d7, 24) && bit(d7, 25) && may_have_tiles())
        found |= MK_HAS_AMX; /* BF16, tiles, int8 */
    return found;
}

static unsigned detect(void) {
    static unsigned found;
    if (!found) found = look();
    return found;
}

int mk_f16_is_free(void) {
    static int known, is_free;
    if (!known) is_free = is_amd(), known = 1;
    return is_free;
}
#elif defined(MK_ARM)
#ifdef __APPLE__
#include <sys/sysctl.h>

static unsigned detect(void) { /* all that run Python have dotprod */
    int i8mm = 0;
    size_t bytes = sizeof i8mm;
    if (sysctlbyname("hw.optional.arm.FEAT_I8MM", &i8mm, &bytes, NULL, 0)) i8mm = 0;
    return MK_HAS_SCALAR | MK_HAS_NEON | MK_HAS_DOTPROD | (i8mm ? MK_HAS_I8MM : 0);
}
#else
#include <sys/auxv.h>

static unsigned detect(void) {
    const int dotprod = getauxval(AT_HWCAP) & 1ul << 20 /* ASIMDDP */ ? 1 : 0;
    const int i8mm = dotprod && getauxval(AT_HWCAP2) & 1ul << 13 /* I8MM */;
    return MK_HAS_SCALAR | MK_HAS_NEON | (dotprod ? MK_HAS_DOTPROD : 0) | (i8mm ? MK_HAS_I8MM : 0);
}
#endif
#else
static unsigned detect(void) { return MK_HAS_SCALAR; }
#endif

#ifndef MK_X86
int mk_f16_is_free(void) { return 0; }
#endif

static const struct {
    const mk_path *path;
    unsigned needs;
} PATHS[] = {
#define ROW(name, needs) {&mk_##name, needs},
    MK_PATHS(ROW)
#undef ROW
};

enum { COUNT = sizeof PATHS / sizeof *PATHS };

const mk_path *mk_active = &mk_scalar;

/* The index-th path that this machine has. */
static const mk_path *usable(int index) {
    unsigned found = detect();
    for (int i = 0; i < COUNT; i++)
        if (found & PATHS[i].needs && index-- == 0) return PATHS[i].path;
    return NULL;
}

int mk_path_count(void) {
    int count = 0;
    while (usable(count)) count++;
    return count;
}

const char *mk_path_name(int index) {
    const mk_path *path = usable(index);
    return path ? path->name : NULL;
}

int mk_set_path(const char *name) {
    const mk_path *path;
    for (int i = 0; (path = usable(i)); i++)
        if (!strcmp(path->name, name)) {
            mk_active = path;
            return 0;
        }
    return -1;
}
