"""Parts of layers as one piece of work give the bits of the single kernels, in whatever parts their matrices lie."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from mpillm import kernels
from mpillm.kernels import Activation, BlockType, KvType, Norm, fused
from mpillm.kernels.types import MIXED_ROWS
from tests.kernels import cases
from tests.kernels.fused_results import RESULTS, mlp_results
from tests.kernels.random_parts import (
    COMPILED,
    FFN,
    HD,
    HEADS,
    HIDDEN,
    KVH,
    Matrix,
    fitting,
    matrix,
    norm_of,
    packed,
    small_matrix,
    unfused,
    vector,
)

pytestmark = pytest.mark.skipif(not COMPILED, reason="the extension is not built")


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = kernels.path()
    yield
    kernels.set_path(before)


@pytest.mark.parametrize("path", COMPILED)
@pytest.mark.parametrize("name", RESULTS)
def test_one_piece_of_work_gives_the_single_kernels_bits(path: str, name: str) -> None:
    kernels.set_path(path)
    for seed in range(8):
        for m, threads, cut in ((1, 1, False), (1, 3, True), (7, 2, True), (40, 3, seed % 2 == 0)):
            want = RESULTS[name](unfused(getattr(fused, name)), seed, m, 1, cut)
            got = RESULTS[name](getattr(kernels, name), seed, m, threads, cut)
            for a, b in zip(got, want, strict=True):
                assert cases.same(a, b), (seed, m, threads, cut)


@pytest.mark.parametrize("path", COMPILED)
@pytest.mark.parametrize("rows", [[1], [1, 1, 1], [1, 8, 2, 1], [2, 1, 7, 40, 5]])
def test_a_mixture_adds_up_its_experts_in_one_piece_of_work(path: str, rows: list[int]) -> None:
    kernels.set_path(path)
    for seed, cut in enumerate((False, True, True, False)):
        rng = np.random.default_rng(seed)
        d, m = HIDDEN[seed % 2], max(rows)
        kinds = [fitting(d, 3 * seed + i + len(rows)) for i in range(3)]
        experts = [
            [
                matrix(rng, kinds[0], FFN, d, cut="rows" if cut else ""),
                matrix(rng, kinds[1], FFN, d, cut="rows" if cut else ""),
                matrix(rng, fitting(FFN, seed + len(rows)), d, FFN, 4, cut="columns" if cut else ""),
            ]
            for _ in rows
        ]
        gated, biased = seed != 1, seed > 1
        options = {"activation": list(Activation)[5 - seed], "limit": 4.0} if seed else {}
        if not gated:
            experts = [[None, *parts[1:]] for parts in experts]
            options["activation"] = Activation.RELU2
        biases = [
            {"biases": (vector(rng, FFN), vector(rng, FFN) if i % 2 else None), "down_bias": vector(rng, d)}
            if biased
            else {}
            for i in range(len(rows))
        ]
        at = np.concatenate([np.sort(rng.permutation(m)[:count]) for count in rows]).astype(np.int32)
        starts = np.cumsum([0, *rows], dtype=np.int32)
        h, weights = rng.standard_normal((m, d)).astype(np.float32), rng.random(len(at)).astype(np.float32)
        want = rng.standard_normal((4, m, d)).astype(np.float32)
        got = [want.copy() for _ in range(3)]
        with np.errstate(over="ignore", invalid="ignore"):  # some scales are as large as floats are
            made = [fused.Expert(*parts, **b) for parts, b in zip(experts, biases, strict=True)]
            unfused(fused.Experts)(made, **options)(h, at, starts, weights, want)
        made = [kernels.Expert(*parts, **b) for parts, b in zip(experts, biases, strict=True)]
        work = kernels.Experts(made, **options)
        for threads, panels in enumerate(got, 1):
            before = kernels._compiled.regions()
            work(h, at, starts, weights, panels, threads)
            assert kernels._compiled.regions() - before == 1
            assert cases.same(panels, want), (seed, cut, threads)


@pytest.mark.parametrize(
    ("m", "pieces"), [(MIXED_ROWS // 3, 1), (MIXED_ROWS // 3 + 1, 2), (MIXED_ROWS + 1, 3)]
)
def test_a_mixture_of_very_many_rows_takes_some_experts_at_a_time(m: int, pieces: int) -> None:
    """Activations of all would take much room, more than is planned for; the sums are the same."""
    rng, d = np.random.default_rng(1), HIDDEN[0]
    experts = [
        [
            *(matrix(rng, BlockType.Q4_0, FFN, d) for _ in range(2)),
            matrix(rng, BlockType.Q8_0, d, FFN, 2),
        ]
        for _ in range(3)
    ]
    at, starts = np.tile(np.arange(m, dtype=np.int32), 3), np.arange(4, dtype=np.int32) * m
    h, weights = rng.standard_normal((m, d)).astype(np.float32), rng.random(3 * m).astype(np.float32)
    want = np.zeros((2, m, d), np.float32)
    got = want.copy()
    unfused(fused.Experts)([fused.Expert(*parts) for parts in experts])(h, at, starts, weights, want)
    before = kernels._compiled.regions()
    kernels.Experts([kernels.Expert(*parts) for parts in experts])(h, at, starts, weights, got, 2)
    assert kernels._compiled.regions() - before == pieces
    assert cases.same(got, want)


def test_what_is_no_mixture_is_refused() -> None:
    rng, d = np.random.default_rng(2), 64
    one, other = (
        kernels.Expert(
            *(matrix(rng, BlockType.Q8_0, width, d) for _ in range(2)), matrix(rng, BlockType.Q8_0, d, width)
        )
        for width in (32, 64)
    )
    gate = matrix(rng, BlockType.Q8_0, 32, d)
    with pytest.raises(ValueError, match="but not in rows"):
        kernels.Expert(gate, gate, matrix(rng, BlockType.Q8_0, d, 32, cut="rows"))
    with pytest.raises(ValueError, match="experts of one mixture are alike"):
        kernels.Experts([one, other])
    mixture, h = kernels.Experts([one, one]), np.zeros((3, d), np.float32)
    at, weights, panels = (
        np.array([0, 2, 1], np.int32),
        np.ones(3, np.float32),
        np.zeros((1, 3, d), np.float32),
    )
    for starts in ([0, 0, 3], [0, 2, 4], [1, 2, 3], [0, 3, 2]):
        with pytest.raises(ValueError, match="starts must rise from 0 to 3"):
            mixture(h, at, np.array(starts, np.int32), weights, panels)
    with pytest.raises(ValueError, match=r"at must be within 0\.\.2"):
        mixture(h, at + 1, np.array([0, 1, 3], np.int32), weights, panels)
    with pytest.raises(ValueError, match="panels must have shape"):
        mixture(h, at, np.array([0, 1, 3], np.int32), weights, panels[:, :2])


def test_many_rows_take_the_memory_of_the_call_before() -> None:
    """Each page of new memory is a fault; of a prompt they took as long as norms and attention together."""
    rng, d, ffn, m = np.random.default_rng(4), 64, 2048, 4096
    gate, up, down = (packed(BlockType.Q4_0, cases.canonical(rng, BlockType.Q4_0, n, k), k, [0, k])
                      for n, k in ((ffn, d), (ffn, d), (d, ffn)))  # fmt: skip
    mlp, x = kernels.Mlp(gate, up, down), rng.standard_normal((m, d)).astype(np.float32)
    out, pages = np.zeros((m, d), np.float32), 2 * m * ffn * 4 // resource.getpagesize()
    faults = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        mlp(x, out, 1)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(faults[1:]) < pages // 16, faults


@pytest.mark.parametrize(("m", "regions"), [(1, 1), (5, 2), (8, 2), (17, 4)])
def test_a_stack_is_its_layers_in_turn(m: int, regions: int) -> None:
    """The same bits as part by part, in fewer regions the fewer rows there are, with time for others before each."""
    rng, count, d = np.random.default_rng(8), 4, HIDDEN[0]
    kv_of_head = np.arange(HEADS, dtype=np.int32) // (HEADS // KVH)
    made, dims = [], [HD, HD, 32, 32]
    for layer, hd in enumerate(dims):
        q, k, v = (small_matrix(rng, BlockType.Q4_0, n * hd, d) for n in (HEADS, KVH, KVH))
        o = small_matrix(rng, BlockType.Q8_0, d, HEADS * hd, 2)
        attention = kernels.Attention(
            q, k, v, o, kv_of_head, KVH, hd, 0.25, window=3 * (layer % 2), norm=norm_of(rng, d, layer),
            rotary=0 if layer == 3 else None,
        )  # fmt: skip
        gate, up = (small_matrix(rng, BlockType.F16, FFN, d) for _ in range(2))
        mlp = kernels.Mlp(
            gate, up, small_matrix(rng, BlockType.Q8_0, d, FFN, 4), norm=norm_of(rng, d, layer + 1)
        )
        after = [
            kernels.Residual(
                vector(rng, d) if layer % 2 else None, norm_of(rng, d, layer + i), (1.0, 0.5)[layer // 2]
            )
            for i in (2, 4)
        ]
        made.append((attention, after[0], mlp, after[1]))
    pos, zeros = np.arange(m, dtype=np.int32), np.zeros(m, np.int32)
    rows = []
    for hd, block in ((HD, 1), (32, 0)):
        cos, sin = rng.standard_normal((2, m, hd // 2)).astype(np.float32)
        rows.append((cos, sin, zeros + block, pos, pos, np.array([block], np.int32), zeros))
    x = rng.standard_normal((m, d)).astype(np.float32)
    results = []
    for module in (kernels, fused):
        pools = [tuple(np.zeros(*one) for one in kernels.kv_pools(KvType.F16, 2, KVH, hd)) for hd in dims]
        mine, before = x.copy(), kernels._compiled.regions()
        calls: list[int] = []
        module.LayerStack(made, KvType.F16, pools, [0, 0, 1, 1])(
            mine, rows, lambda calls=calls: calls.append(1), None, 2
        )
        if module is kernels:
            assert kernels._compiled.regions() - before == len(calls) == regions
        else:
            assert len(calls) == count
        results.append([mine, *(pool for pair in pools for pool in pair)])
    for got, want in zip(*results, strict=True):
        assert cases.same(got, want)
    assert np.isfinite(results[0][0]).all()
    assert not cases.same(results[0][0], x)
    # Without messages to look after there are fewer regions still.
    pools = [tuple(np.zeros(*one) for one in kernels.kv_pools(KvType.F16, 2, KVH, hd)) for hd in dims]
    mine, before = x.copy(), kernels._compiled.regions()
    kernels.LayerStack(made, KvType.F16, pools, [0, 0, 1, 1])(mine, rows, None, None, 2)
    assert kernels._compiled.regions() - before == 1
    assert cases.same(mine, results[0][0])
    # With two shards that make the same, the sum comes between the parts and what is done with them.
    sums = []
    for module in (kernels, fused):
        pools = [tuple(np.zeros(*one) for one in kernels.kv_pools(KvType.F16, 2, KVH, hd)) for hd in dims]
        mine = x.copy()
        module.LayerStack(made, KvType.F16, pools, [0, 0, 1, 1])(mine, rows, lambda: None, _double, 2)
        sums.append(mine)
    assert cases.same(*sums)
    assert not cases.same(sums[0], results[0][0])
    # In lanes too, each of whose sums ends when it is needed, in the order in which they began.
    for module in (kernels, fused) if m > 1 else ():
        pools = [tuple(np.zeros(*one) for one in kernels.kv_pools(KvType.F16, 2, KVH, hd)) for hd in dims]
        mine, said = x.copy(), list[str]()
        later = partial(_later, said)
        module.LayerStack(made, KvType.F16, pools, [0, 0, 1, 1])(mine, rows, None, later, 2, [0, m // 2, m])
        assert cases.same(mine, sums[0])
        assert said == [
            "begin 0",
            "begin 1",
            *["end 0", "begin 0", "end 1", "begin 1"] * (2 * count - 1),
            "end 0",
            "end 1",
        ]
    pools = [tuple(np.zeros(*one) for one in kernels.kv_pools(KvType.F16, 2, KVH, hd)) for hd in dims]
    for places, words in (
        ([0, 1, 1, 1], "layers of one place rotate 16 and 32"),
        ([0, 0, 1, 2], "use places .* there are 2"),
        ([0, 0, 0], "4 layers have as many pools and places, not 4 and 3"),
    ):
        with pytest.raises(ValueError, match=words):
            kernels.LayerStack(made, KvType.F16, pools, places)(x, rows, lambda: None, None)
    for lanes, reduce in (([0, m + 1], _double), ([0], _double), ([0, 0, m], _double), ([0, 1, m], None)):
        with pytest.raises(ValueError, match=f"lanes are rows .* of {m} rows, not"):
            kernels.LayerStack(made, KvType.F16, pools, [0, 0, 1, 1])(x, rows, None, reduce, 1, lanes)


def _double(part: Any, lane: int) -> Callable[[], None]:
    part += part
    return lambda: None


def _later(said: list[str], part: Any, lane: int) -> Callable[[], None]:
    """Double the part when that is ended."""
    said.append(f"begin {lane}")

    def end() -> None:
        said.append(f"end {lane}")
        part[...] += part

    return end


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("norm must be 64 wide, not 32", {"norm": Norm(32, 1e-5)}),
        ("q's norm must be 8 or 16 wide, not 4", {"qk_norms": (Norm(4, 1e-5), None)}),
        ("k's bias must have shape", {"biases": (None, np.zeros(3, np.float32), None)}),
        ("sinks must have shape", {"sinks": np.zeros(3, np.float32)}),
        ("n of q, k, v and k of o", {"value_dim": 16}),
        ("rope rotates an even number of a head's 8 dimensions, not 12", {"rotary": 12}),
        ("a soft cap must be above 0", {"softcap": -1.0}),
        ("chunks are windows: they need a number of positions", {"chunked": True}),
        ("scores cannot be tuned by .*: the length is at least 1", {"tuning": (0.1, 0, 0)}),
    ],
)
def test_what_is_no_attention_is_refused(words: str, options: dict[str, Any]) -> None:
    rng, heads = np.random.default_rng(3), np.zeros(2, np.int32)
    q, k, v = (matrix(rng, BlockType.Q8_0, n * 8, 64) for n in (2, 1, 1))
    with pytest.raises(ValueError, match=words):
        kernels.Attention(q, k, v, matrix(rng, BlockType.Q8_0, 64, 16), heads, 1, 8, 1.0, **options)


def test_what_is_no_latent_attention_is_refused() -> None:
    rng = np.random.default_rng(3)
    heads, latent, part, rotary, value = 2, 32, 8, 4, 16
    q, kv_a = (
        matrix(rng, BlockType.F32, heads * (part + rotary), 64),
        matrix(rng, BlockType.F32, latent + rotary, 64),
    )
    k_b = [matrix(rng, BlockType.F32, latent, part) for _ in range(heads)]
    v_b = [matrix(rng, BlockType.F32, value, latent) for _ in range(heads)]
    o, norm = matrix(rng, BlockType.F32, 64, heads * value), {"kv_norm": Norm(latent, 1e-6)}
    kernels.LatentAttention(q, kv_a, k_b, v_b, o, 1.0, **norm)
    with pytest.raises(ValueError, match="heads and k of v_b, n of q and k of o"):
        kernels.LatentAttention(q, kv_a, k_b[:1], v_b, o, 1.0, **norm)
    with pytest.raises(ValueError, match="n and k of v_b must have shape"):
        kernels.LatentAttention(q, kv_a, k_b, [v_b[0], k_b[0]], o, 1.0, **norm)
    with pytest.raises(ValueError, match="kv's norm must be 32 wide, not 16"):
        kernels.LatentAttention(q, kv_a, k_b, v_b, o, 1.0, kv_norm=Norm(16, 1e-6))
    with pytest.raises(ValueError, match="q without a low rank has neither a norm nor a bias"):
        kernels.LatentAttention(q, kv_a, k_b, v_b, o, 1.0, q_norm=Norm(8, 1e-6), **norm)
    odd = matrix(rng, BlockType.F32, latent + 3, 64), matrix(rng, BlockType.F32, heads * (part + 3), 64)
    with pytest.raises(ValueError, match="rope rotates an even number"):
        kernels.LatentAttention(odd[1], odd[0], k_b, v_b, o, 1.0, **norm)


def test_what_is_no_mlp_is_refused() -> None:
    rng = np.random.default_rng(3)
    gate, up, down = (matrix(rng, BlockType.Q8_0, n, k) for n, k in ((32, 64), (64, 64), (64, 32)))
    with pytest.raises(ValueError, match="n of gate and up"):
        kernels.Mlp(gate, up, down)
    with pytest.raises(ValueError, match="n of up"):
        kernels.Mlp(None, up, down)
    with pytest.raises(ValueError, match="without a gate has no bias of one"):
        kernels.Mlp(None, gate, down, biases=(np.zeros(32, np.float32), None))
    with pytest.raises(ValueError, match="the clamped SwiGLU needs up and a limit above 0"):
        kernels.Mlp(None, gate, down, activation=Activation.SWIGLU_CLAMPED, limit=7.0)
    with pytest.raises(ValueError, match="an RMS norm has no bias"):
        Norm(4, 1e-5, bias=np.zeros(4, np.float32))


def test_products_of_parts_are_the_whole() -> None:
    rng = np.random.default_rng(2)
    for type in BlockType:
        k = 3 * max(32, type.block)
        x = rng.standard_normal((5, k)).astype(np.float32)
        for cut, panels in (("rows", 1), ("columns", 2)):
            parted = matrix(np.random.default_rng(3), type, 50, k, panels, cut)
            whole = matrix(np.random.default_rng(3), type, 50, k, panels)
            outs = [np.empty((5, 50), np.float32) for _ in range(2)]
            kernels.Products(parted)(x, outs[:1], 2)
            kernels.Products(whole)(x, outs[1:], 2)
            assert cases.same(*outs)


def test_matrices_of_the_same_rows_cut_them_alike() -> None:
    rng = np.random.default_rng(4)
    with pytest.raises(ValueError, match="cut their columns alike"):
        kernels.Products(matrix(rng, BlockType.Q8_0, 16, 64), matrix(rng, BlockType.Q8_0, 16, 96))


def test_an_mlp_is_one_piece_of_work() -> None:
    before = kernels._compiled.regions()
    mlp_results(kernels.Mlp, 2, 3, 2, cut=False)
    made = kernels._compiled.regions() - before
    assert made == 3 + 2  # three matrices packed, two calls


def in_pieces(whole: Matrix, raw: Any, count: int) -> Matrix:
    """The same matrix as so many pieces, one under the other."""
    pieces = tuple(packed(whole.type, piece, whole.k, whole.bounds) for piece in np.array_split(raw, count))
    return replace(whole, data=whole.data[:0], parts=pieces)


@pytest.mark.parametrize("counts", [(28, 2, 2, 26), (30, 1, 1, 32)])
def test_attention_of_about_sixty_pieces(counts: tuple[int, ...]) -> None:
    """Each piece is a step of the work: its list is as long as the matrices ask for."""
    rng = np.random.default_rng(sum(counts))
    d, m = 70, 3
    shapes = [(HEADS * HD, d), (KVH * HD, d), (KVH * HD, d), (d, HEADS * HD)]
    raws = [cases.canonical(rng, BlockType.F16, n, k) for n, k in shapes]
    whole = [packed(BlockType.F16, raw, k, [0, k]) for raw, (_, k) in zip(raws, shapes, strict=True)]
    pieces = [in_pieces(*one) for one in zip(whole, raws, counts, strict=True)]
    x, (cos, sin) = vector(rng, m * d).reshape(m, d), vector(rng, 2 * m * HD // 2).reshape(2, m, HD // 2)
    row, results = np.arange(m, dtype=np.int32), []
    for q, k, v, o in (whole, pieces):
        pools = [np.zeros(*one) for one in kernels.kv_pools(KvType.F16, 1, KVH, HD)]
        kv_of_head = np.arange(HEADS, dtype=np.int32) // (HEADS // KVH)
        work = kernels.Attention(
            q, k, v, o, kv_of_head, KVH, HD, 0.25, norm=Norm(d, 1e-5, vector(rng, d) * 0 + 1)
        )
        out, zeros = np.empty((m, d), np.float32), np.zeros(m, np.int32)
        work(x, cos, sin, BlockType.F16, *pools, zeros, row, row, np.zeros(1, np.int32), zeros, out, 2)
        results.append(out)
    assert cases.same(*results)
