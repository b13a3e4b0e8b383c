# Checks of arguments that several functions share; each raises ValueError with the condition that must hold.


cdef int require(str name, tuple want, tuple got) except -1:
    if want != got:
        raise ValueError(f"{name} must have shape {list(want)}, not {list(got)}")
    return 0


cdef int require_vector(str name, Py_ssize_t want, Py_ssize_t got) except -1:
    if want != got:
        raise ValueError(f"{name} must have shape [{want}], not [{got}]")
    return 0


cdef int require_rows(str name, const float[:, :] x, Py_ssize_t rows, Py_ssize_t width) except -1:
    """Check a matrix with contiguous rows; a negative count allows any number."""
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
    """Return panel bounds as int32; they must rise from 0 to k, and inner ones must be multiples of `block`."""
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
    """Check that rows of a K-quant consist of whole blocks."""
    if k % MK_SUPER:
        raise ValueError(f"the columns of a K-quant matrix must be a multiple of {MK_SUPER}, not {k}")
    return 0


cdef long count_blocks(const int32_t[::1] edges, int block) noexcept:
    cdef long blocks = 0
    cdef Py_ssize_t i
    for i in range(edges.shape[0] - 1):
        blocks += mk_blocks(edges[i + 1] - edges[i], block)
    return blocks


cdef long tile_bytes(int type, const int32_t[::1] edges) noexcept:
    cdef long size = 0
    cdef Py_ssize_t i
    for i in range(edges.shape[0] - 1):
        size += mk_tile_bytes(type, edges[i + 1] - edges[i])
    return size


cdef long activation_bytes(int type, const int32_t[::1] edges) noexcept:
    cdef long size = 0
    cdef Py_ssize_t i
    for i in range(edges.shape[0] - 1):
        size += mk_activation_bytes(type, edges[i + 1] - edges[i])
    return size


cdef int require_quantised(int type) except -1:
    require_type(type)
    if not mk_is_quantised(type):
        raise ValueError(f"activations for block type {type} are floats")
    return 0


cdef int require_exact(int type, const int32_t[::1] edges) except -1:
    """Check that the sums of a panel's products fit into 32 bits."""
    cdef Py_ssize_t i
    for i in range(edges.shape[0] - 1):
        if mk_is_panel(type) and edges[i + 1] - edges[i] > MK_PANEL_COLUMNS:
            raise ValueError(f"a panel of block type {type} has at most {MK_PANEL_COLUMNS} columns, "
                             f"not {edges[i + 1] - edges[i]}")
    return 0


cdef long packed_bytes(int type, long n, const int32_t[::1] edges) noexcept:
    if mk_is_float(type):
        return n * count_blocks(edges, mk_block(type)) * mk_block_bytes(type)
    return mk_blocks(n, MK_TILE) * tile_bytes(type, edges)


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
    if kv_type != MK_F32 and kv_type != MK_F16 and not mk_is_kv_int8(kv_type):
        raise ValueError(f"the KV cache holds F32, F16, Q8_0 or Q8_0_INT8, not block type {kv_type}")
    for dim in (hd, vd):
        if not 0 < dim <= MK_MAX_HEAD_DIM:
            raise ValueError(f"a head has 1 to {MK_MAX_HEAD_DIM} dimensions, not {dim}")
        if mk_is_kv_int8(kv_type) and dim % MK_BLOCK:
            raise ValueError(f"a KV cache of int8 needs heads of a multiple of {MK_BLOCK} dimensions, not {dim}")
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
    if mk_is_kv_int8(kv_type):
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
    if mk_is_kv_int8(kv_type):
        require("vpool", (pools.blocks, kvh, mk_kv_bytes(kv_type, vd)), vpool.shape)
    else:
        require("vpool", (pools.blocks, kvh, MK_KV_BLOCK, vd), vpool.shape)
    return pools


cdef int require_chunks(int window, bint chunked) except -1:
    if chunked and window < 1:
        raise ValueError("chunks are windows: they need a number of positions")
    return 0


cdef mk_tuning tuning_of(tuning) except *:
    """Return the tuning of (beta, length, offset), or none for None."""
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
    """Check that every block that a row reads is in its table and in the pool."""
    cdef Py_ssize_t row, first, last, b, low = 0, high = -1
    for row in range(pos.shape[0]):
        if pos[row] < 0 or start[row] < 0 or start[row] + pos[row] // MK_KV_BLOCK >= table.shape[0]:
            raise ValueError(f"row {row}: position {pos[row]} lies outside its block table of "
                             f"{table.shape[0] - start[row]} blocks")
        first = (pos[row] - window + 1) // MK_KV_BLOCK if window and pos[row] >= window else 0
        last = pos[row] // MK_KV_BLOCK
        if row == 0 or start[row] != start[row - 1] or first < low:  # blocks low..high of this sequence are checked
            low, high = first, first - 1
        for b in range(max(first, high + 1), last + 1):
            if not 0 <= table[start[row] + b] < pool:
                raise ValueError(f"row {row}: the block table names a block outside the pool of {pool}")
        high = max(high, last)
    return 0


cdef int rotary_of(int rotary, int hd) except -1:
    """Return how many dimensions of a head are rotated; `rotary` 0 stands for all of them."""
    if hd % 2 and not rotary:
        raise ValueError(f"rope needs an even head dimension, not {hd}")
    if rotary < 0 or rotary % 2 or rotary > hd:
        raise ValueError(f"rope rotates an even number of a head's {hd} dimensions, not {rotary}")
    return rotary or hd


cdef int require_activation(int kind, bint gated, float limit) except -1:
    if not 0 <= kind < MK_ACTIVATION_COUNT:
        raise ValueError(f"there is no activation {kind}")
    if kind == MK_SWIGLU_CLAMPED and not (gated and limit > 0):
        raise ValueError("the clamped SwiGLU needs up and a limit above 0")
    return 0


cdef int require_cap(float cap) except -1:
    if not cap > 0:
        raise ValueError(f"a soft cap must be above 0, not {cap}")
    return 0


cdef int require_sequences(const int32_t[::1] first_rows, const int32_t[::1] slots, Py_ssize_t rows, Py_ssize_t states
                           ) except -1:
    """Check that the first sequence begins at row 0, that each has at least one row, and that no two share a slot."""
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


cdef long delta_floats(long heads, long dk, long dv) noexcept:
    """Floats of a sequence's state (`types.delta_floats`)."""
    return heads * mk_blocks(dv, MK_TILE) * MK_TILE * dk
