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
