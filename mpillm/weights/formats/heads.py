"""Matrices that lie in their file within another one: each head's rows beside those of another matrix.

DeepSeek's `kv_b_proj` [heads * (part + value), latent] expands a latent to each head's keys and values. What is
computed with (`kernels.LatentAttention`) are k_b [heads * latent, part], which has the first rows of each head turned,
a column for each, and v_b [heads * value, latent], which has the others. llama.cpp's newer files hold them so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpillm.weights.formats.stored import OWN, Bytes, Stored


@dataclass(frozen=True)
class HeadPart:
    """Of each head's `rows` rows in the file, of `k` values as `stored`, the `count` rows from `first` on.

    `turned`: each head's matrix is transposed.
    """

    stored: Stored
    k: int
    rows: int
    first: int
    count: int
    turned: bool

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the file."""
        return self.stored.row_bytes(self.k)

    @property
    def made(self) -> Stored:
        """How rows come from `gather`: blocks cannot be turned, but their values can."""
        return OWN["F32"] if self.turned and self.stored.block > 1 else self.stored

    def heads(self, rows: range) -> range:
        """The heads that have some of these rows of the matrix."""
        each = self.k if self.turned else self.count
        return range(rows.start // each, -(-rows.stop // each))

    def nbytes(self, n: int) -> int:
        """Bytes in the file of a matrix of n rows."""
        return len(self.heads(range(n))) * self.count * self.row_bytes

    def gather(self, raw: Bytes, rows: range, threads: int = 1) -> Bytes:
        """Rows of the matrix, uint8 [len(rows), row bytes], of the rows in the file of all heads that have some."""
        heads = self.heads(rows)
        own = np.ascontiguousarray(
            raw.reshape(len(heads), self.rows, self.row_bytes)[:, self.first : self.first + self.count]
        ).reshape(-1, self.row_bytes)
        if not self.turned:
            begin = heads.start * self.count
            return own[rows.start - begin : rows.stop - begin]
        if self.stored.block > 1:
            own = self.stored.decode(own, self.k, threads).view(np.uint8)
        values = own.view(f"u{self.made.block_bytes}").reshape(len(heads), self.count, self.k)
        begin = heads.start * self.k
        turned = values.swapaxes(1, 2).reshape(-1, self.count)[rows.start - begin : rows.stop - begin]
        return np.ascontiguousarray(turned).view(np.uint8)
