# Half a layer as one piece of work for the threads.  The NumPy twin, mpillm/kernels/halves.py, says what each computes.

from libc.stdlib cimport free, malloc


cdef const float[::1] vector_of(str name, values, long n):
    cdef const float[::1] vector = values
    require_vector(name, n, vector.shape[0])
    return vector


cdef class Space:
    """Memory of one call, handed out in pieces of whole cache lines."""

    cdef char *start
    cdef char *at

    def __cinit__(self, size_t size):
        self.start = self.at = <char *>malloc(size)
        if not self.start:
            raise MemoryError(f"no {size} bytes for activations")

    def __dealloc__(self):
        free(self.start)

    cdef void *take(self, size_t size) noexcept:
        self.at += whole_lines(size)
        return self.at - whole_lines(size)


cdef size_t whole_lines(size_t size) noexcept:
    return (size + 63) // 64 * 64


cdef list pieces_of(matrix):
    """The products that make up a matrix: one, or several one under the other."""
    cdef Product product
    if matrix.parts and len(matrix.parts[0].bounds) == len(matrix.bounds):
        return [piece for part in matrix.parts for piece in pieces_of(part)]
    product = Product(matrix.type, matrix.n, matrix.k, matrix.bounds)
    first = 0
    for part in matrix.parts or (matrix,):
        product.put(first, <int>len(part.bounds) - 1, part.data)
        first += len(part.bounds) - 1
    return [product]


cdef class Products:
    """Products of the same activations [m, k]: they are quantised once, and the products run side by side."""

    cdef list matrices  # pieces of each
    cdef tuple widths
    cdef Product first
    cdef bint quantised, floating

    def __init__(self, *matrices):
        cdef Product piece
        self.matrices = [pieces_of(matrix) for matrix in matrices]
        self.widths = tuple([matrix.n for matrix in matrices])
        self.first = self.matrices[0][0]
        self.quantised = self.floating = False
        if sum([len(pieces) for pieces in self.matrices]) > MK_MOST_PRODUCTS:
            raise ValueError(f"no more than {MK_MOST_PRODUCTS} pieces of matrices run side by side")
        for pieces in self.matrices:
            for piece in pieces:
                if piece.x_bytes != self.first.x_bytes or piece.k != self.first.k:
                    raise ValueError("matrices of the same activations must cut their columns alike")
                self.quantised |= piece.quantised()
                self.floating |= not piece.quantised()

    cdef size_t space(self, long m) noexcept:
        """Bytes of the activations as products take them."""
        return ((whole_lines(m * self.first.x_bytes) if self.quantised else 0)
                + (grouped_space(m, self.first.k) if self.floating else 0))

    cdef int add(self, mk_work *work, Space space, const float *x, long stride, long m, Sums *sums) except -1:
        """sums[i] = x times matrix i."""
        cdef uint8_t *blocks = NULL
        cdef const float *rows = NULL
        cdef Product piece
        cdef long column
        cdef Py_ssize_t i
        if self.quantised:
            blocks = <uint8_t *>space.take(m * self.first.x_bytes)
            mk_quantize_rows(work, x, stride, m, &self.first.edges[0], self.first.panels, blocks, self.first.x_bytes)
        if self.floating:
            rows = grouped(work, space, x, stride, m, self.first.k)
        for i in range(len(self.matrices)):
            column = 0
            for piece in <list>self.matrices[i]:
                piece.add(work, <const void *>blocks if piece.quantised() else <const void *>rows, m,
                          sums[i].to + column, sums[i].stride, sums[i].panel_stride)
                column += piece.n
                mk_join(work, 1)
        mk_join(work, 0)
        return 0

    cdef int add_last(self, mk_work *work, Space space, const float *x, long m, out, bint fold) except -1:
        """The only matrix times contiguous x, into the caller's array."""
        cdef Sums sums = sums_of(out, self.first.panels, m, self.widths[0], fold)
        return self.add(work, space, x, self.first.k, m, &sums)

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
        cdef long m = x.shape[0], d = x.shape[1], hd = self.hd, wide = self.heads * hd, narrow = self.kvh * hd
        cdef Pools pools = pools_of(kv_type, kpool, vpool, self.kvh, self.hd)
        require_rows("x", x, -1, self.norm.shape[0])
        require("cos", (m, hd // 2), (cos.shape[0], cos.shape[1]))
        require("sin", (m, hd // 2), (sin.shape[0], sin.shape[1]))
        require("block, offset, pos and table_start", (m, m, m, m),
                (block.shape[0], offset.shape[0], pos.shape[0], table_start.shape[0]))
        require_range("block", block, <int>pools.blocks)
        require_range("offset", offset, MK_KV_BLOCK)
        require_tables(pos, table, table_start, self.window, pools.blocks)
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
        mk_rms_norm(&work, &x[0, 0], x.strides[0] // 4, &self.norm[0], self.eps, m, d, normed, d)
        self.qkv.add(&work, space, normed, d, m, sums)
        if self.biased:
            mk_add_row(&work, q, wide, &self.q_bias[0], m, wide)
            mk_join(&work, 1)
            mk_add_row(&work, k, narrow, &self.k_bias[0], m, narrow)
            mk_add_row(&work, v, narrow, &self.v_bias[0], m, narrow)
            mk_join(&work, 0)
        if self.normed:
            mk_rms_norm(&work, q, hd, &self.q_norm[0], self.eps, m * self.heads, hd, q, hd)
            mk_join(&work, 1)
            mk_rms_norm(&work, k, hd, &self.k_norm[0], self.eps, m * self.kvh, hd, k, hd)
            mk_join(&work, 0)
        mk_rope(&work, q, wide, &cos[0, 0], &sin[0, 0], m, self.heads, self.hd)
        mk_join(&work, 1)
        mk_rope(&work, k, narrow, &cos[0, 0], &sin[0, 0], m, self.kvh, self.hd)
        mk_join(&work, 0)
        mk_kv_store(&work, kv_type, k, narrow, v, narrow, &block[0], &offset[0], m, pools.keys, pools.values, self.kvh,
                    self.hd)
        mk_attention(&work, kv_type, q, wide, mixed, wide, pools.keys, pools.values, &pos[0], &table[0],
                     &table_start[0], &self.kv_of_head[0], m, self.heads, self.kvh, self.hd, self.scale, self.window)
        self.o.add_last(&work, space, mixed, m, out, True)
        finish(&work, threads)


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
        cdef long m = x.shape[0], d = x.shape[1], width = self.down.first.k, stride = x.strides[0] // 4
        require_rows("x", x, -1, self.gate_up.first.k)
        cdef Space space = Space((whole_lines(4 * m * d) if self.normed else 0) + 2 * whole_lines(4 * m * width)
                                 + self.gate_up.space(m) + self.down.space(m))
        cdef const float *rows = &x[0, 0]
        cdef float *normed
        cdef float *gate = <float *>space.take(4 * m * width)
        cdef float *up = <float *>space.take(4 * m * width)
        cdef Sums *sums = [Sums(gate, width, 0), Sums(up, width, 0)]
        cdef mk_work work
        mk_begin(&work)
        if self.normed:
            normed = <float *>space.take(4 * m * d)
            mk_rms_norm(&work, rows, stride, &self.norm[0], self.eps, m, d, normed, d)
            rows, stride = normed, d
        self.gate_up.add(&work, space, rows, stride, m, sums)
        if self.biased:
            mk_add_row(&work, gate, width, &self.gate_bias[0], m, width)
            mk_join(&work, 1)
            mk_add_row(&work, up, width, &self.up_bias[0], m, width)
            mk_join(&work, 0)
        mk_silu_mul(&work, gate, width, up, width, m, width, gate, width)
        self.down.add_last(&work, space, gate, m, out, fold)
        finish(&work, threads)
