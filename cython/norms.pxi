# Norms, biases, and additions to the hidden states.


cdef class NormStep:
    """A `Norm` of mpillm.kernels.types, checked."""

    cdef Vector weight, bias
    cdef long width
    cdef float eps
    cdef bint centred

    def __init__(self, str name, norm):
        self.width, self.eps, self.centred = norm.width, norm.eps, norm.centred
        self.weight = Vector(f"{name}'s weight", norm.weight, self.width)
        self.bias = Vector(f"{name}'s bias", norm.bias, self.width)

    cdef void add(self, mk_work *work, const float *x, long stride, int groups, long m, float *out, long out_stride
                  ) noexcept:
        """Normalise m rows; `out` may be `x`."""
        if self.centred:
            mk_layer_norm(work, x, stride, self.weight.at, self.bias.at, self.eps, m, self.width, out, out_stride)
        else:
            mk_rms_norm(work, x, stride, self.weight.at, self.eps, groups, m, self.width, out, out_stride)

    cdef void add_heads(self, mk_work *work, float *x, long m, int heads, int hd) noexcept:
        """Normalise each head of x [m, heads * hd], or whole rows, in place."""
        if self.width == hd:
            self.add(work, x, hd, 1, m * heads, x, hd)
        else:
            self.add(work, x, self.width, heads, m, x, self.width)


cdef NormStep norm_of(str name, norm, tuple widths):
    """Return the step of a norm with one of these widths, or None."""
    if norm is None:
        return None
    if norm.width not in widths:
        raise ValueError(f"{name} must be {' or '.join(map(str, widths))} wide, not {norm.width}")
    return NormStep(name, norm)


cdef void add_bias(mk_work *work, float *x, long stride, Vector bias, long m) noexcept:
    """x [m, n] += the bias [n], if there is one; the next steps are joined."""
    if bias.at:
        mk_add_rows(work, x, stride, bias.at, 0, 1.0, m, bias.values.shape[0])
        mk_join(work, 1)


cdef enum: RESIDUAL_STEPS = 3  # the maximum number of steps


cdef class Residual:
    cdef Vector bias
    cdef NormStep norm
    cdef float scale
    cdef long width  # 0: any

    def __init__(self, bias=None, norm=None, float scale=1.0):
        self.scale = scale
        self.norm = None if norm is None else NormStep("norm", norm)
        self.width = self.norm.width if norm is not None else 0 if bias is None else len(bias)
        self.bias = Vector("bias", bias, self.width)

    def __call__(self, float[:, :] x, float[:, :] part, int threads=1):
        require_rows("x", x, -1, self.width or -1)
        require_rows("part", part, x.shape[0], x.shape[1])
        self.compute(&x[0, 0], x.strides[0] // 4, &part[0, 0], part.strides[0] // 4, x.shape[0], x.shape[1], threads)

    cdef int compute(self, float *x, long stride, float *part, long part_stride, long m, long d,
                     int threads) except -1:
        cdef Space space = Space(step_bytes(RESIDUAL_STEPS))
        cdef mk_work work
        begin(&work, space, RESIDUAL_STEPS)
        self.add(&work, x, stride, part, part_stride, m, d)
        return finish(&work, threads)

    cdef void add(self, mk_work *work, float *x, long stride, float *part, long part_stride, long m, long d) noexcept:
        add_bias(work, part, part_stride, self.bias, m)
        mk_join(work, 0)
        if self.norm is not None:
            self.norm.add(work, part, part_stride, 1, m, part, part_stride)
        mk_add_rows(work, x, stride, part, part_stride, self.scale, m, d)
