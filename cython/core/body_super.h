/* Tiles of K-quants, whose blocks have 8 parts of 32 columns, each with its own scales (super.h). */

/* The scales and minima of a part of 16 rows for products: one of each for the part, or one for each half. */
/* The factors of the scales and minima of 16 rows' blocks. */
typedef struct {
    vf d, m;
} super_scales;

MK_INLINE super_scales load_super_scales(const int type, const uint8_t *w) {
    super_scales of = {vf_load_f16((const void *)w), vf_set1(0.0f)};
    if (mk_is_grid(type)) of.d = vf_mul(of.d, vf_set1(mk_grid_unit(type)));
    if (mk_f16s(type) == 2) of.m = vf_sub(of.m, vf_load_f16((const void *)(w + 32)));
    if (type == MK_Q2_K) of.m = vf_mul(of.m, vf_set1(-1.0f / 32)); /* offset32 is -32 times a sum */
    return of;
}

MK_INLINE part_scales load_scales(const int type, const uint8_t *small, const uint8_t *part, vf d, vf m) {
    part_scales of;
    UNROLL
    for (int h = 0; h < 2; h++) of.scale[h] = of.minimum[h] = vf_set1(0.0f);
    if (mk_is_grid(type)) {
        uint8_t odd[2][MK_TILE];
        for (int h = 0; h < 1 + mk_halved(type); h++) {
            for (int r = 0; r < MK_TILE; r++) {
                const uint8_t scales = mk_part_scales(type) ? small[r] : 0;
                odd[h][r] = (uint8_t)mk_grid_scale(type, part + r * mk_grid_bytes(type), scales, h);
            }
            of.scale[h] = mk_halved(type) ? vf_load_u8(odd[h]) : vf_mul(d, vf_load_u8(odd[h]));
        }
    } else if (type == MK_IQ4_XS) {
        of.scale[0] = vf_mul(d, vf_load_i8(small));
    } else if (!mk_halved(type)) {
        of.scale[0] = vf_mul(d, vf_load_u8(small));
        of.minimum[0] = vf_mul(m, vf_load_u8(small + 16));
    } else {
        UNROLL
        for (int h = 0; h < 2; h++)
            if (type == MK_Q2_K) { /* a byte has both */
                vf both = vf_load_u8(small + 16 * h);
                of.minimum[h] = vf_from(vi_trunc(vf_mul(both, vf_set1(0.0625f))));
                of.scale[h] = vf_fma(of.minimum[h], vf_set1(-16.0f), both);
            } else {
                of.scale[h] = vf_load_i8(small + 16 * h);
            }
    }
    return of;
}

/* Like `start_of`, for half h of a part. */
MK_INLINE int32_t start_of_half(const int type, const mk_activation *a, const int h) {
    if (mk_is_grid(type)) return VEC_Q8_BIAS ? mk_offset32(a, h) * 4 : 0;
    return type == MK_Q6_K ? mk_offset32(a, h) : type == MK_Q3_K ? mk_offset32(a, h) / 8 : 0;
}

/* K-quants, 32 columns at a time. */
HOT void super_tile(const int type, const int T, const uint8_t *w, const uint8_t *x, long count, vf *sums) {
    const int bytes = mk_part_bytes(type), step = mk_part_scales(type);
    vf acc[MK_GROUP];
    UNROLL
    for (int t = 0; t < T; t++) acc[t] = vf_set1(0.0f);
    for (long block = 0; block < count; block++, w += mk_packed_bytes(type) * MK_TILE) {
        const super_scales all = load_super_scales(type, w);
        const uint8_t *small = w + mk_scales_at(type), *part = w + mk_values_at(type);
        for (int s = 0; s < MK_PARTS; s++, x += T * MK_ACTIVATION, small += step, part += bytes) {
            const mk_activation *a = (const void *)x;
            if (VEC_FETCHES) { /* or what is read now: compilers load it in no order that prefetchers follow */
                fetch_lines(small + ahead_of(type, T), step);
                fetch_lines(part + ahead_of(type, T), bytes);
            }
            const int halves = 1 + mk_halved(type);
            vi dots[2][MK_GROUP];
            UNROLL
            for (int t = 0; t < T; t++)
                for (int h = 0; h < halves; h++)
                    dots[h][t] = vi_set1(mk_halved(type) ? start_of_half(type, a + t, h) : start_of(type, a + t));
            dots_of_rows(type, halves, T, part, a, dots);
            const part_scales of = load_scales(type, small, part, all.d, all.m);
            UNROLL
            for (int t = 0; t < T; t++)
                acc[t] = add_part(form_of(type), acc[t], dots[0][t], dots[halves - 1][t], &of, all.d, all.m, a + t);
        }
    }
    UNROLL
    for (int t = 0; t < T; t++) sums[t] = acc[t];
}
