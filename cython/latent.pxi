# Multi-head latent attention, from hidden states to the product with o.


cdef class HeadProducts:
    """A product for each head: its part of x [m, heads * k] times its matrix [n, k]; the results are side by side."""

    cdef list pieces  # a Product for each head
    cdef long heads, n, k, steps

    def __init__(self, str name, matrices):
        cdef Product piece
        self.pieces = [Product(one.type, one.n, one.k, one.bounds, one.row_bytes) for one in matrices]
        self.heads, self.n, self.k = len(self.pieces), matrices[0].n, matrices[0].k
        self.steps = 2 * self.heads
        for piece, one in zip(self.pieces, matrices):
            require(f"n and k of {name}", (self.n, self.k), (one.n, one.k))
            piece.put(0, piece.panels, one.data)

    cdef size_t space(self, long m) noexcept:
        cdef Product piece = self.pieces[0]
        return self.heads * whole_lines(piece.taken(m))

    cdef int add(self, mk_work *work, Space space, const float *x, long stride, long x_head, long m, float *out,
                 long out_stride, long out_head) except -1:
        """At out + i * out_head: the product of the rows at x + i * x_head with head i's matrix."""
        cdef Product piece
        cdef Py_ssize_t head
        cdef list taken = []
        for head in range(self.heads):
            piece = self.pieces[head]
            taken.append(<size_t>piece.take(work, space, x + head * x_head, stride, NULL, m))
        mk_join(work, 0)
        for head in range(self.heads):
            piece = self.pieces[head]
            piece.add(work, <const void *><size_t>taken[head], m, out + head * out_head, out_stride, 0)
        mk_join(work, 0)
        return 0


cdef class LatentAttention:
    cdef Products first, q, o  # first: the products of the hidden states
    cdef HeadProducts k_b, v_b
    cdef NormStep norm, q_norm, kv_norm
    cdef Vector q_bias, kv_bias
    cdef const int32_t[::1] kv_of_head
    cdef int heads, nope, rotary, latent, hd, key, vd, window
    cdef long rank  # the rank of q; 0: q has full rank
    cdef bint interleaved
    cdef float scale
    cdef long steps  # the maximum number of steps

    def __init__(self, q, kv_a, k_b, v_b, o, float scale, *, kv_norm, q_a=None, q_norm=None, norm=None, biases=None,
                 bint interleaved=True):
        self.k_b, self.v_b, self.o = HeadProducts("k_b", k_b), HeadProducts("v_b", v_b), Products(o)
        self.heads, self.nope, self.latent, self.vd = self.k_b.heads, self.k_b.k, self.k_b.n, self.v_b.n
        self.rotary, self.key = kv_a.n - self.latent, kv_a.n
        self.hd, self.scale, self.interleaved = self.nope + self.rotary, scale, interleaved
        require("heads and k of v_b, n of q and k of o",
                (self.heads, self.latent, self.heads * self.hd, self.heads * self.vd),
                (self.v_b.heads, self.v_b.k, q.n, o.k))
        rotary_of(self.rotary, self.rotary)
        self.kv_of_head = np.zeros(self.heads, np.int32)
        self.norm = norm_of("norm", norm, (kv_a.k,))
        self.kv_norm = norm_of("kv's norm", kv_norm, (self.latent,))
        q_bias, kv_bias = biases or (None, None)
        self.kv_bias = Vector("kv_a's bias", kv_bias, kv_a.n)
        self.q, self.rank = None, 0
        if q_a is None:
            if q_norm is not None or q_bias is not None:
                raise ValueError("q without a low rank has neither a norm nor a bias")
            self.first = Products(q, kv_a)
        else:
            self.first, self.q, self.rank = Products(q_a, kv_a), Products(q), q_a.n
            require("k of q", (self.rank,), (q.k,))
        self.q_bias = Vector("q_a's bias", q_bias, self.rank)
        self.q_norm = norm_of("q's norm", q_norm, (self.rank,))
        self.steps = self.first.steps + self.k_b.steps + self.v_b.steps + self.o.steps + 12
        if self.q is not None:
            self.steps += self.q.steps

    def __call__(self, const float[:, :] x, cos, sin, int kv_type, kpool, vpool, const int32_t[::1] block,
                 const int32_t[::1] offset, const int32_t[::1] pos, const int32_t[::1] table,
                 const int32_t[::1] table_start, out, int threads=1):
        cdef Pools pools = pools_of(kv_type, kpool, None, 1, self.key, self.latent)
        cdef long m = x.shape[0], d = self.first.first.k, stride = x.strides[0] // 4
        cdef Rows rows = rows_of(cos, sin, block, offset, pos, table, table_start, m, self.rotary, 0, pools.blocks)
        require_rows("x", x, -1, d)
        cdef Sums sums = sums_of(out, self.o.first.panels, m, self.o.widths[0], True)
        cdef long q_wide = self.heads * self.hd, wide = self.heads * self.key, latents = self.heads * self.latent
        cdef long values = self.heads * self.vd
        cdef Space space = Space(
            step_bytes(self.steps) + floats(m * d) + floats(m * self.rank) + floats(m * self.key) + floats(m * q_wide)
            + floats(m * wide) + floats(m * latents) + floats(m * values) + self.first.space(m)
            + (0 if self.q is None else self.q.space(m)) + self.k_b.space(m) + self.v_b.space(m) + self.o.space(m))
        cdef mk_work work
        begin(&work, space, self.steps)
        cdef const float *hidden = &x[0, 0]
        cdef float *normed
        if self.norm is not None:
            normed = <float *>space.take(4 * m * d)
            self.norm.add(&work, hidden, stride, 1, m, normed, d)
            hidden, stride = normed, d
        cdef float *low = <float *>space.take(4 * m * self.rank)
        cdef float *keys = <float *>space.take(4 * m * self.key)
        cdef float *q = <float *>space.take(4 * m * q_wide)
        cdef float *queries = <float *>space.take(4 * m * wide)
        cdef float *mixed = <float *>space.take(4 * m * latents)
        cdef float *made = <float *>space.take(4 * m * values)
        cdef Sums *second = [Sums(q, q_wide, 0)]
        cdef Sums *first = [second[0], Sums(keys, self.key, 0)]
        if self.rank:
            first[0] = Sums(low, self.rank, 0)
        self.first.add(&work, space, hidden, stride, m, first)
        add_bias(&work, low, self.rank, self.q_bias, m)
        add_bias(&work, keys, self.key, self.kv_bias, m)
        mk_join(&work, 0)
        if self.q_norm is not None:
            self.q_norm.add(&work, low, self.rank, 1, m, low, self.rank)
            mk_join(&work, 1)
        self.kv_norm.add(&work, keys, self.key, 1, m, keys, self.key)
        mk_join(&work, 1)
        mk_rope(&work, keys + self.latent, self.key, rows.cos, rows.sin, m, 1, self.rotary, self.rotary,
                self.interleaved)
        mk_join(&work, 0)
        if self.q is not None:
            self.q.add(&work, space, low, self.rank, m, second)
        mk_copy_rows(&work, q + self.nope, self.hd, m * self.heads, self.rotary, queries + self.latent, self.key)
        mk_join(&work, 1)
        self.k_b.add(&work, space, q, q_wide, self.hd, m, queries, wide, self.key)
        mk_rope(&work, queries + self.latent, wide, rows.cos, rows.sin, m, self.heads, self.key, self.rotary,
                self.interleaved)
        mk_join(&work, 1)
        mk_kv_store(&work, kv_type, keys, self.key, NULL, 0, rows.block, rows.offset, m, pools.keys, NULL, 1, self.key,
                    0)
        mk_join(&work, 0)
        mk_attention(&work, kv_type, queries, wide, mixed, latents, pools.keys, NULL, rows.pos, rows.table,
                     rows.table_start, &self.kv_of_head[0], m, self.heads, 1, self.key, self.latent, self.scale, 0,
                     NULL, 0.0, 0, 0, NULL)
        self.v_b.add(&work, space, mixed, latents, self.latent, m, made, values, self.vd)
        self.o.add(&work, space, made, values, m, &sums)
        finish(&work, threads)
