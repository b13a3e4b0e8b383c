# Operations on each row of a matrix: norms, RoPE, activations, softmax, top k.


cdef class Vector:
    """A vector [n], or none; `at` is NULL then."""

    cdef const float[::1] values
    cdef const float *at

    def __init__(self, str name, values, long n):
        self.at = NULL
        if values is not None:
            self.values = values
            require_vector(name, n, self.values.shape[0])
            self.at = &self.values[0]


def square_sums(const float[:, :] x, float[::1] out, int threads=1):
    require_rows("x", x, -1, -1)
    require_vector("out", x.shape[0], out.shape[0])
    cdef mk_work work
    mk_begin(&work)
    mk_square_sums(&work, &x[0, 0], x.strides[0] // 4, x.shape[0], x.shape[1], &out[0])
    finish(&work, threads)


def rms_norm(const float[:, :] x, w, float eps, float[:, :] out, int threads=1, int groups=1):
    require_rows("x", x, -1, -1)
    cdef Vector weight = Vector("w", w, x.shape[1])
    require_rows("out", out, x.shape[0], x.shape[1])
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"{x.shape[1]} columns are not {groups} groups")
    cdef mk_work work
    mk_begin(&work)
    mk_rms_norm(&work, &x[0, 0], x.strides[0] // 4, weight.at, eps, groups, x.shape[0], x.shape[1], &out[0, 0],
                out.strides[0] // 4)
    finish(&work, threads)


def layer_norm(const float[:, :] x, w, bias, float eps, float[:, :] out, int threads=1):
    require_rows("x", x, -1, -1)
    cdef Vector weight = Vector("w", w, x.shape[1]), shift = Vector("bias", bias, x.shape[1])
    require_rows("out", out, x.shape[0], x.shape[1])
    cdef mk_work work
    mk_begin(&work)
    mk_layer_norm(&work, &x[0, 0], x.strides[0] // 4, weight.at, shift.at, eps, x.shape[0], x.shape[1], &out[0, 0],
                  out.strides[0] // 4)
    finish(&work, threads)


def rope(float[:, :] x, const float[:, ::1] cos, const float[:, ::1] sin, int heads, int hd, int threads=1,
         int rotary=0, bint interleaved=False):
    cdef int rotated
    require_rows("x", x, -1, <Py_ssize_t>heads * hd)
    rotated = rotary_of(rotary, hd)
    require("cos", (x.shape[0], rotated // 2), (cos.shape[0], cos.shape[1]))
    require("sin", (x.shape[0], rotated // 2), (sin.shape[0], sin.shape[1]))
    cdef mk_work work
    mk_begin(&work)
    mk_rope(&work, &x[0, 0], x.strides[0] // 4, &cos[0, 0], &sin[0, 0], x.shape[0], heads, hd, rotated, interleaved)
    finish(&work, threads)


def activate(int kind, const float[:, :] gate, up, float[:, :] out, int threads=1, float limit=0.0, float alpha=1.702):
    cdef const float[:, :] factor
    cdef const float *at = NULL
    cdef long stride = 0
    require_activation(kind, up is not None, limit)
    require_rows("gate", gate, -1, -1)
    if up is not None:
        factor = up
        require_rows("up", factor, gate.shape[0], gate.shape[1])
        at, stride = &factor[0, 0], factor.strides[0] // 4
    require_rows("out", out, gate.shape[0], gate.shape[1])
    cdef mk_work work
    mk_begin(&work)
    mk_activate(&work, kind, &gate[0, 0], gate.strides[0] // 4, at, stride, limit, alpha, gate.shape[0], gate.shape[1],
                &out[0, 0], out.strides[0] // 4)
    finish(&work, threads)


def softcap(float[:, :] x, float cap, int threads=1):
    require_rows("x", x, -1, -1)
    require_cap(cap)
    cdef mk_work work
    mk_begin(&work)
    mk_softcap(&work, &x[0, 0], x.strides[0] // 4, cap, x.shape[0], x.shape[1])
    finish(&work, threads)


def softmax(float[:, :] x, int threads=1):
    require_rows("x", x, -1, -1)
    cdef mk_work work
    mk_begin(&work)
    mk_softmax(&work, &x[0, 0], x.strides[0] // 4, x.shape[0], x.shape[1])
    finish(&work, threads)


def top_k(const float[:, :] x, long k, float[:, ::1] values, int32_t[:, ::1] ids, int threads=1):
    require_rows("x", x, -1, -1)
    require("values", (x.shape[0], k), (values.shape[0], values.shape[1]))
    require("ids", (x.shape[0], k), (ids.shape[0], ids.shape[1]))
    cdef mk_work work
    mk_begin(&work)
    mk_top_k(&work, &x[0, 0], x.strides[0] // 4, x.shape[0], x.shape[1], k, &values[0, 0], &ids[0, 0])
    finish(&work, threads)


def lse_parts(const float[:, :] x, const float[::1] inv_t, bounds, float[:, :, ::1] out, int threads=1):
    require_rows("x", x, -1, -1)
    cdef const int32_t[::1] edges = np.ascontiguousarray(bounds, np.int32)
    cdef Py_ssize_t panels = edges.shape[0] - 1, i
    for i in range(max(panels, 1)):
        if panels < 1 or edges[0] < 0 or edges[panels] > x.shape[1] or edges[i + 1] < edges[i]:
            raise ValueError(f"bounds must rise within 0..{x.shape[1]}: {list(edges)}")
    require_vector("inv_t", x.shape[0], inv_t.shape[0])
    require("out", (x.shape[0], panels, 3), (out.shape[0], out.shape[1], out.shape[2]))
    cdef mk_work work
    mk_begin(&work)
    mk_lse_parts(&work, &x[0, 0], x.strides[0] // 4, &inv_t[0], x.shape[0], &edges[0], <int>panels, &out[0, 0, 0])
    finish(&work, threads)
