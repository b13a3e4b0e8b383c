"""The decoder of one rank: its stage's layers, its shard of each, for all rows of a step.

One code for all architectures; `ModelConfig` says in data where they differ. Shapes: m rows (tokens of the
step, of any sequences), d = hidden size, h = this shard's query heads, hd = head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpillm import kernels
from mpillm.comm import grid
from mpillm.comm.collectives import Group, Pipe
from mpillm.model.config import ModelConfig
from mpillm.model.kv import KVCache
from mpillm.model.rope import cos_sin
from mpillm.weights.cache import Use, WeightCache
from mpillm.weights.layer import ATTENTION, DOWN, EXPERTS, GATE, HEAD, UP, Layer, Matrix
from mpillm.weights.names import Key
from mpillm.weights.source import Source

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

FOLD_ROWS = 128  # rows whose panels' sums are held at a time, where a matrix lies in parts


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step, as arrays of length m (`table` is as long as all sequences' block tables together)."""

    tokens: Ints
    positions: Ints
    table: Ints  # all sequences' block tables, one after the other
    table_start: Ints  # where each row's sequence begins in `table`
    block: Ints  # the KV block that takes the row's keys and values
    offset: Ints  # the place in that block


class Rows:
    """Activations [m, k] on their way into products: quantised once for each way that a matrix cuts its columns."""

    def __init__(self, x: Floats, threads: int) -> None:
        self.x = x
        self._threads = threads
        self._quantised: dict[tuple[int, bytes], NDArray[np.uint8]] = {}

    def times(self, matrix: Matrix, fold: bool = True) -> Floats:
        """x @ matrix.T: [m, n], or the panels' sums [P, m, n] if they are not to be folded."""
        m, n, panels = len(self.x), matrix.n, len(matrix.bounds) - 1
        out = np.empty((m, n) if fold else (panels, m, n), np.float32)
        if not matrix.parts:
            self._product(matrix, 0, slice(None), out, fold)
        elif panels == 1:
            self._rows(matrix, out)
        elif not fold:
            self._panels(matrix, slice(None), out)
        else:
            for first in range(0, m, FOLD_ROWS):
                some = slice(first, first + FOLD_ROWS)
                sums = np.empty((panels, len(out[some]), n), np.float32)
                self._panels(matrix, some, sums)
                kernels.fold(sums, out[some], self._threads)
        return out

    def _rows(self, matrix: Matrix, out: Floats) -> None:
        """A matrix whose parts lie one under the other: each makes columns of `out` [m, n]."""
        first = 0
        for part in matrix.parts:
            self._product(part, 0, slice(None), out[:, first : first + part.n], fold=True)
            first += part.n

    def _panels(self, matrix: Matrix, some: slice, sums: Floats) -> None:
        """A matrix whose parts lie side by side: each makes the sums [P, m, n] of its panels, for some rows."""
        column = panel = 0
        for part in matrix.parts:
            count = len(part.bounds) - 1
            self._product(part, column, some, sums[panel : panel + count], fold=False)
            column, panel = column + part.k, panel + count

    def _product(self, matrix: Matrix, column: int, some: slice, out: Floats, fold: bool) -> None:
        """Some rows' product with a matrix that takes their columns from `column` on."""
        x: NDArray[Any] = self.x[:, column : column + matrix.k]
        if matrix.type.quantised:
            x = self._as_bytes(x, column, matrix.bounds)
        n, k, bounds = matrix.n, matrix.k, matrix.bounds
        kernels.matmul(matrix.type, matrix.data, n, k, bounds, x[some], out, self._threads, fold)

    def _as_bytes(self, x: Floats, column: int, bounds: Ints) -> NDArray[np.uint8]:
        key = (column, bounds.tobytes())
        if key not in self._quantised:
            self._quantised[key] = np.empty((len(x), kernels.activation_nbytes(x.shape[1], bounds)), np.uint8)
            kernels.quantize_rows(x, bounds, self._quantised[key], self._threads)
        return self._quantised[key]


class Decoder:
    """Runs steps through the layers `grid.stage_layers(shape, place)`; all its arguments belong to the caller."""

    def __init__(
        self,
        config: ModelConfig,
        shape: grid.Shape,
        place: grid.Place,
        source: Source,
        cache: WeightCache[Layer],
        kv: KVCache,
        group: Group,
        pipe: Pipe,
        threads: int,
    ) -> None:
        self.config = config
        self.place = place
        self._source = source
        self._cache = cache
        self._kv = kv
        self._group = group
        self._pipe = pipe
        self._threads = threads
        self._layers = grid.stage_layers(shape, place)
        self._items = {(item.layer, item.part): number for number, item in enumerate(cache.items)}
        heads, kv_heads = grid.own_heads(shape, place), grid.own_kv_heads(shape, place)
        share = config.n_heads // config.n_kv_heads
        self._heads, self._kv_heads = len(heads), len(kv_heads)
        self._kv_of_head = np.array([head // share - kv_heads.start for head in heads], np.int32)
        self.vocab = grid.own_vocab(shape, place)
        panels = [bound for bound in grid.vocab_panels(shape) if self.vocab.start <= bound <= self.vocab.stop]
        self.vocab_bounds = np.array(panels, np.int32) - self.vocab.start

    @property
    def is_first(self) -> bool:
        """Whether steps begin on this rank."""
        return self.place.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether hidden states end, and logits arise, on this rank."""
        return self.place.stage == self.place.stages - 1

    def forward(self, batch: Batch) -> Floats | None:
        """Run the step's rows through this stage: the last layer's output [m, d] on the last stage, else None."""
        if self.is_first:
            x = self._source.read_f32(Key("embed"), batch.tokens)
        else:
            x = self._pipe.recv(len(batch.tokens), self.config.hidden)
        angles = cos_sin(self.config.rope, self.config.head_dim, batch.positions)
        for i, number in enumerate(self._layers):
            with self._use(number, ATTENTION) as layer:
                self._attention(layer, i, number, x, batch, *angles)
                h = self._norm(x, layer.vector("ffn_norm"))
                routed = self._route(layer, h) if self.config.moe_layers[number] else None
            if routed is None:
                self._feed_forward(number, h, x)
            else:
                with self._use(number, EXPERTS) as layer:
                    out = self._experts(layer, h, *routed)
                self._group.all_reduce(out)
                x += out
        if self.is_last:
            return x
        self._pipe.send(x)
        return None

    def final_norm(self, x: Floats) -> Floats:
        """The rows [m, d] as they enter the output head; what embeddings are pooled from."""
        with self._use(-1, HEAD) as head:
            return self._norm(x, head.vector("final_norm"))

    def logits(self, hidden: Floats) -> Floats:
        """Logits [m, this shard's part of the vocabulary] of rows from `final_norm`."""
        with self._use(-1, HEAD) as head:
            return Rows(hidden, self._threads).times(head.matrix("head"))

    def _use(self, layer: int, part: str) -> Use[Layer]:
        return self._cache.use(self._items[layer, part])

    def _norm(self, x: Floats, weight: Floats) -> Floats:
        out = np.empty(x.shape, np.float32)
        kernels.rms_norm(x, weight, self.config.rms_eps, out, self._threads)
        return out

    def _attention(
        self, layer: Layer, i: int, number: int, x: Floats, batch: Batch, cos: Floats, sin: Floats
    ) -> None:
        config, threads, hd = self.config, self._threads, self.config.head_dim
        m = len(x)
        rows = Rows(self._norm(x, layer.vector("attn_norm")), threads)
        q, k, v = (rows.times(layer.matrix(role)) for role in "qkv")
        if config.attention_bias:
            q += layer.vector("q_bias")
            k += layer.vector("k_bias")
            v += layer.vector("v_bias")
        if config.qk_norm:
            q = self._norm(q.reshape(-1, hd), layer.vector("q_norm")).reshape(m, -1)
            k = self._norm(k.reshape(-1, hd), layer.vector("k_norm")).reshape(m, -1)
        kernels.rope(q, cos, sin, self._heads, hd, threads)
        kernels.rope(k, cos, sin, self._kv_heads, hd, threads)
        keys, values = self._kv.pools[i]
        kv_type = self._kv.kv_type
        kernels.kv_store(kv_type, k, v, batch.block, batch.offset, keys, values, self._kv_heads, hd)
        mixed = np.empty_like(q)
        kernels.attention(
            kv_type,
            q,
            mixed,
            keys,
            values,
            batch.positions,
            batch.table,
            batch.table_start,
            self._kv_of_head,
            self._kv_heads,
            hd,
            hd**-0.5,
            config.windows[number],
            threads,
        )
        out = Rows(mixed, threads).times(layer.matrix("o"))
        self._group.all_reduce(out)
        x += out
        if config.o_bias:
            x += layer.vector("o_bias")

    def _feed_forward(self, number: int, h: Floats, x: Floats) -> None:
        """Add to x [m, d] what a layer without experts makes of the normed rows h [m, d]."""
        rows, bias = Rows(h, self._threads), self.config.mlp_bias
        with self._use(number, GATE) as layer:
            gate = rows.times(layer.matrix("gate"))
            if bias:
                gate += layer.vector("gate_bias")
        with self._use(number, UP) as layer:
            up = rows.times(layer.matrix("up"))
            if bias:
                up += layer.vector("up_bias")
        with self._use(number, DOWN) as layer:
            out = Rows(self._activate(gate, up), self._threads).times(layer.matrix("down"))
            self._group.all_reduce(out)
            x += out
            if bias:
                x += layer.vector("down_bias")

    def _activate(self, gate: Floats, up: Floats) -> Floats:
        out = np.empty_like(gate)
        kernels.silu_mul(gate, up, out, self._threads)
        return out

    def _route(self, layer: Layer, h: Floats) -> tuple[Floats, Ints]:
        """Each row's `experts_per_token` likeliest experts: their weights by the router's softmax, their numbers."""
        config, threads = self.config, self._threads
        m, chosen = len(h), config.experts_per_token
        scores = Rows(h, threads).times(layer.matrix("router"))
        kernels.softmax(scores, threads)
        weights, ids = np.empty((m, chosen), np.float32), np.empty((m, chosen), np.int32)
        kernels.top_k(scores, chosen, weights, ids, threads)
        if config.norm_topk:
            total = weights[:, 0].copy()
            for j in range(1, chosen):  # one after the other: NumPy's own sum may pair them up
                total += weights[:, j]
            weights /= total[:, None]
        return weights, ids

    def _experts(self, layer: Layer, h: Floats, weights: Floats, ids: Ints) -> Floats:
        """Mixture of experts: the weighted sum of what each row's experts make of it.

        Experts are added up in the order of their numbers within each column panel, and only then are panels
        folded: the sums are the same however many shards the panels are spread over.
        """
        config, threads, m = self.config, self._threads, len(h)
        panels: Floats | None = None
        for expert in np.unique(ids).tolist():
            at, slot = np.nonzero(ids == expert)
            rows = Rows(np.ascontiguousarray(h[at]), threads)
            gate, up = rows.times(layer.matrix("gate", expert)), rows.times(layer.matrix("up", expert))
            down = Rows(self._activate(gate, up), threads).times(layer.matrix("down", expert), fold=False)
            if panels is None:
                panels = np.zeros((len(down), m, config.hidden), np.float32)
            panels[:, at] += weights[at, slot][:, None] * down
        assert panels is not None
        out = np.empty((m, config.hidden), np.float32)
        kernels.fold(panels, out, threads)
        return out
