/* Operations on rows.  Sums run in 16 lanes, folded in the layer's fixed tree.  Items are rows. */

#define EACH(i, d) for (long i = 0; i < (d); i += MK_TILE)

static void fold(const void *argument, long begin, long end) {
    const mk_small_job *job = argument;
    long panel = job->m * job->d;
    for (long row = begin; row < end; row++) EACH(i, job->d) {
        vf pending[MK_MAX_LEVELS];
        int depth = 0;
        for (int p = 0; p < job->panels; p++) {
            pending[depth++] = vf_row(job->a + p * panel + row * job->d, i, job->d, 0.0f);
            for (int carry = p; carry & 1; carry >>= 1, depth--)
                pending[depth - 2] = vf_add(pending[depth - 2], pending[depth - 1]);
        }
        vf_row_store(job->out + row * job->out_stride, i, job->d, pending[0]);
    }
}

MK_INLINE float sum_of_squares(const float *x, long d) {
    vf squares = vf_set1(0.0f);
    EACH(i, d) {
        vf v = vf_row(x, i, d, 0.0f);
        squares = vf_fma(v, v, squares);
    }
    return vf_hadd(squares);
}

static void square_sums(const void *argument, long begin, long end) {
    const mk_small_job *job = argument;
    for (long row = begin; row < end; row++) job->out[row] = sum_of_squares(job->a + row * job->a_stride, job->d);
}

/* The squares of each of `heads` parts of a row are summed separately, and these sums are added in order. */
static void rms_norm(const void *argument, long begin, long end) {
    const mk_small_job *job = argument;
    const float *w = job->b;
    const long d = job->d, part = d / job->heads;
    for (long row = begin; row < end; row++) {
        const float *x = job->a + row * job->a_stride;
        float *out = job->out + row * job->out_stride;
        float total = sum_of_squares(x, part);
        for (int head = 1; head < job->heads; head++) total += sum_of_squares(x + head * part, part);
        vf scale = vf_set1(1.0f / sqrtf(total / (float)d + job->eps));
        EACH(i, d) {
            vf v = vf_mul(vf_row(x, i, d, 0.0f), scale);
            if (w) v = vf_mul(vf_row(w, i, d, 0.0f), v);
            vf_row_store(out, i, d, v);
        }
    }
}

static void layer_norm(const void *argument, long begin, long end) {
    const mk_small_job *job = argument;
    const float *w = job->b, *bias = job->c;
    const long d = job->d;
    for (long row = begin; row < end; row++) {
        const float *x = job->a + row * job->a_stride;
        float *out = job->out + row * job->out_stride;
        vf total = vf_set1(0.0f), squares = total;
        EACH(i, d) total = vf_add(total, vf_row(x, i, d, 0.0f));
        const float mean = vf_hadd(total) / (float)d;
        const vf means = vf_set1(mean);
        EACH(i, d) {
            vf v = vf_sub(vf_row(x, i, d, mean), means);
            squares = vf_fma(v, v, squares);
        }
        vf scale = vf_set1(1.0f / sqrtf(vf_hadd(squares) / (float)d + job->eps));
        EACH(i, d) {
            vf v = vf_mul(vf_sub(vf_row(x, i, d, mean), means), scale);
            if (w) v = vf_mul(vf_row(w, i, d, 0.0f), v);
            if (bias) v = vf_add(v, vf_row(bias, i, d, 0.0f));
            vf_row_store(out, i, d, v);
        }
    }
}

/* Rotate the pairs (a, b) of the first 2 * half dimensions of each head: b lies `half` dimensions after a. */
static void rope(const void *argument, long begin, long end) {
    const mk_small_job *job = argument;
    long half = job->d / 2;
    for (long row = begin; row < end; row++)
        for (int head = 0; head < job->heads; head++) EACH(i, half) {
            float *x = job->out + row * job->out_stride + (long)head * job->hd;
            vf c = vf_row(job->a + row * half, i, half, 0.0f), s = vf_row(job->b + row * half, i, half, 0.0f);
            vf a = vf_row(x, i, half, 0.0f), b = vf_row(x + half, i, half, 0.0f);
            vf_row_store(x, i, half, vf_sub(vf_mul(a, c), vf_mul(b, s)));
            vf_row_store(x + half, i, half, vf_add(vf_mul(b, c), vf_mul(a, s)));
        }
}

/* The same for neighbouring a and b. */
static void rope_interleaved(const void *argument, long begin, long end) {
    const mk_small_job *job = argument;
    long half = job->d / 2;
    for (long row = begin; row < end; row++)
        for (int head = 0; head < job->heads; head++) EACH(i, half) {
            float *x = job->out + row * job->out_stride + (long)head * job->hd + 2 * i;
            float evens[MK_TILE] = {0}, odds[MK_TILE] = {0};
            const long count = half - i < MK_TILE ? half - i : MK_TILE;
            vf c = vf_row(job->a + row * half, i, half, 0.0f), s = vf_row(job->b + row * half, i, half, 0.0f);
            for (long j = 0; j < count; j++) evens[j] = x[2 * j], odds[j] = x[2 * j + 1];
            vf a = vf_load(evens), b = vf_load(odds);
            vf_store(evens, vf_sub(vf_mul(a, c), vf_mul(b, s)));
            vf_store(odds, vf_add(vf_mul(b, c), vf_mul(a, s)));
            for (long j = 0; j < count; j++) x[2 * j] = evens[j], x[2 * j + 1] = odds[j];
        }
}

MK_INLINE vf sigmoid_times(vf x, vf factor) { /* factor / (1 + e^-x) */
    return vf_div(factor, vf_add(vf_set1(1.0f), vf_exp(vf_sub(vf_set1(-0.0f), x))));
}

/* The activation f(gate) of mpillm.kernels.types.Activation; for MK_SWIGLU_CLAMPED only the factor of the gate. */
MK_INLINE vf activated(const int kind, vf g, vf limit, vf alpha) {
    vf cube;
    switch (kind) {
    case MK_SILU: return sigmoid_times(g, g);
    case MK_GELU: return vf_mul(g, vf_normal(g));
    case MK_GELU_TANH: /* (1 + tanh(u)) / 2 = 1 / (1 + e^-2u), u = sqrt(2 / pi) (g + 0.044715 g^3) */
        cube = vf_mul(vf_mul(vf_mul(g, g), g), vf_set1(0.044715f));
        return sigmoid_times(vf_mul(vf_add(g, cube), vf_set1(1.5957691216057308f)), g);
    case MK_RELU2:
        g = vf_max(vf_set1(0.0f), g);
        return vf_mul(g, g);
    case MK_RELU: return vf_max(vf_set1(0.0f), g);
    case MK_SIGMOID: return sigmoid_times(g, vf_set1(1.0f));
    case MK_IDENTITY: return g;
    case MK_SILU_SCALED:
        g = vf_mul(alpha, g);
        return sigmoid_times(g, g);
    default: /* MK_SWIGLU_CLAMPED */
        g = vf_min(limit, g);
        return sigmoid_times(vf_mul(alpha, g), g);
    }
}

MK_INLINE void activate_rows(const int kind, const mk_small_job *job, long begin, long end) {
    const vf one = vf_set1(1.0f), limit = vf_set1(job->limit), low = vf_set1(-job->limit), alpha = vf_set1(job->alpha);
    const long d = job->d;
    for (long row = begin; row < end; row++) {
        const float *gate = job->a + row * job->a_stride, *up = job->b ? job->b + row * job->b_stride : NULL;
        float *out = job->out + row * job->out_stride;
        EACH(i, d) {
            vf s = activated(kind, vf_row(gate, i, d, 0.0f), limit, alpha);
            if (up) {
                vf u = vf_row(up, i, d, 0.0f);
                if (kind == MK_SWIGLU_CLAMPED) u = vf_add(vf_max(low, vf_min(limit, u)), one);
                s = vf_mul(s, u);
            }
            vf_row_store(out, i, d, s);
        }
    }
}

static void activate(const void *argument, long begin, long end) {
    const mk_small_job *job = argument;
    switch (job->kind) {
#define CASE(kind) case kind: activate_rows(kind, job, begin, end); break;
        MK_ACTIVATIONS(CASE)
#undef CASE
    }
}

MK_INLINE vf capped(vf x, vf cap) { return vf_mul(cap, vf_tanh(vf_div(x, cap))); }

static void softcap(const void *argument, long begin, long end) {
    const mk_small_job *job = argument;
    const vf cap = vf_set1(job->limit);
    for (long row = begin; row < end; row++) {
        float *x = job->out + row * job->out_stride;
        EACH(i, job->d) vf_row_store(x, i, job->d, capped(vf_row(x, i, job->d, 0.0f), cap));
    }
}

MK_INLINE float row_max(const float *x, long d) {
    vf top = vf_set1(-INFINITY);
    EACH(i, d) top = vf_max(top, vf_row(x, i, d, -INFINITY));
    return vf_hmax(top);
}

static void softmax(const void *argument, long begin, long end) {
    const mk_small_job *job = argument;
    for (long row = begin; row < end; row++) {
        float *x = job->out + row * job->out_stride;
        vf top = vf_set1(row_max(x, job->d)), total = vf_set1(0.0f);
        EACH(i, job->d) {
            vf e = vf_exp(vf_sub(vf_row(x, i, job->d, -INFINITY), top));
            total = vf_add(total, e);
            vf_row_store(x, i, job->d, e);
        }
        total = vf_set1(vf_hadd(total));
        EACH(i, job->d) vf_row_store(x, i, job->d, vf_div(vf_row(x, i, job->d, 0.0f), total));
    }
}

/* Items are (row, panel). */
static void lse_parts(const void *argument, long begin, long end) {
    const mk_small_job *job = argument;
    for (long item = begin; item < end; item++) {
        int panel = (int)(item % job->panels);
        long row = item / job->panels, from = job->bounds[panel], d = job->bounds[panel + 1] - from;
        const float *x = job->a + row * job->a_stride + from;
        float *out = job->out + 3 * item, top = row_max(x, d);
        vf shift = vf_set1(top == -INFINITY ? 0.0f : top), inv_t = vf_set1(job->b[row]);
        vf plain = vf_set1(0.0f), tempered = plain;
        EACH(i, d) {
            vf v = vf_sub(vf_row(x, i, d, -INFINITY), shift), u = vf_mul(v, inv_t);
            if (i + MK_TILE > d) { /* lanes after the end add nothing, for any inv_t */
                float lanes[MK_TILE];
                vf_store(lanes, u);
                u = vf_load_part(lanes, d - i, -INFINITY);
            }
            plain = vf_add(plain, vf_exp(v));
            tempered = vf_add(tempered, vf_exp(u));
        }
        out[0] = top;
        out[1] = vf_hadd(plain);
        out[2] = vf_hadd(tempered);
    }
}

/* The k best so far are a heap whose root is the worst: the lowest value, and of equal values the highest id. */
MK_INLINE int worse(float a, int32_t i, float b, int32_t j) { return a < b || (a == b && i > j); }

static void sift(float *values, int32_t *ids, long size, long at) {
    float value = values[at];
    int32_t id = ids[at];
    for (long child; (child = 2 * at + 1) < size; at = child) {
        if (child + 1 < size && worse(values[child + 1], ids[child + 1], values[child], ids[child])) child++;
        if (!worse(values[child], ids[child], value, id)) break;
        values[at] = values[child];
        ids[at] = ids[child];
    }
    values[at] = value;
    ids[at] = id;
}

static void heapify(float *values, int32_t *ids, long size) {
    for (long at = size / 2; at-- > 0;) sift(values, ids, size, at);
}

static void replace_worst(float *values, int32_t *ids, long size, float value, long id) {
    values[0] = value;
    ids[0] = (int32_t)id;
    sift(values, ids, size, 0);
}

/* Sort a heap: the best first. */
static void sort_heap(float *values, int32_t *ids, long size) {
    for (long last = size; --last > 0;) { /* the worst goes to the end */
        float value = values[0];
        int32_t id = ids[0];
        values[0] = values[last], ids[0] = ids[last];
        values[last] = value, ids[last] = id;
        sift(values, ids, last, 0);
    }
}

/* A heap of the `size` best of d values; NaN counts as -inf. */
static void heap_best(const float *x, long d, long size, float *values, int32_t *ids) {
    for (long i = 0; i < size; i++) {
        values[i] = x[i] == x[i] ? x[i] : -INFINITY;
        ids[i] = (int32_t)i;
    }
    heapify(values, ids, size);
    for (long i = size; i < d; i += MK_TILE) {
        vf v = vf_row(x, i, d, -INFINITY);
        if (!vf_any_gt(v, vf_set1(values[0]))) continue;
        for (long j = i; j < i + MK_TILE && j < d; j++)
            if (x[j] > values[0]) replace_worst(values, ids, size, x[j], j);
    }
}

enum { PEAKS = 1 << 14, FEW = 8 /* for so few the heap alone is faster */, LONGEST = 48, SHORTEST = 4 /* groups */ };

/* The same, faster for few of many: `size` of the peaks of groups of values are at least as high as the lowest of those,
 * so what is lower need not be looked at.  Returns 0, with no heap, where this does not help. */
static int heap_of_high(const float *x, long d, long size, float *values, int32_t *ids) {
    long each = d / (8 * size), count = 0; /* values of a group */
    if (each > LONGEST) each = LONGEST;
    if (each * (PEAKS - MK_TILE) < d) each = d / (PEAKS - MK_TILE) + 1;
    if (size < FEW || each < SHORTEST || each * size > d / 4) return 0;
    const long step = each * MK_TILE;
    float peaks[PEAKS];
    do { /* a peak of each lane */
        const long i = count * each;
        vf peak = vf_set1(-INFINITY);
        for (long j = i; j < i + step && j < d; j += MK_TILE) {
            vf v = vf_row(x, j, d, -INFINITY);
            peak = vf_gt(v, peak, v, peak); /* not if v is NaN */
        }
        vf_store(peaks + count, peak);
        count += MK_TILE;
    } while (count * each < d);
    heap_best(peaks, count, size, values, ids);
    const float lowest = values[0];
    if (lowest == -INFINITY) return 0;
    const vf below = vf_set1(nextafterf(lowest, -INFINITY));
    long found = 0;
    for (long i = 0, at = 0; i < d; i += step, at += MK_TILE) {
        if (row_max(peaks + at, MK_TILE) < lowest) continue;
        for (long from = i; from < i + step && from < d; from += MK_TILE) {
            if (!vf_any_gt(vf_row(x, from, d, -INFINITY), below)) continue;
            for (long j = from; j < from + MK_TILE && j < d; j++) {
                if (found == size) {
                    if (x[j] > values[0]) replace_worst(values, ids, size, x[j], j);
                } else if (x[j] >= lowest) {
                    values[found] = x[j];
                    ids[found++] = (int32_t)j;
                    if (found == size) heapify(values, ids, size);
                }
            }
        }
    }
    return 1;
}

static void top_k(const void *argument, long begin, long end) {
    const mk_small_job *job = argument;
    for (long row = begin; row < end; row++) {
        const float *x = job->a + row * job->a_stride;
        float *values = job->out + row * job->k;
        int32_t *ids = job->ids + row * job->k;
        const long size = job->k < job->d ? job->k : job->d;
        for (long i = size; i < job->k; i++) values[i] = -INFINITY, ids[i] = -1;
        if (!size) continue;
        if (!heap_of_high(x, job->d, size, values, ids)) heap_best(x, job->d, size, values, ids);
        sort_heap(values, ids, size);
    }
}
