"""What a rank holds of a layer: planned from shapes alone, loaded into one buffer, seen through a `Layer`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from ..comm import grid
from ..comm.grid import Place, Shape
from ..errors import ModelError
from ..kernels.types import TILE_ROWS, BlockType, packed_nbytes
from .names import ROLES, Cut, Key
from .source import Source

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

ALIGNMENT = 64  # of every entry in the buffer: a cache line, and the widest vector
CHUNK = 4 * 2**20  # canonical bytes that are on their way into the buffer at a time


class Flags(Protocol):
    """What of a model's configuration decides which tensors it has; `ModelConfig` is one."""

    @property
    def attention_bias(self) -> bool: ...
    @property
    def o_bias(self) -> bool: ...
    @property
    def mlp_bias(self) -> bool: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def moe_layers(self) -> Sequence[bool]: ...


@dataclass(frozen=True)
class Matrix:
    """A kernel-ready matrix [n, k]: `data` is uint8, packed in column panels `bounds` (int32, P + 1)."""

    type: BlockType
    n: int
    k: int
    bounds: Ints
    data: Bytes


@dataclass(frozen=True)
class Entry:
    """A tensor's part that a rank holds: rows and columns of it, and `nbytes` from `offset` on in the buffer.

    `bounds` are the column panels, relative to the first column; a vector (`type` F32, no `bounds`) has one column.
    """

    key: Key
    rows: range
    cols: range
    type: BlockType
    bounds: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def n(self) -> int:
        return len(self.rows)

    @property
    def k(self) -> int:
        return len(self.cols)


@dataclass(frozen=True)
class LayerPlan:
    """One item of the weight cache: a layer, or the output head. `nbytes` is the size of its buffer."""

    name: str
    entries: tuple[Entry, ...]
    nbytes: int

    @cached_property
    def index(self) -> dict[tuple[str, int], Entry]:
        """Entries by role and expert."""
        return {(entry.key.role, entry.key.expert): entry for entry in self.entries}


class Layer:
    """A loaded item: its matrices and vectors, as views of the buffer, until it is dropped."""

    def __init__(self, plan: LayerPlan, buffer: Bytes) -> None:
        self.plan = plan
        self.buffer = buffer

    def matrix(self, role: str, expert: int = -1) -> Matrix:
        """A matrix of the layer, or of one of its experts."""
        entry = self.plan.index[role, expert]
        assert entry.bounds, role
        return Matrix(entry.type, entry.n, entry.k, np.array(entry.bounds, np.int32), self._bytes(entry))

    def vector(self, role: str) -> Floats:
        """A norm's weights, or a bias: f32 [n]."""
        entry = self.plan.index[role, -1]
        assert not entry.bounds, role
        values: Floats = self._bytes(entry).view(np.float32)
        return values

    def drop(self) -> None:
        """Let go of the buffer: others may have it now."""
        self.buffer = np.empty(0, np.uint8)

    def _bytes(self, entry: Entry) -> Bytes:
        assert self.buffer.nbytes == self.plan.nbytes, f"{self.plan.name} is used after it was dropped"
        return self.buffer[entry.offset : entry.offset + entry.nbytes]


def layer_tensors(shape: Shape, flags: Flags, layer: int) -> Iterator[tuple[Key, tuple[int, ...]]]:
    """The tensors of a layer and their whole shapes."""
    d, hd = shape.hidden, shape.head_dim
    heads, kv_heads = shape.n_heads * hd, shape.n_kv_heads * hd

    def own(role: str, *dims: int) -> tuple[Key, tuple[int, ...]]:
        return Key(role, layer), dims

    yield own("attn_norm", d)
    yield own("q", heads, d)
    yield own("k", kv_heads, d)
    yield own("v", kv_heads, d)
    if flags.attention_bias:
        yield own("q_bias", heads)
        yield own("k_bias", kv_heads)
        yield own("v_bias", kv_heads)
    if flags.qk_norm:
        yield own("q_norm", hd)
        yield own("k_norm", hd)
    yield own("o", d, heads)
    if flags.o_bias:
        yield own("o_bias", d)
    yield own("ffn_norm", d)
    if flags.moe_layers[layer]:
        yield own("router", shape.n_experts, d)
        width = shape.moe_intermediate
        for expert in range(shape.n_experts):
            for role in ("gate", "up", "down"):
                yield Key(role, layer, expert), (d, width) if role == "down" else (width, d)
        return
    width = shape.intermediate
    yield own("gate", width, d)
    yield own("up", width, d)
    yield own("down", d, width)
    if flags.mlp_bias:
        yield own("gate_bias", width)
        yield own("up_bias", width)
        yield own("down_bias", d)


def head_tensors(shape: Shape) -> Iterator[tuple[Key, tuple[int, ...]]]:
    """The tensors of the output head and their whole shapes."""
    yield Key("final_norm"), (shape.hidden,)
    yield Key("head"), (shape.vocab, shape.hidden)


def check_tensors(source: Source, shape: Shape, flags: Flags) -> None:
    """ModelError if a tensor is missing, has another shape than the configuration says, or is not in it at all."""
    known = set()
    for key, dims in _all_tensors(shape, flags):
        info = source.tensors.get(key)
        if info is None:
            raise ModelError(f"{source.path} has no tensor for {_described(key)}; the model is not complete.")
        if info.shape != dims:
            raise ModelError(
                f"{source.path}: {_described(key)} has shape {list(info.shape)}, but the configuration makes it "
                f"{list(dims)}."
            )
        known.add(key)
    for key in source.tensors:
        if key not in known:
            raise ModelError(f"{source.path} has {_described(key)}, which its configuration does not have.")


def _all_tensors(shape: Shape, flags: Flags) -> Iterator[tuple[Key, tuple[int, ...]]]:
    yield Key("embed"), (shape.vocab, shape.hidden)
    yield from head_tensors(shape)
    for layer in range(shape.n_layers):
        yield from layer_tensors(shape, flags, layer)


def rank_plans(shape: Shape, place: Place, source: Source, flags: Flags) -> list[LayerPlan]:
    """All that a rank holds: its stage's layers in order and, on the last stage, the output head."""
    plans = [layer_plan(shape, place, source, flags, layer) for layer in grid.stage_layers(shape, place)]
    if place.stage == place.stages - 1:
        plans.append(_plan("the output head", head_tensors(shape), shape, place, source))
    return plans


def layer_plan(shape: Shape, place: Place, source: Source, flags: Flags, layer: int) -> LayerPlan:
    """What a rank holds of one layer. `check_tensors` has found the source complete."""
    return _plan(f"layer {layer}", layer_tensors(shape, flags, layer), shape, place, source)


def load(plan: LayerPlan, source: Source, buffer: Bytes, threads: int) -> Layer:
    """Read what is planned and make it kernel-ready in `buffer` (uint8 [plan.nbytes], 64-byte aligned).

    Besides the buffer, little more than `CHUNK` bytes (and their float32 values, where they are requantised) are held.
    """
    assert buffer.nbytes == plan.nbytes
    assert buffer.ctypes.data % ALIGNMENT == 0
    for entry in plan.entries:
        out = buffer[entry.offset : entry.offset + entry.nbytes]
        if entry.bounds:
            _load_matrix(entry, source, out, threads)
        else:
            out.view(np.float32)[:] = source.read_f32(entry.key, entry.rows)
    return Layer(plan, buffer)


def new_buffer(nbytes: int) -> Bytes:
    """Uninitialised bytes that begin at a multiple of ALIGNMENT."""
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % ALIGNMENT
    return raw[begin : begin + nbytes]


def _described(key: Key) -> str:
    of = "" if key.layer < 0 else f" of layer {key.layer}"
    return f"{key.role}{of}" + ("" if key.expert < 0 else f", expert {key.expert}")


def _plan(
    name: str, tensors: Iterator[tuple[Key, tuple[int, ...]]], shape: Shape, place: Place, source: Source
) -> LayerPlan:
    entries, offset = [], 0
    for key, dims in tensors:
        rows, cols, bounds = _slices(key, dims, shape, place)
        if len(dims) == 1:
            type, nbytes = BlockType.F32, 4 * len(rows)
        else:
            type = source.tensors[key].type
            nbytes = packed_nbytes(type, len(rows), len(cols), bounds)
        entries.append(Entry(key, rows, cols, type, bounds, offset, nbytes))
        offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return LayerPlan(name, tuple(entries), offset)


def _slices(
    key: Key, dims: tuple[int, ...], shape: Shape, place: Place
) -> tuple[range, range, tuple[int, ...]]:
    """Rows, columns and column panels of a tensor that a rank holds; a vector has no panels."""
    rows, hd = range(dims[0]), shape.head_dim
    cols = range(dims[1]) if len(dims) == 2 else range(1)
    bounds: tuple[int, ...] = (0, len(cols)) if len(dims) == 2 else ()
    match ROLES[key.role].cut:
        case Cut.ROWS_HEADS:
            rows = _scaled(grid.own_heads(shape, place), hd)
        case Cut.ROWS_KV_HEADS:
            rows = _scaled(grid.own_kv_heads(shape, place), hd)
        case Cut.ROWS_FFN:
            rows = grid.own_ffn(shape, place, dims[0])
        case Cut.ROWS_VOCAB:
            rows = grid.own_vocab(shape, place)
        case Cut.COLS_HEADS:
            cols = _scaled(grid.own_heads(shape, place), hd)
            bounds = tuple(head * hd for head in grid.own_panels(grid.attention_panels(shape), place))
        case Cut.COLS_FFN:
            cols = grid.own_ffn(shape, place, dims[1])
            bounds = grid.own_panels(grid.ffn_panels(shape, dims[1]), place)
        case Cut.WHOLE:
            pass
    return rows, cols, bounds


def _scaled(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)


def _load_matrix(entry: Entry, source: Source, out: Bytes, threads: int) -> None:
    """Pack a matrix into `out`, some tiles of rows at a time: a panel's tiles lie in the order of their rows."""
    type, n = entry.type, entry.n
    step = max(CHUNK // (type.row_bytes(entry.k) * TILE_ROWS), 1) * TILE_ROWS
    for first in range(0, n, step):
        count = min(step, n - first)
        rows = range(entry.rows.start + first, entry.rows.start + first + count)
        chunk = source.read(entry.key, rows, entry.cols, threads)
        begin = 0
        for left, right in zip(entry.bounds[:-1], entry.bounds[1:], strict=True):
            width = right - left
            panel = chunk[:, left // type.block * type.block_bytes :][:, : type.row_bytes(width)]
            at = begin + packed_nbytes(type, first, width, (0, width))
            size = packed_nbytes(type, count, width, (0, width))
            kernels.pack(type, np.ascontiguousarray(panel), width, (0, width), out[at : at + size], threads)
            begin += packed_nbytes(type, n, width, (0, width))
        del chunk, panel
        source.release(entry.key, rows)
