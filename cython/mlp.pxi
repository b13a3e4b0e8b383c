# The MLP of a layer, and experts.


cdef struct Function:  # what `mk_activate` does
    int kind
    float limit, alpha


cdef Function function_of(int kind, bint gated, float limit, float alpha) except *:
    require_activation(kind, gated, limit)
    return Function(kind, limit, alpha)


cdef class MlpMatrices:
    """gate (or none), up and down of an MLP or an expert, with their biases."""

    cdef Products inputs, down
    cdef Vector gate_bias, up_bias, down_bias
    cdef bint gated
    cdef long width, steps

    def __init__(self, gate, up, down, biases, down_bias):
        self.gated, self.down, self.width = gate is not None, Products(down), down.k
        self.inputs = Products(gate, up) if self.gated else Products(up)
        if self.gated:
            require("n of gate and up", (down.k, down.k), (gate.n, up.n))
        else:
            require("n of up", (down.k,), (up.n,))
        gate_bias, up_bias = biases or (None, None)
        if gate_bias is not None and not self.gated:
            raise ValueError("an MLP without a gate has no bias of one")
        self.gate_bias, self.up_bias = Vector("gate's bias", gate_bias, down.k), Vector("up's bias", up_bias, down.k)
        self.down_bias = Vector("down's bias", down_bias, down.n)
        self.steps = self.inputs.steps + self.down.steps + 2

    cdef void place(self, Sums *sums, float *gate, float *up) noexcept:
        """Where `inputs` write their outputs: without a gate up's take its place."""
        sums[0], sums[1] = Sums(gate, self.width, 0), Sums(up, self.width, 0)

    cdef void add_biases(self, mk_work *work, float *gate, float *up, long m) noexcept:
        """Of gate and up; what follows is joined."""
        add_bias(work, gate, self.width, self.gate_bias, m)
        add_bias(work, up if self.gated else gate, self.width, self.up_bias, m)


cdef void add_activation(mk_work *work, const Function *f, float *gate, const float *up, long m, long width) noexcept:
    mk_activate(work, f.kind, gate, width, up, width, f.limit, f.alpha, m, width, gate, width)


cdef class Mlp:
    cdef MlpMatrices matrices
    cdef NormStep norm
    cdef Function function
    cdef long steps  # at most

    def __init__(self, gate, up, down, *, int activation=MK_SILU, float limit=0.0, float alpha=1.702, norm=None,
                 biases=None):
        self.matrices = MlpMatrices(gate, up, down, biases, None)
        self.function = function_of(activation, self.matrices.gated, limit, alpha)
        self.norm = norm_of("norm", norm, (up.k,))
        self.steps = self.matrices.steps + 2

    def __call__(self, const float[:, :] x, out, int threads=1, bint fold=True):
        cdef Products down = self.matrices.down
        require_rows("x", x, -1, self.matrices.inputs.first.k)
        cdef Sums sums = sums_of(out, down.first.panels, x.shape[0], down.widths[0], fold)
        self.compute(&x[0, 0], x.strides[0] // 4, x.shape[0], &sums, threads)

    cdef int compute(self, const float *x, long stride, long m, Sums *out, int threads) except -1:
        cdef Space space = Space(step_bytes(self.steps) + self.space(m))
        cdef mk_work work
        begin(&work, space, self.steps)
        self.add(&work, space, x, stride, m, out)
        return finish(&work, threads)

    cdef size_t space(self, long m) noexcept:
        """Bytes of what `add` takes for m rows."""
        cdef MlpMatrices matrices = self.matrices
        return (floats(m * matrices.inputs.first.k) + 2 * floats(m * matrices.width) + matrices.inputs.space(m)
                + matrices.down.space(m))

    cdef int add(self, mk_work *work, Space space, const float *x, long stride, long m, Sums *out) except -1:
        """out = the MLP of x."""
        cdef MlpMatrices matrices = self.matrices
        cdef long d = matrices.inputs.first.k, x_stride = stride
        cdef const float *hidden = x
        cdef float *normed
        mk_join(work, 0)
        if self.norm is not None:
            normed = <float *>space.take(4 * m * d)
            self.norm.add(work, x, stride, 1, m, normed, d)
            hidden, x_stride = normed, d
        cdef float *gate = <float *>space.take(4 * m * matrices.width)
        cdef float *up = <float *>space.take(4 * m * matrices.width) if matrices.gated else NULL
        cdef Sums sums[2]
        matrices.place(sums, gate, up)
        matrices.inputs.add(work, space, hidden, x_stride, m, sums)
        matrices.add_biases(work, gate, up, m)
        mk_join(work, 0)
        add_activation(work, &self.function, gate, up, m, matrices.width)
        return matrices.down.add(work, space, gate, matrices.width, m, out)


cdef class Expert:
    cdef MlpMatrices matrices
    cdef tuple sizes

    def __init__(self, gate, up, down, *, biases=None, down_bias=None):
        self.matrices = MlpMatrices(gate, up, down, biases, down_bias)
        if len(self.matrices.down.matrices[0]) > 1:
            raise ValueError("an expert's down may lie in column panels, but not in rows")
        self.sizes = (self.matrices.gated, up.k, down.k, down.n, self.matrices.down.first.panels)

    cdef size_t space(self, long m) noexcept:
        return self.matrices.inputs.space(m) + self.matrices.down.space(m)


cdef enum:
    MIXED_ROWS = 512  # of all experts at once, unless one alone has more: bounds the memory of their activations


cdef class Experts:
    cdef list experts
    cdef Expert first
    cdef Function function

    def __init__(self, experts, *, int activation=MK_SILU, float limit=0.0, float alpha=1.702):
        cdef Expert expert
        self.experts = list(experts)
        self.first = self.experts[0]
        self.function = function_of(activation, self.first.matrices.gated, limit, alpha)
        for expert in self.experts:
            if expert.matrices.down.first.row_bytes and expert.matrices.down.first.quantised():
                raise ValueError("quantised weights of a mixture's experts must be packed")
            if expert.sizes != self.first.sizes:
                raise ValueError(f"experts of one mixture are alike, not {self.first.sizes} and {expert.sizes}")

    def __call__(self, const float[:, ::1] h, const int32_t[::1] at, const int32_t[::1] starts,
                 const float[::1] weights, float[:, :, ::1] panels, int threads=1):
        cdef Py_ssize_t first = 0, last, count = len(self.experts), i
        cdef MlpMatrices matrices = self.first.matrices
        require_rows("h", h, -1, matrices.inputs.first.k)
        require_range("at", at, <int>h.shape[0])
        require_vector("weights", at.shape[0], weights.shape[0])
        require("panels", (matrices.down.first.panels, h.shape[0], matrices.down.widths[0]),
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
        cdef MlpMatrices matrices = self.first.matrices
        cdef long k = h.shape[1], width = matrices.width, d = panels.shape[2], m = starts[last] - starts[first]
        cdef long count = last - first, steps = 2, row, rows
        cdef size_t size = 2 * floats(m * width)
        cdef Expert expert
        cdef Py_ssize_t i
        for i in range(first, last):
            expert = self.experts[i]
            steps += expert.matrices.steps
            size += expert.space(starts[i + 1] - starts[i])
        cdef Space space = Space(size + step_bytes(steps) + whole_lines(count * sizeof(Taken))
                                 + whole_lines(count * sizeof(mk_product)))
        cdef mk_work work
        begin(&work, space, steps)
        cdef Taken *taken = <Taken *>space.take(count * sizeof(Taken))
        cdef mk_product *products = <mk_product *>space.take(count * sizeof(mk_product))
        cdef float *gate = <float *>space.take(4 * m * width)
        cdef float *up = <float *>space.take(4 * m * width) if matrices.gated else NULL
        cdef Sums sums[2]
        for i in range(first, last):
            expert = self.experts[i]
            taken[i - first] = expert.matrices.inputs.take(&work, space, &h[0, 0], k, at + starts[i],
                                                           starts[i + 1] - starts[i])
        mk_join(&work, 0)
        for i in range(first, last):
            expert, row = self.experts[i], starts[i] - starts[first]
            expert.matrices.place(sums, gate + row * width, up + row * width if up else NULL)
            expert.matrices.inputs.multiply(&work, taken[i - first], starts[i + 1] - starts[i], sums)
        mk_join(&work, 0)
        for i in range(first, last):
            expert, row = self.experts[i], starts[i] - starts[first]
            expert.matrices.add_biases(&work, gate + row * width, up + row * width if up else NULL,
                                       starts[i + 1] - starts[i])
        mk_join(&work, 0)
        add_activation(&work, &self.function, gate, up, m, width)
        for i in range(first, last):
            expert, row, rows = self.experts[i], starts[i] - starts[first], starts[i + 1] - starts[i]
            matrices = expert.matrices
            taken[i - first] = matrices.down.take(&work, space, gate + row * width, width, NULL, rows)
            matrices.down.first.weigh(&work, &products[i - first],
                                      taken[i - first].rows[matrices.down.first.form()], rows, &panels[0, 0, 0], d,
                                      h.shape[0] * d, at + starts[i], weights + starts[i], matrices.down_bias.at)
        mk_join(&work, 0)
        mk_mixture(&work, products, count)
        return finish(&work, threads)
