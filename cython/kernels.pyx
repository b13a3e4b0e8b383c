# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""The compiled kernels: each function checks its arguments, lets the GIL go and calls core/kernels.h.

Shapes, layouts and words of errors are those of the NumPy twin, mpillm/kernels/reference.
"""

from libc.errno cimport EAGAIN
from libc.stdint cimport int32_t, uint8_t, uint16_t

import numpy as np

include "declarations.pxi"  # what core/kernels.h declares; setup.py makes it


def available():
    """Names of the paths this build has and this machine can run, slowest first."""
    names = []
    while mk_path_name(len(names)) != NULL:
        names.append(mk_path_name(len(names)).decode())
    return tuple(names)


def set_path(str name):
    """Use a path; ValueError if it is not among `available()`."""
    if mk_set_path(name.encode()):
        raise ValueError(f"this machine has no kernel path {name!r}")


def block_types():
    """The kind, the values, the bytes and the packed bytes of a block of each type."""
    kinds = ("float", "plain", "super")
    return [(kinds[mk_kind(type)], mk_block(type), mk_block_bytes(type), mk_packed_bytes(type))
            for type in range(MK_TYPES)]


# --- checks -----------------------------------------------------------------------------------------------------


cdef int require(str name, tuple want, tuple got) except -1:
    if want != got:
        raise ValueError(f"{name} must have shape {list(want)}, not {list(got)}")
    return 0


cdef int require_vector(str name, Py_ssize_t want, Py_ssize_t got) except -1:
    if want != got:
        raise ValueError(f"{name} must have shape [{want}], not [{got}]")
    return 0


cdef int require_rows(str name, const float[:, :] x, Py_ssize_t rows, Py_ssize_t width) except -1:
    """A matrix with contiguous rows; a negative count is any."""
    if (rows >= 0 and x.shape[0] != rows) or (width >= 0 and x.shape[1] != width):
        want = [x.shape[0] if rows < 0 else rows, x.shape[1] if width < 0 else width]
        raise ValueError(f"{name} must have shape {want}, not {[x.shape[0], x.shape[1]]}")
    if (x.shape[1] > 1 and x.strides[1] != 4) or x.strides[0] % 4:
        raise ValueError(f"{name} must have contiguous rows")
    return 0


cdef int require_type(int type) except -1:
    if not 0 <= type < MK_TYPES:
        raise ValueError(f"there is no block type {type}")
    return 0


cdef const int32_t[::1] check_bounds(bounds, long k, int block):
    """Panel bounds as int32; they rise from 0 to k, and inner ones are multiples of `block`."""
    cdef const int32_t[::1] edges = np.ascontiguousarray(bounds, np.int32)
    cdef Py_ssize_t panels = edges.shape[0] - 1, i
    if panels < 1 or panels & (panels - 1) or panels > 64:
        raise ValueError(f"bounds must be P + 1 integers with P a power of two up to 64, not {len(edges)} integers")
    for i in range(panels):
        if edges[0] or edges[panels] != k or edges[i + 1] < edges[i]:
            raise ValueError(f"bounds must rise from 0 to k = {k}: {list(edges)}")
        if edges[i] % block:
            raise ValueError(f"inner bounds of a quantised matrix must be multiples of {block}: {list(edges)}")
    if block == MK_SUPER:
        require_whole(k)
    return edges


cdef int require_whole(long k) except -1:
    """K-quants come in whole blocks."""
    if k % MK_SUPER:
        raise ValueError(f"the columns of a K-quant matrix must be a multiple of {MK_SUPER}, not {k}")
    return 0


cdef long count_blocks(const int32_t[::1] edges, int block) noexcept:
    cdef long blocks = 0
    cdef Py_ssize_t i
    for i in range(edges.shape[0] - 1):
        blocks += mk_blocks(edges[i + 1] - edges[i], block)
    return blocks


cdef long packed_bytes(int type, long n, const int32_t[::1] edges) noexcept:
    if mk_is_float(type):
        return n * edges[edges.shape[0] - 1] * mk_block_bytes(type)
    return mk_blocks(n, MK_TILE) * MK_TILE * count_blocks(edges, mk_block(type)) * mk_packed_bytes(type)


cdef struct Pools:
    void *keys
    void *values
    Py_ssize_t blocks


cdef Pools pools_of(int kv_type, kpool, vpool, int kvh, int hd, int vd) except *:
    """Contiguous pools for keys of hd dimensions and values of vd; the caller keeps the arrays.

    vpool may be None: values are then the first vd dimensions of keys.
    """
    cdef const float[:, :, :, ::1] kfloats, vfloats
    cdef const uint16_t[:, :, :, ::1] khalves, vhalves
    cdef const uint8_t[:, :, ::1] kbytes, vbytes
    cdef Pools pools
    if kv_type != MK_F32 and kv_type != MK_F16 and kv_type != MK_Q8_0:
        raise ValueError(f"the KV cache holds F32, F16 or Q8_0, not block type {kv_type}")
    for dim in (hd, vd):
        if not 0 < dim <= MK_MAX_HEAD_DIM:
            raise ValueError(f"a head has 1 to {MK_MAX_HEAD_DIM} dimensions, not {dim}")
        if kv_type == MK_Q8_0 and dim % MK_BLOCK:
            raise ValueError(f"a Q8_0 KV cache needs heads of a multiple of {MK_BLOCK} dimensions, not {dim}")
    pools.values = NULL
    if kv_type == MK_F32:
        kfloats = kpool
        pools.keys = <void *>&kfloats[0, 0, 0, 0]
    elif kv_type == MK_F16:
        khalves = kpool
        pools.keys = <void *>&khalves[0, 0, 0, 0]
    else:
        kbytes = kpool
        pools.keys = <void *>&kbytes[0, 0, 0]
    pools.blocks = kpool.shape[0]
    if kv_type == MK_Q8_0:
        require("kpool", (pools.blocks, kvh, mk_kv_bytes(kv_type, hd)), kpool.shape)
    else:
        require("kpool", (pools.blocks, kvh, hd, MK_KV_BLOCK), kpool.shape)
    if vpool is None:
        if vd > hd:
            raise ValueError(f"values of {vd} dimensions are no part of keys of {hd}")
        return pools
    if kv_type == MK_F32:
        vfloats = vpool
        pools.values = <void *>&vfloats[0, 0, 0, 0]
    elif kv_type == MK_F16:
        vhalves = vpool
        pools.values = <void *>&vhalves[0, 0, 0, 0]
    else:
        vbytes = vpool
        pools.values = <void *>&vbytes[0, 0, 0]
    if kv_type == MK_Q8_0:
        require("vpool", (pools.blocks, kvh, mk_kv_bytes(kv_type, vd)), vpool.shape)
    else:
        require("vpool", (pools.blocks, kvh, MK_KV_BLOCK, vd), vpool.shape)
    return pools


cdef int require_chunks(int window, bint chunked) except -1:
    if chunked and window < 1:
        raise ValueError("chunks are windows: they need a number of positions")
    return 0


cdef mk_tuning tuning_of(tuning) except *:
    """beta, length and offset, or None."""
    cdef mk_tuning found = mk_tuning(0.0, 0, 0)
    if tuning is not None:
        found.beta, found.length, found.offset = tuning
        if found.length < 1 or found.offset < 0:
            raise ValueError(f"scores cannot be tuned by {tuning}: the length is at least 1, the offset at least 0")
    return found


cdef int require_range(str name, const int32_t[::1] values, int limit) except -1:
    cdef Py_ssize_t i
    for i in range(values.shape[0]):
        if not 0 <= values[i] < limit:
            raise ValueError(f"{name} must be within 0..{limit - 1}")
    return 0


cdef int require_tables(const int32_t[::1] pos, const int32_t[::1] table, const int32_t[::1] start, int window,
                        Py_ssize_t pool) except -1:
    """Every block that a row will read is in its table and in the pool."""
    cdef Py_ssize_t row, first, last, b, low = 0, high = -1
    for row in range(pos.shape[0]):
        if pos[row] < 0 or start[row] < 0 or start[row] + pos[row] // MK_KV_BLOCK >= table.shape[0]:
            raise ValueError(f"row {row}: position {pos[row]} lies outside its block table of "
                             f"{table.shape[0] - start[row]} blocks")
        first = (pos[row] - window + 1) // MK_KV_BLOCK if window and pos[row] >= window else 0
        last = pos[row] // MK_KV_BLOCK
        if row == 0 or start[row] != start[row - 1] or first < low:  # blocks low..high of the last sequence are fine
            low, high = first, first - 1
        for b in range(max(first, high + 1), last + 1):
            if not 0 <= table[start[row] + b] < pool:
                raise ValueError(f"row {row}: the block table names a block outside the pool of {pool}")
        high = max(high, last)
    return 0


# --- running ----------------------------------------------------------------------------------------------------


cdef int finish(mk_work *work, int threads) except -1:
    """Run what has been added, without the GIL."""
    cdef int failed
    cdef long capacity = mk_capacity(work)
    with nogil:
        failed = mk_run(work, threads)
    if failed == MK_TOO_MANY_STEPS:
        raise RuntimeError(f"the call needs more than the {capacity} steps of its list; nothing was computed")
    if failed == MK_NO_THREADS:
        raise OSError(EAGAIN, f"the kernels' {threads} threads do not start")
    if failed:
        raise MemoryError("attention")
    return 0


def first_touch(uint8_t[::1] memory, int threads=1):
    if memory.shape[0] and threads > 1:
        with nogil:
            mk_first_touch(&memory[0], memory.shape[0], threads)


def regions():
    """How many times work was given to the threads since the start of the process."""
    return mk_regions()


def weights_read():
    """Bytes of matrices that their products passed through since the start of the process."""
    return mk_weights_read()


# --- kernels ----------------------------------------------------------------------------------------------------


def pack(int type, const uint8_t[:, :] canonical, long k, bounds, uint8_t[::1] out, int threads=1, stored=None,
         long first=0, whole=None, long head=0):
    require_type(type)
    cdef int kind = type if stored is None else stored
    cdef const int32_t[::1] edges = check_bounds(bounds, k, mk_block(type))
    cdef long n = canonical.shape[0], rows = first + n if whole is None else whole
    require_type(kind)
    if kind != type and (not mk_is_float(kind) or (type != MK_Q8_0 and type != MK_Q4_0)):
        raise ValueError(f"pack makes Q8_0 or Q4_0 of F32, F16 or BF16, not block type {type} of {kind}")
    require("canonical", (n, mk_blocks(k, mk_block(kind)) * mk_block_bytes(kind)), (n, canonical.shape[1]))
    if canonical.shape[1] > 1 and canonical.strides[1] != 1:
        raise ValueError("canonical must have contiguous rows")
    if first < 0 or first % MK_TILE or first + n > rows or (n % MK_TILE and first + n < rows):
        raise ValueError(f"rows {first} to {first + n} are no whole tiles of {rows} rows")
    if head < 0 or head % 2 or (head and n % head):
        raise ValueError(f"{n} rows are no whole heads of two halves: {head} rows each")
    require_vector("out", packed_bytes(type, rows, edges), out.shape[0])
    cdef mk_work work
    mk_begin(&work)
    mk_pack(&work, type, kind, &canonical[0, 0], canonical.strides[0], n, head, &edges[0],
            <int>edges.shape[0] - 1, &out[0], first, rows)
    finish(&work, threads)


def quantize(int type, const float[:, :] x, uint8_t[:, ::1] out, int threads=1):
    require_type(type)
    if type != MK_Q8_0 and type != MK_Q4_0:
        raise ValueError(f"quantize makes Q8_0 or Q4_0, not block type {type}")
    require_rows("x", x, -1, -1)
    require("out", (x.shape[0], mk_blocks(x.shape[1], MK_BLOCK) * mk_block_bytes(type)), (out.shape[0], out.shape[1]))
    cdef mk_work work
    mk_begin(&work)
    mk_quantize(&work, type, &x[0, 0], x.strides[0] // 4, x.shape[0], x.shape[1], &out[0, 0])
    finish(&work, threads)


def dequantize(int type, const uint8_t[:, ::1] canonical, long k, float[:, :] out, int threads=1):
    require_type(type)
    if mk_block(type) == MK_SUPER:
        require_whole(k)
    cdef long n = canonical.shape[0]
    require("canonical", (n, mk_blocks(k, mk_block(type)) * mk_block_bytes(type)), (n, canonical.shape[1]))
    require_rows("out", out, n, k)
    cdef mk_work work
    mk_begin(&work)
    mk_dequantize(&work, type, &canonical[0, 0], n, k, &out[0, 0], out.strides[0] // 4)
    finish(&work, threads)


def quantize_rows(const float[:, :] x, bounds, uint8_t[:, ::1] out, int threads=1):
    require_rows("x", x, -1, -1)
    cdef const int32_t[::1] edges = check_bounds(bounds, x.shape[1], 1)
    require("out", (x.shape[0], count_blocks(edges, MK_BLOCK) * MK_ACTIVATION), (out.shape[0], out.shape[1]))
    cdef mk_work work
    mk_begin(&work)
    mk_quantize_rows(&work, &x[0, 0], x.strides[0] // 4, NULL, x.shape[0], &edges[0], <int>edges.shape[0] - 1,
                     &out[0, 0], out.shape[1])
    finish(&work, threads)


cdef class Product:
    """A matrix [n, k], checked once; its panels may lie apart, and rows of floats `row_bytes` (0: they are packed)."""

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
            self.x_bytes = count_blocks(self.edges, MK_BLOCK) * MK_ACTIVATION
        else:
            self.x_bytes = mk_float_bytes(type, &self.edges[0], self.panels)
        if row_bytes and (self.quantised() or row_bytes < k * mk_block_bytes(type)):
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
        return not mk_is_float(self.type)

    cdef int form(self) noexcept:
        """Which of the forms of activations it takes (`Forms`)."""
        return 0 if self.quantised() else 2 if self.type == MK_BF16 else 1

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
            mk_quantize_rows(work, x, stride, at, m, &self.edges[0], self.panels, rows, self.x_bytes)
        else:
            mk_float_rows(work, self.type, x, stride, at, m, &self.edges[0], self.panels, rows, self.x_bytes)
        mk_join(work, 1)
        return rows


cdef enum: FORMS = 3  # of activations: quantised, floats, rounded to BF16


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


cdef class Vector:
    """A vector [n], or none: then `at` is NULL."""

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


cdef int rotary_of(int rotary, int hd) except -1:
    """The number of dimensions of a head that are rotated; 0 means all of them."""
    if hd % 2 and not rotary:
        raise ValueError(f"rope needs an even head dimension, not {hd}")
    if rotary < 0 or rotary % 2 or rotary > hd:
        raise ValueError(f"rope rotates an even number of a head's {hd} dimensions, not {rotary}")
    return rotary or hd


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


cdef int require_activation(int kind, bint gated, float limit) except -1:
    if not 0 <= kind < MK_ACTIVATION_COUNT:
        raise ValueError(f"there is no activation {kind}")
    if kind == MK_SWIGLU_CLAMPED and not (gated and limit > 0):
        raise ValueError("the clamped SwiGLU needs up and a limit above 0")
    return 0


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


cdef int require_cap(float cap) except -1:
    if not cap > 0:
        raise ValueError(f"a soft cap must be above 0, not {cap}")
    return 0


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


cdef int require_sequences(const int32_t[::1] first_rows, const int32_t[::1] slots, Py_ssize_t rows, Py_ssize_t states
                           ) except -1:
    """Sequences of at least one row each, which begin at row 0, and a slot for each of them."""
    cdef Py_ssize_t i, count = first_rows.shape[0]
    require_vector("slots", count, slots.shape[0])
    for i in range(count):
        if first_rows[0] or first_rows[i] >= (first_rows[i + 1] if i + 1 < count else rows):
            raise ValueError(f"first_rows must rise from 0 and end before {rows}: {list(first_rows)}")
    if not count and rows:
        raise ValueError(f"{rows} rows belong to no sequence")
    require_range("slots", slots, <int>states)
    if len(set(slots)) < count:
        raise ValueError(f"every sequence has a slot of its own, not {list(slots)}")
    return 0


cdef int require_states(str name, const float[:, :] states, Py_ssize_t width) except -1:
    require_rows(name, states, -1, -1)
    if states.shape[1] < width:
        raise ValueError(f"{name} must be at least {width} wide, not {states.shape[1]}")
    return 0


def decays(float[:, ::1] x, const float[::1] rates, const float[::1] bias, int threads=1, steps=None, float scale=1.0,
           float low=0.0, float high=np.inf):
    cdef float[:, ::1] made
    cdef float *to = NULL
    require_vector("rates", x.shape[1], rates.shape[0])
    require_vector("bias", x.shape[1], bias.shape[0])
    if steps is not None:
        made = steps
        require("steps", (x.shape[0], x.shape[1]), (made.shape[0], made.shape[1]))
        to = &made[0, 0]
    cdef mk_work work
    mk_begin(&work)
    mk_decays(&work, &x[0, 0], scale, &rates[0], &bias[0], low, high, x.shape[0], x.shape[1], to, &x[0, 0])
    finish(&work, threads)


def short_conv(const float[:, :] x, const float[:, ::1] w, bias, float[:, :] tails, const int32_t[::1] first_rows,
               const int32_t[::1] slots, float[:, :] out, bint silu, int threads=1):
    cdef long m = x.shape[0], channels = x.shape[1], taps = w.shape[0]
    cdef Vector shift = Vector("bias", bias, channels)
    require_rows("x", x, -1, -1)
    require("w", (taps, channels), (w.shape[0], w.shape[1]))
    require_rows("out", out, m, channels)
    require_states("tails", tails, (taps - 1) * channels)
    require_sequences(first_rows, slots, m, tails.shape[0])
    cdef mk_work work
    mk_begin(&work)
    mk_short_conv(&work, &x[0, 0], x.strides[0] // 4, &w[0, 0], shift.at, &tails[0, 0], tails.strides[0] // 4,
                  &first_rows[0], &slots[0], first_rows.shape[0], m, channels, <int>taps, silu, &out[0, 0],
                  out.strides[0] // 4)
    finish(&work, threads)


def delta_rule(const float[:, ::1] q, const float[:, ::1] k, const float[:, ::1] v, const float[:, ::1] decay,
               const float[:, ::1] beta, float[:, :] states, const int32_t[::1] first_rows, const int32_t[::1] slots,
               const int32_t[::1] key_of_head, int dk, int dv, float[:, ::1] out, int threads=1):
    cdef long m = q.shape[0], keys = q.shape[1] // dk, heads = key_of_head.shape[0]
    require("q", (m, keys * dk), (q.shape[0], q.shape[1]))
    require("k", (m, keys * dk), (k.shape[0], k.shape[1]))
    require("v", (m, heads * dv), (v.shape[0], v.shape[1]))
    require_range("key_of_head", key_of_head, <int>keys)
    require("decay", (m, heads), (decay.shape[0], decay.shape[1]))
    require("beta", (m, heads), (beta.shape[0], beta.shape[1]))
    require("out", (m, heads * dv), (out.shape[0], out.shape[1]))
    require_states("states", states, delta_floats(heads, dk, dv))
    require_sequences(first_rows, slots, m, states.shape[0])
    cdef mk_work work
    mk_begin(&work)
    mk_delta_rule(&work, &q[0, 0], &k[0, 0], &v[0, 0], &decay[0, 0], &beta[0, 0], &states[0, 0], states.strides[0] // 4,
                  &first_rows[0], &slots[0], first_rows.shape[0], &key_of_head[0], m, <int>keys, <int>heads, dk, dv,
                  &out[0, 0])
    finish(&work, threads)


def selective_scan(const float[:, ::1] c, const float[:, ::1] b, const float[:, ::1] x, const float[:, ::1] decay,
                   const float[:, ::1] step, const float[::1] skip, float[:, :] states, const int32_t[::1] first_rows,
                   const int32_t[::1] slots, const int32_t[::1] group_of_head, int dk, int dv, float[:, ::1] out,
                   int threads=1):
    cdef long m = c.shape[0], groups = c.shape[1] // dk, heads = group_of_head.shape[0]
    require("c", (m, groups * dk), (c.shape[0], c.shape[1]))
    require("b", (m, groups * dk), (b.shape[0], b.shape[1]))
    require("x", (m, heads * dv), (x.shape[0], x.shape[1]))
    require_range("group_of_head", group_of_head, <int>groups)
    require("decay", (m, heads), (decay.shape[0], decay.shape[1]))
    require("step", (m, heads), (step.shape[0], step.shape[1]))
    require_vector("skip", heads, skip.shape[0])
    require("out", (m, heads * dv), (out.shape[0], out.shape[1]))
    require_states("states", states, delta_floats(heads, dk, dv))
    require_sequences(first_rows, slots, m, states.shape[0])
    cdef mk_work work
    mk_begin(&work)
    mk_selective_scan(&work, &c[0, 0], &b[0, 0], &x[0, 0], &decay[0, 0], &step[0, 0], &skip[0], &states[0, 0],
                      states.strides[0] // 4, &first_rows[0], &slots[0], first_rows.shape[0], &group_of_head[0], m,
                      <int>groups, <int>heads, dk, dv, &out[0, 0])
    finish(&work, threads)


cdef long delta_floats(long heads, long dk, long dv) noexcept:
    """Floats of a sequence's state (`types.delta_floats`)."""
    return heads * mk_blocks(dv, MK_TILE) * MK_TILE * dk


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


# Several operations as one piece of work for the threads.  The NumPy twin, mpillm/kernels/fused.py, says what each
# computes.
include "products.pxi"
include "norms.pxi"
include "attention.pxi"
include "latent.pxi"
include "recurrent.pxi"
include "mlp.pxi"
include "stack.pxi"
