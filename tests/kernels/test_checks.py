"""Wrong shapes, strides and types are refused in the same words by the compiled kernels and by NumPy's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from mpillm import kernels
from mpillm.kernels import Activation, BlockType, reference

Q8, Q4_K, BF16, F32 = BlockType.Q8_0, BlockType.Q4_K, BlockType.BF16, BlockType.F32


def u8(*shape: int) -> Any:
    return np.zeros(shape, np.uint8)


def f4(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


def f8(*shape: int) -> Any:
    return np.zeros(shape)


def i4(*values: int) -> Any:
    return np.array(values, np.int32)


def attend(
    pos: Any, table: Any, kv_of_head: Any = None, kv_type: BlockType = F32, pool: Any = None, **options: Any
) -> None:
    heads = i4(0, 0) if kv_of_head is None else kv_of_head
    kpool = f4(4, 1, 8, 32) if pool is None else pool
    kernels.attention(
        kv_type,
        f4(1, 16),
        f4(1, 16),
        kpool,
        f4(4, 1, 32, 8),
        pos,
        table,
        i4(0),
        heads,
        1,
        8,
        1.0,
        0,
        1,
        **options,
    )


def convolve(first_rows: Any, slots: Any, tails: Any = None) -> None:
    tails = f4(2, 24) if tails is None else tails
    kernels.short_conv(f4(3, 8), f4(4, 8), None, tails, first_rows, slots, f4(3, 8), True)


def recur(states: Any, key_of_head: Any = None) -> None:
    key_of_head = i4(0) if key_of_head is None else key_of_head
    qkv = f4(1, 4), f4(1, 4), f4(1, 3)
    kernels.delta_rule(*qkv, f4(1, 1), f4(1, 1), states, i4(0), i4(0), key_of_head, 4, 3, f4(1, 3))


def scan(states: Any, group_of_head: Any = None, skip: Any = None) -> None:
    group_of_head, skip = (
        (i4(0) if group_of_head is None else group_of_head),
        (f4(1) if skip is None else skip),
    )
    cbx = f4(1, 4), f4(1, 4), f4(1, 3)
    kernels.selective_scan(
        *cbx, f4(1, 1), f4(1, 1), skip, states, i4(0), i4(0), group_of_head, 4, 3, f4(1, 3)
    )


@pytest.fixture(autouse=True, params=["numpy", kernels.available()[-1]])
def _path(request: pytest.FixtureRequest) -> Iterator[None]:
    before = kernels.path()
    kernels.set_path(request.param)
    yield
    kernels.set_path(before)


WRONG: list[tuple[str, Callable[[], None]]] = [
    (r"bounds must rise from 0 to k = 64: \[0, 32\]", lambda: kernels.pack(Q8, u8(1, 68), 64, [0, 32], u8(544))),
    (r"bounds must be P \+ 1 integers .* not 4 integers",
     lambda: kernels.pack(Q8, u8(1, 68), 64, [0, 1, 2, 64], u8(9))),
    (r"inner bounds .* multiples of 32: \[0, 16, 64\]", lambda: kernels.pack(Q8, u8(1, 68), 64, [0, 16, 64], u8(9))),
    (r"multiples of 256: \[0, 32, 256\]", lambda: kernels.pack(Q4_K, u8(1, 144), 256, [0, 32, 256], u8(9))),
    (r"columns of a K-quant matrix must be a multiple of 256, not 288",
     lambda: kernels.pack(Q4_K, u8(1, 288), 288, [0, 288], u8(9))),
    (r"columns of a K-quant matrix must be a multiple of 256, not 32",
     lambda: kernels.dequantize(Q4_K, u8(1, 144), 32, f4(1, 32))),
    (r"canonical must have shape \[1, 68\], not \[1, 67\]", lambda: kernels.pack(Q8, u8(1, 67), 64, [0, 64], u8(9))),
    (r"out must have shape \[1088\], not \[9\]", lambda: kernels.pack(Q8, u8(1, 68), 64, [0, 64], u8(9))),
    (r"pack makes Q8_0, Q4_0 or W8A8 of F32, F16 or BF16, not block type 2 of 0",
     lambda: kernels.pack(BF16, u8(1, 64), 16, [0, 16], u8(512), stored=F32)),
    (r"rows 8 to 9 are no whole tiles of 9 rows",
     lambda: kernels.pack(Q8, u8(1, 34), 32, [0, 32], u8(544), first=8)),
    (r"rows 0 to 1 are no whole tiles of 2 rows",
     lambda: kernels.pack(Q8, u8(1, 34), 32, [0, 32], u8(544), whole=2)),
    (r"3 rows are no whole heads of two halves: 2 rows each",
     lambda: kernels.pack(Q8, u8(3, 34), 32, [0, 32], u8(544), head=2)),
    (r"canonical must have contiguous rows",
     lambda: kernels.pack(Q8, u8(1, 68)[:, ::2], 32, [0, 32], u8(544))),
    (r"quantize makes Q8_0 or Q4_0", lambda: kernels.quantize(BlockType.Q4_1, f4(1, 32), u8(1, 20))),
    (r"out must have shape \[1, 34\], not \[1, 36\]", lambda: kernels.quantize(Q8, f4(1, 32), u8(1, 36))),
    (r"out must have shape \[2, 32\], not \[2, 33\]", lambda: kernels.dequantize(Q8, u8(2, 34), 32, f4(2, 33))),
    (r"out must have shape \[2, 56\]", lambda: kernels.quantize_rows(f4(2, 32), [0, 32], u8(2, 90))),
    (r"activations for block type 2 are floats", lambda: kernels.quantize_rows(f4(2, 32), [0, 32], u8(2, 56), 1, BF16)),
    (r"a panel of block type 25 has at most 131072 columns, not 131104",
     lambda: kernels.matmul(BlockType.W8A8, u8(64 + 16 * 131104), 1, 131104, [0, 131104], u8(1, 131136), f4(1, 1))),
    (r"rows of 16 values of block type 2 cannot lie 31 bytes apart",
     lambda: kernels.matmul(BF16, u8(96), 3, 16, [0, 16], f4(1, 16), f4(1, 3), row_bytes=31)),
    (r"rows of 32 values of block type 3 cannot lie 33 bytes apart",
     lambda: kernels.matmul(Q8, u8(544), 3, 32, [0, 32], u8(1, 56), f4(1, 3), row_bytes=33)),
    (r"rows of 16384 values of block type 3 cannot lie 17408 bytes apart",
     lambda: kernels.matmul(Q8, u8(17408), 1, 16384, [0, 16384], u8(1, 28672), f4(1, 1), row_bytes=17408)),
    (r"w must have shape \[112\], not \[96\]",
     lambda: kernels.matmul(BF16, u8(96), 3, 16, [0, 16], f4(1, 16), f4(1, 3), row_bytes=40)),
    (r"w must have shape \[96\], not \[5\]", lambda: kernels.matmul(BF16, u8(5), 3, 16, [0, 16], f4(1, 16), f4(1, 3))),
    (r"x must have shape \[1, 16\], not \[1, 15\]",
     lambda: kernels.matmul(BF16, u8(96), 3, 16, [0, 16], f4(1, 15), f4(1, 3))),
    (r"x must have shape \[1, 56\], not \[1, 34\]",
     lambda: kernels.matmul(Q8, u8(544), 3, 32, [0, 32], u8(1, 34), f4(1, 3))),
    (r"out must have shape \[1, 3\], not \[1, 4\]",
     lambda: kernels.matmul(BF16, u8(96), 3, 16, [0, 16], f4(1, 16), f4(1, 4))),
    (r"out must have shape \[1, 1, 3\]",
     lambda: kernels.matmul(BF16, u8(96), 3, 16, [0, 16], f4(1, 16), f4(2, 1, 3), 1, False)),
    (r"x must have contiguous rows",
     lambda: kernels.matmul(BF16, u8(96), 3, 16, [0, 16], f4(1, 32)[:, ::2], f4(1, 3))),
    (r"float32|'float'", lambda: kernels.softmax(f8(2, 2))),
    (r"uint8|'uint8_t'", lambda: kernels.matmul(Q8, f4(544), 3, 32, [0, 32], u8(1, 40), f4(1, 3))),
    (r"parts must be .* not \(3, 1, 8\)", lambda: kernels.fold(f4(3, 1, 8), f4(1, 8))),
    (r"w must have shape \[8\], not \[7\]", lambda: kernels.rms_norm(f4(1, 8), f4(7), 1e-5, f4(1, 8))),
    (r"8 columns are not 3 groups", lambda: kernels.rms_norm(f4(1, 8), None, 1e-5, f4(1, 8), groups=3)),
    (r"bias must have shape \[8\], not \[7\]",
     lambda: kernels.layer_norm(f4(1, 8), None, f4(7), 1e-5, f4(1, 8))),
    (r"out must have shape \[2\], not \[1\]", lambda: kernels.square_sums(f4(2, 8), f4(1))),
    (r"a soft cap must be above 0, not -1", lambda: kernels.softcap(f4(2, 8), -1.0)),
    (r"rope rotates an even number of a head's 8 dimensions, not 10",
     lambda: kernels.rope(f4(1, 16), f4(1, 5), f4(1, 5), 2, 8, rotary=10)),
    (r"rope rotates an even number of a head's 8 dimensions, not 3",
     lambda: kernels.rope(f4(1, 16), f4(1, 1), f4(1, 1), 2, 8, rotary=3)),
    (r"cos must have shape \[1, 2\], not \[1, 4\]",
     lambda: kernels.rope(f4(1, 16), f4(1, 4), f4(1, 4), 2, 8, rotary=4)),
    (r"there is no activation 9", lambda: kernels.activate(9, f4(1, 8), None, f4(1, 8))),
    (r"the clamped SwiGLU needs up and a limit above 0",
     lambda: kernels.activate(Activation.SWIGLU_CLAMPED, f4(1, 8), None, f4(1, 8), limit=7.0)),
    (r"the clamped SwiGLU needs up and a limit above 0",
     lambda: kernels.activate(Activation.SWIGLU_CLAMPED, f4(1, 8), f4(1, 8), f4(1, 8))),
    (r"rope needs an even head dimension, not 7", lambda: kernels.rope(f4(1, 14), f4(1, 3), f4(1, 3), 2, 7)),
    (r"sin must have shape \[1, 4\], not \[1, 3\]", lambda: kernels.rope(f4(1, 16), f4(1, 4), f4(1, 3), 2, 8)),
    (r"up must have shape \[1, 8\], not \[2, 8\]",
     lambda: kernels.activate(Activation.SILU, f4(1, 8), f4(2, 8), f4(1, 8))),
    (r"ids must have shape \[1, 3\], not \[1, 4\]",
     lambda: kernels.top_k(f4(1, 8), 3, f4(1, 3), np.zeros((1, 4), np.int32))),
    (r"bounds must rise within 0..8: \[0, 9\]", lambda: kernels.lse_parts(f4(1, 8), f4(1), i4(0, 9), f4(1, 1, 3))),
    (r"out must have shape \[1, 1, 3\]", lambda: kernels.lse_parts(f4(1, 8), f4(1), i4(0, 8), f4(1, 1, 2))),
    (r"the KV cache holds F32, F16, Q8_0 or Q8_0_INT8, not", lambda: attend(i4(0), i4(0), kv_type=Q4_K)),
    (r"a KV cache of int8 needs heads of a multiple of 32 dimensions, not 8", lambda: attend(i4(0), i4(0), kv_type=Q8)),
    (r"vpool must have shape \[4, 1, 1088\], not \[4, 1, 1024\]",
     lambda: kernels.kv_store(Q8, f4(1, 32), f4(1, 32), i4(0), i4(0), u8(4, 1, 1088), u8(4, 1, 1024), 1, 32)),
    (r"kpool must have shape \[4, 1, 8, 32\], not \[4, 1, 9, 32\]", lambda: attend(i4(0), i4(0), pool=f4(4, 1, 9, 32))),
    (r"vpool must have shape \[4, 1, 32, 4\], not \[4, 1, 32, 8\]",
     lambda: kernels.kv_store(F32, f4(1, 8), f4(1, 4), i4(0), i4(0), f4(4, 1, 8, 32), f4(4, 1, 32, 8), 1, 8, 4)),
    (r"v must have shape \[1, 4\], not \[1, 8\]",
     lambda: kernels.kv_store(F32, f4(1, 8), f4(1, 8), i4(0), i4(0), f4(4, 1, 8, 32), f4(4, 1, 32, 4), 1, 8, 4)),
    (r"sinks must have shape \[2\], not \[1\]", lambda: attend(i4(0), i4(0), sinks=f4(1))),
    (r"a soft cap must be above 0, not -2", lambda: attend(i4(0), i4(0), softcap=-2.0)),
    (r"kv_of_head must be within 0..0", lambda: attend(i4(0), i4(0), i4(0, 1))),
    (r"row 0: position 32 lies outside its block table of 1 blocks", lambda: attend(i4(32), i4(0))),
    (r"row 0: the block table names a block outside the pool of 4", lambda: attend(i4(33), i4(0, 4))),
    (r"offset must be within 0..31",
     lambda: kernels.kv_store(F32, f4(1, 8), f4(1, 8), i4(0), i4(32), f4(4, 1, 8, 32), f4(4, 1, 32, 8), 1, 8)),
    (r"block must be within 0..3",
     lambda: kernels.kv_store(F32, f4(1, 8), f4(1, 8), i4(4), i4(0), f4(4, 1, 8, 32), f4(4, 1, 32, 8), 1, 8)),
    (r"rates must have shape \[8\], not \[7\]", lambda: kernels.decays(f4(1, 8), f4(7), f4(8))),
    (r"first_rows must rise from 0 and end before 3: \[0, 3\]", lambda: convolve(i4(0, 3), i4(0, 1))),
    (r"first_rows must rise from 0 and end before 3: \[1\]", lambda: convolve(i4(1), i4(0))),
    (r"3 rows belong to no sequence", lambda: convolve(i4(), i4())),
    (r"slots must have shape \[2\], not \[1\]", lambda: convolve(i4(0, 1), i4(0))),
    (r"slots must be within 0..1", lambda: convolve(i4(0, 1), i4(0, 2))),
    (r"every sequence has a slot of its own, not \[1, 1\]", lambda: convolve(i4(0, 1), i4(1, 1))),
    (r"tails must be at least 24 wide, not 23", lambda: convolve(i4(0), i4(0), f4(2, 23))),
    (r"states must be at least 64 wide, not 63", lambda: recur(f4(2, 63))),
    (r"key_of_head must be within 0..0", lambda: recur(f4(2, 64), i4(1))),
    (r"states must be at least 64 wide, not 63", lambda: scan(f4(2, 63))),
    (r"group_of_head must be within 0..0", lambda: scan(f4(2, 64), i4(1))),
    (r"skip must have shape \[1\], not \[2\]", lambda: scan(f4(2, 64), skip=f4(2))),
    (r"steps must have shape \[1, 3\], not \[1, 2\]",
     lambda: kernels.decays(f4(1, 3), f4(3), f4(3), steps=f4(1, 2))),
]  # fmt: skip


@pytest.mark.parametrize(("words", "call"), WRONG)
def test_refused(words: str, call: Callable[[], None]) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_nothing_to_do_is_fine() -> None:
    out = f4(0, 3)
    kernels.matmul(BF16, u8(96), 3, 16, [0, 16], f4(0, 16), out)
    kernels.rms_norm(f4(0, 8), f4(8), 1e-5, f4(0, 8))
    kernels.softmax(f4(0, 8))
    kernels.attention(
        F32, f4(0, 8), f4(0, 8), f4(4, 1, 8, 32), f4(4, 1, 32, 8), i4(), i4(0), i4(), i4(0), 1, 8, 1.0, 0, 1
    )


@pytest.mark.skipif(kernels._compiled is None, reason="the extension is not built")
@pytest.mark.parametrize("name", sorted({*reference.__all__} - {*kernels.SHARED}))
def test_both_have_the_same_arguments(name: str) -> None:
    compiled, twin = (inspect.signature(getattr(module, name)) for module in (kernels._compiled, reference))
    assert list(compiled.parameters) == list(twin.parameters)
    assert [p.default for p in compiled.parameters.values()] == [p.default for p in twin.parameters.values()]
