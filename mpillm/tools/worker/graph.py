"""Read what a root sends before its first step: pipes, buffers, segments of operations, and weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpillm.kernels.types import BlockType
from mpillm.tools.worker.link import Link, StrangeRootError

TYPES = {0: BlockType.F32, 2: BlockType.Q4_0, 3: BlockType.Q8_0}  # NnFloatType
NOTHING = -1  # the index of no buffer, whose size is 0
MOST = 2**20  # the maximum of every count
PIPE, BUFFER = 0, 1  # NnPointerSource
RAW, BATCH, SLICE = 0, 1, 2  # NnPointerType
FROM_ROOT, SLICES, SLICES_TO_ROOT = 0, 1, 2  # NnSyncType


class Size(NamedTuple):
    """The size of an array [z, y, x]; `type` is None for one of no size."""

    type: BlockType | None
    z: int
    y: int
    x: int

    @property
    def row_bytes(self) -> int:
        return 0 if self.type is None else self.type.row_bytes(self.x)

    @property
    def nbytes(self) -> int:
        """Bytes of it all; weights lie with y innermost, so that z * y * x is what has whole blocks."""
        return 0 if self.type is None else self.type.row_bytes(self.z * self.y * self.x)


class Pointer(NamedTuple):
    """An array of the graph, or this node's part of each of its rows."""

    source: int
    number: int
    kind: int


@dataclass
class Operation:
    """An operation; `config` is the struct that its code has."""

    code: int
    name: str
    index: int
    size: Size  # the size of the weights
    input: Pointer
    output: Pointer
    config: bytes
    weight: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))


@dataclass(frozen=True)
class Segment:
    """Operations, and what is exchanged when they are done: pipes and how."""

    operations: tuple[Operation, ...]
    syncs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Graph:
    """All that a node computes; `node` counts from 0, which is the root."""

    rows: int  # the maximum rows of one step
    nodes: int
    node: int
    pipes: tuple[Size, ...]
    buffers: tuple[Size, ...]
    segments: tuple[Segment, ...]


def read_graph(root: Link) -> Graph:
    """Return the graph that a root sends, with its weights; StrangeRootError if it is not as this version has it."""
    root.await_acknowledgement()
    rows, nodes, count = root.numbers("III")
    pipes = tuple(_named_size(root) for _ in _counted(root, count))
    for _ in _counted(
        root, root.number()
    ):  # the pipes that are exchanged before a step: positions, which steps carry
        root.number()
    root.acknowledge()
    root.await_acknowledgement()
    node, n_buffers, n_segments = root.numbers("III")
    buffers = tuple(_named_size(root) for _ in _counted(root, n_buffers))
    segments = tuple(_segment(root) for _ in _counted(root, n_segments))
    root.acknowledge()
    if not 0 < node < nodes or not 0 < rows <= MOST:
        raise StrangeRootError(f"{root.who} speaks of node {node} of {nodes}, and of {rows} rows.")
    graph = Graph(rows, nodes, node, pipes, buffers, segments)
    _read_weights(root, graph)
    return graph


def _read_weights(root: Link, graph: Graph) -> None:
    operations = {
        (operation.name, operation.index): operation
        for segment in graph.segments
        for operation in segment.operations
    }
    for operation in operations.values():
        operation.weight = np.zeros(operation.size.nbytes, np.uint8)
    while length := root.number():
        name = root.read(length)[:-1].decode("utf-8", "replace") if length <= MOST else ""
        index, offset, nbytes = root.numbers("IQQ")
        found = operations.get((name, index))
        if found is None or offset + nbytes > len(found.weight):
            raise StrangeRootError(
                f"{root.who} sent weights of {name[:40]!r} {index} that it did not describe."
            )
        root.read_into(found.weight.data[offset : offset + nbytes])
    root.acknowledge()


def _counted(root: Link, count: int) -> range:
    if count > MOST:
        raise StrangeRootError(f"{root.who} announces {count} parts of its graph: it is of another version.")
    return range(count)


def _size(root: Link) -> Size:
    code, z, y, x, length, nbytes, _ = root.numbers("iIIIQQQ")
    if code == NOTHING:
        return Size(None, 0, 0, 0)
    if code not in TYPES:
        raise StrangeRootError(f"{root.who} uses the float type {code}; f32, q40 and q80 are known.")
    size = Size(TYPES[code], z, y, x)
    if length != z * y * x or length % TYPES[code].block or nbytes != size.nbytes:
        raise StrangeRootError(f"{root.who} describes an array of {nbytes} bytes that has {size.nbytes}.")
    return size


def _named_size(root: Link) -> Size:
    size = _size(root)
    root.string()
    if size.type is None or size.x % size.type.block:
        raise StrangeRootError(f"{root.who} describes an array with rows of {size.x} values.")
    return size


def _segment(root: Link) -> Segment:
    n_syncs, n_operations = root.numbers("II")
    syncs = tuple(root.numbers("Ii") for _ in _counted(root, n_syncs))
    return Segment(tuple(_operation(root) for _ in _counted(root, n_operations)), syncs)


def _operation(root: Link) -> Operation:
    code, index = root.numbers("iI")
    size, nbytes, name = _size(root), root.number(), root.string()
    x, y = (Pointer(*root.numbers("iIi")) for _ in range(2))
    _counted(root, nbytes)
    return Operation(code, name, index, size, x, y, bytes(root.read(nbytes)))
