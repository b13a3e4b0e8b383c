"""The base class of all parts of layers: products of rows with matrices, and norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mpillm.kernels import reference
from mpillm.kernels.types import F32, U8, BlockType, Bounds, Norm, activation_nbytes


class Packed(Protocol):
    """A matrix [n, k] with its column panels: packed, or rows at a distance of `row_bytes`, as in a file."""

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


class Fused:
    """A part of a layer as single kernels of `ops`."""

    ops: Any = reference  # the module whose kernels are called

    def _times(self, x: F32, matrix: Packed, threads: int) -> F32:
        out = np.empty((len(x), matrix.n), np.float32)
        self._multiply(x, matrix, out, threads)
        return out

    def _biased(
        self, x: F32, matrices: Sequence[Packed], biases: Sequence[F32 | None], threads: int
    ) -> list[F32]:
        """Multiply x [m, k] with each matrix and add its bias, if it has one."""
        made = [self._times(x, matrix, threads) for matrix in matrices]
        for rows, bias in zip(made, biases, strict=True):
            if bias is not None:
                rows += bias
        return made

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
            rows = np.empty((len(x), activation_nbytes(matrix.k, matrix.bounds, matrix.type)), np.uint8)
            self.ops.quantize_rows(x, matrix.bounds, rows, threads, matrix.type)
        self.ops.matmul(matrix.type, matrix.data, matrix.n, matrix.k, matrix.bounds, rows, out, threads, fold,
                        matrix.row_bytes)  # fmt: skip

    def _norm(self, x: F32, norm: Norm | None, threads: int, groups: int = 1) -> F32:
        if norm is None:
            return x
        out = np.empty(x.shape, np.float32)
        if norm.centred:
            self.ops.layer_norm(x, norm.weight, norm.bias, norm.eps, out, threads)
        else:
            self.ops.rms_norm(x, norm.weight, norm.eps, out, threads, groups)
        return out

    def _norm_heads(self, x: F32, norm: Norm | None, heads: int, threads: int) -> F32:
        """Normalise x [m, heads * hd]: each head by itself if the norm is as wide as a head, else whole rows."""
        if norm is None or norm.width == x.shape[1]:
            return self._norm(x, norm, threads, heads)
        return self._norm(x.reshape(-1, norm.width), norm, threads).reshape(x.shape)


class Products(Fused):
    """Products of rows x [m, k], C-contiguous, with several matrices: outs[i] [m, n] = x @ matrices[i].T."""

    def __init__(self, *matrices: Packed) -> None:
        self._matrices = matrices

    def __call__(self, x: F32, outs: Sequence[F32], threads: int = 1) -> None:
        for matrix, out in zip(self._matrices, outs, strict=True):
            self._multiply(x, matrix, out, threads)
