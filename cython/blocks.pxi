# Matrices and activations in blocks: packing, quantising, and the way back.


def pack(int type, const uint8_t[:, :] canonical, long k, bounds, uint8_t[::1] out, int threads=1, stored=None,
         long first=0, whole=None, long head=0):
    require_type(type)
    cdef int kind = type if stored is None else stored
    cdef const int32_t[::1] edges = check_bounds(bounds, k, mk_block(type))
    cdef long n = canonical.shape[0], rows = first + n if whole is None else whole
    require_type(kind)
    if type == MK_BF12 and kind == MK_BF16:
        kind = type
    if kind != type and (mk_block(kind) > 1 or type not in (MK_Q8_0, MK_Q4_0, MK_W8A8)):
        raise ValueError(f"pack makes Q8_0, Q4_0 or W8A8 of F32, F16 or BF16, not block type {type} of {kind}")
    require("canonical", (n, mk_blocks(k, mk_block(kind)) * mk_block_bytes(kind)), (n, canonical.shape[1]))
    if canonical.shape[1] > 1 and canonical.strides[1] != 1:
        raise ValueError("canonical must have contiguous rows")
    if first < 0 or first % MK_TILE or first + n > rows or (n % MK_TILE and first + n < rows):
        raise ValueError(f"rows {first} to {first + n} are no whole tiles of {rows} rows")
    if head < 0 or head % 2 or (head and n % head):
        raise ValueError(f"{n} rows are no whole heads of two halves: {head} rows each")
    require_vector("out", packed_bytes(type, rows, edges), out.shape[0])
    cdef mk_work work
    cdef int misfit = 0
    mk_begin(&work)
    mk_pack(&work, type, kind, &canonical[0, 0], canonical.strides[0], n, head, &edges[0],
            <int>edges.shape[0] - 1, &out[0], first, rows, &misfit)
    finish(&work, threads)
    if misfit:
        raise Misfit(MISFIT)


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


def quantize_rows(const float[:, :] x, bounds, uint8_t[:, ::1] out, int threads=1, int type=MK_Q8_0):
    require_quantised(type)
    require_rows("x", x, -1, -1)
    cdef const int32_t[::1] edges = check_bounds(bounds, x.shape[1], 1)
    require("out", (x.shape[0], activation_bytes(type, edges)), (out.shape[0], out.shape[1]))
    cdef mk_work work
    mk_begin(&work)
    mk_quantize_rows(&work, type, &x[0, 0], x.strides[0] // 4, NULL, x.shape[0], &edges[0], <int>edges.shape[0] - 1,
                     &out[0, 0], out.shape[1])
    finish(&work, threads)
