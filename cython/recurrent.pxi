# Token mixers with a state for each sequence, from hidden states to the product with o.

from libc.math cimport INFINITY


cdef class Convolution:
    """A causal convolution of each channel with w [taps, channels], and the floats of its preceding inputs."""

    cdef const float[:, ::1] w
    cdef Vector bias
    cdef long channels, tail

    def __init__(self, str name, w, bias, taps, long channels):
        self.w, self.channels = w, channels
        require(name, (taps, channels), (self.w.shape[0], self.w.shape[1]))
        self.bias = Vector(f"{name}'s bias", bias, channels)
        self.tail = (self.w.shape[0] - 1) * channels

    cdef void add(self, mk_work *work, const float *x, long m, bint silu, float *tails, long stride,
                  const int32_t[::1] first_rows, const int32_t[::1] slots, float *out) noexcept:
        mk_short_conv(work, x, self.channels, &self.w[0, 0], self.bias.at, tails, stride, &first_rows[0], &slots[0],
                      first_rows.shape[0], m, self.channels, <int>self.w.shape[0], silu, out, self.channels)


cdef long tails_of(list convs) noexcept:
    """Floats of the preceding inputs of all convolutions."""
    cdef Convolution conv
    cdef long total = 0
    for conv in convs:
        total += conv.tail
    return total


cdef class GatedDeltaNet:
    cdef Products inputs, o
    cdef NormStep norm, out_norm
    cdef Vector rates, dt_bias, q_scale, k_scale
    cdef list convs
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
        self.convs = [Convolution(f"{name}'s convolution", w, None, len(convs[0]), matrix.n)
                      for name, w, matrix in zip("qkv", convs, (q, k, v))]
        self.rates, self.dt_bias = Vector("rates", rates, heads), Vector("dt_bias", dt_bias, heads)
        self.norm, self.out_norm = norm_of("norm", norm, (q.k,)), norm_of("out_norm", out_norm, (dv,))
        self.q_scale = Vector("q's scale", np.full(dk, 1 / dk, np.float32), dk)
        self.k_scale = Vector("k's scale", np.full(dk, dk**-0.5, np.float32), dk)
        self.eps = <float>(eps / dk)
        self.steps = self.inputs.steps + self.o.steps + 12

    def __call__(self, const float[:, :] x, float[:, :] states, const int32_t[::1] first_rows,
                 const int32_t[::1] slots, out, int threads=1):
        cdef long m = x.shape[0], d = self.inputs.first.k, x_stride = x.strides[0] // 4, heads = self.heads
        cdef long wide = self.keys * self.dk, values = heads * self.dv, state_stride = states.strides[0] // 4
        cdef Convolution conv
        require_rows("x", x, -1, d)
        require_states("states", states, tails_of(self.convs) + delta_floats(heads, self.dk, self.dv))
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
        cdef long *widths = [wide, wide, values]
        cdef float *state = &states[0, 0]
        for i in range(3):
            raw[i], qkv[i] = <float *>space.take(4 * m * widths[i]), <float *>space.take(4 * m * widths[i])
        cdef Sums *sums = [Sums(raw[0], wide, 0), Sums(raw[1], wide, 0), Sums(raw[2], values, 0),
                           Sums(gate, values, 0), Sums(beta, heads, 0), Sums(decay, heads, 0)]
        self.inputs.add(&work, space, hidden, x_stride, m, sums)
        for i in range(3):
            conv = self.convs[i]
            conv.add(&work, raw[i], m, True, state, state_stride, first_rows, slots, qkv[i])
            state += conv.tail
            mk_join(&work, 1)
        mk_activate(&work, MK_SIGMOID, beta, heads, NULL, 0, 0, 0, m, heads, beta, heads)
        mk_decays(&work, decay, 1.0, self.rates.at, self.dt_bias.at, 0.0, INFINITY, m, heads, NULL, decay)
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


cdef class Mamba2:
    cdef Products inputs, o
    cdef NormStep norm
    cdef list convs, out_norms
    cdef Vector rates, dt_bias, skip
    cdef Vector gate_bias, x_bias, b_bias, c_bias
    cdef const int32_t[::1] group_of_head
    cdef long groups, heads, dk, dv, steps
    cdef bint gate_first
    cdef float gate_scale, dt_scale, low, high

    def __init__(self, gate, x, b, c, dt, o, convs, rates, dt_bias, skip, const int32_t[::1] group_of_head, int dk,
                 int dv, *, biases=(None, None, None), out_norms=(), bint gate_first=True, float gate_scale=1.0,
                 float dt_scale=1.0, float low=0.0, float high=INFINITY, norm=None,
                 input_biases=(None, None, None, None)):
        cdef long heads = group_of_head.shape[0], groups = b.n // dk, values = heads * dv
        self.inputs, self.o = Products(gate, x, b, c, dt), Products(o)
        self.heads, self.groups, self.dk, self.dv, self.group_of_head = heads, groups, dk, dv, group_of_head
        require("n of gate, x, b, c and dt and k of o", (values, values, groups * dk, groups * dk, heads, values),
                (gate.n, x.n, b.n, c.n, dt.n, o.k))
        require_range("group_of_head", group_of_head, <int>groups)
        self.convs = [Convolution(f"{name}'s convolution", w, bias, len(convs[0]), matrix.n)
                      for name, w, bias, matrix in zip("xbc", convs, biases, (x, b, c))]
        self.rates, self.dt_bias = Vector("rates", rates, heads), Vector("dt_bias", dt_bias, heads)
        self.skip = Vector("skip", skip, heads)
        gate_bias, x_bias, b_bias, c_bias = input_biases
        self.gate_bias, self.x_bias = Vector("gate's bias", gate_bias, values), Vector("x's bias", x_bias, values)
        self.b_bias, self.c_bias = Vector("b's bias", b_bias, b.n), Vector("c's bias", c_bias, c.n)
        self.out_norms = [norm_of("out_norm", one, (values // len(out_norms),)) for one in out_norms]
        self.norm = norm_of("norm", norm, (gate.k,))
        self.gate_first, self.gate_scale = gate_first, gate_scale
        self.dt_scale, self.low, self.high = dt_scale, low, high
        self.steps = self.inputs.steps + self.o.steps + len(self.out_norms) + 12

    def __call__(self, const float[:, :] x, float[:, :] states, const int32_t[::1] first_rows,
                 const int32_t[::1] slots, out, int threads=1):
        cdef long m = x.shape[0], d = self.inputs.first.k, x_stride = x.strides[0] // 4, heads = self.heads
        cdef long wide = self.groups * self.dk, values = heads * self.dv, state_stride = states.strides[0] // 4
        cdef Convolution conv
        require_rows("x", x, -1, d)
        require_states("states", states, tails_of(self.convs) + delta_floats(heads, self.dk, self.dv))
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
        cdef float *step = <float *>space.take(4 * m * heads)
        cdef float *decay = <float *>space.take(4 * m * heads)
        cdef float *raw[3]
        cdef float *xbc[3]
        cdef long *widths = [values, wide, wide]
        cdef float *state = &states[0, 0]
        for i in range(3):
            raw[i], xbc[i] = <float *>space.take(4 * m * widths[i]), <float *>space.take(4 * m * widths[i])
        cdef Sums *sums = [Sums(gate, values, 0), Sums(raw[0], values, 0), Sums(raw[1], wide, 0),
                           Sums(raw[2], wide, 0), Sums(decay, heads, 0)]
        self.inputs.add(&work, space, hidden, x_stride, m, sums)
        add_bias(&work, gate, values, self.gate_bias, m)
        add_bias(&work, raw[0], values, self.x_bias, m)
        add_bias(&work, raw[1], wide, self.b_bias, m)
        add_bias(&work, raw[2], wide, self.c_bias, m)
        mk_join(&work, 0)
        for i in range(3):
            conv = self.convs[i]
            conv.add(&work, raw[i], m, True, state, state_stride, first_rows, slots, xbc[i])
            state += conv.tail
            mk_join(&work, 1)
        mk_decays(&work, decay, self.dt_scale, self.rates.at, self.dt_bias.at, self.low, self.high, m, heads, step,
                  decay)
        mk_join(&work, 0)
        mk_selective_scan(&work, xbc[2], xbc[1], xbc[0], decay, step, self.skip.at, state, state_stride,
                          &first_rows[0], &slots[0], first_rows.shape[0], &self.group_of_head[0], m,
                          <int>self.groups, <int>heads, <int>self.dk, <int>self.dv, made)
        if self.gate_first:
            mk_activate(&work, MK_SILU_SCALED, gate, values, made, values, 0, self.gate_scale, m, values, made, values)
        self.add_norms(&work, made, m, values)
        if not self.gate_first:
            mk_activate(&work, MK_SILU_SCALED, gate, values, made, values, 0, self.gate_scale, m, values, made, values)
        self.o.add(&work, space, made, values, m, &to)
        finish(&work, threads)

    cdef void add_norms(self, mk_work *work, float *made, long m, long values) noexcept:
        """Normalise each of the equal groups of columns."""
        cdef NormStep norm
        cdef float *at = made
        for norm in self.out_norms:
            norm.add(work, at, values, 1, m, at, values)
            at += norm.width
            mk_join(work, 1)
        mk_join(work, 0)


cdef class GatedConvolution:
    cdef Products inputs, o
    cdef NormStep norm
    cdef Vector b_bias, c_bias, v_bias
    cdef Convolution conv
    cdef long steps

    def __init__(self, b, c, v, o, w, *, norm=None, biases=(None, None, None), conv_bias=None):
        self.inputs, self.o = Products(b, c, v), Products(o)
        require("n of c and v and k of o", (b.n, b.n, b.n), (c.n, v.n, o.k))
        self.conv = Convolution("w", w, conv_bias, len(w), b.n)
        b_bias, c_bias, v_bias = biases
        self.b_bias, self.c_bias = Vector("b's bias", b_bias, b.n), Vector("c's bias", c_bias, b.n)
        self.v_bias = Vector("v's bias", v_bias, b.n)
        self.norm = norm_of("norm", norm, (b.k,))
        self.steps = self.inputs.steps + self.o.steps + 7

    def __call__(self, const float[:, :] x, float[:, :] states, const int32_t[::1] first_rows,
                 const int32_t[::1] slots, out, int threads=1):
        cdef long m = x.shape[0], d = self.inputs.first.k, x_stride = x.strides[0] // 4, n = self.conv.channels
        require_rows("x", x, -1, d)
        require_states("states", states, self.conv.tail)
        require_sequences(first_rows, slots, m, states.shape[0])
        cdef Sums to = sums_of(out, self.o.first.panels, m, self.o.widths[0], True)
        cdef Space space = Space(step_bytes(self.steps) + floats(m * d) + 4 * floats(m * n) + self.inputs.space(m)
                                 + self.o.space(m))
        cdef mk_work work
        begin(&work, space, self.steps)
        cdef const float *hidden = &x[0, 0]
        cdef float *normed
        if self.norm is not None:
            normed = <float *>space.take(4 * m * d)
            self.norm.add(&work, hidden, x_stride, 1, m, normed, d)
            hidden, x_stride = normed, d
        cdef float *b = <float *>space.take(4 * m * n)
        cdef float *c = <float *>space.take(4 * m * n)
        cdef float *v = <float *>space.take(4 * m * n)
        cdef float *made = <float *>space.take(4 * m * n)
        cdef Sums *sums = [Sums(b, n, 0), Sums(c, n, 0), Sums(v, n, 0)]
        self.inputs.add(&work, space, hidden, x_stride, m, sums)
        add_bias(&work, b, n, self.b_bias, m)
        add_bias(&work, c, n, self.c_bias, m)
        add_bias(&work, v, n, self.v_bias, m)
        mk_join(&work, 0)
        mk_activate(&work, MK_IDENTITY, b, n, v, n, 0, 0, m, n, v, n)
        self.conv.add(&work, v, m, False, &states[0, 0], states.strides[0] // 4, first_rows, slots, made)
        mk_activate(&work, MK_IDENTITY, c, n, made, n, 0, 0, m, n, made, n)
        self.o.add(&work, space, made, n, m, &to)
        finish(&work, threads)
