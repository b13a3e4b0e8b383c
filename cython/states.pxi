# Recurrent operations: the rows of each sequence change its state, in their order.


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
