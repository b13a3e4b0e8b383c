"""Half a layer as one piece of work gives the bits of the single kernels, in whatever parts its matrices lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from mpillm import kernels
from mpillm.kernels import BlockType, halves
from mpillm.kernels.types import MIXED_ROWS
from tests.kernels import cases

COMPILED = [name for name in kernels.available() if name != "numpy"]
pytestmark = pytest.mark.skipif(not COMPILED, reason="the extension is not built")
HD, HEADS, KVH, FFN, BLOCKS = 16, 6, 2, 160, 4
HIDDEN = (70, 256)  # by the seed; K-quants have whole blocks of 256


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = kernels.path()
    yield
    kernels.set_path(before)


@dataclass
class Matrix:
    type: BlockType
    n: int
    k: int
    bounds: Any
    data: Any
    parts: tuple[Matrix, ...] = ()
    row_bytes: int = 0


def packed(type: BlockType, raw: Any, k: int, bounds: Any) -> Matrix:
    data = np.empty(kernels.packed_nbytes(type, len(raw), k, bounds), np.uint8)
    kernels.pack(type, np.ascontiguousarray(raw), k, bounds, data)
    return Matrix(type, len(raw), k, np.array(bounds, np.int32), data)


def matrix(
    rng: np.random.Generator, type: BlockType, n: int, k: int, panels: int = 1, cut: str = ""
) -> Matrix:
    """Random weights in one piece, or in two: `rows` one under the other, `columns` side by side."""
    raw = cases.canonical(rng, type, n, k)
    unit = max(32, type.block)
    bounds = [k // unit * p // panels * unit for p in range(panels)] + [k]
    whole = packed(type, raw, k, bounds)
    if cut == "rows":
        parts = (packed(type, raw[: n // 2], k, bounds), packed(type, raw[n // 2 :], k, bounds))
    elif cut == "columns":
        half = bounds[panels // 2]
        left = type.row_bytes(half)
        parts = (
            packed(type, raw[:, :left], half, bounds[: panels // 2 + 1]),
            packed(type, raw[:, left:], k - half, [b - half for b in bounds[panels // 2 :]]),
        )
    else:
        return whole
    return replace(whole, data=whole.data[:0], parts=parts)


def fitting(k: int, number: int) -> BlockType:
    """One of the types that have rows of k values."""
    types = [type for type in BlockType if cases.whole(type, k) == k]
    return types[number % len(types)]


def unfused(half: type[Any]) -> Any:
    """The twin's class over the compiled single kernels."""
    return type(half.__name__, (half,), {"ops": kernels._compiled})


def vector(rng: np.random.Generator, n: int) -> Any:
    return rng.standard_normal(n).astype(np.float32)


def attention_results(make: Any, seed: int, m: int, threads: int, cut: bool) -> list[Any]:
    """What a half gives, and the pools after it; the first row of each of two sequences is at a position of its own."""
    rng = np.random.default_rng(seed)
    d = HIDDEN[seed % 2]
    q, k, v = (
        matrix(rng, fitting(d, 2 * seed + i), n * HD, d, cut="rows" if cut else "")
        for i, n in enumerate((HEADS, KVH, KVH))
    )
    o = matrix(rng, fitting(HEADS * HD, seed + 3), d, HEADS * HD, 2, cut="columns" if cut else "")
    biases = tuple(vector(rng, n * HD) for n in (HEADS, KVH, KVH)) if seed % 2 else None
    norms = (vector(rng, HD), vector(rng, HD)) if seed % 3 else None
    kv_of_head = np.arange(HEADS, dtype=np.int32) // (HEADS // KVH)
    half = make(vector(rng, d), 1e-5, q, k, v, o, kv_of_head, KVH, HD, 0.25, 0, biases, norms)
    table = np.array([2, 0, 3, 1], np.int32)
    row = np.arange(m, dtype=np.int32)
    pos, start = row // 2, row % 2 * 2
    block = table[start + pos // 32]
    pools = np.zeros((BLOCKS, KVH, HD, 32), np.uint16), np.zeros((BLOCKS, KVH, 32, HD), np.uint16)
    cos, sin = rng.standard_normal((2, m, HD // 2)).astype(np.float32)
    out = np.empty((m, d), np.float32)
    order = np.argsort(start, kind="stable")  # a sequence's rows are neighbours
    x, index = rng.standard_normal((m, d)).astype(np.float32), (order,)
    half(x, cos, sin, BlockType.F16, *pools, *(np.ascontiguousarray(a[index]) for a in (block, pos % 32, pos)),
         table, np.ascontiguousarray(start[order]), out, threads)  # fmt: skip
    return [out, *pools]


def feed_forward_results(make: Any, seed: int, m: int, threads: int, cut: bool) -> list[Any]:
    rng = np.random.default_rng(seed)
    d = HIDDEN[seed % 2]
    gate, up = (matrix(rng, fitting(d, seed // 2 + 4), FFN, d, cut="rows" if cut else "") for _ in range(2))
    down = matrix(rng, BlockType.Q8_0, d, FFN, 4, cut="columns" if cut else "")
    norm = vector(rng, d) if seed % 2 else None
    biases = (vector(rng, FFN), vector(rng, FFN)) if seed % 3 else None
    half = make(norm, 1e-5, gate, up, down, biases)
    x = rng.standard_normal((m, d)).astype(np.float32)
    out, panels = np.empty((m, d), np.float32), np.empty((4, m, d), np.float32)
    half(x, out, threads)
    half(x, panels, threads, fold=False)
    return [out, panels]


@pytest.mark.parametrize("path", COMPILED)
@pytest.mark.parametrize("results", [attention_results, feed_forward_results])
def test_one_piece_of_work_gives_the_single_kernels_bits(path: str, results: Any) -> None:
    name = "AttentionHalf" if results is attention_results else "FeedForwardHalf"
    kernels.set_path(path)
    for seed in range(6):
        for m, threads, cut in ((1, 1, False), (1, 3, True), (7, 2, True), (40, 3, seed % 2 == 0)):
            want = results(unfused(getattr(halves, name)), seed, m, 1, cut)
            got = results(getattr(kernels, name), seed, m, threads, cut)
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
        at = np.concatenate([np.sort(rng.permutation(m)[:count]) for count in rows]).astype(np.int32)
        starts = np.cumsum([0, *rows], dtype=np.int32)
        h, weights = rng.standard_normal((m, d)).astype(np.float32), rng.random(len(at)).astype(np.float32)
        want = rng.standard_normal((4, m, d)).astype(np.float32)
        got = [want.copy() for _ in range(3)]
        with np.errstate(over="ignore", invalid="ignore"):  # some scales are as large as floats are
            unfused(halves.Mixture)([halves.Expert(*parts) for parts in experts])(
                h, at, starts, weights, want
            )
        work = kernels.Mixture([kernels.Expert(*parts) for parts in experts])
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
    unfused(halves.Mixture)([halves.Expert(*parts) for parts in experts])(h, at, starts, weights, want)
    before = kernels._compiled.regions()
    kernels.Mixture([kernels.Expert(*parts) for parts in experts])(h, at, starts, weights, got, 2)
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
        kernels.Mixture([one, other])
    mixture, h = kernels.Mixture([one, one]), np.zeros((3, d), np.float32)
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


def test_layers_are_their_halves_in_turn() -> None:
    """The same bits as half by half, in two pieces of work a layer, with room for others before each."""
    rng, m, count, d = np.random.default_rng(8), 5, 3, HIDDEN[0]
    kv_of_head = np.arange(HEADS, dtype=np.int32) // (HEADS // KVH)
    made = []
    for _ in range(count):
        q, k, v = (matrix(rng, BlockType.Q4_0, n * HD, d) for n in (HEADS, KVH, KVH))
        o = matrix(rng, BlockType.Q8_0, d, HEADS * HD, 2)
        attention = kernels.AttentionHalf(vector(rng, d), 1e-5, q, k, v, o, kv_of_head, KVH, HD, 0.25, 3)
        gate, up = (matrix(rng, BlockType.F16, FFN, d) for _ in range(2))
        down = matrix(rng, BlockType.Q8_0, d, FFN, 4)
        made.append((attention, kernels.FeedForwardHalf(vector(rng, d), 1e-5, gate, up, down)))
    pos, table, zeros = np.arange(m, dtype=np.int32), np.array([1], np.int32), np.zeros(m, np.int32)
    where = zeros + 1, pos, pos, table, zeros  # block, offset, position, table, where it begins
    cos, sin = rng.standard_normal((2, m, HD // 2)).astype(np.float32)
    x = rng.standard_normal((m, d)).astype(np.float32)
    results, calls = [], []
    for module in (kernels, halves):
        pools = [tuple(np.zeros(*one) for one in kernels.kv_pools(BlockType.F16, 2, KVH, HD)) for _ in made]
        mine, before = x.copy(), kernels._compiled.regions()
        module.Layers(made, BlockType.F16, pools)(mine, cos, sin, *where, lambda: calls.append(1), 2)
        assert kernels._compiled.regions() - before == 2 * count
        results.append([mine, *(pool for pair in pools for pool in pair)])
    for got, want in zip(*results, strict=True):
        assert cases.same(got, want)
    assert len(calls) == 2 * count
    assert not cases.same(results[0][0], x)


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


def test_half_a_layer_is_one_piece_of_work() -> None:
    before = kernels._compiled.regions()
    feed_forward_results(kernels.FeedForwardHalf, 1, 3, 2, cut=False)
    made = kernels._compiled.regions() - before
    assert made == 3 + 2  # three matrices packed, two calls
