# cython: language_level=3, boundscheck=False, wraparound=False
"""Flags in shared memory, by which processes tell each other that they have written their part of an exchange."""

from libc.stdint cimport uint32_t


cdef extern from *:
    """
    #include <limits.h>
    #include <sched.h>
    #include <stdint.h>
    #include <time.h>
    #ifdef __linux__
    #include <linux/futex.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    #endif

    #define POLLS 64  /* polls between two reads of the clock */

    #if defined(__x86_64__)
    #define RELAX() __builtin_ia32_pause()
    #elif defined(__aarch64__)
    #define RELAX() __asm__ volatile("yield")
    #else
    #define RELAX() ((void)0)
    #endif

    static int flag_reached(const uint32_t *flag, uint32_t count) {
        return (int32_t)(__atomic_load_n(flag, __ATOMIC_ACQUIRE) - count) >= 0;
    }

    static double flag_seconds(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
    }

    /* Everything that was written before becomes visible to whoever sees the new count.  flag[1] counts who sleeps; it
     * is read after the count was written, and a sleeper reads the count after it has counted itself, in one order. */
    static void flag_raise(uint32_t *flag) {
        __atomic_add_fetch(flag, 1, __ATOMIC_SEQ_CST);
    #ifdef __linux__
        if (__atomic_load_n(flag + 1, __ATOMIC_SEQ_CST)) syscall(SYS_futex, flag, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    #endif
    }

    /* Polls for `spin` seconds, then sleeps for up to `sleep` seconds, until the flag has reached the count. */
    static int flag_wait(uint32_t *flag, uint32_t count, double spin, double sleep) {
        const double start = flag_seconds();
        do {
            for (int i = 0; i < POLLS; i++) {
                if (flag_reached(flag, count)) return 1;
                RELAX();
            }
            sched_yield();
        } while (flag_seconds() - start < spin);
        if (sleep <= 0) return flag_reached(flag, count);
        const struct timespec most = {(time_t)sleep, (long)(1e9 * (sleep - (double)(time_t)sleep))};
    #ifdef __linux__
        __atomic_add_fetch(flag + 1, 1, __ATOMIC_SEQ_CST);
        const uint32_t seen = __atomic_load_n(flag, __ATOMIC_SEQ_CST);
        if ((int32_t)(seen - count) < 0) syscall(SYS_futex, flag, FUTEX_WAIT, seen, &most, NULL, 0);
        __atomic_sub_fetch(flag + 1, 1, __ATOMIC_SEQ_CST);
    #else
        nanosleep(&most, NULL);
    #endif
        return flag_reached(flag, count);
    }
    """
    void flag_raise(uint32_t *flag) nogil
    int flag_wait(uint32_t *flag, uint32_t count, double spin, double sleep) nogil


cdef class Flags:
    """A flag for each process, in its own cache line: its count, the number of sleeping waiters, and two sizes.

    Each process raises its own flag for each exchange, and then waits until the others have the same count.
    """

    cdef uint32_t[:, ::1] words
    cdef int own

    def __init__(self, uint32_t[:, ::1] words, int own):
        """`words`, uint32 [processes, 16] in shared memory, must be zero at first."""
        if words.shape[1] != 16 or not 0 <= own < words.shape[0]:
            raise ValueError(f"flags are 16 words each, and there must be one of number {own}")
        self.words, self.own = words, own

    def raised(self, uint32_t nbytes):
        """Raise this process's flag: it has written `nbytes` bytes for this exchange."""
        cdef uint32_t count = self.words[self.own, 0] + 1
        self.words[self.own, 2 + (count & 1)] = nbytes
        flag_raise(&self.words[self.own, 0])

    def wait(self, double spin, double sleep):
        """Wait for all other flags, each for at most `seconds`; return whether all have been raised."""
        cdef uint32_t count = self.words[self.own, 0]
        cdef int other, reached = 1
        with nogil:
            for other in range(<int>self.words.shape[0]):
                if not flag_wait(&self.words[other, 0], count, spin, sleep):
                    reached = 0
                    break
        return reached != 0

    def unlike(self):
        """After `wait`: return a process that wrote a different number of bytes, and that number; else None."""
        cdef uint32_t size = self.words[self.own, 0] & 1
        cdef uint32_t expected = self.words[self.own, 2 + size]
        cdef int other
        for other in range(<int>self.words.shape[0]):
            if self.words[other, 2 + size] != expected:
                return other, self.words[other, 2 + size]
        return None
