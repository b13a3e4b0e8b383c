"""Half a layer, said in terms of the single kernels; the compiled module has the same classes as one piece of work.

Shapes: x [m, d], contiguous rows; `matrix` is anything with `type, data, n, k, bounds` as `matmul` takes them,
or with `parts` that are such matrices: with all of its columns, one under the other, or with all of its rows and
one or several of its column panels each, side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mpillm.kernels import reference
from mpillm.kernels.types import F32, I32, U8, BlockType, Bounds, activation_nbytes

Pool = npt.NDArray[Any]


class Packed(Protocol):
    """A matrix [n, k] with its column panels: packed, or rows of floats `row_bytes` apart."""

    @property
    def type(self) -> BlockType: ...
    @property
    def data(self) -> U8: ...
    @property
    def n(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def bounds(self) -> Bounds: ...
    @property
    def row_bytes(self) -> int: ...
    @property
    def parts(self) -> Sequence[Packed]: ...


class _Half:
    ops: Any = reference  # the module whose kernels are called

    def _times(self, x: F32, matrix: Packed, threads: int) -> F32:
        out = np.empty((len(x), matrix.n), np.float32)
        self._multiply(x, matrix, out, threads)
        return out

    def _multiply(self, x: F32, matrix: Packed, out: F32, threads: int, fold: bool = True) -> None:
        if not matrix.parts:
            self._product(x, matrix, out, threads, fold)
        elif len(matrix.parts[0].bounds) == len(matrix.bounds):
            row = 0
            for part in matrix.parts:
                self._product(x, part, out[..., row : row + part.n], threads, fold)
                row += part.n
        else:
            sums = np.empty((len(matrix.bounds) - 1, len(x), matrix.n), np.float32) if fold else out
            column = panel = 0
            for part in matrix.parts:
                count = len(part.bounds) - 1
                columns = np.ascontiguousarray(x[:, column : column + part.k])
                self._product(columns, part, sums[panel : panel + count], threads, fold=False)
                column, panel = column + part.k, panel + count
            if fold:
                self.ops.fold(sums, out, threads)

    def _product(self, x: F32, matrix: Packed, out: F32, threads: int, fold: bool) -> None:
        rows: npt.NDArray[Any] = x
        if matrix.type.quantised:
            rows = np.empty((len(x), activation_nbytes(matrix.k, matrix.bounds)), np.uint8)
            self.ops.quantize_rows(x, matrix.bounds, rows, threads)
        self.ops.matmul(matrix.type, matrix.data, matrix.n, matrix.k, matrix.bounds, rows, out, threads, fold,
                        matrix.row_bytes)  # fmt: skip

    def _norm(self, x: F32, weight: F32, eps: float, threads: int) -> F32:
        out = np.empty(x.shape, np.float32)
        self.ops.rms_norm(x, weight, eps, out, threads)
        return out


class Products(_Half):
    """Products of the same rows x [m, k], C-contiguous, with several matrices: outs[i] [m, n] = x @ matrix i .T."""

    def __init__(self, *matrices: Packed) -> None:
        self._matrices = matrices

    def __call__(self, x: F32, outs: Sequence[F32], threads: int = 1) -> None:
        for matrix, out in zip(self._matrices, outs, strict=True):
            self._multiply(x, matrix, out, threads)


class AttentionHalf(_Half):
    """out [m, d] = o(attention(rope(q), rope(k), v)) of the normed rows; their keys and values are stored first.

    `biases` are those of q, k and v; `qk_norms` the weights [hd] of the norms of every head of q and of k.
    """

    def __init__(self, norm: F32, eps: float, q: Packed, k: Packed, v: Packed, o: Packed, kv_of_head: I32, kvh: int,
                 hd: int, scale: float, window: int, biases: tuple[F32, F32, F32] | None = None,
                 qk_norms: tuple[F32, F32] | None = None) -> None:  # fmt: skip
        self._norm_weight, self._eps, self._qkv, self._o = norm, eps, (q, k, v), o
        self._kv_of_head, self._kvh, self._hd = kv_of_head, kvh, hd
        self._scale, self._window, self._biases, self._qk_norms = scale, window, biases, qk_norms

    def __call__(self, x: F32, cos: F32, sin: F32, kv_type: BlockType, kpool: Pool, vpool: Pool, block: I32,
                 offset: I32, pos: I32, table: I32, table_start: I32, out: F32, threads: int = 1) -> None:  # fmt: skip
        m, hd, ops = len(x), self._hd, self.ops
        rows = self._norm(x, self._norm_weight, self._eps, threads)
        q, k, v = (self._times(rows, matrix, threads) for matrix in self._qkv)
        if self._biases:
            for values, bias in zip((q, k, v), self._biases, strict=True):
                values += bias
        if self._qk_norms:
            q, k = (
                self._norm(values.reshape(-1, hd), weight, self._eps, threads).reshape(m, -1)
                for values, weight in zip((q, k), self._qk_norms, strict=True)
            )
        ops.rope(q, cos, sin, len(self._kv_of_head), hd, threads)
        ops.rope(k, cos, sin, self._kvh, hd, threads)
        ops.kv_store(kv_type, k, v, block, offset, kpool, vpool, self._kvh, hd)
        mixed = np.empty_like(q)
        ops.attention(kv_type, q, mixed, kpool, vpool, pos, table, table_start, self._kv_of_head, self._kvh, hd,
                      self._scale, self._window, threads)  # fmt: skip
        self._multiply(mixed, self._o, out, threads)


class FeedForwardHalf(_Half):
    """out = down(silu(gate(x)) * up(x)) of the normed rows, or of x itself: [m, d], or panels [P, m, d] not folded."""

    def __init__(self, norm: F32 | None, eps: float, gate: Packed, up: Packed, down: Packed,
                 biases: tuple[F32, F32] | None = None) -> None:  # fmt: skip
        self._norm_weight, self._eps, self._gate_up, self._down = norm, eps, (gate, up), down
        self._biases = biases

    def __call__(self, x: F32, out: F32, threads: int = 1, fold: bool = True) -> None:
        rows = x if self._norm_weight is None else self._norm(x, self._norm_weight, self._eps, threads)
        gate, up = (self._times(rows, matrix, threads) for matrix in self._gate_up)
        if self._biases:
            gate += self._biases[0]
            up += self._biases[1]
        self.ops.silu_mul(gate, up, gate, threads)
        self._multiply(gate, self._down, out, threads, fold)


class Expert:
    """The matrices of a `Mixture`'s expert."""

    def __init__(self, gate: Packed, up: Packed, down: Packed) -> None:
        self.matrices = gate, up, down


class Mixture(_Half):
    """Add to column panels [P, m, d] what experts make of rows of h [m, k], C-contiguous, times weights.

    Rows `at[starts[i]:starts[i + 1]]`, at least one, go to expert i, with these of the weights; experts are added up in
    their order. Panels are not folded, for that comes after the last expert: sums are then the same over any number of
    shards.
    """

    def __init__(self, experts: Sequence[Expert]) -> None:
        self._experts = experts

    def __call__(self, h: F32, at: I32, starts: I32, weights: F32, panels: F32, threads: int = 1) -> None:
        for expert, begin, end in zip(self._experts, starts[:-1], starts[1:], strict=True):
            half = FeedForwardHalf(None, 0.0, *expert.matrices)
            half.ops = self.ops
            rows = at[begin:end]
            sums = np.empty((len(panels), len(rows), panels.shape[2]), np.float32)
            half(np.ascontiguousarray(h[rows]), sums, threads, fold=False)
            panels[:, rows] += weights[begin:end, None] * sums


class Layers:
    """Whole layers, whose keys and values lie in these pools: x [m, d] += its attention half, and then the other one.

    `between` is called before each layer: what else has to go on meanwhile.
    """

    def __init__(self, halves: Sequence[tuple[AttentionHalf, FeedForwardHalf]], kv_type: BlockType,
                 pools: Sequence[tuple[Pool, ...]]) -> None:  # fmt: skip
        self._layers = list(zip(halves, pools, strict=True))
        self._kv_type = kv_type

    def __call__(self, x: F32, cos: F32, sin: F32, block: I32, offset: I32, pos: I32, table: I32, table_start: I32,
                 between: Callable[[], object], threads: int = 1) -> None:  # fmt: skip
        out = np.empty_like(x)
        for (attention, feed_forward), (kpool, vpool) in self._layers:
            between()
            attention(x, cos, sin, self._kv_type, kpool, vpool, block, offset, pos, table, table_start, out,
                      threads)  # fmt: skip
            x += out
            feed_forward(x, out, threads)
            x += out
