"""Packing as loaders do it: rows that lie apart, some of a matrix at a time, quantised and reordered on the way."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from mpillm import kernels
from mpillm.kernels import BlockType
from mpillm.kernels.blocks import CANONICAL, quantise_q8
from mpillm.kernels.types import TRAITS
from tests.kernels import cases

BOUNDS = {  # by the columns of a block
    1: [0, 256, 1024],
    32: [0, 32, 1024 + 7],
    64: [0, 192, 1024 + 7],
    128: [0, 384, 1024 + 7],
    256: [0, 768, 1024],
}


@pytest.fixture(autouse=True, params=kernels.available())
def _path(request: pytest.FixtureRequest) -> Iterator[None]:
    before = kernels.path()
    kernels.set_path(request.param)
    yield
    kernels.set_path(before)


def packed(type: BlockType, rows: np.ndarray, bounds: list[int], threads: int = 1) -> np.ndarray:
    out = np.full(kernels.packed_nbytes(type, len(rows), bounds[-1], bounds), 0xAA, np.uint8)
    kernels.pack(type, np.ascontiguousarray(rows), bounds[-1], bounds, out, threads)
    return out


@pytest.mark.parametrize("type", BlockType)
def test_some_rows_at_a_time_that_lie_apart(type: BlockType) -> None:
    bounds, n = BOUNDS[type.block], 16 * 5 + 3
    rows = cases.canonical(np.random.default_rng(1), type, n, bounds[-1])
    wide = np.zeros((n, rows.shape[1] + 30), np.uint8)
    wide[:, 7 : 7 + rows.shape[1]] = rows
    apart = wide[:, 7 : 7 + rows.shape[1]]
    expected = packed(type, rows, bounds)
    out = np.full(len(expected), 0xAA, np.uint8)
    for first, stop in ((48, n), (0, 16), (16, 48)):
        kernels.pack(type, apart[first:stop], bounds[-1], bounds, out, 2, first=first, whole=n)
    assert (out == expected).all()


@pytest.mark.parametrize("head", [6, 16, 96])
@pytest.mark.parametrize("type", [BlockType.Q4_0, BlockType.BF16, BlockType.Q6_K])
def test_heads_in_the_order_of_llama_cpp(type: BlockType, head: int) -> None:
    """Row (head, half, j) comes from (head, j, half), as convert_hf_to_gguf.py's `permute` has written it."""
    bounds, n = BOUNDS[type.block], 2 * 96
    rows = cases.canonical(np.random.default_rng(head), type, n, bounds[-1])
    stored = rows.reshape(n // head, 2, head // 2, -1).swapaxes(1, 2).reshape(n, -1)
    out = np.empty_like(expected := packed(type, rows, bounds))
    for first in (96, 0):
        kernels.pack(type, stored[first:][:96], bounds[-1], bounds, out, 1, None, first, n, head)
    assert (out == expected).all()


@pytest.mark.parametrize("type", [BlockType.Q8_0, BlockType.Q4_0, BlockType.W8A8])
@pytest.mark.parametrize("stored", [BlockType.F32, BlockType.F16, BlockType.BF16])
def test_floats_are_quantised_on_the_way(stored: BlockType, type: BlockType) -> None:
    k, n, bounds = 1031, 35, [0, 608, 1031]
    rows = cases.canonical(np.random.default_rng(3), stored, n, k)
    values, quantised = np.empty((n, k), np.float32), np.empty((n, type.row_bytes(k)), np.uint8)
    kernels.dequantize(stored, rows, k, values)
    if type is BlockType.W8A8:
        blocks = quantised.view(CANONICAL[type])
        for first, last in itertools.pairwise(bounds):
            of_panel = blocks[:, first // 32 : -(-last // 32)]
            d, q = quantise_q8(values[:, first:last])
            of_panel["d"] = d[:, None]
            of_panel["q"] = np.pad(q, ((0, 0), (0, -last % 32))).view(np.uint8).reshape(n, -1, 32)
    else:
        kernels.quantize(type, values, quantised)
    out = np.empty_like(expected := packed(type, quantised, bounds))
    kernels.pack(type, rows, k, bounds, out, 2, stored)
    assert (out == expected).all()


@pytest.mark.skipif(kernels._compiled is None, reason="the extension is not built")
def test_block_types_have_the_same_traits_in_c() -> None:
    assert kernels._compiled.block_types() == [tuple(TRAITS[type]) for type in BlockType]
