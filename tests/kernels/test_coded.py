"""BF12: the bits of BF16 in three quarters of its bytes, in products of any shape, or a refusal."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from mpillm import kernels
from mpillm.kernels import BlockType, reference
from mpillm.kernels.coded import EXCEPTIONS, decode_panel
from mpillm.kernels.types import Misfit, packed_nbytes
from tests.kernels import cases

BF12, BF16 = BlockType.BF12, BlockType.BF16
SHAPES = (
    (16, 256, 1),
    (33, 288, 1),
    (1, 33, 3),
    (50, 700, 37),
    (70, 96, 5),
    (20, 2050, 8),
    (7, 1, 2),
    (48, 512, 64),
)


@pytest.fixture(autouse=True, params=kernels.available())
def _path(request: pytest.FixtureRequest) -> Iterator[None]:
    before = kernels.path()
    kernels.set_path(request.param)
    yield
    kernels.set_path(before)


def packed(type: BlockType, rows: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    out = np.full(packed_nbytes(type, len(rows), bounds[-1], bounds), 0xAA, np.uint8)
    kernels.pack(type, rows, int(bounds[-1]), bounds, out, 2, stored=BF16)
    return out


@pytest.mark.parametrize(("n", "k", "m"), SHAPES)
def test_products_are_those_of_bf16(n: int, k: int, m: int) -> None:
    rng = np.random.default_rng(n * k + m)
    for kind in ("any", "trained"):
        rows = cases.canonical(rng, BF12, n, k)
        if kind == "trained":
            normal = (rng.standard_normal((n, k)) / 50).astype(np.float32)
            rows = (normal.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        bounds, x = cases.panels(rng, BF12, k), cases.values(rng, m, k)
        results = []
        for type in (BF16, BF12):
            for fold in (True, False):
                out = np.empty((m, n) if fold else (len(bounds) - 1, m, n), np.float32)
                kernels.matmul(type, packed(type, rows, bounds), n, k, bounds, x, out, 2, fold)
                results.append(out)
        for plain, coded in zip(results[:2], results[2:], strict=True):
            assert cases.same(plain, coded)


@pytest.mark.parametrize(("n", "k"), [(16, 256), (37, 257), (5, 31), (64, 1024)])
def test_every_bit_comes_back(n: int, k: int) -> None:
    """Also of infinities, NaNs, denormals and zeros; and the twin packs the same bytes."""
    rng = np.random.default_rng(k)
    rows = cases.canonical(rng, BF12, n, k).view(np.uint16)
    rows[0, :4] = rows[n - 1, k - 4 :] = 0x7F80, 0xFFFF, 0x0001, 0x8000
    bounds = np.array([0, k], np.int32)
    out = packed(BF12, rows.view(np.uint8), bounds)
    assert np.array_equal(decode_panel(out, n, k), rows)
    twin = np.empty_like(out)
    reference.pack(BF12, rows.view(np.uint8), k, bounds, twin)
    assert np.array_equal(out, twin)


def test_trained_weights_take_at_most_12_1_bits() -> None:
    n, k = 128, 4096
    rng = np.random.default_rng(5)
    normal = (rng.standard_normal((n, k)) * rng.choice([0.01, 0.1], (n, 1))).astype(np.float32)
    bounds = np.arange(0, k + 1, k // 8, dtype=np.int32)
    out = packed(BF12, (normal.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8), bounds)
    assert 8 * out.nbytes / (n * k) <= 12.1


def test_a_block_with_too_many_exceptions_is_refused() -> None:
    rows = np.full((32, 512), 0x3F80, np.uint16)
    for code in range(16):
        rows[16:, 256 + code] = (0x30 + code) << 8
    bounds = np.array([0, 512], np.int32)
    rows[20, 300 : 300 + EXCEPTIONS] = 0x1234
    assert np.array_equal(decode_panel(packed(BF12, rows.view(np.uint8), bounds), 32, 512), rows)
    rows[31, 511] = 0x1234
    with pytest.raises(Misfit, match="too many values are far from the others for BF12"):
        packed(BF12, rows.view(np.uint8), bounds)
    rows[31, 511] = 0x3F80
    packed(BF12, rows.view(np.uint8), bounds)


def test_only_bf16_becomes_bf12() -> None:
    with pytest.raises(
        ValueError, match="pack makes Q8_0, Q4_0 or W8A8 of F32, F16 or BF16, not block type 21 of 0"
    ):
        kernels.pack(
            BF12, np.zeros((1, 128), np.uint8), 32, [0, 32], np.zeros(816, np.uint8), stored=BlockType.F32
        )
    x, out = np.zeros((1, 32), np.float32), np.zeros((1, 1), np.float32)
    with pytest.raises(ValueError, match="rows of 32 values of block type 21 cannot lie 64 bytes apart"):
        kernels.matmul(BF12, np.zeros(816, np.uint8), 1, 32, [0, 32], x, out, row_bytes=64)
