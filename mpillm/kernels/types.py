"""Block types of weights, and the sizes that follow from the shape of a matrix."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
I32 = npt.NDArray[np.int32]
Bounds = Sequence[int] | npt.NDArray[Any]

QUANT_BLOCK = 32  # values that share one scale (ggml's QK8_0 = QK4_0 = QK4_1)
SUPER_BLOCK = 256  # values of a K-quant's block: 8 parts of 32 with small scales of their own (ggml's QK_K)
TILE_ROWS = 16  # rows of W that are interleaved: the lanes of a kernel
STORED_TILE = 2**18  # bytes: what a tile of quantised rows that lie as in a file takes, packed, at most
# int8 q[32], f32 scale, f32 scale * sum(q), i32 -8, -128 times sum(q), i32 -32 times sum(q[:16]), sum(q[16:])
ACTIVATION_BLOCK_BYTES = 56
PANEL_ROW = 32  # bytes of a row of activations for a panel of W8A8, beside its int8 (mk_panel_row)
OUTLIER = 16256  # what the largest integer of a panel of activations may be
PANEL_COLUMNS = 2**17  # the maximum columns of a panel of W8A8, whose sums of products then fit into 32 bits
# Columns of a BF16 product's step: each of 16 lanes adds the odd and then the even column of its pair.
PAIRED = 32
# Columns of a BF16 product whose sum begins at zero before it is added to the sum of earlier columns.
BF16_BLOCK = 256
# Bytes of the head of a BF12 block, and of 32 columns of its 16 rows (core/coded.h).
CODED_HEAD, CODED_STEP = (
    48,
    768,
)
MISFIT = "too many values are far from the others for BF12"
ROW_GROUP = 4  # rows of activations that are interleaved
# Rows of all experts in one call, unless one expert has more: bounds the memory of their activations.
MIXED_ROWS = 512
KV_BLOCK = 32  # tokens of one block of the KV cache


class BlockType(IntEnum):
    """The types of a matrix's elements. The layouts are ggml's, except FP8, NVFP4 and NF4 (`scaled_blocks`)."""

    F32 = 0
    F16 = 1
    BF16 = 2
    Q8_0 = 3
    Q4_0 = 4
    Q4_1 = 5
    Q4_K = 6
    Q5_K = 7
    Q6_K = 8
    MXFP4 = 9
    IQ4_NL = 10
    Q5_0 = 11
    Q5_1 = 12
    IQ4_XS = 13
    Q3_K = 14
    Q2_K = 15
    IQ3_S = 16
    IQ3_XXS = 17
    IQ2_S = 18
    IQ2_XS = 19
    IQ2_XXS = 20
    BF12 = 21  # BF16 with the same bits in three quarters of the bytes; `canonical` rows are those of BF16
    FP8 = 22
    NVFP4 = 23
    NF4 = 24
    W8A8 = 25  # int8; `canonical` blocks have a float32 scale, the same in a row's blocks of a column panel

    @property
    def quantised(self) -> bool:
        """True for types whose rows are interleaved, and whose products round activations to integers."""
        return TRAITS[self].kind in ("plain", "super", "panel")

    @property
    def whole(self) -> bool:
        """True for types whose rows have one scale for a whole column panel, in weights as in activations."""
        return TRAITS[self].kind == "panel"

    @property
    def scaled(self) -> bool:
        """True for types whose blocks have a float32 scale and codes that stand for floats."""
        return TRAITS[self].kind == "scaled"

    @property
    def k_quant(self) -> bool:
        """True for types with blocks of 256 values; a row must consist of whole blocks."""
        return TRAITS[self].kind == "super"

    @property
    def coded(self) -> bool:
        """True for types that are compressed without loss when they are packed."""
        return TRAITS[self].kind == "coded"

    @property
    def multiplied_as(self) -> BlockType:
        """The type whose products are the same, bit for bit."""
        return BlockType.BF16 if self.coded else self

    @property
    def block(self) -> int:
        """Values in one block: 256, 128, 64, 32 or 1. Columns are cut between blocks."""
        return TRAITS[self].values

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in the canonical (ggml) form."""
        return TRAITS[self].bytes

    @property
    def packed_bytes(self) -> int:
        """Bytes of one block in packed form, in which scales of 6 bits take a byte."""
        return TRAITS[self].packed

    def row_bytes(self, k: int) -> int:
        """Return bytes of a canonical row of k values."""
        return -(-k // self.block) * self.block_bytes


class Traits(NamedTuple):
    """Properties of a block type; the compiled kernels have the same table, MK_BLOCK_TYPES in core/kernels.h."""

    kind: Literal["float", "plain", "super", "coded", "scaled", "panel"]  # how it is packed and multiplied
    values: int  # values in a block
    bytes: int  # bytes of a block in ggml's form
    packed: int  # bytes of a block in a tile; see `tile_nbytes`


TRAITS = {
    BlockType.F32: Traits("float", 1, 4, 4),
    BlockType.F16: Traits("float", 1, 2, 2),
    BlockType.BF16: Traits("float", 1, 2, 2),
    BlockType.Q8_0: Traits("plain", QUANT_BLOCK, 34, 34),
    BlockType.Q4_0: Traits("plain", QUANT_BLOCK, 18, 18),
    BlockType.Q4_1: Traits("plain", QUANT_BLOCK, 20, 20),
    BlockType.Q4_K: Traits("super", SUPER_BLOCK, 144, 148),
    BlockType.Q5_K: Traits("super", SUPER_BLOCK, 176, 180),
    BlockType.Q6_K: Traits("super", SUPER_BLOCK, 210, 210),
    BlockType.MXFP4: Traits("plain", QUANT_BLOCK, 17, 17),
    BlockType.IQ4_NL: Traits("plain", QUANT_BLOCK, 18, 18),
    BlockType.Q5_0: Traits("plain", QUANT_BLOCK, 22, 22),
    BlockType.Q5_1: Traits("plain", QUANT_BLOCK, 24, 24),
    BlockType.IQ4_XS: Traits("super", SUPER_BLOCK, 136, 138),
    BlockType.Q3_K: Traits("super", SUPER_BLOCK, 110, 114),
    BlockType.Q2_K: Traits("super", SUPER_BLOCK, 84, 84),
    BlockType.IQ3_S: Traits("super", SUPER_BLOCK, 110, 114),
    BlockType.IQ3_XXS: Traits("super", SUPER_BLOCK, 98, 98),
    BlockType.IQ2_S: Traits("super", SUPER_BLOCK, 82, 82),
    BlockType.IQ2_XS: Traits("super", SUPER_BLOCK, 74, 74),
    BlockType.IQ2_XXS: Traits("super", SUPER_BLOCK, 66, 66),
    BlockType.BF12: Traits("coded", 1, 2, 2),
    BlockType.FP8: Traits("scaled", 128, 132, 132),
    BlockType.NVFP4: Traits("scaled", 128, 76, 76),
    BlockType.NF4: Traits("scaled", 64, 36, 36),
    BlockType.W8A8: Traits("panel", QUANT_BLOCK, 36, 32),
}


class Misfit(ValueError):
    """A coded type cannot hold these rows; the caller keeps their type."""


class Activation(IntEnum):
    """The function f of an MLP: down(f(gate) * up), or down(f(up)) without a gate."""

    SILU = 0  # x / (1 + e^-x)
    GELU = 1  # x times the normal distribution function of x
    GELU_TANH = 2  # the approximation x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
    RELU2 = 3  # max(x, 0)^2
    SIGMOID = 4  # 1 / (1 + e^-x)
    # gpt-oss: g / (1 + e^(-alpha g)) with g = min(x, limit), times up in -limit..limit plus 1.
    SWIGLU_CLAMPED = 5
    IDENTITY = 6  # x
    SILU_SCALED = 7  # SILU of alpha x
    RELU = 8  # max(x, 0)


@dataclass(frozen=True)
class Norm:
    """RMS norm, or with `centred` LayerNorm, of rows of `width` values: weight * normalised + bias."""

    width: int
    eps: float
    weight: F32 | None = None
    bias: F32 | None = None
    centred: bool = False

    def __post_init__(self) -> None:
        if self.bias is not None and not self.centred:
            raise ValueError("an RMS norm has no bias")


def packed_nbytes(type: BlockType, n: int, k: int, bounds: Bounds) -> int:
    """Return bytes of W [n, k] in packed form, with column panels `bounds` (bounds[0] = 0, bounds[-1] = k)."""
    type = BlockType(type)
    edges = check_bounds(bounds, k, type.block)
    if not type.quantised and not type.coded:
        return n * int((-(-np.diff(edges) // type.block)).sum()) * type.packed_bytes
    return -(-n // TILE_ROWS) * sum(tile_nbytes(type, width) for width in np.diff(edges).tolist())


def tile_nbytes(type: BlockType, k: int) -> int:
    """Return bytes of a panel of k columns of a tile, of types whose rows are interleaved."""
    if type.coded:
        return coded_nbytes(k)
    head = 4 if type.whole else 0  # the scale of each row
    return (head + -(-k // type.block) * type.packed_bytes) * TILE_ROWS


def coded_nbytes(k: int) -> int:
    """Return bytes of k columns of a BF12 tile: blocks of 256 columns, each a head and steps of 32 columns, 16 rows."""
    return -(-k // BF16_BLOCK) * CODED_HEAD + -(-k // PAIRED) * CODED_STEP


def used_as_stored(type: BlockType, k: int, bounds: Bounds) -> bool:
    """Return whether products take a matrix whose rows of k values lie as in a file; rows in blocks are packed."""
    if type.quantised:
        return packed_nbytes(type, TILE_ROWS, k, bounds) <= STORED_TILE
    return type.block == 1 and not type.coded


def strided_nbytes(type: BlockType, n: int, k: int, row_bytes: int) -> int:
    """Return bytes from the first of n rows of k values to the end of the last one, at a distance of `row_bytes`."""
    return (n - 1) * row_bytes + type.row_bytes(k) if n else 0


def delta_floats(heads: int, dk: int, dv: int) -> int:
    """Floats of the states of `heads` heads: [dk, dv] each, in pieces of 16 columns."""
    return heads * -(-dv // TILE_ROWS) * TILE_ROWS * dk


def activation_nbytes(k: int, bounds: Bounds, type: BlockType = BlockType.Q8_0) -> int:
    """Return bytes of one row of k activations quantised for weights of a type, each panel padded to 32 values."""
    edges = np.asarray(bounds, np.int64)
    return _activation_nbytes(k, edges.shape, edges.tobytes(), type.whole)


@functools.lru_cache(maxsize=256)  # it is called before every product, for the same few shapes
def _activation_nbytes(k: int, shape: tuple[int, ...], data: bytes, whole: bool) -> int:
    edges = check_bounds(np.frombuffer(data, np.int64).reshape(shape), k, 1)
    blocks = int((-(-np.diff(edges) // QUANT_BLOCK)).sum())
    return PANEL_ROW * (len(edges) - 1) + QUANT_BLOCK * blocks if whole else ACTIVATION_BLOCK_BYTES * blocks


def check_bounds(bounds: Bounds, k: int, block: int) -> npt.NDArray[np.int64]:
    """Check panel bounds and return them as an array [panels + 1]; raises ValueError."""
    edges = np.asarray(bounds, dtype=np.int64)
    panels = edges.size - 1
    if edges.ndim != 1 or panels < 1 or panels & (panels - 1) or panels > 64:
        raise ValueError(
            f"bounds must be P + 1 integers with P a power of two up to 64, not {edges.size} integers"
        )
    if edges[0] != 0 or edges[-1] != k or (np.diff(edges) < 0).any():
        raise ValueError(f"bounds must rise from 0 to k = {k}: {edges.tolist()}")
    if (edges[:-1] % block).any():
        raise ValueError(f"inner bounds of a quantised matrix must be multiples of {block}: {edges.tolist()}")
    if block == SUPER_BLOCK:
        check_whole(k)
    return edges


def check_whole(k: int) -> None:
    """Raise ValueError unless rows of k values consist of whole blocks of 256."""
    if k % SUPER_BLOCK:
        raise ValueError(f"the columns of a K-quant matrix must be a multiple of {SUPER_BLOCK}, not {k}")


class KvType(IntEnum):
    """The types of a KV cache. Q8_0_INT8 is Q8_0 whose queries are rounded to int8 too (MK_Q8_0_INT8)."""

    F32 = BlockType.F32
    F16 = BlockType.F16
    Q8_0 = BlockType.Q8_0
    Q8_0_INT8 = len(BlockType)

    @property
    def int8(self) -> bool:
        """Whether its numbers are int8 with scales."""
        return self in (KvType.Q8_0, KvType.Q8_0_INT8)


def kv_pools(
    kv_type: KvType, blocks: int, heads: int, head_dim: int, value_dim: int = 0
) -> tuple[tuple[tuple[int, ...], type], tuple[tuple[int, ...], type]]:
    """Return shape and element type of the pool of keys and of the pool of values, for `blocks` KV blocks.

    A block has `KV_BLOCK` tokens. A head's keys have `head_dim` dimensions, its values `value_dim` (0: `head_dim`).
    F32 and F16 (as uint16): keys [block, head, dim, token] and values [block, head, token, dim]. Q8_0: bytes
    [block, head, 34 * dim]; F16 scales [dim / 32, token] come first, then the integers in the order of F32. The
    keys of Q8_0_INT8 are [dim / 4, token, 4]. Raises ValueError if a cache cannot have this type or these dimensions.
    """
    value_dim = value_dim or head_dim
    if kv_type not in tuple(KvType):
        raise ValueError(f"the KV cache holds F32, F16, Q8_0 or Q8_0_INT8, not {BlockType(kv_type).name}")
    if KvType(kv_type).int8:
        for dim in (head_dim, value_dim):
            if dim % QUANT_BLOCK:
                raise ValueError(
                    f"a KV cache of int8 needs heads of a multiple of {QUANT_BLOCK} dimensions, not {dim}"
                )
        keys, values = (
            (blocks, heads, BlockType.Q8_0.row_bytes(dim) * KV_BLOCK) for dim in (head_dim, value_dim)
        )
        return (keys, np.uint8), (values, np.uint8)
    dtype = np.float32 if kv_type == KvType.F32 else np.uint16
    return ((blocks, heads, head_dim, KV_BLOCK), dtype), ((blocks, heads, KV_BLOCK, value_dim), dtype)
