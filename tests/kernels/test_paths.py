"""Every compiled path equals the scalar one bit for bit; threads, other rows and panels' cuts change nothing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from mpillm import kernels
from mpillm.kernels import BlockType, KvType
from tests.kernels import cases

COMPILED = [name for name in kernels.available() if name != "numpy"]
pytestmark = pytest.mark.skipif(not COMPILED, reason="the extension is not built")


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = kernels.path()
    yield
    kernels.set_path(before)


def scalar(case: cases.Case) -> list[cases.Array]:
    kernels.set_path("scalar")
    return case.run()


@pytest.mark.parametrize("path", [name for name in COMPILED if name != "scalar"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_scalar(path: str, seed: int) -> None:
    for case in cases.everything(np.random.default_rng(seed), threads=1 + seed):
        want = scalar(case)
        kernels.set_path(path)
        for got, expected in zip(case.run(), want, strict=True):
            assert cases.same(got, expected), f"{path}: {case}"


@pytest.mark.parametrize("path", [name for name in COMPILED if name != "scalar"])
@pytest.mark.parametrize(("type", "codes"), [(BlockType.Q8_0, slice(2, 34)), (BlockType.Q6_K, slice(0, 192))])
def test_largest_products_do_not_overflow(path: str, type: BlockType, codes: slice) -> None:
    """Sums of pairs are at the limits of 16 bits: weights of -128 and 127, activations of -127 and 127."""
    rng, k = np.random.default_rng(4), 2 * type.block
    weights, x = cases.canonical(rng, type, 16, k), np.ones((16, k), np.float32)
    blocks = weights.reshape(16, 2, type.block_bytes)
    for row, code in enumerate((0x80, 0x7F, 0x81, 0x00, 0xFF)):
        blocks[row, :, codes] = code
    x[1] = -1
    x[2, ::2] = -1
    x[3, 1::2] = -0.99
    x[4:] = rng.choice(np.array([-1, 1], np.float32), x[4:].shape)
    for m in (1, 4, 16):
        case = cases.Case("product", [int(type), 16, k, m, 1], [weights, np.array([0, k], np.int32), x[:m]])
        want = scalar(case)
        kernels.set_path(path)
        assert cases.same(case.run()[-1], want[-1]), m


@pytest.mark.parametrize("path", COMPILED)
@pytest.mark.parametrize("type", list(BlockType))
def test_rows_do_not_depend_on_their_batch_or_on_threads(path: str, type: BlockType) -> None:
    rng = np.random.default_rng(int(type))
    n = 83
    whole = cases.product(rng, type, n, 600, 103)
    k = whole.ints[2]
    kernels.set_path(path)
    want = whole.run()[-1]
    weights, bounds, x = whole.arrays
    for first, m in ((0, 1), (32, 1), (3, 2), (1, 3), (7, 5), (8, 17), (0, 41), (0, 103)):
        for threads in (1, 2, 3):
            case = cases.Case(
                "product", [int(type), n, k, m, 1], [weights, bounds, x[first : first + m]], threads
            )
            assert cases.same(case.run()[-1], want[first : first + m]), (first, m, threads)


@pytest.mark.parametrize("path", COMPILED)
@pytest.mark.parametrize("type", [BlockType.BF16, BlockType.Q4_1, BlockType.Q4_K, BlockType.W8A8])
def test_shards_fold_to_the_same_sum(path: str, type: BlockType) -> None:
    """Panels computed apart and folded later give what one product gives."""
    rng = np.random.default_rng(5)
    unit = max(64, type.block)
    n, k, m = 40, 8 * unit, 6
    kernels.set_path(path)
    weights, x = cases.canonical(rng, type, n, k), rng.standard_normal((m, k)).astype(np.float32)
    bounds = np.arange(0, k + 1, unit, dtype=np.int32)
    want = cases.Case("product", [int(type), n, k, m, 1], [weights, bounds, x]).run()[-1]
    for shards in (2, 4, 8):
        width = k // shards
        parts = []
        for s in range(shards):
            size = type.block_bytes * width // type.block
            mine = np.ascontiguousarray(weights[:, s * size : (s + 1) * size])
            inner = np.arange(0, width + 1, unit, dtype=np.int32)
            columns = np.ascontiguousarray(x[:, s * width : (s + 1) * width])
            parts.append(cases.Case("product", [int(type), n, width, m, 1], [mine, inner, columns]).run()[-1])
        assert cases.same(cases.Case("fold", [shards, m, n], [np.stack(parts)]).run()[0], want)


@pytest.mark.parametrize("path", kernels.available())
@pytest.mark.parametrize("type", [BlockType.F32, BlockType.F16, BlockType.BF16])
def test_float_weights_are_used_where_they_lie(path: str, type: BlockType) -> None:
    """Some rows and columns of a wider matrix, at any address, give what they give when packed."""
    rng = np.random.default_rng(8)
    n, k, m, size = 37, 131, 19, type.block_bytes
    kernels.set_path(path)
    file = np.zeros(5 + (n + 2) * (k + 9) * size, np.uint8)
    stored = file[5:].reshape(n + 2, -1)
    stored[:, : (k + 9) * size] = cases.canonical(rng, type, n + 2, k + 9)
    rows = stored[1 : n + 1, 4 * size : (4 + k) * size]
    begin = 5 + stored.shape[1] + 4 * size
    here = file[begin : begin + (n - 1) * stored.shape[1] + k * size]
    x = cases.values(rng, m, k)
    for bounds in ([0, k], [0, 32, 50, 50, k]):
        case = cases.Case("product", [int(type), n, k, m, 1], [rows, np.array(bounds, np.int32), x])
        want, got = case.run()[-1], np.empty((m, n), np.float32)
        for threads in (1, 2):
            kernels.matmul(type, here, n, k, bounds, x, got, threads, row_bytes=stored.shape[1])
            assert cases.same(got, want)


@pytest.mark.parametrize("path", kernels.available())
@pytest.mark.parametrize("type", [type for type in BlockType if type.quantised])
def test_quantised_weights_are_used_where_they_lie(path: str, type: BlockType) -> None:
    """As floats: some columns of a wider matrix give what they give when packed, in each panel too."""
    rng = np.random.default_rng(9)
    n, k, unit = 37, 1024, max(type.block, 32)
    kernels.set_path(path)
    stored = cases.canonical(rng, type, n, k + unit)
    width = type.row_bytes(k)
    left = stored[:, -width:]
    here = stored.reshape(-1)[stored.shape[1] - width :]
    bounds = np.array([0, 256, 256, 512, k], np.int32)
    packed = np.empty(kernels.packed_nbytes(type, n, k, bounds), np.uint8)
    kernels.pack(type, left, k, bounds, packed)
    for m in (1, 5, 19):
        x = np.empty((m, kernels.activation_nbytes(k, bounds, type)), np.uint8)
        kernels.quantize_rows(cases.values(rng, m, k), bounds, x, type=type)
        want, got = np.zeros((2, 4, m, n), np.float32)
        kernels.matmul(type, packed, n, k, bounds, x, want, fold=False)
        for threads in (1, 2):
            kernels.matmul(type, here, n, k, bounds, x, got, threads, False, stored.shape[1])
            assert cases.same(got, want)


@pytest.mark.parametrize("path", COMPILED)
def test_bf16_is_the_sum_of_the_manual(path: str) -> None:
    """Bit for bit what NumPy makes of it: products of two BF16 are exact, so multiplying and adding is an fma."""
    rng = np.random.default_rng(12)
    n, k, m = 21, 1677, 11  # a panel of whole steps of 32, more than pass by at a time, and one of any length
    weights = cases.canonical(rng, BlockType.BF16, n, k).view(np.uint16).copy()
    weights[2:4] = weights[0]  # rows that are denormal, or of any exponent
    bounds, x = np.array([0, 1344, 1677], np.int32), rng.standard_normal((m, k)).astype(np.float32)
    case = cases.Case("product", [int(BlockType.BF16), n, k, m, 1], [weights.view(np.uint8), bounds, x])
    kernels.set_path("numpy")
    want = case.run()[-1]
    kernels.set_path(path)
    assert cases.same(case.run()[-1], want)


@pytest.mark.parametrize("path", COMPILED)
def test_attention_depends_on_positions_alone(path: str) -> None:
    # of 1100 rows there are many queries, which are computed in larger groups than those of a part of the rows
    case = cases.attention(np.random.default_rng(11), BlockType.F16, 64, heads=8, kvh=2, window=40, rows=1100)
    kernels.set_path(path)
    want = case.run()[-1]
    ints, arrays = case.ints, case.arrays
    for rows in ([5], [0, 1099], list(range(3, 20)), list(range(600)), list(range(1100))):
        picked = [a[rows] if i in (4, 5, 7) else a for i, a in enumerate(arrays)]
        for threads in (1, 3):
            part = cases.Case("attention", [*ints[:2], len(rows), *ints[3:]], picked, threads)
            assert cases.same(part.run()[-1], want[rows])


@pytest.mark.parametrize("path", COMPILED)
@pytest.mark.parametrize("kv_type", cases.KV_TYPES)
def test_values_that_are_a_part_of_the_keys_give_the_bits_of_values_that_are_stored(
    path: str, kv_type: KvType
) -> None:
    kernels.set_path(path)
    for hd, vd, heads in ((96, 64, 1), (576, 512, 20), (1056, 1024, 3)):
        shared = cases.attention(
            np.random.default_rng(hd), kv_type, hd, heads, kvh=1, window=0, vd=vd, shared=True
        )
        stored = cases.Case("attention", shared.ints, shared.arrays.copy(), threads=2)
        stored.arrays[1] = np.ascontiguousarray(shared.arrays[0][:, :vd])
        assert cases.same(shared.run()[-1], stored.run()[-1])


@pytest.mark.parametrize("path", kernels.available())
def test_every_f16_converts_as_ieee_says(path: str) -> None:
    every = np.arange(65536, dtype=np.uint16)
    kernels.set_path(path)
    out = np.empty((256, 256), np.float32)
    kernels.dequantize(BlockType.F16, every.reshape(256, 256).view(np.uint8), 256, out, 1)
    with np.errstate(invalid="ignore"):
        assert cases.same(out.ravel(), every.view(np.float16).astype(np.float32))


@pytest.mark.parametrize("path", kernels.available())
def test_float32_rounds_to_f16_as_ieee_says(path: str) -> None:
    rng = np.random.default_rng(3)
    finite = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (finite[:-1] + finite[1:]) / np.float32(2)  # ties
    edges = np.array([65519.996, 65520, 65536, 1e10, np.inf, 2**-25, 2**-26, 2.9e-8, 1e-45, 0], np.float32)
    beside = [np.nextafter(between, np.float32(to)) for to in (0, np.inf)]
    x = np.concatenate([finite, between, *beside,
                        rng.integers(0, 2**32, 9000, dtype=np.uint32).view(np.float32), edges])  # fmt: skip
    x = np.concatenate([x, -x, np.zeros(-2 * len(x) % 64, np.float32)]).reshape(-1, 64)
    kernels.set_path(path)
    k, v = np.zeros((len(x), 1, 64, 32), np.uint16), np.zeros((len(x), 1, 32, 64), np.uint16)
    rows = np.arange(len(x), dtype=np.int32)
    kernels.kv_store(KvType.F16, x, x, rows, rows % 32, k, v, 1, 64)
    with np.errstate(over="ignore", invalid="ignore"):
        want = x.astype(np.float16)
    for got in (k[rows, 0, :, rows % 32], v[rows, 0, rows % 32]):
        ok = (got == want.view(np.uint16)) | (np.isnan(want) & np.isnan(got.view(np.float16)))
        assert ok.all()


def test_forcing_a_path() -> None:
    from mpillm.errors import JobError

    for name in kernels.available():
        kernels.set_path(name)
        assert kernels.path() == name
    missing = next(name for name in ("amx", "neondot") if name not in kernels.available())
    for name in (missing, "sse9"):
        with pytest.raises(
            JobError,
            match=f"MPILLM_KERNELS = {name} cannot be used on this machine; choose from numpy, scalar",
        ):
            kernels.set_path(name)
