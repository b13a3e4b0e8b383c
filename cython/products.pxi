# Memory of one call, and products of several matrices with the same activations.

from libc.stdlib cimport free, malloc


cdef enum: LINE = 64


cdef class Space:
    """Memory of one call, handed out in pieces of whole cache lines."""

    cdef void *memory
    cdef char *at

    def __cinit__(self, size_t size):
        self.memory = malloc(size + LINE)
        if not self.memory:
            raise MemoryError(f"no {size} bytes for activations")
        self.at = <char *>self.memory + (-<size_t>self.memory) % LINE

    def __dealloc__(self):
        free(self.memory)

    cdef void *take(self, size_t size) noexcept:
        self.at += whole_lines(size)
        return self.at - whole_lines(size)

    cdef void release(self, void *piece) noexcept:
        """Give back a piece and all that was taken after it."""
        self.at = <char *>piece


cdef size_t whole_lines(size_t size) noexcept:
    return (size + LINE - 1) // LINE * LINE


cdef size_t floats(long count) noexcept:
    """Bytes that a Space needs for so many floats."""
    return whole_lines(4 * count)


cdef void begin(mk_work *work, Space space, long steps) noexcept:
    """Begin a work of at most so many steps, which lie in the space."""
    mk_begin_in(work, <mk_step *>space.take(steps * sizeof(mk_step)), steps)


cdef size_t step_bytes(long steps) noexcept:
    """Bytes that a Space needs for them."""
    return whole_lines(steps * sizeof(mk_step))


cdef list pieces_of(matrix):
    """The products that make up a matrix: one, or several one under the other."""
    cdef Product product
    if matrix.parts and len(matrix.parts[0].bounds) == len(matrix.bounds):
        return [piece for part in matrix.parts for piece in pieces_of(part)]
    product = Product(matrix.type, matrix.n, matrix.k, matrix.bounds, matrix.row_bytes)
    first = 0
    for part in matrix.parts or (matrix,):
        product.put(first, <int>len(part.bounds) - 1, part.data)
        first += len(part.bounds) - 1
    return [product]


cdef struct Taken:  # activations in the forms that products take
    const void *rows[FORMS]


cdef class Products:
    """Products of the same activations [m, k]: each form of these is made once, and the products run side by side."""

    cdef list matrices  # pieces of each
    cdef tuple widths
    cdef Product first
    cdef list takers  # for each form the first piece that takes it, or None
    cdef long steps   # at most

    def __init__(self, *matrices):
        cdef Product piece
        self.matrices = [pieces_of(matrix) for matrix in matrices]
        self.widths = tuple([matrix.n for matrix in matrices])
        self.first, self.takers = self.matrices[0][0], [None] * FORMS
        if sum([len(pieces) for pieces in self.matrices]) > MK_MAX_PRODUCTS:
            raise ValueError(f"no more than {MK_MAX_PRODUCTS} pieces of matrices run side by side")
        for pieces in self.matrices:
            for piece in pieces:
                if list(piece.edges) != list(self.first.edges):
                    raise ValueError("matrices of the same activations must cut their columns alike")
                self.takers[piece.form()] = self.takers[piece.form()] or piece
        self.steps = FORMS + sum([len(pieces) for pieces in self.matrices])

    cdef size_t space(self, long m) noexcept:
        """Bytes of the activations as products take them."""
        cdef Product piece
        cdef size_t size = 0
        for taker in self.takers:
            if taker is not None:
                piece = taker
                size += piece.taken(m)
        return size

    cdef Taken take(self, mk_work *work, Space space, const float *x, long stride, const int32_t *at, long m) noexcept:
        """Rows `at` of x (NULL: the first m) in all forms that products take. What follows is joined."""
        cdef Taken taken
        cdef Product piece
        for i in range(FORMS):
            if self.takers[i] is not None:
                piece = self.takers[i]
                taken.rows[i] = piece.take(work, space, x, stride, at, m)
        return taken

    cdef int multiply(self, mk_work *work, Taken taken, long m, Sums *sums) except -1:
        """sums[i] = what was taken times matrix i; what follows is joined."""
        cdef Product piece
        cdef long column
        cdef Py_ssize_t i
        for i in range(len(self.matrices)):
            column = 0
            for piece in <list>self.matrices[i]:
                piece.add(work, taken.rows[piece.form()], m, sums[i].to + column, sums[i].stride, sums[i].panel_stride)
                column += piece.n
        return 0

    cdef int add(self, mk_work *work, Space space, const float *x, long stride, long m, Sums *sums) except -1:
        """sums[i] = x times matrix i."""
        cdef Taken taken = self.take(work, space, x, stride, NULL, m)
        mk_join(work, 0)
        self.multiply(work, taken, m, sums)
        mk_join(work, 0)
        return 0

    def __call__(self, const float[:, ::1] x, outs, int threads=1):
        cdef long m = x.shape[0]
        cdef Sums sums[MK_MAX_PRODUCTS]
        cdef Space space = Space(self.space(m) + step_bytes(self.steps))
        cdef mk_work work
        require_rows("x", x, -1, self.first.k)
        for i, out in enumerate(outs):
            sums[i] = sums_of(out, 1, m, self.widths[i], True)
        begin(&work, space, self.steps)
        self.add(&work, space, &x[0, 0], self.first.k, m, sums)
        finish(&work, threads)
