"""The operations of a graph, each over all rows of a step.

An operation gets `rows`, how many there are, and computes what Distributed-Llama's src/nn/nn-cpu-ops.cpp does. Arrays
are f32 [z, y, x], or Q8_0 blocks uint8 [z, y, row bytes].
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mpillm import kernels
from mpillm.kernels.types import BlockType, activation_nbytes, packed_nbytes
from mpillm.tools.worker.arrays import Array, Arrays, Floats, OperationContext, from_q8_0, to_q8_0
from mpillm.tools.worker.graph import Operation
from mpillm.tools.worker.link import StrangeRootError

Step = Callable[[int], None]
HALVES = 1  # NnRopeType: what RoPE turns together; 0 and 2 turn pairs


def prepare(operation: Operation, arrays: Arrays, threads: int) -> Step:
    """Return the operation as a function of a step's rows; StrangeRootError if it is none that is known."""
    make = _MAKERS.get(operation.code)
    if make is None:
        raise StrangeRootError(
            f"The root's graph has the operation {operation.code} ({operation.name}), which is unknown."
        )
    try:
        return make(OperationContext(operation, arrays, threads))
    except (IndexError, struct.error, ValueError) as error:
        raise StrangeRootError(
            f"The root's graph has {operation.name}, which is not as it must be: {error}."
        ) from None


def _cast(of: OperationContext) -> Step:
    if of.x_blocks == of.y_blocks:
        change: Callable[[Array], Array] = lambda x: x  # noqa: E731
    else:
        change = from_q8_0 if of.x_blocks else to_q8_0

    def step(rows: int) -> None:
        of.y[:, :rows] = change(of.x[:, :rows])

    return step


def _merge_add(of: OperationContext) -> Step:
    def step(rows: int) -> None:
        x = of.x[0, :rows]
        values = from_q8_0(x) if of.x_blocks else x
        width = of.y.shape[2]
        for first in range(0, values.shape[1], width):
            of.y[0, :rows] += values[:, first : first + width]

    return step


def _merge_sum(of: OperationContext) -> Step:
    def step(rows: int) -> None:
        of.y[0, :rows] = of.x[:, :rows].sum(0, dtype=np.float32)

    return step


def _inverse_rms(of: OperationContext) -> Step:
    eps, columns = of.config("fI")

    def step(rows: int) -> None:
        x = of.x[0, :rows].reshape(rows, columns, -1)
        of.y[0, :rows, :columns] = 1 / np.sqrt((x * x).mean(2, dtype=np.float32) + np.float32(eps))

    return step


def _rms_norm(of: OperationContext) -> Step:
    inverse, columns = of.config("II")
    weight, factors = of.operation.weight.view(np.float32), of.arrays.floats(inverse)

    def step(rows: int) -> None:
        x = of.x[0, :rows]
        x = (from_q8_0(x) if of.x_blocks else x).reshape(rows, columns, -1)
        of.y[0, :rows] = (weight * (factors[0, :rows, :columns, None] * x)).reshape(rows, -1)

    return step


def _matmul(of: OperationContext) -> Step:
    size, threads = of.operation.size, of.threads
    n, k, bounds = size.x, size.y, (0, size.y)
    n_experts, active, chosen = of.config("III")
    if size.type is BlockType.F32:
        matrices: Sequence[Array] = list(of.operation.weight.reshape(size.z, -1))
    else:
        assert size.type is not None
        canonical = of.operation.weight.reshape(size.z, n, size.type.row_bytes(k))
        matrices = [np.empty(packed_nbytes(size.type, n, k, bounds), np.uint8) for _ in range(size.z)]
        for rows_of, out in zip(canonical, matrices, strict=True):
            kernels.pack(size.type, rows_of, k, bounds, out, threads)
        of.operation.weight = np.empty(0, np.uint8)
    kind = size.type

    def product(x: Array, matrix: int) -> Floats:
        values = np.ascontiguousarray(from_q8_0(x) if of.x_blocks else x)
        given: Array = values
        if kind is not BlockType.F32:
            given = np.empty((len(values), activation_nbytes(k, bounds)), np.uint8)
            kernels.quantize_rows(values, bounds, given, threads)
        out = np.empty((len(values), n), np.float32)
        kernels.matmul(kind, matrices[matrix], n, k, bounds, given, out, threads)
        return out

    def dense(rows: int) -> None:
        of.y[0, :rows] = product(of.x[0, :rows], 0)

    def routed(rows: int) -> None:
        experts = of.arrays.floats(chosen).reshape(-1)[: rows * active].reshape(rows, active).astype(int)
        for row, numbers in enumerate(experts):
            for slot, number in enumerate(numbers):
                of.y[slot, row] = product(of.x[slot, row : row + 1], number)[0]

    return routed if n_experts and active else dense


def _rope(of: OperationContext) -> Step:
    kind, is_q, pipe, _, factor, low, high, original = of.config("iIIIfffI")
    q_dim, q_start, _, _, _, kv_dim, kv_start, _, _, head, _, theta = struct.unpack_from(
        "<11If", of.operation.config, 32
    )
    width, start = (q_dim, q_start) if is_q else (kv_dim, kv_start)
    numbers = np.arange(0, head, 2) if kind == HALVES else (start + np.arange(0, width, 2)) % head
    frequencies = 1 / np.power(
        np.float32(theta), numbers.astype(np.float32) / np.float32(head), dtype=np.float32
    )
    if kind != HALVES and factor != 1:
        frequencies = _scaled(frequencies, factor, low, high, original)

    pairs = (width // head, 2, head // 2) if kind == HALVES else (width // 2, 2, 1)

    def step(rows: int) -> None:
        angles = of.arrays.positions(pipe, rows)[:, None].astype(np.float32) * frequencies
        shape = (rows, 1, -1) if kind == HALVES else (rows, -1, 1)
        cos, sin = np.cos(angles).reshape(shape), np.sin(angles).reshape(shape)
        x = of.x[0, :rows].reshape(rows, *pairs)
        first, second = x[:, :, 0], x[:, :, 1]
        turned = np.stack((first * cos - second * sin, first * sin + second * cos), 2)
        of.y[0, :rows] = turned.reshape(rows, width)

    return step


def _scaled(frequencies: Floats, factor: float, low: float, high: float, original: int) -> Floats:
    """Llama 3's scaling."""
    wavelengths = 2 * np.pi / frequencies
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    result: Floats = ((1 - smooth) * frequencies / factor + smooth * frequencies).astype(np.float32)
    return result


def _attention(of: OperationContext) -> Step:
    heads, own, kv_heads, head, _, _, kv_dim, pipe, q, keys, values, _ = of.config("12I")
    group = heads // kv_heads
    q_of, k_of, v_of = (of.arrays.floats(index) for index in (q, keys, values))
    root = np.sqrt(np.float32(head))

    def step(rows: int) -> None:
        for row, position in enumerate(of.arrays.positions(pipe, rows)):
            seen = position + 1
            k = k_of.reshape(-1, kv_dim)[:seen].reshape(seen, -1, head)
            v = v_of.reshape(-1, kv_dim)[:seen].reshape(seen, -1, head)
            query = q_of[0, row].reshape(own // group, group, head)
            scores = np.einsum("ngh,tnh->ngt", query, k) / root
            scores = np.exp(scores - scores.max(2, keepdims=True))
            scores /= scores.sum(2, keepdims=True)
            of.y[0, row] = np.einsum("ngt,tnh->ngh", scores, v).reshape(-1)

    return step


def _shift(of: OperationContext) -> Step:
    (pipe,) = of.config("I")
    width = of.x.shape[2]

    def step(rows: int) -> None:
        of.y.reshape(-1, width)[of.arrays.positions(pipe, rows)] = of.x[0, :rows]

    return step


def _silu(of: OperationContext) -> Step:
    def step(rows: int) -> None:
        x = of.y[:, :rows]
        x /= 1 + np.exp(-x)

    return step


def _mul(of: OperationContext) -> Step:
    (index,) = of.config("I")

    def step(rows: int) -> None:
        of.y[:, :rows] = of.x[:, :rows] * of.arrays.floats(index)[:, :rows]

    return step


def _repeat(of: OperationContext) -> Step:
    def step(rows: int) -> None:
        of.y[:, :rows] = to_q8_0(of.x[0, :rows]) if of.y_blocks else of.x[0, :rows]

    return step


def _softmax(of: OperationContext) -> Step:
    def step(rows: int) -> None:
        x = np.exp(of.x[0, :rows] - of.x[0, :rows].max(1, keepdims=True))
        of.y[0, :rows] = x / x.sum(1, keepdims=True)

    return step


def _gate(of: OperationContext) -> Step:
    count, normalised, chosen = of.config("III")

    def step(rows: int) -> None:
        x = of.x[0, :rows]
        best = np.argsort(-x, 1, kind="stable")[:, :count]
        found = np.take_along_axis(x, best, 1)
        if normalised:
            found = found / found.sum(1, keepdims=True)
        of.arrays.floats(chosen).reshape(-1)[: rows * count] = best.reshape(-1)
        of.y[:, :rows, 0] = found.T

    return step


# By NnOpCode. Those that are missing no root sends to a worker: the embedding, and GELU.
_MAKERS: Mapping[int, Callable[[OperationContext], Step]] = {
    0: _merge_add, 1: _merge_sum, 3: _inverse_rms, 4: _rms_norm, 5: _matmul, 6: _rope, 7: _attention, 9: _silu,
    10: _mul, 11: _mul, 12: _cast, 13: _repeat, 14: _shift, 15: _softmax, 16: _gate,
}  # fmt: skip
