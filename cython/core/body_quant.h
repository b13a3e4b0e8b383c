/* Quantises and dequantises rows of blocks.  Items are rows. */

/* 1/d, or 0 if that is not finite, so that the integers of such a block are 0. */
MK_INLINE float inverse(float d) {
    float inverse = 1.0f / d;
    return inverse - inverse == 0.0f ? inverse : 0.0f;
}

/* Nearest integers, halves away from zero (C's roundf), of |x| < 2^31.  What is added is the largest float below a half: a
 * half would round the float below it up. */
MK_INLINE vi round_away(vf x) {
    const float half = 0x1.fffffep-2f;
    return vi_trunc(vf_add(x, vf_gt(vf_set1(0.0f), x, vf_set1(-half), vf_set1(half))));
}

/* Whether all of a, b are finite. */
MK_INLINE int all_finite(vf a, vf b) {
    const vf zero = vf_set1(0.0f), one = vf_set1(1.0f), spoilt = vf_add(vf_mul(a, zero), vf_mul(b, zero)); /* 0, or NaN */
    return !vf_any_gt(vf_gt(one, spoilt, zero, one), zero);
}

/* Quantise 32 values with the scale d; where it is NaN the integers are 0.
 * sums[h][j]: the sum of integers j, j + 4, j + 8, j + 12 of half h. */
MK_INLINE void quantise_with(float d, vf a, vf b, int8_t *q, int32_t sums[2][4]) {
    if (d != d) {
        memset(q, 0, MK_BLOCK);
        memset(sums, 0, 8 * sizeof **sums);
        return;
    }
    vf id = vf_set1(inverse(d));
    vi lo = round_away(vf_mul(a, id)), hi = round_away(vf_mul(b, id));
    vi_store_i8(q, lo);
    vi_store_i8(q + MK_TILE, hi);
    vi_store_sums(sums[0], lo);
    vi_store_sums(sums[1], hi);
}

MK_INLINE int32_t sum_of_4(const int32_t *sums) { return sums[0] + sums[1] + (sums[2] + sums[3]); }

/* Quantise 32 values; the scale is amax / 127, or NaN for a block with inf or NaN. */
MK_INLINE void quantise_q8(vf a, vf b, int8_t *q, float *scale, int32_t sums[2][4]) {
    *scale = all_finite(a, b) ? vf_hmax(vf_max(vf_abs(a), vf_abs(b))) / 127.0f : mk_bits_float(0x7fc00000u);
    quantise_with(*scale, a, b, q, sums);
}

/* The first of 32 values with this magnitude; 0 if the magnitude is 0. */
MK_INLINE float first_of(const float *x, vf a, vf b, float size) {
    static const float place[MK_TILE] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vf peak = vf_set1(size), none = vf_set1(-MK_BLOCK), low = vf_sub(vf_set1(0.0f), vf_load(place));
    vf high = vf_sub(low, vf_set1(MK_TILE));
    vf found = vf_max(vf_gt(peak, vf_abs(a), none, low), vf_gt(peak, vf_abs(b), none, high));
    return size > 0.0f ? x[-(int)vf_hmax(found)] : 0.0f;
}

/* ggml's Q4_0: the value of largest magnitude (the first of equals) becomes -8. */
MK_INLINE float quantise_q4(const float *x, uint8_t *q) {
    vf a = vf_load(x), b = vf_load(x + MK_TILE), half = vf_set1(8.5f), top = vf_set1(15.0f);
    int8_t lo[MK_TILE], hi[MK_TILE];
    if (!all_finite(a, b)) {
        memset(q, 0x88, MK_TILE);
        return mk_bits_float(0x7fc00000u);
    }
    float d = first_of(x, a, b, vf_hmax(vf_max(vf_abs(a), vf_abs(b)))) / -8.0f;
    vf id = vf_set1(inverse(d));
    a = vf_fma(a, id, half), b = vf_fma(b, id, half);
    vi_store_i8(lo, vi_trunc(vf_gt(a, top, top, a)));
    vi_store_i8(hi, vi_trunc(vf_gt(b, top, top, b)));
    for (int j = 0; j < MK_TILE; j++) q[j] = (uint8_t)(lo[j] | hi[j] << 4);
    return d;
}

/* Values i .. i + 31 of a row that ends at `limit`, and zeros. */
MK_INLINE void block_of(const float *x, long i, long limit, vf *lo, vf *hi) {
    *lo = vf_row(x, i, limit, 0.0f);
    *hi = i + MK_TILE < limit ? vf_row(x, i + MK_TILE, limit, 0.0f) : vf_set1(0.0f);
}

static void quantize(const void *argument, long begin, long end) {
    const mk_rows_job *job = argument;
    long blocks = mk_blocks(job->k, MK_BLOCK), bytes = mk_block_bytes(job->type);
    for (long row = begin; row < end; row++)
        for (long b = 0; b < blocks; b++) {
            const float *x = job->x + row * job->stride;
            uint8_t *out = job->out + (row * blocks + b) * bytes;
            vf lo, hi;
            float d, values[MK_BLOCK];
            int32_t sums[2][4];
            block_of(x, b * MK_BLOCK, job->k, &lo, &hi);
            if (mk_is_panel(job->type)) {
                d = job->values[row];
                memcpy(out, &d, sizeof d);
                quantise_with(d, lo, hi, (int8_t *)out + sizeof d, sums);
                continue;
            }
            if (job->type == MK_Q8_0) {
                quantise_q8(lo, hi, (int8_t *)out + 2, &d, sums);
            } else {
                vf_store(values, lo);
                vf_store(values + MK_TILE, hi);
                d = quantise_q4(values, out + 2);
            }
            uint16_t h = mk_to_f16(d);
            memcpy(out, &h, 2);
        }
}

/* The scale of columns begin .. limit - 1 of a row of x for a PANEL type: the largest value's integer is at most MK_OUTLIER,
 * and the others' are at most 127.  *largest: that value's column, or -1 if all are 0; the scale is NaN if one is not finite. */
MK_INLINE float scale_of_panel(const float *x, long begin, long limit, long *largest) {
    vf first = vf_set1(0.0f), second = first, spoilt = first, lo, hi; /* in each lane the largest sizes */
    float sizes[MK_TILE], others[MK_TILE];
    long i;
    for (i = begin; i < limit; i += MK_BLOCK) {
        block_of(x, i, limit, &lo, &hi);
        spoilt = vf_add(spoilt, vf_add(vf_mul(lo, vf_set1(0.0f)), vf_mul(hi, vf_set1(0.0f)))); /* 0, or NaN */
        lo = vf_abs(lo), hi = vf_abs(hi);
        second = vf_max(second, vf_min(first, lo)), first = vf_max(first, lo);
        second = vf_max(second, vf_min(first, hi)), first = vf_max(first, hi);
    }
    *largest = -1;
    if (!all_finite(spoilt, spoilt)) return mk_bits_float(0x7fc00000u);
    const float most = vf_hmax(first);
    if (most == 0.0f) return 0.0f;
    const vf below = vf_set1(mk_bits_float(mk_float_bits(most) - 1));
    for (i = begin;; i += MK_BLOCK) {
        block_of(x, i, limit, &lo, &hi);
        if (vf_any_gt(vf_abs(lo), below) || vf_any_gt(vf_abs(hi), below)) break;
    }
    while (fabsf(x[i]) != most) i++;
    *largest = i;
    vf_store(sizes, first), vf_store(others, second);
    sizes[(i - begin) % MK_TILE] = others[(i - begin) % MK_TILE];
    const float next = vf_hmax(vf_load(sizes));
    return next / 127.0f > most / MK_OUTLIER ? next / 127.0f : most / MK_OUTLIER;
}

/* A panel of a row of x for a PANEL type.  `rows`: of its group. */
static void quantise_whole(const float *x, long begin, long limit, mk_panel_row *of, int8_t *q, long rows) {
    int8_t *const first = q;
    int32_t sums[4];
    long largest;
    memset(of, 0, sizeof *of);
    of->scale = scale_of_panel(x, begin, limit, &largest);
    if (largest < 0) {
        for (long i = begin; i < limit; i += MK_BLOCK, q += MK_BLOCK * rows) memset(q, 0, MK_BLOCK);
        return;
    }
    const vf id = vf_set1(inverse(of->scale));
    vi total = vi_set1(0);
    for (long i = begin; i < limit; i += MK_BLOCK, q += MK_BLOCK * rows) {
        vf lo, hi;
        block_of(x, i, limit, &lo, &hi);
        const vi low = round_away(vf_mul(lo, id)), high = round_away(vf_mul(hi, id));
        vi_store_i8(q, low);
        vi_store_i8(q + MK_TILE, high);
        total = vi_add(total, vi_add(low, high));
    }
    const int32_t whole = (int32_t)roundf(x[largest] * inverse(of->scale)), high = (whole + 64) >> 7;
    largest -= begin;
    first[largest / MK_BLOCK * MK_BLOCK * rows + largest % MK_BLOCK] = (int8_t)(whole - 128 * high);
    of->high[largest % 4] = (int8_t)high;
    of->group = (int32_t)(largest / 4);
    of->high128 = -128 * high;
    vi_store_sums(sums, total);
    of->offset128 = -128 * (sum_of_4(sums) - 128 * high);
}

/* The panels of row number `row` of a group of `rows` rows. */
static void quantise_panels(const mk_rows_job *job, const float *x, long row, long rows, uint8_t *out) {
    for (int p = 0; p < job->panels; p++) {
        const long begin = job->bounds[p], limit = job->bounds[p + 1];
        int8_t *q = (int8_t *)out + rows * MK_PANEL_ROW + row * MK_BLOCK;
        quantise_whole(x, begin, limit, (mk_panel_row *)out + row, q, rows);
        out += rows * mk_activation_bytes(job->type, limit - begin);
    }
}

/* Columns i .. i + 31 of a row that ends at `limit`. */
MK_INLINE void quantise_block(const float *x, long i, long limit, mk_activation *out) {
    vf lo, hi;
    int32_t sums[2][4];
    block_of(x, i, limit, &lo, &hi);
    quantise_q8(lo, hi, out->q, &out->scale, sums);
    const int32_t sum = sum_of_4(sums[0]) + sum_of_4(sums[1]);
    out->total = out->scale * (float)sum;
    out->offset8 = -8 * sum;
    out->offset128 = -128 * sum;
    for (int h = 0; h < 2; h++)
        for (int j = 0; j < 2; j++) out->offset32[h][j] = (int16_t)(-32 * (sums[h][2 * j] + sums[h][2 * j + 1]));
}

/* Quantise panels of activations, each padded with zeros to whole blocks; rows are grouped. */
static void quantize_rows(const void *argument, long begin, long end) {
    const mk_rows_job *job = argument;
    for (long row = begin; row < end; row++) {
        const float *x = job->x + (job->at ? job->at[row] : row) * job->stride;
        long first = row / MK_GROUP * MK_GROUP, rows = job->n - first < MK_GROUP ? job->n - first : MK_GROUP;
        mk_activation *out = (mk_activation *)(job->out + first * job->out_bytes) + (row - first);
        if (mk_is_panel(job->type)) {
            quantise_panels(job, x, row - first, rows, job->out + first * job->out_bytes);
            continue;
        }
        for (int p = 0; p < job->panels; p++)
            for (long i = job->bounds[p]; i < job->bounds[p + 1]; i += MK_BLOCK, out += rows)
                quantise_block(x, i, job->bounds[p + 1], out);
    }
}

static const int8_t E2M1[16] = {MK_E2M1_VALUES(MK_AS_IT_IS)};

/* Dequantise one block of 32 values; d * q is exact, so an fma gives the same bits. */
MK_INLINE void dequantise_block(int type, const uint8_t *in, vf *lo, vf *hi) {
    int8_t whole[MK_BLOCK];
    uint16_t f16s[2] = {0};
    const int bits = mk_bits(type) == 5 ? 4 : 0;
    const uint8_t *q = in + mk_scale_bytes(type) + bits;
    const uint32_t fifth = bits ? mk_word(q - bits) : 0;
    memcpy(f16s, in, (size_t)mk_scale_bytes(type));
    float d = type == MK_MXFP4 ? mk_from_e8m0(*in) : mk_from_f16(f16s[0]);
    if (mk_is_panel(type)) memcpy(&d, in, sizeof d);
    const float m = mk_f16s(type) == 2 ? mk_from_f16(f16s[1]) : 0.0f;
    for (int h = 0; h < 2; h++)
        for (int j = 0; j < MK_TILE; j++) { /* a loop that compilers turn into vectors */
            int value = mk_bits(type) == 8 ? (int8_t)q[MK_TILE * h + j] : q[j] >> 4 * h & 15;
            if (bits) value |= (fifth >> (MK_TILE * h + j) & 1) << 4;
            if (type == MK_Q4_0) value -= 8;
            if (type == MK_Q5_0) value -= 16;
            if (type == MK_MXFP4) value = E2M1[value];
            if (type == MK_IQ4_NL) value = mk_iq4[value];
            whole[MK_TILE * h + j] = (int8_t)value;
        }
    *lo = vf_mul(vf_set1(d), vf_load_i8((const uint8_t *)whole));
    *hi = vf_mul(vf_set1(d), vf_load_i8((const uint8_t *)whole + MK_TILE));
    if (mk_f16s(type) == 2) *lo = vf_add(*lo, vf_set1(m)), *hi = vf_add(*hi, vf_set1(m));
}

MK_INLINE void dequantise_row(int type, const uint8_t *in, float *out, long k) {
    for (long i = 0; i < k; i += MK_BLOCK, in += mk_block_bytes(type)) {
        vf lo, hi;
        dequantise_block(type, in, &lo, &hi);
        vf_row_store(out, i, k, lo);
        if (i + MK_TILE < k) vf_row_store(out, i + MK_TILE, k, hi);
    }
}

/* Dequantise a K-quant's block; the products are exact, so a value is rounded once. */
static void dequantise_super(int type, const uint8_t *in, float *values) {
    uint16_t h[2] = {0};
    memcpy(h, in + mk_d_at(type), 2 * (size_t)mk_f16s(type));
    const float d = mk_from_f16(h[0]) * (mk_is_grid(type) ? mk_grid_unit(type) : 1.0f), dmin = mk_from_f16(h[1]);
    for (int s = 0; s < MK_PARTS; s++, values += MK_BLOCK) {
        mk_part part;
        mk_split(type, in, s, &part);
        for (int j = 0; j < MK_BLOCK; j++) {
            values[j] = d * (float)part.scale[j / 16] * (float)part.q[j];
            if (mk_f16s(type) == 2) values[j] -= dmin * (float)part.minimum[j / 16];
        }
    }
}

static void dequantise_scaled(int type, const uint8_t *in, float *values) {
    float scales[MK_TILE];
    const vf unit = vf_set1(scaled_unit(type, in));
    scaled_parts(type, in, scales);
    for (int pair = 0; pair < mk_block(type) / MK_BLOCK; pair++)
        for (int half = 0; half < 2; half++, values += MK_TILE)
            vf_store(values, vf_mul(unit, scaled_numbers(type, in, scales, pair, half)));
}

static void dequantize(const void *argument, long begin, long end) {
    const mk_rows_job *job = argument;
    long row_bytes = mk_blocks(job->k, mk_block(job->type)) * mk_block_bytes(job->type);
    for (long row = begin; row < end; row++) {
        const uint8_t *in = job->in + row * row_bytes;
        float *out = job->values + row * job->stride;
        if (job->type == MK_F32) {
            memcpy(out, in, (size_t)row_bytes);
        } else if (mk_is_scaled(job->type)) {
            const int block = mk_block(job->type);
            float values[128];
            for (long i = 0; i < job->k; i += block, in += mk_block_bytes(job->type)) {
                dequantise_scaled(job->type, in, values);
                memcpy(out + i, values, (size_t)(job->k - i < block ? job->k - i : block) * sizeof *values);
            }
        } else if (!mk_is_quantised(job->type)) {
            for (long i = 0; i < job->k; i += MK_TILE) {
                uint16_t half[MK_TILE] = {0};
                long count = job->k - i < MK_TILE ? job->k - i : MK_TILE;
                memcpy(half, in + 2 * i, (size_t)count * 2);
                vf_row_store(out, i, job->k, job->type == MK_F16 ? vf_load_f16(half) : vf_load_bf16(half));
            }
        } else if (mk_is_super(job->type)) {
            for (long i = 0; i < job->k; i += MK_SUPER, in += mk_block_bytes(job->type))
                dequantise_super(job->type, in, out + i);
        } else if (job->type == MK_Q8_0) { /* where a type is known the compiler drops what the others need: of messages */
            dequantise_row(MK_Q8_0, in, out, job->k);
        } else if (job->type == MK_Q4_0) {
            dequantise_row(MK_Q4_0, in, out, job->k);
        } else {
            dequantise_row(job->type, in, out, job->k);
        }
    }
}
