# Gated DeltaNet, from hidden states to the product with o.


cdef class GatedDeltaNet:
    cdef Products inputs, o
    cdef NormStep norm, out_norm
    cdef Vector rates, dt_bias, q_scale, k_scale
    cdef const float[:, ::1] q_conv, k_conv, v_conv
    cdef const int32_t[::1] key_of_head
    cdef long keys, heads, dk, dv, steps
    cdef float eps

    def __init__(self, q, k, v, gate, beta, alpha, o, convs, rates, dt_bias, const int32_t[::1] key_of_head, int dk,
                 int dv, out_norm, *, norm=None, double eps=1e-6):
        cdef long heads = key_of_head.shape[0], keys = q.n // dk
        self.inputs, self.o = Products(q, k, v, gate, beta, alpha), Products(o)
        self.heads, self.keys, self.dk, self.dv, self.key_of_head = heads, keys, dk, dv, key_of_head
        require("n of q, k, v, gate, beta and alpha and k of o",
                (keys * dk, keys * dk, heads * dv, heads * dv, heads, heads, heads * dv),
                (q.n, k.n, v.n, gate.n, beta.n, alpha.n, o.k))
        require_range("key_of_head", key_of_head, <int>keys)
        self.q_conv, self.k_conv, self.v_conv = convs
        cdef Py_ssize_t taps = self.q_conv.shape[0]
        require("q's convolution", (taps, q.n), (self.q_conv.shape[0], self.q_conv.shape[1]))
        require("k's convolution", (taps, k.n), (self.k_conv.shape[0], self.k_conv.shape[1]))
        require("v's convolution", (taps, v.n), (self.v_conv.shape[0], self.v_conv.shape[1]))
        self.rates, self.dt_bias = Vector("rates", rates, heads), Vector("dt_bias", dt_bias, heads)
        self.norm, self.out_norm = norm_of("norm", norm, (q.k,)), norm_of("out_norm", out_norm, (dv,))
        self.q_scale = Vector("q's scale", np.full(dk, 1 / dk, np.float32), dk)
        self.k_scale = Vector("k's scale", np.full(dk, dk**-0.5, np.float32), dk)
        self.eps = <float>(eps / dk)
        self.steps = self.inputs.steps + self.o.steps + 12

    def __call__(self, const float[:, :] x, float[:, :] states, const int32_t[::1] first_rows,
                 const int32_t[::1] slots, out, int threads=1):
        cdef long m = x.shape[0], d = self.inputs.first.k, x_stride = x.strides[0] // 4, heads = self.heads
        cdef long wide = self.keys * self.dk, values = heads * self.dv, before = self.q_conv.shape[0] - 1
        cdef long state_stride = states.strides[0] // 4
        require_rows("x", x, -1, d)
        require_states("states", states, before * (2 * wide + values) + delta_floats(heads, self.dk, self.dv))
        require_sequences(first_rows, slots, m, states.shape[0])
        cdef Sums to = sums_of(out, self.o.first.panels, m, self.o.widths[0], True)
        cdef Space space = Space(step_bytes(self.steps) + floats(m * d) + 4 * floats(m * wide) + 4 * floats(m * values)
                                 + 2 * floats(m * heads) + self.inputs.space(m) + self.o.space(m))
        cdef mk_work work
        begin(&work, space, self.steps)
        cdef const float *hidden = &x[0, 0]
        cdef float *normed
        if self.norm is not None:
            normed = <float *>space.take(4 * m * d)
            self.norm.add(&work, hidden, x_stride, 1, m, normed, d)
            hidden, x_stride = normed, d
        cdef float *made = <float *>space.take(4 * m * values)
        cdef float *gate = <float *>space.take(4 * m * values)
        cdef float *beta = <float *>space.take(4 * m * heads)
        cdef float *decay = <float *>space.take(4 * m * heads)
        cdef float *raw[3]
        cdef float *qkv[3]
        cdef const float *convs[3]
        cdef long *widths = [wide, wide, values]
        cdef float *state = &states[0, 0]
        for i in range(3):
            raw[i], qkv[i] = <float *>space.take(4 * m * widths[i]), <float *>space.take(4 * m * widths[i])
        convs[0], convs[1], convs[2] = &self.q_conv[0, 0], &self.k_conv[0, 0], &self.v_conv[0, 0]
        cdef Sums *sums = [Sums(raw[0], wide, 0), Sums(raw[1], wide, 0), Sums(raw[2], values, 0),
                           Sums(gate, values, 0), Sums(beta, heads, 0), Sums(decay, heads, 0)]
        self.inputs.add(&work, space, hidden, x_stride, m, sums)
        for i in range(3):
            mk_short_conv(&work, raw[i], widths[i], convs[i], NULL, state, state_stride, &first_rows[0], &slots[0],
                          first_rows.shape[0], m, widths[i], <int>before + 1, True, qkv[i], widths[i])
            state += before * widths[i]
            mk_join(&work, 1)
        mk_activate(&work, MK_SIGMOID, beta, heads, NULL, 0, 0, 0, m, heads, beta, heads)
        mk_decays(&work, decay, self.rates.at, self.dt_bias.at, m, heads, decay)
        mk_join(&work, 0)
        # x / sqrt(sum(x^2) + eps) is the RMS norm with eps / dk, over sqrt(dk); q is divided by another sqrt(dk).
        mk_rms_norm(&work, qkv[0], self.dk, self.q_scale.at, self.eps, 1, m * self.keys, self.dk, qkv[0], self.dk)
        mk_join(&work, 1)
        mk_rms_norm(&work, qkv[1], self.dk, self.k_scale.at, self.eps, 1, m * self.keys, self.dk, qkv[1], self.dk)
        mk_join(&work, 0)
        mk_delta_rule(&work, qkv[0], qkv[1], qkv[2], decay, beta, state, state_stride, &first_rows[0], &slots[0],
                      first_rows.shape[0], &self.key_of_head[0], m, <int>self.keys, <int>heads, <int>self.dk,
                      <int>self.dv, made)
        self.out_norm.add(&work, made, self.dv, 1, m * heads, made, self.dv)
        mk_activate(&work, MK_SILU, gate, values, made, values, 0, 0, m, values, made, values)
        self.o.add(&work, space, made, values, m, &to)
        finish(&work, threads)
