"""Each kernel alone, on a model's own sizes: bytes and operations a second, and the gain over the scalar path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from mpillm import kernels
from mpillm.bench.machine import seconds
from mpillm.bench.random_blocks import random_blocks, random_scaled
from mpillm.bench.result import Kernel, Machine
from mpillm.kernels import KV_BLOCK, BlockType, KvType
from mpillm.weights.plan import panels_of_rows

ROWS = (1, 32, 512)
ENOUGH = 0.002  # seconds that a timing is to last, unless one call takes longer
TIMINGS = 5  # timings of each repeat
MATRIX_BYTES = 2**30  # all copies of W together: more than a cache holds, so products read W from memory
MOST_COPIES = 128
TOP = 40  # candidates of a draw with top_k

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class KernelSizes:
    """The sizes of a model that determine the work of its kernels; `context` tokens are in the KV cache."""

    hidden: int = 2048
    ffn: int = 8192
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    vocab: int = 32_000
    context: int = 512


@dataclass(frozen=True)
class Case:
    """A kernel and its arguments; it reads and writes `nbytes` bytes and does `operations` operations."""

    name: str
    detail: str
    rows: int
    nbytes: int
    operations: int
    call: Callable[[int], object]  # takes the number of threads
    product: bool = False


def measure(
    sizes: KernelSizes,
    types: Sequence[BlockType],
    threads: Sequence[int],
    machine: Machine,
    repeats: int,
    rows: Sequence[int] = ROWS,
) -> Iterator[Kernel]:
    """Products of each type, then the small operations, with each number of rows and threads."""
    usual = kernels.path()
    scalar = "scalar" if "scalar" in kernels.available() else "numpy"
    for case in cases(sizes, types, rows):
        for count in threads:
            taken = _time(case, count, repeats)
            made = Kernel(
                name=case.name,
                detail=case.detail,
                rows=case.rows,
                threads=count,
                seconds=taken,
                rate=case.nbytes / taken,
                operations=case.operations / taken,
            )
            if count in machine.read:
                made.read_share = made.rate / machine.read[count]
            if case.product and case.detail.startswith(("Q", "W")) and count in machine.int8:
                made.int8_share = made.operations / machine.int8[count]
            if not case.product:
                try:
                    kernels.set_path(scalar)
                    made.over_scalar = _time(case, count, repeats) / taken
                finally:
                    kernels.set_path(usual)
            yield made


def cases(sizes: KernelSizes, types: Sequence[BlockType], rows: Sequence[int]) -> Iterator[Case]:
    """Yield all cases to measure. The matrix is one of an MLP: the widest ones, and most of a model's weights."""
    random = np.random.default_rng(1)
    for kind in types:
        if kind.k_quant and sizes.hidden % kind.block:
            continue  # no such model has K-quants
        for m in rows:
            yield _product(random, kind, sizes.ffn, sizes.hidden, m)
    for m in rows:
        yield from _small(random, sizes, m)
        yield _attention(random, sizes, m)


def _time(case: Case, threads: int, repeats: int) -> float:
    """Return seconds of one call: the minimum of the timings, which other programs disturbed least."""
    case.call(threads)
    calls = max(1, min(10_000, int(ENOUGH / max(seconds(case.call, threads), 1e-7))))

    def timing() -> None:
        for _ in range(calls):
            case.call(threads)

    return min(seconds(timing) for _ in range(repeats * TIMINGS)) / calls


def _random(kind: BlockType, k: int) -> NDArray[np.uint8]:
    """Blocks of a matrix with rows of k values."""
    return (
        random_scaled(kind)
        if kind.scaled or kind.whole
        else random_blocks(GGMLQuantizationType[kind.multiplied_as.name], k)
    )


def _product(random: np.random.Generator, kind: BlockType, n: int, k: int, m: int) -> Case:
    bounds = np.array(panels_of_rows(kind, k), np.int32)
    one = kernels.packed_nbytes(kind, n, k, bounds)
    copies = min(MOST_COPIES, -(-MATRIX_BYTES // one)) if m == 1 else 1
    canonical = np.resize(_random(kind, k), (n, kind.row_bytes(k)))
    packed = np.empty(one, np.uint8)
    kernels.pack(kind, canonical, k, bounds, packed)
    weights = [packed, *(packed.copy() for _ in range(copies - 1))]
    rows = _floats(random, m, k)
    x: NDArray[np.generic] = rows
    if kind.quantised:
        blocks = np.empty((m, kernels.activation_nbytes(k, bounds, kind)), np.uint8)
        kernels.quantize_rows(rows, bounds, blocks, type=kind)
        x = blocks
    out = np.empty((m, n), np.float32)
    turn = 0

    def call(threads: int) -> None:
        nonlocal turn
        turn = (turn + 1) % copies
        kernels.matmul(kind, weights[turn], n, k, bounds, x, out, threads)

    nbytes = one + x.nbytes + out.nbytes
    return Case("matmul", f"{kind.name} {n} x {k}", m, nbytes, 2 * n * k * m, call, product=True)


def _small(random: np.random.Generator, sizes: KernelSizes, m: int) -> Iterator[Case]:
    """Yield the kernels that work on rows; their operations are counted where there is a usual way to count them."""
    d, ffn, hd, vocab = sizes.hidden, sizes.ffn, sizes.head_dim, sizes.vocab
    x, weight, out = _floats(random, m, d), _floats(random, d), np.empty((m, d), np.float32)
    yield Case(
        "rms_norm", str(d), m, 8 * m * d, 4 * m * d, lambda t: kernels.rms_norm(x, weight, 1e-5, out, t)
    )
    q, angles = _floats(random, m, sizes.heads * hd), random.uniform(0, 6, (m, hd // 2))
    cos, sin = np.cos(angles, dtype=np.float32), np.sin(angles, dtype=np.float32)
    yield Case(
        "rope", f"{sizes.heads} x {hd}", m, 2 * q.nbytes, 3 * q.size,
        lambda t: kernels.rope(q, cos, sin, sizes.heads, hd, t),
    )  # fmt: skip
    gate, up = _floats(random, m, ffn), _floats(random, m, ffn)
    active = np.empty_like(gate)
    yield Case(
        "activate", str(ffn), m, 12 * m * ffn, 0,
        lambda t: kernels.activate(kernels.Activation.SILU, gate, up, active, t),
    )  # fmt: skip
    bounds = np.array([0, ffn], np.int32)
    blocks = np.empty((m, kernels.activation_nbytes(ffn, bounds)), np.uint8)
    yield Case(
        "quantize_rows", str(ffn), m, gate.nbytes + blocks.nbytes, 0,
        lambda t: kernels.quantize_rows(gate, bounds, blocks, t),
    )  # fmt: skip
    scores = _floats(random, m, 128)
    yield Case("softmax", "128", m, 8 * m * 128, 0, lambda t: kernels.softmax(scores, t))
    if m > 64:
        return  # the engine computes logits of at most 64 rows at a time
    logits, values, ids = (
        _floats(random, m, vocab),
        np.empty((m, TOP), np.float32),
        np.empty((m, TOP), np.int32),
    )
    yield Case(
        "top_k",
        f"{TOP} of {vocab}",
        m,
        logits.nbytes,
        0,
        lambda t: kernels.top_k(logits, TOP, values, ids, t),
    )
    ones, ends, sums = np.ones(m, np.float32), np.array([0, vocab], np.int32), np.empty((m, 1, 3), np.float32)
    yield Case(
        "lse_parts", str(vocab), m, logits.nbytes, 0, lambda t: kernels.lse_parts(logits, ones, ends, sums, t)
    )


def _attention(random: np.random.Generator, sizes: KernelSizes, m: int) -> Case:
    """`m` sequences' next tokens after `context` tokens; from 512 rows on, one sequence's prompt up to there."""
    heads, kv_heads, hd, context = sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.context
    prompt = m >= 512
    per_sequence = -(-max(context, m if prompt else 0) // KV_BLOCK)
    sequences = 1 if prompt else m
    blocks = per_sequence * sequences
    keys = random.standard_normal((blocks, kv_heads, hd, KV_BLOCK)).astype(np.float16).view(np.uint16)
    values = random.standard_normal((blocks, kv_heads, KV_BLOCK, hd)).astype(np.float16).view(np.uint16)
    q, out = _floats(random, m, heads * hd), np.empty((m, heads * hd), np.float32)
    table = np.arange(blocks, dtype=np.int32)
    if prompt:
        positions, start = np.arange(m, dtype=np.int32), np.zeros(m, np.int32)
    else:
        positions = np.full(m, context - 1, np.int32)
        start = np.arange(m, dtype=np.int32) * per_sequence
    kv_of_head = (np.arange(heads) // (heads // kv_heads)).astype(np.int32)
    pairs = int((positions.astype(np.int64) + 1).sum())
    nbytes = q.nbytes + out.nbytes + 2 * 2 * kv_heads * hd * (m if prompt else pairs)

    def call(threads: int) -> None:
        kernels.attention(
            KvType.F16, q, out, keys, values, positions, table, start, kv_of_head, kv_heads, hd, hd**-0.5, 0,
            threads,
        )  # fmt: skip

    return Case("attention", f"{heads} heads, {'prompt' if prompt else f'{context} tokens'}", m, nbytes,
                4 * heads * hd * pairs, call)  # fmt: skip


def _floats(random: np.random.Generator, *shape: int) -> Floats:
    return random.standard_normal(shape, np.float32)
