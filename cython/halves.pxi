# Half a layer as one piece of work for the threads.  The NumPy twin, mpillm/kernels/halves.py, says what each computes.

from libc.stdlib cimport free, malloc


cdef const float[::1] vector_of(str name, values, long n):
    cdef const float[::1] vector = values
    require_vector(name, n, vector.shape[0])
    return vector


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


cdef size_t whole_lines(size_t size) noexcept:
    return (size + LINE - 1) // LINE * LINE


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

    def __init__(self, *matrices):
        cdef Product piece
        self.matrices = [pieces_of(matrix) for matrix in matrices]
        self.widths = tuple([matrix.n for matrix in matrices])
        self.first, self.takers = self.matrices[0][0], [None] * FORMS
        if sum([len(pieces) for pieces in self.matrices]) > MK_MOST_PRODUCTS:
            raise ValueError(f"no more than {MK_MOST_PRODUCTS} pieces of matrices run side by side")
        for pieces in self.matrices:
            for piece in pieces:
                if list(piece.edges) != list(self.first.edges):
                    raise ValueError("matrices of the same activations must cut their columns alike")
                self.takers[piece.form()] = self.takers[piece.form()] or piece

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
        cdef Sums sums[MK_MOST_PRODUCTS]
        cdef Space space = Space(self.space(m))
        cdef mk_work work
        require_rows("x", x, -1, self.first.k)
        for i, out in enumerate(outs):
            sums[i] = sums_of(out, 1, m, self.widths[i], True)
        mk_begin(&work)
        self.add(&work, space, &x[0, 0], self.first.k, m, sums)
        finish(&work, threads)


cdef struct Rows:
    long m
    const float *cos
    const float *sin
    const int32_t *block
    const int32_t *offset
    const int32_t *pos
    const int32_t *table
    const int32_t *table_start


cdef Rows rows_of(const float[:, ::1] cos, const float[:, ::1] sin, const int32_t[::1] block,
                  const int32_t[::1] offset, const int32_t[::1] pos, const int32_t[::1] table,
                  const int32_t[::1] table_start, long m, long hd, int window, Py_ssize_t blocks) except *:
    """Where the rows of a step belong, checked; the caller keeps the arrays."""
    require("cos", (m, hd // 2), (cos.shape[0], cos.shape[1]))
    require("sin", (m, hd // 2), (sin.shape[0], sin.shape[1]))
    require("block, offset, pos and table_start", (m, m, m, m),
            (block.shape[0], offset.shape[0], pos.shape[0], table_start.shape[0]))
    require_range("block", block, <int>blocks)
    require_range("offset", offset, MK_KV_BLOCK)
    require_tables(pos, table, table_start, window, blocks)
    return Rows(m, &cos[0, 0], &sin[0, 0], &block[0], &offset[0], &pos[0], &table[0], &table_start[0])


cdef class AttentionHalf:
    cdef Products qkv, o
    cdef const float[::1] norm, q_norm, k_norm, q_bias, k_bias, v_bias
    cdef bint biased, normed
    cdef const int32_t[::1] kv_of_head
    cdef int heads, kvh, hd, window
    cdef float eps, scale

    def __init__(self, norm, float eps, q, k, v, o, const int32_t[::1] kv_of_head, int kvh, int hd, float scale,
                 int window, biases=None, qk_norms=None):
        self.qkv, self.o = Products(q, k, v), Products(o)
        self.heads, self.kvh, self.hd = <int>kv_of_head.shape[0], kvh, hd
        self.eps, self.scale, self.window, self.kv_of_head = eps, scale, window, kv_of_head
        require_range("kv_of_head", kv_of_head, kvh)
        require("n of q, k, v and k of o", (self.heads * hd, kvh * hd, kvh * hd, self.heads * hd), (q.n, k.n, v.n, o.k))
        if hd % 2:
            raise ValueError(f"rope needs an even head dimension, not {hd}")
        self.norm = vector_of("norm", norm, q.k)
        self.biased, self.normed = biases is not None, qk_norms is not None
        if self.biased:
            self.q_bias = vector_of("q's bias", biases[0], q.n)
            self.k_bias = vector_of("k's bias", biases[1], k.n)
            self.v_bias = vector_of("v's bias", biases[2], v.n)
        if self.normed:
            self.q_norm = vector_of("q's norm", qk_norms[0], hd)
            self.k_norm = vector_of("k's norm", qk_norms[1], hd)

    def __call__(self, const float[:, :] x, const float[:, ::1] cos, const float[:, ::1] sin, int kv_type, kpool,
                 vpool, const int32_t[::1] block, const int32_t[::1] offset, const int32_t[::1] pos,
                 const int32_t[::1] table, const int32_t[::1] table_start, out, int threads=1):
        cdef Pools pools = pools_of(kv_type, kpool, vpool, self.kvh, self.hd)
        cdef Rows rows = rows_of(cos, sin, block, offset, pos, table, table_start, x.shape[0], self.hd, self.window,
                                 pools.blocks)
        require_rows("x", x, -1, self.norm.shape[0])
        cdef Sums sums = sums_of(out, self.o.first.panels, x.shape[0], self.o.widths[0], True)
        self.compute(&x[0, 0], x.strides[0] // 4, &rows, kv_type, &pools, &sums, NULL, threads)

    cdef int compute(self, const float *x, long stride, const Rows *rows, int kv_type, const Pools *pools, Sums *out,
                     float *add_to, int threads) except -1:
        """out = what the half makes of x, and add_to (x itself, or nothing) += it."""
        cdef long m = rows.m, d = self.norm.shape[0], hd = self.hd, wide = self.heads * hd, narrow = self.kvh * hd
        cdef Space space = Space(whole_lines(4 * m * d) + 2 * whole_lines(4 * m * wide)
                                 + 2 * whole_lines(4 * m * narrow) + self.qkv.space(m) + self.o.space(m))
        cdef float *normed = <float *>space.take(4 * m * d)
        cdef float *mixed = <float *>space.take(4 * m * wide)
        cdef float *q = <float *>space.take(4 * m * wide)
        cdef float *k = <float *>space.take(4 * m * narrow)
        cdef float *v = <float *>space.take(4 * m * narrow)
        cdef Sums *sums = [Sums(q, wide, 0), Sums(k, narrow, 0), Sums(v, narrow, 0)]
        cdef mk_work work
        mk_begin(&work)
        mk_rms_norm(&work, x, stride, &self.norm[0], self.eps, m, d, normed, d)
        self.qkv.add(&work, space, normed, d, m, sums)
        if self.biased:
            mk_add_rows(&work, q, wide, &self.q_bias[0], 0, m, wide)
            mk_join(&work, 1)
            mk_add_rows(&work, k, narrow, &self.k_bias[0], 0, m, narrow)
            mk_add_rows(&work, v, narrow, &self.v_bias[0], 0, m, narrow)
            mk_join(&work, 0)
        if self.normed:
            mk_rms_norm(&work, q, hd, &self.q_norm[0], self.eps, m * self.heads, hd, q, hd)
            mk_join(&work, 1)
            mk_rms_norm(&work, k, hd, &self.k_norm[0], self.eps, m * self.kvh, hd, k, hd)
            mk_join(&work, 0)
        mk_rope(&work, q, wide, rows.cos, rows.sin, m, self.heads, self.hd)
        mk_join(&work, m > 1)  # one row is done before another thread knows of it
        mk_rope(&work, k, narrow, rows.cos, rows.sin, m, self.kvh, self.hd)
        mk_join(&work, 0)
        mk_kv_store(&work, kv_type, k, narrow, v, narrow, rows.block, rows.offset, m, pools.keys, pools.values,
                    self.kvh, self.hd)
        mk_attention(&work, kv_type, q, wide, mixed, wide, pools.keys, pools.values, rows.pos, rows.table,
                     rows.table_start, &self.kv_of_head[0], m, self.heads, self.kvh, self.hd, self.scale, self.window)
        self.o.add(&work, space, mixed, wide, m, out)
        if add_to:
            mk_add_rows(&work, add_to, stride, out.to, out.stride, m, d)
        return finish(&work, threads)


cdef class FeedForwardHalf:
    cdef Products gate_up, down
    cdef const float[::1] norm, gate_bias, up_bias
    cdef bint normed, biased
    cdef float eps

    def __init__(self, norm, float eps, gate, up, down, biases=None):
        self.gate_up, self.down, self.eps = Products(gate, up), Products(down), eps
        require("n of gate and up", (down.k, down.k), (gate.n, up.n))
        self.normed, self.biased = norm is not None, biases is not None
        if self.normed:
            self.norm = vector_of("norm", norm, gate.k)
        if self.biased:
            self.gate_bias = vector_of("gate's bias", biases[0], gate.n)
            self.up_bias = vector_of("up's bias", biases[1], up.n)

    def __call__(self, const float[:, :] x, out, int threads=1, bint fold=True):
        require_rows("x", x, -1, self.gate_up.first.k)
        cdef Sums sums = sums_of(out, self.down.first.panels, x.shape[0], self.down.widths[0], fold)
        self.compute(&x[0, 0], x.strides[0] // 4, x.shape[0], &sums, NULL, threads)

    cdef int compute(self, const float *x, long stride, long m, Sums *out, float *add_to, int threads) except -1:
        """out = what the half makes of x, and add_to (x itself, or nothing) += it."""
        cdef Space space = Space(self.space(m))
        cdef mk_work work
        mk_begin(&work)
        self.add(&work, space, x, stride, m, out)
        if add_to:
            mk_add_rows(&work, add_to, stride, out.to, out.stride, m, self.gate_up.first.k)
        return finish(&work, threads)

    cdef size_t space(self, long m) noexcept:
        return ((whole_lines(4 * m * self.gate_up.first.k) if self.normed else 0)
                + 2 * whole_lines(4 * m * self.down.first.k) + self.gate_up.space(m) + self.down.space(m))

    cdef int add(self, mk_work *work, Space space, const float *x, long stride, long m, Sums *out) except -1:
        """out = what the half makes of x."""
        cdef long d = self.gate_up.first.k, width = self.down.first.k, rows_stride = stride
        cdef const float *rows = x
        cdef float *normed
        cdef float *gate = <float *>space.take(4 * m * width)
        cdef float *up = <float *>space.take(4 * m * width)
        cdef Sums *sums = [Sums(gate, width, 0), Sums(up, width, 0)]
        if self.normed:
            normed = <float *>space.take(4 * m * d)
            mk_rms_norm(work, x, stride, &self.norm[0], self.eps, m, d, normed, d)
            rows, rows_stride = normed, d
        self.gate_up.add(work, space, rows, rows_stride, m, sums)
        if self.biased:
            mk_add_rows(work, gate, width, &self.gate_bias[0], 0, m, width)
            mk_join(work, 1)
            mk_add_rows(work, up, width, &self.up_bias[0], 0, m, width)
            mk_join(work, 0)
        mk_silu_mul(work, gate, width, up, width, m, width, gate, width)
        return self.down.add(work, space, gate, width, m, out)


cdef class Expert:
    cdef Products gate_up, down
    cdef tuple sizes
    cdef long steps  # at most

    def __init__(self, gate, up, down):
        self.gate_up, self.down = Products(gate, up), Products(down)
        require("n of gate and up", (down.k, down.k), (gate.n, up.n))
        if len(self.down.matrices[0]) > 1:
            raise ValueError("an expert's down may lie in column panels, but not in rows")
        self.sizes = (gate.k, down.k, down.n, self.down.first.panels)
        self.steps = 2 * FORMS + len(self.gate_up.matrices[0]) + len(self.gate_up.matrices[1])

    cdef size_t space(self, long m) noexcept:
        return self.gate_up.space(m) + self.down.space(m)


cdef enum:
    MIXED_ROWS = 512  # of all experts at once, unless one alone has more: their activations take room


cdef class Mixture:
    cdef list experts
    cdef Expert first

    def __init__(self, experts):
        cdef Expert expert
        self.experts = list(experts)
        self.first = self.experts[0]
        for expert in self.experts:
            if expert.sizes != self.first.sizes:
                raise ValueError(f"experts of one mixture are alike, not {self.first.sizes} and {expert.sizes}")

    def __call__(self, const float[:, ::1] h, const int32_t[::1] at, const int32_t[::1] starts,
                 const float[::1] weights, float[:, :, ::1] panels, int threads=1):
        cdef Py_ssize_t first = 0, last, count = len(self.experts), i
        require_rows("h", h, -1, self.first.gate_up.first.k)
        require_range("at", at, <int>h.shape[0])
        require_vector("weights", at.shape[0], weights.shape[0])
        require("panels", (self.first.down.first.panels, h.shape[0], self.first.down.widths[0]),
                (panels.shape[0], panels.shape[1], panels.shape[2]))
        require_vector("starts", count + 1, starts.shape[0])
        for i in range(count):
            if starts[0] or starts[count] != at.shape[0] or starts[i + 1] <= starts[i]:
                raise ValueError(f"starts must rise from 0 to {at.shape[0]}: {list(starts)}")
        while first < count:
            last = first + 1
            while last < count and starts[last + 1] - starts[first] <= MIXED_ROWS:
                last += 1
            self.mix(first, last, h, &at[0], &starts[0], &weights[0], panels, threads)
            first = last

    cdef int mix(self, Py_ssize_t first, Py_ssize_t last, const float[:, ::1] h, const int32_t *at,
                 const int32_t *starts, const float *weights, float[:, :, ::1] panels, int threads) except -1:
        """Experts first .. last - 1, in one piece of work."""
        cdef long k = h.shape[1], width = self.first.down.first.k, d = panels.shape[2], m = starts[last] - starts[first]
        cdef long count = last - first, steps = 2, row
        cdef size_t size = 2 * whole_lines(4 * m * width)
        cdef Expert expert
        cdef Py_ssize_t i
        for i in range(first, last):
            expert = self.experts[i]
            steps += expert.steps
            size += expert.space(starts[i + 1] - starts[i])
        cdef Space space = Space(size + whole_lines(steps * sizeof(mk_step)) + whole_lines(count * sizeof(Taken))
                                 + whole_lines(count * sizeof(mk_product)))
        cdef mk_step *room = <mk_step *>space.take(steps * sizeof(mk_step))
        cdef Taken *taken = <Taken *>space.take(count * sizeof(Taken))
        cdef mk_product *products = <mk_product *>space.take(count * sizeof(mk_product))
        cdef float *gate = <float *>space.take(4 * m * width)
        cdef float *up = <float *>space.take(4 * m * width)
        cdef Sums *sums = [Sums(gate, width, 0), Sums(up, width, 0)]
        cdef mk_work work
        mk_begin_in(&work, room, steps)
        for i in range(first, last):
            expert = self.experts[i]
            taken[i - first] = expert.gate_up.take(&work, space, &h[0, 0], k, at + starts[i], starts[i + 1] - starts[i])
        mk_join(&work, 0)
        for i in range(first, last):
            expert, row = self.experts[i], starts[i] - starts[first]
            sums[0].to, sums[1].to = gate + row * width, up + row * width
            expert.gate_up.multiply(&work, taken[i - first], starts[i + 1] - starts[i], sums)
        mk_join(&work, 0)
        mk_silu_mul(&work, gate, width, up, width, m, width, gate, width)
        for i in range(first, last):
            expert, row = self.experts[i], starts[i] - starts[first]
            taken[i - first] = expert.down.take(&work, space, gate + row * width, width, NULL,
                                                starts[i + 1] - starts[i])
            expert.down.first.weigh(&work, &products[i - first],
                                    taken[i - first].rows[expert.down.first.form()],
                                    starts[i + 1] - starts[i], &panels[0, 0, 0], d, h.shape[0] * d, at + starts[i],
                                    weights + starts[i])
        mk_join(&work, 0)
        mk_mixture(&work, products, count)
        return finish(&work, threads)


cdef class Layers:
    cdef list attention, feed_forward, pools
    cdef int kv_type

    def __init__(self, halves, int kv_type, pools):
        self.attention, self.feed_forward = map(list, zip(*halves))
        self.kv_type, self.pools = kv_type, list(pools)
        if len(self.pools) != len(self.attention):
            raise ValueError(f"{len(self.attention)} layers have as many pools, not {len(self.pools)}")

    def __call__(self, float[:, ::1] x, const float[:, ::1] cos, const float[:, ::1] sin, const int32_t[::1] block,
                 const int32_t[::1] offset, const int32_t[::1] pos, const int32_t[::1] table,
                 const int32_t[::1] table_start, between, int threads=1):
        cdef AttentionHalf attention = self.attention[0]
        cdef FeedForwardHalf feed_forward
        cdef long m = x.shape[0], d = attention.norm.shape[0]
        cdef Pools pools = pools_of(self.kv_type, self.pools[0][0], self.pools[0][1], attention.kvh, attention.hd)
        cdef Rows rows = rows_of(cos, sin, block, offset, pos, table, table_start, m, attention.hd, 0, pools.blocks)
        cdef Space space = Space(4 * m * d)
        cdef Sums sums = Sums(<float *>space.take(4 * m * d), d, 0)
        require_rows("x", x, -1, d)
        for i in range(len(self.pools)):
            between()
            attention, feed_forward = self.attention[i], self.feed_forward[i]
            pools = pools_of(self.kv_type, self.pools[i][0], self.pools[i][1], attention.kvh, attention.hd)
            attention.compute(&x[0, 0], d, &rows, self.kv_type, &pools, &sums, &x[0, 0], threads)
            feed_forward.compute(&x[0, 0], d, m, &sums, &x[0, 0], threads)
