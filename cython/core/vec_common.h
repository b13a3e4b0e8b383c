/* Functions written with the vector layer: parts of vectors, exp, tanh and the normal distribution. */

#ifndef HOT /* functions that are inlined everywhere, so that constants propagate and loops unroll */
#define HOT MK_INLINE
#define UNROLL _Pragma("GCC unroll 32")
#endif

/* The first `count` lanes (0..16) of p; the others are `fill`. */
static inline vf vf_load_part(const float *p, long count, float fill) {
    float lanes[MK_TILE];
    for (int j = 0; j < MK_TILE; j++) lanes[j] = fill;
    memcpy(lanes, p, (size_t)count * sizeof *lanes);
    return vf_load(lanes);
}

static inline void vf_store_part(float *p, vf a, long count) {
    float lanes[MK_TILE];
    vf_store(lanes, a);
    memcpy(p, lanes, (size_t)count * sizeof *lanes);
}

#ifndef VEC_KEEPS /* where compilers keep in a register what they have computed */
MK_INLINE vb vb_keep(vb a) { return a; }
#endif

#if VEC_ALIKE /* others multiply sizes of signed bytes by x with their signs */
MK_INLINE vb vb_size(vb a) { return a; }
#endif

#ifdef VEC_FOLDS
/* Lane r is vf_hadd(a[r * step]): 16 vectors share their shuffles.  a [4]: what vf_quarters makes of 4 vectors r, r + 4, ... */
MK_INLINE vf vf_sums_of_quarters(const vf *a, const int step) {
    return vf_sixteenths(vf_eighths(a[0], a[step]), vf_eighths(a[2 * step], a[3 * step]));
}
/* a [8]: what vf_both_halves makes of vectors r and r + 4, r = i / 4 * 8 + i % 4. */
MK_INLINE vf vf_sums_of_pairs(const vf *a, const int step) {
    vf quarters[4];
    for (int i = 0; i < 4; i++) quarters[i] = vf_quarters(a[i * step], a[(i + 4) * step]);
    return vf_sums_of_quarters(quarters, 1);
}
MK_INLINE vf vf_sums(const vf *a, const int step) {
    vf both[8];
    for (int i = 0; i < 8; i++) {
        const int r = i / 4 * 8 + i % 4;
        both[i] = vf_both_halves(a[r * step], a[(r + 4) * step]);
    }
    return vf_sums_of_pairs(both, 1);
}
#endif

#ifndef VEC_LOOKUP /* of 16 bytes the halves from bit `shift` on (0, 4) as places in a table of 16 */
MK_INLINE vf vf_lookup(const float *table, const uint8_t *p, const int shift) {
    float found[MK_TILE];
    for (int j = 0; j < MK_TILE; j++) found[j] = table[p[j] >> shift & 15];
    return vf_load(found);
}
#endif

/* mk_from_e8m0 of each of 16 bytes, as a product of two factors because of denormals. */
MK_INLINE vf vf_load_e8m0(const uint8_t *p) {
    vi e = vi_sub(vi_trunc(vf_load_u8(p)), vi_set1(128)), half = vi_half(e);
    return vf_mul(vf_pow2(half), vf_pow2(vi_sub(e, half)));
}

/* Values i .. i + 15 of a row of d values; those after its end are `fill`. */
MK_INLINE vf vf_row(const float *row, long i, long d, float fill) {
    return i + MK_TILE <= d ? vf_load(row + i) : vf_load_part(row + i, d - i, fill);
}

MK_INLINE void vf_row_store(float *row, long i, long d, vf a) {
    if (i + MK_TILE <= d) vf_store(row + i, a);
    else vf_store_part(row + i, a, d - i);
}

enum { MAX_EXPS = 6 };

/* e**x within 2 ulp, of `count` vectors side by side, because each is a long chain: x = n ln 2 + r, e**r = 1 + r + r^2 P(r)
 * (Cephes' expf).  NaN stays NaN; the scaling in two steps rounds once on its way through the denormals; with `normal`
 * (-87 <= x <= 88, or NaN) there are none, and one step gives the same.  mpillm/kernels/lanes.py has the same constants. */
HOT void exp_in(const int normal, const int count, vf *x) {
    const vf high = vf_set1(89.0f), low = vf_set1(-105.0f), magic = vf_set1(0x1.8p23f), one = vf_set1(1.0f);
    static const float FACTORS[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                    5.0000001201e-1f};
    vf shifted[MAX_EXPS], n[MAX_EXPS], p[MAX_EXPS];
    UNROLL
    for (int j = 0; j < count; j++) {
        if (!normal) x[j] = vf_max(low, vf_min(high, x[j]));
        shifted[j] = vf_add(vf_mul(x[j], vf_set1(1.44269504088896341f)), magic); /* its low bits are n, to nearest even */
    }
    UNROLL
    for (int j = 0; j < count; j++) {
        n[j] = vf_sub(shifted[j], magic);
        x[j] = vf_fma(n[j], vf_set1(-0.693359375f), x[j]);
    }
    UNROLL
    for (int j = 0; j < count; j++) {
        x[j] = vf_fma(n[j], vf_set1(2.12194440e-4f), x[j]);
        p[j] = vf_set1(1.9875691500e-4f);
    }
    UNROLL
    for (int i = 0; i < 5; i++)
        UNROLL
        for (int j = 0; j < count; j++) p[j] = vf_fma(p[j], x[j], vf_set1(FACTORS[i]));
    UNROLL
    for (int j = 0; j < count; j++) p[j] = vf_add(vf_fma(p[j], vf_mul(x[j], x[j]), x[j]), one);
    UNROLL
    for (int j = 0; j < count; j++) {
#ifdef VEC_SCALE
        x[j] = vf_scale(p[j], n[j]);
#else
        vi power = vi_sub(vi_bits(shifted[j]), vi_bits(magic)), half = vi_half(power);
        if (normal) x[j] = vf_mul(p[j], vf_pow2(power));
        else x[j] = vf_mul(vf_mul(p[j], vf_pow2(half)), vf_pow2(vi_sub(power, half)));
#endif
    }
}

MK_INLINE vf vf_exp(vf x) {
    exp_in(0, 1, &x);
    return x;
}

/* tanh(x) within 2 ulp: x + x^3 P(x^2) below 0.625, else 1 - 2 / (e^2x + 1) with the sign of x (Cephes' tanhf). */
MK_INLINE vf vf_tanh(vf x) {
    const vf one = vf_set1(1.0f), zero = vf_set1(0.0f), size = vf_abs(x);
    vf square = vf_mul(x, x), p = vf_set1(-5.70498872745e-3f);
    p = vf_fma(p, square, vf_set1(2.06390887954e-2f));
    p = vf_fma(p, square, vf_set1(-5.37397155531e-2f));
    p = vf_fma(p, square, vf_set1(1.33314422036e-1f));
    p = vf_fma(p, square, vf_set1(-3.33332819422e-1f));
    const vf near = vf_fma(vf_mul(p, square), x, x);
    vf far = vf_sub(one, vf_div(vf_set1(2.0f), vf_add(vf_exp(vf_add(size, size)), one)));
    far = vf_gt(zero, x, vf_sub(zero, far), far);
    return vf_gt(size, vf_set1(0.625f), far, near);
}

/* The standard normal distribution function, erfc(-x / sqrt(2)) / 2, with an error below 1e-6 of it down to x = -12.
 * erfc(z) = t e^(-z^2 + P(t)) with t = 1 / (1 + z / 2) for z >= 0 (Press et al., Numerical Recipes in C, 6.2). */
MK_INLINE vf vf_normal(vf x) {
    const vf one = vf_set1(1.0f), z = vf_mul(vf_abs(x), vf_set1(0.70710678118654752f));
    const vf t = vf_div(one, vf_fma(z, vf_set1(0.5f), one));
    vf p = vf_set1(0.17087277f);
    p = vf_fma(p, t, vf_set1(-0.82215223f));
    p = vf_fma(p, t, vf_set1(1.48851587f));
    p = vf_fma(p, t, vf_set1(-1.13520398f));
    p = vf_fma(p, t, vf_set1(0.27886807f));
    p = vf_fma(p, t, vf_set1(-0.18628806f));
    p = vf_fma(p, t, vf_set1(0.09678418f));
    p = vf_fma(p, t, vf_set1(0.37409196f));
    p = vf_fma(p, t, vf_set1(1.00002368f));
    p = vf_fma(p, t, vf_set1(-1.26551223f));
    p = vf_sub(p, vf_mul(z, z));
    const vf tail = vf_mul(vf_mul(t, vf_set1(0.5f)), vf_exp(p));
    return vf_gt(x, vf_set1(0.0f), vf_sub(one, tail), tail);
}
