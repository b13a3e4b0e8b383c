/* Token mixers with a state for each sequence.  The rows of a sequence are neighbours and are computed one after the other
 * in a fixed order of operations, so the bits depend neither on how a prompt is cut into steps nor on other sequences.
 * Items are (16 channels or value dimensions, sequence); each computes all rows of its sequence. */

/* ln(1 + e^x) = max(x, 0) + ln(1 + u) with u = e^-|x|, and ln(1 + u) = 2 artanh(u / (2 + u)); the series of artanh is
 * truncated with a relative error below 2e-9. */
MK_INLINE vf vf_softplus(vf x) {
    const vf zero = vf_set1(0.0f), u = vf_exp(vf_sub(zero, vf_abs(x)));
    const vf s = vf_div(u, vf_add(u, vf_set1(2.0f))), square = vf_mul(s, s);
    vf p = vf_set1(1.0f / 15);
    p = vf_fma(p, square, vf_set1(1.0f / 13));
    p = vf_fma(p, square, vf_set1(1.0f / 11));
    p = vf_fma(p, square, vf_set1(1.0f / 9));
    p = vf_fma(p, square, vf_set1(1.0f / 7));
    p = vf_fma(p, square, vf_set1(1.0f / 5));
    p = vf_fma(p, square, vf_set1(1.0f / 3));
    const vf artanh = vf_fma(vf_mul(p, square), s, s);
    return vf_add(vf_max(x, zero), vf_add(artanh, artanh));
}

static void decays(const void *argument, long begin, long end) {
    const mk_small_job *job = argument;
    const vf scale = vf_set1(job->alpha), low = vf_set1(job->eps), high = vf_set1(job->limit);
    for (long row = begin; row < end; row++) EACH(i, job->d) {
        const vf x = vf_mul(scale, vf_row(job->a + row * job->a_stride, i, job->d, 0.0f));
        const vf step = vf_min(high, vf_max(low, vf_softplus(vf_add(x, vf_row(job->c, i, job->d, 0.0f)))));
        if (job->steps) vf_row_store(job->steps + row * job->out_stride, i, job->d, step);
        vf_row_store(job->out + row * job->out_stride, i, job->d, vf_exp(vf_mul(vf_row(job->b, i, job->d, 0.0f), step)));
    }
}

MK_INLINE long end_of(const mk_sequences *of, long sequence) {
    return sequence + 1 < of->count ? of->first_rows[sequence + 1] : of->rows;
}

static void short_conv(const void *argument, long begin, long end) {
    const mk_conv_job *job = argument;
    const long d = job->channels, before = job->taps - 1;
    for (long item = begin; item < end; item++) {
        const long i = item / job->of.count * MK_TILE, sequence = item % job->of.count;
        const long first = job->of.first_rows[sequence], last = end_of(&job->of, sequence);
        float *tail = job->tails + job->of.slots[sequence] * job->tail_stride;
#define INPUT(row) ((row) < first ? tail + ((row) - first + before) * d : job->x + (row) * job->x_stride)
        for (long row = first; row < last; row++) {
            vf sum = vf_mul(vf_row(job->w, i, d, 0.0f), vf_row(INPUT(row - before), i, d, 0.0f));
            for (long tap = 1; tap <= before; tap++)
                sum = vf_fma(vf_row(job->w + tap * d, i, d, 0.0f), vf_row(INPUT(row - before + tap), i, d, 0.0f), sum);
            if (job->bias) sum = vf_add(sum, vf_row(job->bias, i, d, 0.0f));
            if (job->silu) sum = sigmoid_times(sum, sum);
            vf_row_store(job->out + row * job->out_stride, i, d, sum);
        }
        for (long tap = 0; tap < before; tap++)
            vf_row_store(tail + tap * d, i, d, vf_row(INPUT(last - before + tap), i, d, 0.0f));
#undef INPUT
    }
}

/* Sums over key dimensions have DELTA_CHAINS partial sums; dimension j is added to sum j % DELTA_CHAINS. */
enum { DELTA_CHAINS = 4 };

#define EACH_KEY(dk, use)                                                                    \
    long j = 0;                                                                              \
    for (; j + DELTA_CHAINS <= (dk); j += DELTA_CHAINS) {                                    \
        UNROLL for (int c = 0; c < DELTA_CHAINS; c++) use(j + c, c)                          \
    }                                                                                        \
    UNROLL for (int c = 0; c < DELTA_CHAINS - 1; c++) if (j + c < (dk)) use(j + c, c)

MK_INLINE vf of_chains(const vf *sums) { return vf_add(vf_add(sums[0], sums[1]), vf_add(sums[2], sums[3])); }

/* 16 columns of a state S [dk]: S *= decay; returns k S. */
MK_INLINE vf forget(float *state, long dk, vf decay, const float *k) {
    vf sums[DELTA_CHAINS];
    for (int c = 0; c < DELTA_CHAINS; c++) sums[c] = vf_set1(0.0f);
#define FORGET(j, c) {                                                \
        vf s = vf_mul(vf_load(state + MK_TILE * (j)), decay);         \
        vf_store(state + MK_TILE * (j), s);                           \
        sums[c] = vf_fma(s, vf_set1(k[j]), sums[c]);                  \
    }
    EACH_KEY(dk, FORGET)
    return of_chains(sums);
}

/* S += k delta; returns q S. */
MK_INLINE vf learn(float *state, long dk, vf delta, const float *k, const float *q) {
    vf sums[DELTA_CHAINS];
    for (int c = 0; c < DELTA_CHAINS; c++) sums[c] = vf_set1(0.0f);
#define LEARN(j, c) {                                                                        \
        vf s = vf_fma(vf_set1(k[j]), delta, vf_load(state + MK_TILE * (j)));                 \
        vf_store(state + MK_TILE * (j), s);                                                  \
        sums[c] = vf_fma(s, vf_set1(q[j]), sums[c]);                                         \
    }
    EACH_KEY(dk, LEARN)
    return of_chains(sums);
}

/* S = decay S + k delta; returns q S. */
MK_INLINE vf decay_and_learn(float *state, long dk, vf decay, vf delta, const float *k, const float *q) {
    vf sums[DELTA_CHAINS];
    for (int c = 0; c < DELTA_CHAINS; c++) sums[c] = vf_set1(0.0f);
#define SCAN(j, c) {                                                                         \
        vf s = vf_fma(vf_set1(k[j]), delta, vf_mul(vf_load(state + MK_TILE * (j)), decay));  \
        vf_store(state + MK_TILE * (j), s);                                                  \
        sums[c] = vf_fma(s, vf_set1(q[j]), sums[c]);                                         \
    }
    EACH_KEY(dk, SCAN)
    return of_chains(sums);
}

/* An item: rows first .. last - 1, and 16 columns of a head's state from column i on.  The state [dk, dv] of a head is
 * stored in pieces of 16 columns: [piece][dk][16]. */
typedef struct {
    long first, last, head, key, i; /* key: the first column of the head's key in a row */
    float *state;
} mk_piece;

MK_INLINE mk_piece piece_of(const mk_state_job *job, long item) {
    const long pieces = mk_blocks(job->dv, MK_TILE), sequence = item % job->of.count, place = item / job->of.count;
    return (mk_piece){
        .first = job->of.first_rows[sequence], .last = end_of(&job->of, sequence), .head = place / pieces,
        .key = job->key_of_head[place / pieces] * (long)job->dk, .i = place % pieces * MK_TILE,
        .state = job->states + job->of.slots[sequence] * job->state_stride + place * job->dk * MK_TILE};
}

static void delta_rule(const void *argument, long begin, long end) {
    const mk_state_job *job = argument;
    const long dk = job->dk, dv = job->dv, heads = job->heads, wide = job->keys * dk, values = heads * dv;
    for (long item = begin; item < end; item++) {
        const mk_piece at = piece_of(job, item);
        for (long row = at.first; row < at.last; row++) {
            const float *k = job->k + row * wide + at.key, *q = job->q + row * wide + at.key;
            const long value = row * values + at.head * dv, head = row * heads + at.head;
            const vf seen = forget(at.state, dk, vf_set1(job->decay[head]), k);
            const vf delta = vf_mul(vf_sub(vf_row(job->v + value, at.i, dv, 0.0f), seen), vf_set1(job->beta[head]));
            vf_row_store(job->out + value, at.i, dv, learn(at.state, dk, delta, k, q));
        }
    }
}

static void selective_scan(const void *argument, long begin, long end) {
    const mk_state_job *job = argument;
    const long dk = job->dk, dv = job->dv, heads = job->heads, wide = job->keys * dk, values = heads * dv;
    for (long item = begin; item < end; item++) {
        const mk_piece at = piece_of(job, item);
        const vf skip = vf_set1(job->skip[at.head]);
        for (long row = at.first; row < at.last; row++) {
            const float *b = job->k + row * wide + at.key, *c = job->q + row * wide + at.key;
            const long value = row * values + at.head * dv, head = row * heads + at.head;
            const vf x = vf_row(job->v + value, at.i, dv, 0.0f), delta = vf_mul(x, vf_set1(job->beta[head]));
            const vf read = decay_and_learn(at.state, dk, vf_set1(job->decay[head]), delta, b, c);
            vf_row_store(job->out + value, at.i, dv, vf_fma(skip, x, read));
        }
    }
}
