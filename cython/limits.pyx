# cython: language_level=3, boundscheck=False, wraparound=False, embedsignature=True
"""The limits of the machine: the bandwidth of reading memory, and the rate of 8-bit multiply-adds in registers.

Only `mpillm bench` uses this. It measures the machine's best instruction set, whichever path the kernels take.
"""

from libc.stdint cimport uint8_t, uint64_t

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>

    enum { LINE = 64, STREAMS = 2, CHAINS = 12 /* products in flight: more than any latency */ };

    /* One word of each cache line, for memory gives whole lines: the fewer loads a line takes, the more lines are under
       way.  Two streams have more of them under way than one. */
    static uint64_t read_range(const uint8_t *data, long bytes) {
        uint64_t seen[STREAMS] = {0}, word;
        for (long i = 0, part = bytes / STREAMS; i + LINE <= part; i += LINE)
            for (int s = 0; s < STREAMS; s++) {
                memcpy(&word, data + s * part + i, sizeof word);
                seen[s] |= word;
            }
        return seen[0] | seen[1];
    }

    static uint64_t read_all(const uint8_t *data, long bytes, int threads) {
        uint64_t all = 0;
    #ifdef _OPENMP
    #pragma omp parallel for num_threads(threads) reduction(| : all) schedule(static)
    #endif
        for (int t = 0; t < threads; t++)
            all |= read_range(data + bytes / threads * t, bytes / threads);
        return all;
    }

    /* `rounds` times CHAINS independent products, each chain in a register of its own. The asm keeps the compiler from
       computing them beforehand. */
    #define EACH(do) do(0) do(1) do(2) do(3) do(4) do(5) do(6) do(7) do(8) do(9) do(10) do(11)
    #define BEGIN(c) sum##c = a;
    #define NEXT(c) sum##c = PRODUCT(sum##c); __asm__ volatile("" : REGISTER(sum##c));
    #define SPIN(vector, zero)                                                                          \\
        vector a = zero, b = zero, sum0, sum1, sum2, sum3, sum4, sum5, sum6, sum7, sum8, sum9, sum10, sum11; \\
        __asm__ volatile("" : REGISTER(a), REGISTER(b));                                                \\
        EACH(BEGIN)                                                                                     \\
        for (long i = 0; i < rounds; i++) { EACH(NEXT) }

    #if defined(__x86_64__)
    #include <immintrin.h>
    #define REGISTER(x) "+v"(x)
    #define PRODUCT(sum) _mm512_dpbusd_epi32(sum, a, b)
    __attribute__((target("avx512f,avx512vnni"))) static void spin_zmm(long rounds) {
        SPIN(__m512i, _mm512_setzero_si512())
    }
    #undef REGISTER
    #undef PRODUCT
    #define REGISTER(x) "+x"(x)
    #define PRODUCT(sum) _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, sum), b))
    __attribute__((target("avx2"))) static void spin_ymm(long rounds) { /* without VNNI: three instructions */
        SPIN(__m256i, _mm256_setzero_si256())
    }
    #elif defined(__aarch64__) && defined(__linux__)
    #include <arm_neon.h>
    #include <sys/auxv.h>
    #define REGISTER(x) "+w"(x)
    #define PRODUCT(sum) vdotq_s32(sum, (int8x16_t)a, (int8x16_t)b)
    __attribute__((target("arch=armv8.2-a+dotprod"))) static void spin_dot(long rounds) {
        SPIN(int32x4_t, vdupq_n_s32(0))
    }
    #endif

    /* Multiplications and additions of one product of the best instruction set; 0 if none is known here. */
    static int best(void (**spin)(long)) {
        *spin = 0;
    #if defined(__x86_64__)
        if (__builtin_cpu_supports("avx512vnni")) return *spin = spin_zmm, 128;
        if (__builtin_cpu_supports("avx2")) return *spin = spin_ymm, 64;
    #elif defined(__aarch64__) && defined(__linux__)
        if (getauxval(AT_HWCAP) & 1ul << 20) return *spin = spin_dot, 32; /* ASIMDDP */
    #endif
        return 0;
    }

    static double multiply(long rounds, int threads) {
        void (*spin)(long);
        int operations = best(&spin);
        if (!operations) return 0;
    #ifdef _OPENMP
    #pragma omp parallel for num_threads(threads) schedule(static)
    #endif
        for (int t = 0; t < threads; t++) spin(rounds);
        return (double)operations * CHAINS * (double)rounds * threads;
    }
    """
    uint64_t read_all(const uint8_t *data, long bytes, int threads) nogil
    double multiply(long rounds, int threads) nogil


def read(const uint8_t[::1] data, int threads):
    """Read all of `data` with `threads` threads; return the OR of the first words of its cache lines."""
    cdef uint64_t seen
    with nogil:
        seen = read_all(&data[0], data.shape[0], threads)
    return seen


def int8(long rounds, int threads):
    """Compute `rounds` of products in each thread; return the number of operations (0 if this CPU has no test)."""
    cdef double operations
    with nogil:
        operations = multiply(rounds, threads)
    return operations
