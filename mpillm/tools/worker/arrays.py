"""The pipes and buffers of a graph, what an operation reads and writes of them, and their two formats."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpillm import kernels
from mpillm.kernels.types import BlockType
from mpillm.tools.worker.graph import BUFFER, RAW, SLICE, Graph, Operation, Pointer, Size

Array = NDArray[Any]
Floats = NDArray[np.float32]


class Arrays:
    """The pipes and buffers of a graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.pipes, self.buffers = (list(map(_empty, sizes)) for sizes in (graph.pipes, graph.buffers))

    def at(self, pointer: Pointer) -> tuple[Array, bool]:
        """Return the array of a pointer, and whether it consists of Q8_0 blocks."""
        arrays, sizes = self.pipes, self.graph.pipes
        if pointer.source == BUFFER:
            arrays, sizes = self.buffers, self.graph.buffers
        array, size = arrays[pointer.number], sizes[pointer.number]
        if pointer.kind == SLICE:
            width = array.shape[2] // self.graph.nodes
            array = array[:, :, width * self.graph.node : width * (self.graph.node + 1)]
        return array.reshape(-1) if pointer.kind == RAW else array, size.type is BlockType.Q8_0

    def floats(self, index: int) -> Floats:
        """Return the buffer number `index`, f32 [z, y, x]."""
        return self.buffers[index]

    def positions(self, pipe: int, rows: int) -> NDArray[np.int64]:
        """Return the positions [rows] of a step's rows."""
        return self.pipes[pipe].reshape(-1)[:rows].astype(np.int64)


def _empty(size: Size) -> Array:
    if size.type is BlockType.F32:
        return np.zeros((size.z, size.y, size.x), np.float32)
    return np.zeros((size.z, size.y, size.row_bytes), np.uint8)


class OperationContext:
    """An operation with the arrays that it reads and writes."""

    def __init__(self, operation: Operation, arrays: Arrays, threads: int) -> None:
        self.operation, self.arrays, self.threads = operation, arrays, threads
        (self.x, self.x_blocks), (self.y, self.y_blocks) = (
            arrays.at(operation.input),
            arrays.at(operation.output),
        )

    def config(self, layout: str) -> tuple[Any, ...]:
        """Return the operation's own settings; `layout` is in struct's notation."""
        return struct.unpack_from(f"<{layout}", self.operation.config)

    @property
    def weight(self) -> Floats:
        """Float weights [z, x, y], of which y is summed over."""
        size = self.operation.size
        return self.operation.weight.view(np.float32).reshape(size.z, size.x, size.y)


def from_q8_0(x: Array) -> Floats:
    """Return the values of rows of Q8_0 blocks [.., row bytes]."""
    flat = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    out = np.empty((len(flat), x.shape[-1] // BlockType.Q8_0.block_bytes * 32), np.float32)
    kernels.dequantize(BlockType.Q8_0, flat, out.shape[1], out)
    return out.reshape(*x.shape[:-1], -1)


def to_q8_0(x: Floats) -> Array:
    """Return rows of values [.., n] as Q8_0 blocks uint8 [.., row bytes]."""
    flat = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    out = np.empty((len(flat), BlockType.Q8_0.row_bytes(x.shape[-1])), np.uint8)
    kernels.quantize(BlockType.Q8_0, flat, out)
    return out.reshape(*x.shape[:-1], -1)
