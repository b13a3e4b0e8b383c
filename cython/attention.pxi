# Storage of keys and values, attention, and a layer's attention from hidden states to the product with o.


def kv_store(int kv_type, const float[:, :] k, v, const int32_t[::1] block,
             const int32_t[::1] offset, kpool, vpool, int kvh, int hd, int value_dim=0):
    cdef Pools pools
    cdef const float[:, :] rows
    cdef const float *values = NULL
    cdef long stride = 0
    cdef int vd = value_dim or hd
    require_rows("k", k, -1, <Py_ssize_t>kvh * hd)
    if (v is None) != (vpool is None):
        raise ValueError("v and vpool must both be given, or neither")
    if v is not None:
        rows = v
        require_rows("v", rows, k.shape[0], <Py_ssize_t>kvh * vd)
        values, stride = &rows[0, 0], rows.strides[0] // 4
    pools = pools_of(kv_type, kpool, vpool, kvh, hd, vd)
    require_vector("block", k.shape[0], block.shape[0])
    require_vector("offset", k.shape[0], offset.shape[0])
    require_range("block", block, <int>pools.blocks)
    require_range("offset", offset, MK_KV_BLOCK)
    cdef mk_work work
    mk_begin(&work)
    mk_kv_store(&work, kv_type, &k[0, 0], k.strides[0] // 4, values, stride, &block[0], &offset[0], k.shape[0],
                pools.keys, pools.values, kvh, hd, 0 if v is None else vd)
    finish(&work, 1)


def attention(int kv_type, const float[:, :] q, float[:, :] out, kpool, vpool, const int32_t[::1] pos,
              const int32_t[::1] table, const int32_t[::1] table_start, const int32_t[::1] kv_of_head, int kvh, int hd,
              float scale, int window, int threads=1, int value_dim=0, sinks=None, float softcap=0.0,
              bint chunked=False, tuning=None, bint bidirectional=False):
    cdef Pools pools
    cdef mk_tuning of_position = tuning_of(tuning)
    cdef int heads = <int>kv_of_head.shape[0], vd = value_dim or hd
    cdef Vector sink = Vector("sinks", sinks, heads)
    require_rows("q", q, -1, <Py_ssize_t>heads * hd)
    require_rows("out", out, q.shape[0], <Py_ssize_t>heads * vd)
    pools = pools_of(kv_type, kpool, vpool, kvh, hd, vd)
    require_vector("pos", q.shape[0], pos.shape[0])
    require_vector("table_start", q.shape[0], table_start.shape[0])
    require_range("kv_of_head", kv_of_head, kvh)
    require_tables(pos, table, table_start, window, pools.blocks)
    if softcap:
        require_cap(softcap)
    require_chunks(window, chunked)
    cdef mk_work work
    mk_begin(&work)
    mk_attention(&work, kv_type, &q[0, 0], q.strides[0] // 4, &out[0, 0], out.strides[0] // 4, pools.keys,
                 pools.values, &pos[0], &table[0], &table_start[0], &kv_of_head[0], q.shape[0], heads, kvh, hd, vd,
                 scale, window, sink.at, softcap, chunked, bidirectional, &of_position)
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


cdef Rows rows_of(cos, sin, const int32_t[::1] block, const int32_t[::1] offset, const int32_t[::1] pos,
                  const int32_t[::1] table, const int32_t[::1] table_start, long m, int rotary, int window,
                  Py_ssize_t blocks) except *:
    """Check and return the positions and blocks of a step's rows; the caller keeps the arrays alive.

    With rotary 0, cos and sin are not used.
    """
    cdef const float[:, ::1] cosines, sines
    cdef Rows rows = Rows(m, NULL, NULL, &block[0], &offset[0], &pos[0], &table[0], &table_start[0])
    if rotary:
        cosines, sines = cos, sin
        require("cos", (m, rotary // 2), (cosines.shape[0], cosines.shape[1]))
        require("sin", (m, rotary // 2), (sines.shape[0], sines.shape[1]))
        rows.cos, rows.sin = &cosines[0, 0], &sines[0, 0]
    require("block, offset, pos and table_start", (m, m, m, m),
            (block.shape[0], offset.shape[0], pos.shape[0], table_start.shape[0]))
    require_range("block", block, <int>blocks)
    require_range("offset", offset, MK_KV_BLOCK)
    require_tables(pos, table, table_start, window, blocks)
    return rows


cdef class Attention:
    cdef Products qkv, o
    cdef NormStep norm, q_norm, k_norm, v_norm
    cdef Vector q_bias, k_bias, v_bias, gate_bias, sinks
    cdef const int32_t[::1] kv_of_head
    cdef int heads, kvh, hd, vd, window, rotary
    cdef bint interleaved, gated, chunked, normed_after_rope, bidirectional
    cdef mk_tuning tuning
    cdef float scale, softcap
    cdef long steps  # the maximum number of steps

    def __init__(self, q, k, v, o, const int32_t[::1] kv_of_head, int kvh, int hd, float scale, *, int window=0,
                 int value_dim=0, norm=None, biases=None, qk_norms=None, rotary=None, bint interleaved=False,
                 sinks=None, float softcap=0.0, gate=None, bint chunked=False, tuning=None, v_norm=None,
                 bint normed_after_rope=False, bint bidirectional=False, gate_bias=None):
        cdef int heads = <int>kv_of_head.shape[0], vd = value_dim or hd
        self.gated = gate is not None
        self.qkv, self.o = Products(q, k, v, gate) if self.gated else Products(q, k, v), Products(o)
        if self.gated:
            require("n of the gate", (heads * vd,), (gate.n,))
        elif gate_bias is not None:
            raise ValueError("a gate's bias needs a gate")
        self.heads, self.kvh, self.hd, self.vd, self.kv_of_head = heads, kvh, hd, vd, kv_of_head
        self.scale, self.window, self.softcap, self.chunked = scale, window, softcap, chunked
        self.tuning = tuning_of(tuning)
        require_chunks(window, chunked)
        require_range("kv_of_head", kv_of_head, kvh)
        require("n of q, k, v and k of o", (heads * hd, kvh * hd, kvh * vd, heads * vd), (q.n, k.n, v.n, o.k))
        self.rotary = 0 if rotary == 0 else rotary_of(rotary or 0, hd)
        self.interleaved = interleaved
        if softcap:
            require_cap(softcap)
        self.norm = norm_of("norm", norm, (q.k,))
        q_bias, k_bias, v_bias = biases or (None, None, None)
        self.q_bias = Vector("q's bias", q_bias, q.n)
        self.k_bias = Vector("k's bias", k_bias, k.n)
        self.v_bias = Vector("v's bias", v_bias, v.n)
        self.gate_bias = Vector("the gate's bias", gate_bias, heads * vd)
        q_norm, k_norm = qk_norms or (None, None)
        self.q_norm = norm_of("q's norm", q_norm, (hd, q.n))
        self.k_norm = norm_of("k's norm", k_norm, (hd, k.n))
        self.v_norm = norm_of("v's norm", v_norm, (vd, v.n))
        self.normed_after_rope, self.bidirectional = normed_after_rope, bidirectional
        self.sinks = Vector("sinks", sinks, heads)
        self.steps = self.qkv.steps + self.o.steps + 13

    def __call__(self, const float[:, :] x, cos, sin, int kv_type, kpool, vpool, const int32_t[::1] block,
                 const int32_t[::1] offset, const int32_t[::1] pos, const int32_t[::1] table,
                 const int32_t[::1] table_start, out, int threads=1):
        cdef Pools pools = self.pools(kv_type, kpool, vpool)
        cdef Rows rows = rows_of(cos, sin, block, offset, pos, table, table_start, x.shape[0], self.rotary,
                                 self.window, pools.blocks)
        require_rows("x", x, -1, self.qkv.first.k)
        cdef Sums sums = sums_of(out, self.o.first.panels, x.shape[0], self.o.widths[0], True)
        self.compute(&x[0, 0], x.strides[0] // 4, &rows, kv_type, &pools, &sums, threads)

    def attend(self, float[:, ::1] q, float[:, ::1] k, const float[:, ::1] v, cos, sin, int kv_type, kpool, vpool,
               const int32_t[::1] block, const int32_t[::1] offset, const int32_t[::1] pos,
               const int32_t[::1] table, const int32_t[::1] table_start, out, int threads=1):
        if self.gated:
            raise ValueError("attention with a gate begins with its rows x, of which the gate is made")
        if self.normed_after_rope:
            raise ValueError("attention that normalises after rope begins with its rows x")
        cdef Pools pools = self.pools(kv_type, kpool, vpool)
        cdef long m = q.shape[0]
        cdef Rows rows = rows_of(cos, sin, block, offset, pos, table, table_start, m, self.rotary, self.window,
                                 pools.blocks)
        require("q", (m, self.heads * self.hd), (q.shape[0], q.shape[1]))
        require("k", (m, self.kvh * self.hd), (k.shape[0], k.shape[1]))
        require("v", (m, self.kvh * self.vd), (v.shape[0], v.shape[1]))
        cdef Sums sums = sums_of(out, self.o.first.panels, m, self.o.widths[0], True)
        cdef Space space = Space(step_bytes(self.steps) + self.attend_space(m))
        cdef mk_work work
        begin(&work, space, self.steps)
        self.add_attend(&work, space, &q[0, 0], &k[0, 0], &v[0, 0], NULL, &rows, kv_type, &pools, &sums)
        finish(&work, threads)

    cdef Pools pools(self, int kv_type, kpool, vpool) except *:
        return pools_of(kv_type, kpool, vpool, self.kvh, self.hd, self.vd)

    cdef int compute(self, const float *x, long stride, const Rows *rows, int kv_type, const Pools *pools, Sums *out,
                     int threads) except -1:
        cdef Space space = Space(step_bytes(self.steps) + self.space(rows.m))
        cdef mk_work work
        begin(&work, space, self.steps)
        self.add(&work, space, x, stride, rows, kv_type, pools, out)
        return finish(&work, threads)

    cdef size_t space(self, long m) noexcept:
        """Bytes that `add` takes from the space for m rows."""
        cdef long wide = self.heads * self.hd, narrow = self.kvh * self.hd, values = self.kvh * self.vd
        return (floats(m * self.qkv.first.k) + floats(m * wide) + floats(m * narrow) + floats(m * values)
                + floats(m * self.heads * self.vd) + self.qkv.space(m) + self.attend_space(m))

    cdef int add(self, mk_work *work, Space space, const float *x, long stride, const Rows *rows, int kv_type,
                 const Pools *pools, Sums *out) except -1:
        """out = attention of x."""
        cdef long m = rows.m, d = self.qkv.first.k, x_stride = stride
        cdef long wide = self.heads * self.hd, narrow = self.kvh * self.hd, values = self.kvh * self.vd
        cdef const float *hidden = x
        cdef float *normed
        mk_join(work, 0)
        if self.norm is not None:
            normed = <float *>space.take(4 * m * d)
            self.norm.add(work, x, stride, 1, m, normed, d)
            hidden, x_stride = normed, d
        cdef float *q = <float *>space.take(4 * m * wide)
        cdef float *k = <float *>space.take(4 * m * narrow)
        cdef float *v = <float *>space.take(4 * m * values)
        cdef long gates = self.heads * self.vd
        cdef float *gate = <float *>space.take(4 * m * gates) if self.gated else NULL
        cdef Sums *sums = [Sums(q, wide, 0), Sums(k, narrow, 0), Sums(v, values, 0), Sums(gate, gates, 0)]
        self.qkv.add(work, space, hidden, x_stride, m, sums)
        add_bias(work, q, wide, self.q_bias, m)
        add_bias(work, k, narrow, self.k_bias, m)
        add_bias(work, v, values, self.v_bias, m)
        add_bias(work, gate, gates, self.gate_bias, m)
        mk_join(work, 0)
        if self.v_norm is not None:
            self.v_norm.add_heads(work, v, m, self.kvh, self.vd)
            mk_join(work, 1)
        if not self.normed_after_rope:
            self.add_norms(work, q, k, m)
        mk_join(work, 0)
        return self.add_attend(work, space, q, k, v, gate, rows, kv_type, pools, out)

    cdef void add_norms(self, mk_work *work, float *q, float *k, long m) noexcept:
        if self.q_norm is not None:
            self.q_norm.add_heads(work, q, m, self.heads, self.hd)
            mk_join(work, 1)
        if self.k_norm is not None:
            self.k_norm.add_heads(work, k, m, self.kvh, self.hd)

    cdef size_t attend_space(self, long m) noexcept:
        return floats(m * self.heads * self.vd) + self.o.space(m)

    cdef int add_attend(self, mk_work *work, Space space, float *q, float *k, const float *v, const float *gate,
                        const Rows *rows, int kv_type, const Pools *pools, Sums *out) except -1:
        """out = attention of q, k, v and the gate (or NULL), which have contiguous rows; rotates q and k in place."""
        cdef long m = rows.m, wide = self.heads * self.hd, narrow = self.kvh * self.hd
        cdef long mixed_wide = self.heads * self.vd
        cdef float *mixed = <float *>space.take(4 * m * mixed_wide)
        if self.rotary:
            mk_rope(work, q, wide, rows.cos, rows.sin, m, self.heads, self.hd, self.rotary, self.interleaved)
            mk_join(work, m > 1)  # a single row is computed before another thread could begin
            mk_rope(work, k, narrow, rows.cos, rows.sin, m, self.kvh, self.hd, self.rotary, self.interleaved)
            mk_join(work, 0)
        if self.normed_after_rope:
            self.add_norms(work, q, k, m)
            mk_join(work, 0)
        mk_kv_store(work, kv_type, k, narrow, v, self.kvh * self.vd, rows.block, rows.offset, m, pools.keys,
                    pools.values, self.kvh, self.hd, self.vd)
        mk_attention(work, kv_type, q, wide, mixed, mixed_wide, pools.keys, pools.values, rows.pos, rows.table,
                     rows.table_start, &self.kv_of_head[0], m, self.heads, self.kvh, self.hd, self.vd, self.scale,
                     self.window, self.sinks.at, self.softcap, self.chunked, self.bidirectional,
                     &self.tuning)
        if gate:
            mk_activate(work, MK_SIGMOID, gate, mixed_wide, mixed, mixed_wide, 0, 0, m, mixed_wide, mixed, mixed_wide)
        return self.o.add(work, space, mixed, mixed_wide, m, out)
