"""What a rank holds of a layer: planned from shapes alone, loaded into one buffer, seen through a `Layer`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mpillm import kernels
from mpillm.errors import ModelError
from mpillm.kernels.types import TILE_ROWS, BlockType, packed_nbytes
from mpillm.partition import grid
from mpillm.partition.grid import Place, Shape
from mpillm.weights.names import ROLES, Cut, Key

if TYPE_CHECKING:
    from mpillm.weights.formats.tensors import TensorSource
    from mpillm.weights.source import Source

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

T = TypeVar("T")

Tensors = list[tuple[Key, tuple[int, ...]]]  # with their whole shapes

ALIGNMENT = 64  # of every entry in the buffer: a cache line, and the widest vector
CHUNK = 2**20  # bytes that are on their way into the buffer at a time

# What is paged in together, in the order in which a step uses it: the smaller the parts, the less memory is bound by
# what is in use and what is on its way, and the more can stay.
ATTENTION, GATE, UP, DOWN, EXPERT, HEAD = "attention", "gate", "up", "down", "expert", "the output head"
_PART_OF = {"gate_bias": GATE, "up_bias": UP, "down_bias": DOWN, GATE: GATE, UP: UP, DOWN: DOWN}


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
    """A kernel-ready matrix [n, k]: `data` is uint8, packed in column panels `bounds` (int32, P + 1).

    With `row_bytes` it is not packed: rows of floats lie so far apart, as in their file.

    In packed models a matrix may lie in `parts` (`data` is then empty): matrices with all of its columns, one under
    the other, or with all of its rows and one or several of its column panels each, side by side.
    """

    type: BlockType
    n: int
    k: int
    bounds: Ints
    data: Bytes
    parts: tuple[Matrix, ...] = ()
    row_bytes: int = 0


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
    """One item of the weight cache: a part of a layer, one of its experts, or the output head.

    `nbytes` is the size of its buffer. In a packed model that is the bytes from `offset` on in file number `file`, and
    a tensor may have several entries: the parts of its matrix in their order. A layer's experts are all alike there,
    and may share the entries of the first one.
    """

    name: str
    entries: tuple[Entry, ...]
    nbytes: int
    layer: int = -1
    part: str = HEAD
    file: int = -1
    offset: int = 0
    expert: int = -1

    @cached_property
    def index(self) -> dict[str, tuple[Entry, ...]]:
        """Entries by role."""
        found: dict[str, tuple[Entry, ...]] = {}
        for entry in self.entries:
            found[entry.key.role] = (*found.get(entry.key.role, ()), entry)
        return found


class Placed(NamedTuple):
    """Where an entry lies; `row_bytes` > 0: rows of floats lie so far apart there, as in their file."""

    data: Bytes
    row_bytes: int


class Layer:
    """A loaded item: its matrices and vectors, as views of the buffer, until it is dropped."""

    def __init__(self, plan: LayerPlan, buffer: Bytes, places: Mapping[int, Placed] | None = None) -> None:
        """`places`: of an item that is not as planned in the buffer, its entries by their planned offsets."""
        self.plan = plan
        self.buffer = buffer
        self._places = places
        self._kept: Any = None

    def matrix(self, role: str) -> Matrix:
        """A matrix of the item."""
        parts = tuple(self._matrix(entry) for entry in self.plan.index[role])
        if len(parts) == 1:
            return parts[0]
        first, second, *_ = self.plan.index[role]
        n, k, bounds = first.n, first.k, parts[0].bounds
        if first.rows == second.rows:
            starts = np.cumsum([0, *(part.k for part in parts)], dtype=np.int32)
            bounds = np.concatenate(
                [
                    np.zeros(1, np.int32),
                    *(part.bounds[1:] + start for part, start in zip(parts, starts, strict=False)),
                ]
            )
            k = int(starts[-1])
        else:
            n = sum(part.n for part in parts)
        return Matrix(first.type, n, k, bounds, self.buffer[:0], parts)

    def vector(self, role: str) -> Floats:
        """A norm's weights, or a bias: f32 [n]."""
        entries = self.plan.index[role]
        assert not entries[0].bounds, role
        values = [self._place(entry).data.view(np.float32) for entry in entries]
        return values[0] if len(values) == 1 else np.concatenate(values)

    def keep(self, make: Callable[[Layer], T]) -> T:
        """What `make` makes of the item, made once for as long as it stays in memory."""
        if self._kept is None:
            self._kept = make(self)
        kept: T = self._kept
        return kept

    def drop(self) -> None:
        """Let go of the buffer: others may have it now."""
        self.buffer = np.empty(0, np.uint8)
        self._places = None
        self._kept = None

    def _matrix(self, entry: Entry) -> Matrix:
        assert entry.bounds, entry.key
        data, row_bytes = self._place(entry)
        bounds = np.array(entry.bounds, np.int32)
        return Matrix(entry.type, entry.n, entry.k, bounds, data, row_bytes=row_bytes)

    def _place(self, entry: Entry) -> Placed:
        if self._places is not None:
            return self._places[entry.offset]
        assert self.buffer.nbytes == self.plan.nbytes, f"{self.plan.name} is used after it was dropped"
        return Placed(self.buffer[entry.offset : entry.offset + entry.nbytes], 0)


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
        for expert in range(shape.n_experts):
            yield from expert_tensors(shape, layer, expert)
        return
    width = shape.intermediate
    yield own("gate", width, d)
    yield own("up", width, d)
    yield own("down", d, width)
    if flags.mlp_bias:
        yield own("gate_bias", width)
        yield own("up_bias", width)
        yield own("down_bias", d)


def expert_tensors(shape: Shape, layer: int, expert: int) -> Tensors:
    """The tensors of an expert and their whole shapes."""
    d, width = shape.hidden, shape.moe_intermediate
    dims = {"gate": (width, d), "up": (width, d), "down": (d, width)}
    return [(Key(role, layer, expert), size) for role, size in dims.items()]


def head_tensors(shape: Shape) -> Iterator[tuple[Key, tuple[int, ...]]]:
    """The tensors of the output head and their whole shapes."""
    yield Key("final_norm"), (shape.hidden,)
    yield Key("head"), (shape.vocab, shape.hidden)


def check_tensors(source: Source, shape: Shape, flags: Flags) -> None:
    """ModelError if a tensor is missing, has another shape than the configuration says, or is not in it at all."""
    known = set()
    for key, dims in all_tensors(shape, flags):
        info = source.tensors.get(key)
        if info is None:
            raise ModelError(f"{source.path} has no tensor for {described(key)}; the model is not complete.")
        if info.shape != dims:
            raise ModelError(
                f"{source.path}: {described(key)} has shape {list(info.shape)}, but the configuration makes it "
                f"{list(dims)}."
            )
        known.add(key)
    for key in source.tensors:
        if key not in known:
            raise ModelError(f"{source.path} has {described(key)}, which its configuration does not have.")


def all_tensors(shape: Shape, flags: Flags) -> Iterator[tuple[Key, tuple[int, ...]]]:
    """Every tensor of a model, and its whole shape."""
    yield Key("embed"), (shape.vocab, shape.hidden)
    yield from head_tensors(shape)
    for layer in range(shape.n_layers):
        yield from layer_tensors(shape, flags, layer)


def layer_parts(shape: Shape, flags: Flags, layer: int) -> dict[str, Tensors]:
    """The tensors of a layer by the part in which they are paged in, in the order of use; without experts.

    `ATTENTION` has what comes before the feed-forward products too: their norm, and the router.
    """
    parts: dict[str, Tensors] = {}
    for key, dims in layer_tensors(shape, flags, layer):
        if key.expert < 0:
            parts.setdefault(_PART_OF.get(key.role, ATTENTION), []).append((key, dims))
    return parts


def rank_plans(shape: Shape, place: Place, source: Source, flags: Flags) -> list[LayerPlan]:
    """All that a rank holds, in the order of use: its stage's layers and, on the last stage, the output head.

    `check_tensors` has found the source complete.
    """
    plans = []
    for layer in grid.stage_layers(shape, place):
        for part, tensors in layer_parts(shape, flags, layer).items():
            plans.append(source.plan(part, layer, tensors, shape, place))
        if flags.moe_layers[layer]:
            plans += source.plan_experts(layer, shape, place)
    if place.stage == place.stages - 1:
        plans.append(source.plan(HEAD, -1, list(head_tensors(shape)), shape, place))
    return plans


def load(
    plan: LayerPlan,
    source: TensorSource,
    buffer: Bytes,
    pool: Executor | None = None,
    chunk: int = CHUNK,
) -> Layer:
    """Read what is planned and make it kernel-ready in `buffer` (uint8 [plan.nbytes], 64-byte aligned).

    Besides the buffer, little more than `chunk` bytes for each of the pool's threads is held (and their float32
    values, where `kernels.pack` cannot convert them).
    """
    assert buffer.nbytes == plan.nbytes
    assert buffer.ctypes.data % ALIGNMENT == 0
    groups = [[(entry, buffer[entry.offset : entry.offset + entry.nbytes])] for entry in plan.entries]
    fill(groups, source, pool, chunk)
    return Layer(plan, buffer)


def fill(
    groups: Iterable[Sequence[tuple[Entry, Bytes]]],
    source: TensorSource,
    pool: Executor | None = None,
    chunk: int = CHUNK,
) -> None:
    """Read rows of tensors and make them kernel-ready, each in one or several places.

    A group's entries have the same key and rows, and columns of their own; with each comes where its bytes go. Groups
    that follow one another in the file are read together, up to `chunk` bytes. The
    pool's threads take chunks of rows, each for itself: kernels that share out a chunk would wait for one another all
    the time.
    """
    work = list(_tasks(groups, source, chunk))
    if pool is None or len(work) == 1:
        for task in work:
            task()
        return
    tasks = [pool.submit(task) for task in work]
    wait(tasks)  # all of them, even if one fails: they write to what the caller gave
    for done in tasks:
        done.result()


class _Portion(NamedTuple):
    """Rows and columns of a matrix, of which the first row is number `first` of the entries'."""

    entries: Sequence[tuple[Entry, Bytes]]
    first: int
    rows: range
    cols: range

    @property
    def key(self) -> Key:
        return self.entries[0][0].key


def _tasks(
    groups: Iterable[Sequence[tuple[Entry, Bytes]]], source: TensorSource, chunk: int
) -> Iterator[Callable[[], None]]:
    """What there is to do, one request of the file after the other."""
    together: list[_Portion] = []
    for entries in groups:
        key, rows, type = entries[0][0].key, entries[0][0].rows, entries[0][0].type
        if not entries[0][0].bounds:
            yield partial(_fill_vector, entries, source)
            continue
        cols = range(
            min(entry.cols.start for entry, _ in entries), max(entry.cols.stop for entry, _ in entries)
        )
        head = source.head_rows(key) or 1
        unit = math.lcm(TILE_ROWS, head)
        most = max(chunk // (max(type.row_bytes(len(cols)), source.stored_row_bytes(key)) * unit), 1) * unit
        first = 0
        while first < len(rows):
            room = most - sum(len(portion.rows) for portion in together)
            last = together[-1] if together else None
            goes_on = last and (last.key, last.cols, last.rows.stop) == (key, cols, rows[first])
            if not goes_on or room < unit or rows[first] % head:
                if together:
                    yield partial(_fill_rows, together, source)
                together, room = [], most
            together.append(_Portion(entries, first, rows[first : first + room // unit * unit], cols))
            first += len(together[-1].rows)
    if together:
        yield partial(_fill_rows, together, source)


def _fill_vector(entries: Sequence[tuple[Entry, Bytes]], source: TensorSource) -> None:
    values = source.read_f32(entries[0][0].key, entries[0][0].rows)
    for _, out in entries:
        out.view(np.float32)[:] = values


def _fill_rows(portions: Sequence[_Portion], source: TensorSource) -> None:
    """Rows of a matrix that follow one another."""
    key, cols, begin = portions[0].key, portions[0].cols, portions[0].rows.start
    rows = range(begin, portions[-1].rows.stop)
    stored, chunk, head = source.rows_to_pack(key, rows, cols)
    for portion in portions:
        own = chunk[portion.rows.start - begin : portion.rows.stop - begin]
        for entry, out in portion.entries:
            at = (entry.cols.start - cols.start) // stored.block * stored.block_bytes
            part = own[:, at : at + stored.row_bytes(entry.k)]
            kernels.pack(
                entry.type, part, entry.k, entry.bounds, out, 1, stored, portion.first, entry.n, head
            )
        del own, part
    del chunk
    source.release(key, rows)


def described(key: Key) -> str:
    of = "" if key.layer < 0 else f" of layer {key.layer}"
    return f"{key.role}{of}" + ("" if key.expert < 0 else f", expert {key.expert}")


def plan_entries(
    tensors: Tensors, shape: Shape, place: Place, type_of: Callable[[Key], BlockType]
) -> tuple[tuple[Entry, ...], int]:
    """What a rank holds of these tensors, each from a multiple of ALIGNMENT on, and the bytes that takes."""
    entries, offset = [], 0
    for key, dims in tensors:
        entries.append(plan_entry(key, *slices(key, dims, shape, place), type_of(key), offset))
        offset += aligned(entries[-1].nbytes)
    return tuple(entries), offset


def plan_entry(
    key: Key, rows: range, cols: range, bounds: tuple[int, ...], type: BlockType, offset: int
) -> Entry:
    """An entry of some rows and columns; vectors are float32 whatever they are stored as."""
    if not bounds:
        return Entry(key, rows, cols, BlockType.F32, bounds, offset, 4 * len(rows))
    nbytes = packed_nbytes(type, len(rows), len(cols), bounds)
    return Entry(key, rows, cols, type, bounds, offset, nbytes)


def plan_name(part: str, layer: int, expert: int = -1) -> str:
    """What messages call an item."""
    return part if layer < 0 else f"layer {layer}, {part}" + (f" {expert}" if expert >= 0 else "")


def aligned(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """The next multiple of `alignment`."""
    return -(-nbytes // alignment) * alignment


def slices(
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
