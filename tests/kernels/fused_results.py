"""The results of random parts of layers, as one piece of work or by single kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpillm import kernels
from mpillm.kernels import Activation, BlockType, KvType, Norm
from tests.kernels import cases
from tests.kernels.random_parts import BLOCKS, FFN, HD, HEADS, HIDDEN, KVH, fitting, matrix, norm_of, vector


def attention_results(make: Any, seed: int, m: int, threads: int, cut: bool) -> list[Any]:
    """What attention gives, and the pools after it; the first row of each of two sequences is at its own position."""
    rng = np.random.default_rng(seed)
    d = HIDDEN[seed % 2]
    vd = HD if seed % 3 else 32
    q, k, v = (
        matrix(rng, fitting(d, 2 * seed + i), n, d, cut="rows" if cut else "")
        for i, n in enumerate((HEADS * HD, KVH * HD, KVH * vd))
    )
    o = matrix(rng, fitting(HEADS * vd, seed + 3), d, HEADS * vd, 2, cut="columns" if cut else "")
    biases = tuple(vector(rng, n) for n in (q.n, k.n, v.n)) if seed % 2 else None
    if seed == 3:
        biases = None, vector(rng, k.n), None
    heads = HEADS if seed % 4 == 1 else 1, KVH if seed % 4 == 1 else 1  # of whole rows, or of every head
    norms = tuple(norm_of(rng, HD * n, 2 * (seed % 2)) for n in heads) if seed % 3 else None
    options = {
        "norm": norm_of(rng, d, seed), "biases": biases, "qk_norms": norms, "value_dim": vd, "window": seed % 2 * 9,
        "rotary": (None, 0, 8)[seed % 3], "interleaved": seed % 4 == 0, "softcap": seed % 2 * 4.0,
        "sinks": vector(rng, HEADS) if seed % 4 > 1 else None, "chunked": seed % 4 == 3,
        "tuning": (0.4, 5, seed % 2) if seed % 3 == 0 else None, "normed_after_rope": seed == 4,
        "v_norm": norm_of(rng, vd, 2 * (seed % 2)) if seed % 5 == 1 else None,
    }  # fmt: skip
    gated = seed in (2, 5)
    if gated:
        options["gate"] = matrix(rng, fitting(d, seed), HEADS * vd, d, cut="rows" if cut else "")
        options["gate_bias"] = vector(rng, HEADS * vd) if seed % 2 else None
    kv_of_head = np.arange(HEADS, dtype=np.int32) // (HEADS // KVH)
    work = make(q, k, v, o, kv_of_head, KVH, HD, 0.25, **options)
    table = np.array([2, 0, 3, 1], np.int32)
    row = np.arange(m, dtype=np.int32)
    pos, start = row // 2, row % 2 * 2
    block = table[start + pos // 32]
    cos, sin = rng.standard_normal((2, m, (options["rotary"] or HD) // 2)).astype(np.float32)
    order = np.argsort(start, kind="stable")  # a sequence's rows are neighbours
    x, index = rng.standard_normal((m, d)).astype(np.float32), (order,)
    rows = (
        *(np.ascontiguousarray(a[index]) for a in (block, pos % 32, pos)),
        table, np.ascontiguousarray(start[order]),
    )  # fmt: skip
    results = []
    parts = tuple(vector(rng, m * n).reshape(m, n) for n in (q.n, k.n, v.n))
    for inputs in ((x,),) if gated or seed == 4 else ((x,), parts):
        pools = [np.zeros(*one) for one in kernels.kv_pools(KvType.F16, BLOCKS, KVH, HD, vd)]
        out = np.empty((m, d), np.float32)
        call = work if len(inputs) == 1 else work.attend
        call(*inputs, cos, sin, KvType.F16, *pools, *rows, out, threads)
        results += [out, *pools]
    return results


def delta_results(make: Any, seed: int, m: int, threads: int, cut: bool) -> list[Any]:
    """What gated DeltaNet gives, and the states after it, of several sequences that have states before."""
    rng = np.random.default_rng(seed)
    d, keys, heads, dk, dv = (
        HIDDEN[seed % 2],
        2,
        (4, 6)[seed % 2],
        (9, 16)[seed % 3 % 2],
        (16, 24, 7)[seed % 3],
    )
    widths = keys * dk, keys * dk, heads * dv, heads * dv, heads, heads
    inputs = [
        matrix(rng, fitting(d, 2 * seed + i), n, d, cut="rows" if cut and n > 1 else "")
        for i, n in enumerate(widths)
    ]
    o = matrix(rng, fitting(heads * dv, seed), d, heads * dv, 2, cut="columns" if cut else "")
    taps = 2 + seed % 3
    convs = tuple(vector(rng, taps * n).reshape(taps, n) for n in widths[:3])
    key_of_head = np.arange(heads, dtype=np.int32) % keys
    work = make(
        *inputs, o, convs, -np.exp(vector(rng, heads)), vector(rng, heads), key_of_head, dk, dv,
        Norm(dv, 1e-6, vector(rng, dv)), norm=norm_of(rng, d, seed),
    )  # fmt: skip
    first, slots = cases.sequences(rng, m, 6)
    floats = (taps - 1) * sum(widths[:3]) + kernels.delta_floats(heads, dk, dv)
    states, out = vector(rng, 6 * floats).reshape(6, floats), np.empty((m, d), np.float32)
    work(rng.standard_normal((m, d)).astype(np.float32), states, first, slots, out, threads)
    return [out, states]


def mamba_results(make: Any, seed: int, m: int, threads: int, cut: bool) -> list[Any]:
    """What Mamba-2 gives, and the states after it, of several sequences that have states before."""
    rng = np.random.default_rng(seed)
    d, groups, dk = HIDDEN[seed % 2], (1, 2)[seed % 3 > 0], (9, 16)[seed % 3 % 2]
    heads, dv = (4, 6)[seed % 2], (16, 24, 7)[seed % 3]
    widths = heads * dv, heads * dv, groups * dk, groups * dk, heads
    inputs = [
        matrix(rng, fitting(d, 2 * seed + i), n, d, cut="rows" if cut and n > 1 else "")
        for i, n in enumerate(widths)
    ]
    o = matrix(rng, fitting(heads * dv, seed), d, heads * dv, 2, cut="columns" if cut else "")
    taps = 2 + seed % 3
    convs = tuple(vector(rng, taps * n).reshape(taps, n) for n in widths[1:4])
    parts = heads * dv // groups
    work = make(
        *inputs, o, convs, -np.exp(vector(rng, heads)), vector(rng, heads), vector(rng, heads),
        np.arange(heads, dtype=np.int32) // (heads // groups), dk, dv,
        biases=tuple(vector(rng, n) for n in widths[1:4]) if seed % 2 else (None,) * 3,
        out_norms=[Norm(parts, 1e-6, vector(rng, parts)) for _ in range(groups)] if seed % 4 else (),
        gate_first=seed % 4 < 2, gate_scale=0.8, dt_scale=1.1, low=0.1 * (seed % 3), high=3.0,
        norm=norm_of(rng, d, seed),
        input_biases=tuple(vector(rng, n) if seed % 3 else None for n in widths[:4]),
    )  # fmt: skip
    first, slots = cases.sequences(rng, m, 6)
    floats = (taps - 1) * sum(widths[1:4]) + kernels.delta_floats(heads, dk, dv)
    states, out = vector(rng, 6 * floats).reshape(6, floats), np.empty((m, d), np.float32)
    work(rng.standard_normal((m, d)).astype(np.float32), states, first, slots, out, threads)
    return [out, states]


def convolution_results(make: Any, seed: int, m: int, threads: int, cut: bool) -> list[Any]:
    """What a gated convolution gives, and the rows that it keeps of several sequences."""
    rng = np.random.default_rng(seed)
    d, width, taps = HIDDEN[seed % 2], (64, 90)[seed % 3 > 0], 2 + seed % 3
    b, c, v = (matrix(rng, fitting(d, 2 * seed + i), width, d, cut="rows" if cut else "") for i in range(3))
    o = matrix(rng, fitting(width, seed), d, width, 2, cut="columns" if cut else "")
    biases = [vector(rng, width) if seed % 4 > number else None for number in range(4)]
    w = vector(rng, taps * width).reshape(taps, width)
    work = make(b, c, v, o, w, norm=norm_of(rng, d, seed), biases=biases[:3], conv_bias=biases[3])
    first, slots = cases.sequences(rng, m, 6)
    states, out = vector(rng, 6 * taps * width).reshape(6, -1), np.empty((m, d), np.float32)
    work(rng.standard_normal((m, d)).astype(np.float32), states, first, slots, out, threads)
    return [out, states]


def latent_results(make: Any, seed: int, m: int, threads: int, cut: bool) -> list[Any]:
    """What latent attention gives of rows of two sequences, and the keys after it."""
    rng = np.random.default_rng(seed)
    d, heads, low = HIDDEN[seed % 2], 3, seed % 3 > 0
    latent, part, rotary, vd, rank = ((48, 24, 8, 32, 40), (32, 32, 16, 32, 64), (20, 10, 6, 14, 18))[
        seed % 3
    ]
    q_a = matrix(rng, fitting(d, seed), rank, d, cut="rows" if cut else "") if low else None
    width = rank if low else d
    q = matrix(rng, fitting(width, seed + 1), heads * (part + rotary), width, cut="rows" if cut else "")
    kv_a = matrix(rng, fitting(d, seed + 2), latent + rotary, d, cut="rows" if cut else "")
    k_b = [matrix(rng, fitting(part, seed), latent, part) for _ in range(heads)]
    v_b = [matrix(rng, fitting(latent, seed // 2), vd, latent) for _ in range(heads)]
    whole = seed % 3 == 2  # too narrow for two panels
    o = matrix(
        rng,
        fitting(heads * vd, seed + 3),
        d,
        heads * vd,
        1 if whole else 2,
        "columns" if cut and not whole else "",
    )
    biases = (vector(rng, rank) if low and seed % 4 else None, vector(rng, kv_a.n)) if seed % 2 else None
    work = make(
        q, kv_a, k_b, v_b, o, 0.2, q_a=q_a, norm=norm_of(rng, d, seed), biases=biases,
        kv_norm=Norm(latent, 1e-6, vector(rng, latent)), q_norm=Norm(rank, 1e-6, vector(rng, rank)) if low else None,
        interleaved=seed % 4 != 2,
    )  # fmt: skip
    kv_type = KvType.F16 if seed % 4 else KvType.F32
    pool, none = (np.zeros(*one) for one in kernels.kv_pools(kv_type, BLOCKS, 1, kv_a.n))
    row = np.arange(m, dtype=np.int32)
    pos, start = np.concatenate([row[::2] // 2, row[1::2] // 2]), np.repeat([0, 2], [(m + 1) // 2, m // 2])
    table = np.array([2, 0, 3, 1], np.int32)
    cos, sin = rng.standard_normal((2, m, rotary // 2)).astype(np.float32)
    out = np.empty((m, d), np.float32)
    where = table[start + pos // 32], pos % 32, pos, table, start.astype(np.int32)
    work(
        rng.standard_normal((m, d)).astype(np.float32),
        cos,
        sin,
        kv_type,
        pool,
        none[..., :0],
        *where,
        out,
        threads,
    )
    return [out, pool]


def mlp_results(make: Any, seed: int, m: int, threads: int, cut: bool) -> list[Any]:
    rng = np.random.default_rng(seed)
    d = HIDDEN[seed % 2]
    gate, up = (matrix(rng, fitting(d, seed // 2 + 4), FFN, d, cut="rows" if cut else "") for _ in range(2))
    down = matrix(rng, BlockType.Q8_0, d, FFN, 4, cut="columns" if cut else "")
    kind = list(Activation)[seed % len(Activation)]
    gated = kind == Activation.SWIGLU_CLAMPED or seed % 4 != 1
    biases = (vector(rng, FFN) if gated and seed % 2 else None, vector(rng, FFN)) if seed % 3 else None
    work = make(
        gate if gated else None,
        up,
        down,
        activation=kind,
        limit=3.0,
        norm=norm_of(rng, d, seed + 1),
        biases=biases,
    )
    x = rng.standard_normal((m, d)).astype(np.float32)
    out, panels = np.empty((m, d), np.float32), np.empty((4, m, d), np.float32)
    work(x, out, threads)
    work(x, panels, threads, fold=False)
    return [out, panels]


def residual_results(make: Any, seed: int, m: int, threads: int, cut: bool) -> list[Any]:
    rng = np.random.default_rng(seed)
    x, part = rng.standard_normal((2, m, 70)).astype(np.float32)
    bias = vector(rng, 70) if seed % 2 else None
    make(bias, norm_of(rng, 70, seed), 0.22 if seed % 3 else 1.0)(x, part, threads)
    return [x]


RESULTS = {
    "Attention": attention_results,
    "GatedConvolution": convolution_results,
    "GatedDeltaNet": delta_results,
    "LatentAttention": latent_results,
    "Mamba2": mamba_results,
    "Mlp": mlp_results,
    "Residual": residual_results,
}
