# Whole layers as one call.

# The layers of one parallel region have this many rows of activations in total, unless one layer has more. A region
# costs some microseconds, and at its end the caller waits for every thread, even one whose core another program uses.
# Between regions Python handles signals, and the caller can make progress with messages.
cdef enum:
    REGION_ROWS = 256
    REGION_ROWS_WITH_MESSAGES = 16
    TABLE = 5  # the index, in a step's arrays, of the table, the only array without an element for each row


cdef class LayerStack:
    cdef list layers, pools, places
    cdef int kv_type
    cdef long width

    def __init__(self, layers, int kv_type, pools, places=None):
        cdef Attention attention
        cdef Residual after_attention, after_mlp
        cdef Mlp mlp
        self.layers, self.kv_type, self.pools = [tuple(layer) for layer in layers], kv_type, list(pools)
        self.places = [0] * len(self.layers) if places is None else list(places)
        if not len(self.pools) == len(self.places) == len(self.layers):
            raise ValueError(f"{len(self.layers)} layers have as many pools and places, "
                             f"not {len(self.pools)} and {len(self.places)}")
        attention = self.layers[0][0]
        self.width = attention.qkv.first.k
        for attention, after_attention, mlp, after_mlp in self.layers:
            widths = {attention.qkv.first.k, attention.o.widths[0], mlp.matrices.inputs.first.k,
                      mlp.matrices.down.widths[0], after_attention.width or self.width, after_mlp.width or self.width}
            if widths != {self.width}:
                raise ValueError(f"layers must be {self.width} wide throughout, not {sorted(widths)}")

    def __call__(self, float[:, ::1] x, rows, between, reduce, int threads=1, lanes=None):
        cdef Residual before
        cdef long m = x.shape[0], d = self.width, lane, count, begin, end
        cdef Pools pools
        cdef Attention attention
        cdef Residual after_attention, after_mlp
        cdef Mlp mlp
        bounds = [0, m] if lanes is None else list(lanes)
        count = len(bounds) - 1
        cdef Space space = Space(count * len(rows) * sizeof(Rows) + LINE)
        part = np.empty((m, d), np.float32)
        cdef float[:, ::1] parts = part
        cdef Sums sums = Sums(&parts[0, 0], d, 0)
        cdef Rows *places = <Rows *>space.take(count * len(rows) * sizeof(Rows))
        require_rows("x", x, -1, d)
        if not 0 <= min(self.places) <= max(self.places) < len(rows):
            raise ValueError(f"layers use places {self.places}, and there are {len(rows)}")
        if bounds[0] != 0 or bounds[count] != m or sorted(set(bounds)) != bounds or reduce is None and count > 1:
            raise ValueError(f"lanes are rows between sums of {m} rows, not {bounds}")
        of_lanes = []
        for lane in range(count):
            begin, end = bounds[lane], bounds[lane + 1]
            of_lanes.append([tuple(of if of is None or number == TABLE else of[begin:end]
                                   for number, of in enumerate(where)) for where in rows])
            for place, where in enumerate(of_lanes[lane]):
                places[lane * len(rows) + place] = self.rows_at(place, where, end - begin)
        if reduce is None:
            together = max(1, (REGION_ROWS if between is None else REGION_ROWS_WITH_MESSAGES) // m)
            for first in range(0, len(self.layers), together):
                if between is not None:
                    between()
                self.compute(first, min(first + together, len(self.layers)), &x[0, 0], m, places, &sums, threads)
            return
        slices = [part[begin:end] for begin, end in zip(bounds, bounds[1:])]
        added, before = [None] * count, None
        for (attention, after_attention, mlp, after_mlp), place, (keys, values) in zip(self.layers, self.places,
                                                                                       self.pools):
            if between is not None:
                between()
            pools = attention.pools(self.kv_type, keys, values)
            for lane in range(count):
                begin, end = bounds[lane], bounds[lane + 1]
                sums.to = &parts[begin, 0]
                if before is not None:
                    added[lane]()
                    before.compute(&x[begin, 0], d, sums.to, d, end - begin, d, threads)
                attention.compute(&x[begin, 0], d, &places[lane * len(rows) + <int>place], self.kv_type, &pools,
                                  &sums, threads)
                added[lane] = reduce(slices[lane], lane)
            for lane in range(count):
                begin, end = bounds[lane], bounds[lane + 1]
                sums.to = &parts[begin, 0]
                added[lane]()
                after_attention.compute(&x[begin, 0], d, sums.to, d, end - begin, d, threads)
                mlp.compute(&x[begin, 0], d, end - begin, &sums, threads)
                added[lane] = reduce(slices[lane], lane)
            before = after_mlp
        for lane in range(count):
            begin, end = bounds[lane], bounds[lane + 1]
            added[lane]()
            before.compute(&x[begin, 0], d, &parts[begin, 0], d, end - begin, d, threads)

    cdef int compute(self, Py_ssize_t first, Py_ssize_t last, float *x, long m, Rows *places, Sums *part,
                     int threads) except -1:
        """Compute layers first .. last - 1 of the rows x in one parallel region; the layers share the space."""
        cdef Attention attention
        cdef Residual after_attention, after_mlp
        cdef Mlp mlp
        cdef Pools pools
        cdef long d = self.width, steps = 0
        cdef size_t size = 0
        cdef Py_ssize_t i
        for attention, _, mlp, _ in self.layers[first:last]:
            steps += attention.steps + mlp.steps + 2 * RESIDUAL_STEPS
            size = max(size, attention.space(m), mlp.space(m))
        cdef Space space = Space(step_bytes(steps) + size)
        cdef mk_work work
        begin(&work, space, steps)
        cdef void *activations = space.take(0)
        for i in range(first, last):
            attention, after_attention, mlp, after_mlp = self.layers[i]
            keys, values = self.pools[i]
            pools = attention.pools(self.kv_type, keys, values)
            attention.add(&work, space, x, d, &places[<int>self.places[i]], self.kv_type, &pools, part)
            after_attention.add(&work, x, d, part.to, part.stride, m, d)
            space.release(activations)
            mlp.add(&work, space, x, d, m, part)
            after_mlp.add(&work, x, d, part.to, part.stride, m, d)
            space.release(activations)
        return finish(&work, threads)

    cdef Rows rows_at(self, int place, where, long m) except *:
        """Return the rows of one place, checked for all layers that use them."""
        cdef Attention attention
        cdef int rotary = 0
        layers = [(layer[0], len(keys)) for layer, at, (keys, values) in zip(self.layers, self.places, self.pools)
                  if at == place]
        windows = [window_of(layer) for layer, blocks in layers]
        for attention, blocks in layers:
            if rotary and attention.rotary and rotary != attention.rotary:
                raise ValueError(f"layers of one place rotate {rotary} and {attention.rotary} dimensions")
            rotary = attention.rotary or rotary
        if not layers:
            raise ValueError(f"no layer uses place {place}")
        cdef int window = 0 if 0 in windows else max(windows)
        cdef Py_ssize_t pool = min([blocks for layer, blocks in layers])
        cos, sin, block, offset, pos, table, table_start = where
        return rows_of(cos, sin, block, offset, pos, table, table_start, m, rotary, window, pool)


cdef int window_of(Attention layer) noexcept:
    return layer.window
