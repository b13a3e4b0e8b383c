# The memory and the steps of one call, and their execution.

from libc.errno cimport EAGAIN


cdef extern from "core/memory.h" nogil:
    void *mk_take_memory(size_t size)
    void mk_release_memory(void *memory)


cdef enum: LINE = 64


cdef class Space:
    """Memory of one call, handed out in pieces of whole cache lines."""

    cdef void *memory
    cdef char *at

    def __cinit__(self, size_t size):
        self.memory = mk_take_memory(size)
        if not self.memory:
            raise MemoryError(f"no {size} bytes for activations")
        self.at = <char *>self.memory

    def __dealloc__(self):
        mk_release_memory(self.memory)

    cdef void *take(self, size_t size) noexcept:
        self.at += whole_lines(size)
        return self.at - whole_lines(size)

    cdef void release(self, void *piece) noexcept:
        """Release a piece, and all pieces that were taken after it."""
        self.at = <char *>piece


cdef size_t whole_lines(size_t size) noexcept:
    return (size + LINE - 1) // LINE * LINE


cdef size_t floats(long count) noexcept:
    """Bytes that a Space needs for `count` floats."""
    return whole_lines(4 * count)


cdef void begin(mk_work *work, Space space, long steps) noexcept:
    """Begin a work of at most `steps` steps, which are stored in the space."""
    mk_begin_in(work, <mk_step *>space.take(steps * sizeof(mk_step)), steps)


cdef size_t step_bytes(long steps) noexcept:
    """Bytes that a Space needs for `steps` steps."""
    return whole_lines(steps * sizeof(mk_step))


cdef int finish(mk_work *work, int threads) except -1:
    """Run the steps that have been added, without the GIL."""
    cdef int failed
    cdef long capacity = mk_capacity(work)
    with nogil:
        failed = mk_run(work, threads)
    if failed == MK_TOO_MANY_STEPS:
        raise RuntimeError(f"the call needs more than the {capacity} steps of its list; nothing was computed")
    if failed == MK_NO_THREADS:
        raise OSError(EAGAIN, f"the kernels' {threads} threads do not start")
    if failed:
        raise MemoryError("attention")
    return 0


def first_touch(uint8_t[::1] memory, int threads=1):
    if memory.shape[0] and threads > 1:
        with nogil:
            mk_first_touch(&memory[0], memory.shape[0], threads)


def regions():
    """Return the number of parallel regions since the start of the process."""
    return mk_regions()


def weights_read():
    """Return the bytes of matrices that products have read since the start of the process."""
    return mk_weights_read()
