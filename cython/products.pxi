# Products of a matrix with activations, and of several matrices with the same activations.


cdef class Product:
    """A matrix [n, k], checked once; its panels may lie apart, and rows `row_bytes`, as in a file (0: packed)."""

    cdef list data
    cdef const uint8_t *at[MK_MAX_PANELS]
    cdef const int32_t[::1] edges
    cdef int type, panels
    cdef long n, k, row_bytes, x_bytes

    def __init__(self, int type, long n, long k, bounds, long row_bytes=0):
        require_type(type)
        self.edges = check_bounds(bounds, k, mk_block(type))
        self.type, self.n, self.k, self.row_bytes, self.data = type, n, k, row_bytes, []
        self.panels = <int>self.edges.shape[0] - 1
        if self.quantised():
            self.x_bytes = activation_bytes(type, self.edges)
            require_exact(type, self.edges)
        else:
            self.x_bytes = mk_float_bytes(type, &self.edges[0], self.panels)
        cdef bint fits = packed_bytes(type, MK_TILE, self.edges) <= MK_STORED_TILE if self.quantised() \
            else mk_is_float(type) and mk_block(type) == 1
        if row_bytes and (not fits or row_bytes < mk_row_bytes(type, k)):
            raise ValueError(f"rows of {k} values of block type {type} cannot lie {row_bytes} bytes apart")

    cdef int put(self, int first, int count, const uint8_t[::1] w) except -1:
        """Panels first .. first + count - 1 lie in w, one after the other."""
        cdef const int32_t *edges = &self.edges[first]
        require_vector("w", mk_panels(self.type, NULL, self.n, self.row_bytes, edges, count, &self.at[first]),
                       w.shape[0])
        mk_panels(self.type, &w[0], self.n, self.row_bytes, edges, count, &self.at[first])
        self.data.append(w)
        return 0

    cdef size_t taken(self, long m) noexcept:
        """Bytes of m rows of x in the product's form, at most."""
        return whole_lines((m if self.quantised() else mk_blocks(m, MK_TILE) * MK_TILE) * self.x_bytes)

    cdef int quantised(self) noexcept:
        return mk_is_quantised(self.type)

    cdef int form(self) noexcept:
        """Which of the forms of activations it takes (`Forms`)."""
        if self.quantised():
            return 3 if mk_is_panel(self.type) else 0
        return 2 if mk_is_bf16(self.type) else 1

    cdef void add(self, mk_work *work, const void *x, long m, float *out, long out_stride, long panel_stride) noexcept:
        """x: activations of its form, in groups. What follows is joined."""
        if m and self.n:
            mk_matmul(work, self.type, self.at, self.n, self.row_bytes, &self.edges[0], self.panels, x, self.x_bytes, m,
                      out, out_stride, panel_stride)
            mk_join(work, 1)

    cdef void weigh(self, mk_work *work, mk_product *to, const void *x, long m, float *out, long out_stride,
                    long panel_stride, const int32_t *rows, const float *weights, const float *bias) noexcept:
        """The same as a product of a mixture."""
        mk_weigh(work, to, self.type, self.at, self.n, self.row_bytes, &self.edges[0], self.panels, x, self.x_bytes, m,
                 out, out_stride, panel_stride, rows, weights, bias)

    cdef const void *take(self, mk_work *work, Space space, const float *x, long stride, const int32_t *at, long m
                          ) noexcept:
        """Rows `at` of x (NULL: the first m) in its form, in a piece of the space. What follows is joined."""
        cdef uint8_t *rows = <uint8_t *>space.take(self.taken(m))
        if self.quantised():
            mk_quantize_rows(work, self.type, x, stride, at, m, &self.edges[0], self.panels, rows, self.x_bytes)
        else:
            mk_float_rows(work, self.type, x, stride, at, m, &self.edges[0], self.panels, rows, self.x_bytes)
        mk_join(work, 1)
        return rows


cdef enum: FORMS = 4  # of activations: in blocks, floats, rounded to BF16, in whole panels


def matmul(int type, const uint8_t[::1] w, long n, long k, bounds, x, out, int threads=1, bint fold=True,
           long row_bytes=0):
    cdef Product product = Product(type, n, k, bounds, row_bytes)
    cdef const uint8_t[:, ::1] blocks
    cdef const float[:, :] rows
    cdef Space space
    cdef mk_work work
    cdef const void *from_
    cdef long m
    product.put(0, product.panels, w)
    mk_begin(&work)
    if product.quantised():
        blocks = x
        m, from_ = blocks.shape[0], &blocks[0, 0]
        require("x", (m, product.x_bytes), (m, blocks.shape[1]))
    else:
        rows = x
        require_rows("x", rows, -1, k)
        m = rows.shape[0]
        space = Space(product.taken(m))
        from_ = product.take(&work, space, &rows[0, 0], rows.strides[0] // 4, NULL, m)
    mk_join(&work, 0)
    cdef Sums sums = sums_of(out, product.panels, m, n, fold)
    product.add(&work, from_, m, sums.to, sums.stride, sums.panel_stride)
    finish(&work, threads)


cdef struct Sums:
    float *to
    long stride, panel_stride


cdef Sums sums_of(out, int panels, long m, long n, bint fold) except *:
    """Where a product goes: out [m, n] if its panels are folded, else [panels, m, n]; the caller keeps the array."""
    cdef float[:, :] folded
    cdef float[:, :, ::1] parts
    if fold:
        folded = out
        require_rows("out", folded, m, n)
        return Sums(&folded[0, 0], folded.strides[0] // 4, 0)
    parts = out
    require("out", (panels, m, n), (parts.shape[0], parts.shape[1], parts.shape[2]))
    return Sums(&parts[0, 0, 0], n, m * n)


def fold(const float[:, :, ::1] parts, float[:, :] out, int threads=1):
    cdef int count = <int>parts.shape[0]
    if count < 1 or count & (count - 1) or count > 64:
        raise ValueError("parts must be [P, m, d] with P a power of two up to 64, "
                         f"not {(count, parts.shape[1], parts.shape[2])}")
    require_rows("out", out, parts.shape[1], parts.shape[2])
    cdef mk_work work
    mk_begin(&work)
    mk_fold(&work, &parts[0, 0, 0], count, parts.shape[1], parts.shape[2], &out[0, 0], out.strides[0] // 4)
    finish(&work, threads)


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
        cdef Product piece, taker
        self.matrices = [pieces_of(matrix) for matrix in matrices]
        self.widths = tuple([matrix.n for matrix in matrices])
        self.first, self.takers = self.matrices[0][0], [None] * FORMS
        if sum([len(pieces) for pieces in self.matrices]) > MK_MAX_PRODUCTS:
            raise ValueError(f"no more than {MK_MAX_PRODUCTS} pieces of matrices run side by side")
        for pieces in self.matrices:
            for piece in pieces:
                taker = self.takers[piece.form()] = self.takers[piece.form()] or piece
                if piece.k != self.first.k or list(piece.edges) != list(taker.edges):
                    raise ValueError("matrices of the same activations must cut their columns alike")
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
