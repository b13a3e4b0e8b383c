"""The decoder of one rank: its stage's layers, its shard of each, for all rows of a step.

One code for all architectures; `ModelConfig` says in data where they differ. Shapes: m rows (tokens of the
step, of any sequences), d = hidden size, h = this shard's query heads, hd = head size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpillm import kernels
from mpillm.comm.collectives import Group, Pipe
from mpillm.kernels.router import Router, route
from mpillm.model.config import ModelConfig
from mpillm.model.kv import KVCache
from mpillm.model.rope import cos_sin
from mpillm.partition import grid
from mpillm.weights.inventory import ATTENTION, DOWN, GATE, HEAD, UP
from mpillm.weights.layer import Layer, Matrix
from mpillm.weights.names import Key
from mpillm.weights.paging.cache import Use
from mpillm.weights.paging.weights import Weights
from mpillm.weights.source import Source

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Half = Any  # kernels.Attention, Mlp or Products


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step, as arrays of length m (`table` is as long as all sequences' block tables together)."""

    tokens: Ints
    positions: Ints
    table: Ints  # all sequences' block tables, one after the other
    table_start: Ints  # where each row's sequence begins in `table`
    block: Ints  # the KV block that takes the row's keys and values
    offset: Ints  # the place in that block


class Decoder:
    """Runs steps through the layers `grid.stage_layers(shape, place)`; all its arguments belong to the caller."""

    def __init__(
        self,
        config: ModelConfig,
        shape: grid.Shape,
        place: grid.Place,
        source: Source,
        weights: Weights,
        kv: KVCache,
        group: Group,
        pipe: Pipe,
        threads: int,
    ) -> None:
        self.config = config
        self.place = place
        self._source = source
        self._weights = weights
        self._cache = weights.cycle
        self._experts = weights.experts
        self._kv = kv
        self._group = group
        self._pipe = pipe
        self._threads = threads
        self._layers = grid.stage_layers(shape, place)
        self._at_rest = self._cache.budget >= self._cache.total  # what was loaded stays where it is
        self._halves: dict[tuple[object, ...], Half] = {}
        # Nothing comes between the halves of layers, so that all layers can be one call once the halves have been made.
        self._plain = (
            self._at_rest
            and kv.spill is None
            and place.shards == 1
            and not (config.o_bias or config.mlp_bias)
            and not any(config.moe_layers[number] for number in self._layers)
        )
        self._whole: kernels.LayerStack | None = None
        self._items = {(item.layer, item.part): number for number, item in enumerate(self._cache.items)}
        self._whole_bytes = sum(item.nbytes for item in self._cache.items if item.part == ATTENTION)
        experts = self._experts.items if self._experts else ()
        panels = grid.ffn_panels(shape, config.moe_intermediate) if config.n_experts else ()
        self._expert_panels = (len(panels) - 1) // place.shards
        self._first_expert = {item.layer: number for number, item in enumerate(experts) if not item.expert}
        heads, kv_heads = grid.own_heads(shape, place), grid.own_kv_heads(shape, place)
        share = config.n_heads // config.n_kv_heads
        self._kv_heads = len(kv_heads)
        self._kv_of_head = np.array([head // share - kv_heads.start for head in heads], np.int32)
        self.vocab = grid.own_vocab(shape, place)
        vocab = [bound for bound in grid.vocab_panels(shape) if self.vocab.start <= bound <= self.vocab.stop]
        self.vocab_bounds = np.array(vocab, np.int32) - self.vocab.start

    @property
    def is_first(self) -> bool:
        """Whether steps begin on this rank."""
        return self.place.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether hidden states end, and logits arise, on this rank."""
        return self.place.stage == self.place.stages - 1

    @property
    def paging(self) -> tuple[float, float]:
        """Seconds so far of waiting for weights, and of loading them."""
        return self._weights.stall_seconds, self._weights.load_seconds

    def stepped(self, seconds: float) -> None:
        """Note how long a step took (see `Weights.stepped`)."""
        self._weights.stepped(seconds)

    def forward(self, batch: Batch) -> Floats | None:
        """Run the step's rows through this stage: the last layer's output [m, d] on the last stage, else None."""
        if self.is_first:
            x = self._source.read_f32(Key("embed"), batch.tokens)
        else:
            x = self._pipe.recv(len(batch.tokens), self.config.hidden)
        angles = cos_sin(self.config.rope, self.config.head_dim, batch.positions)
        self._kv.begin(batch.table, batch.block, batch.offset)
        if self._whole is None:
            self._layer_by_layer(x, batch, *angles)
        else:
            where = batch.block, batch.offset, batch.positions, batch.table, batch.table_start
            kernels.compute(self._whole, x, [(*angles, *where)], self._pipe.progress, self._threads)
            self._cache.count_hits(len(self._layers), self._whole_bytes)
        if self.is_last:
            return x
        self._pipe.send(x)
        return None

    def _layer_by_layer(self, x: Floats, batch: Batch, *angles: Floats) -> None:
        """Add to x [m, d] what this stage's layers make of it."""
        for i, number in enumerate(self._layers):
            self._pipe.progress()  # what the previous step sent on leaves while this one computes
            mixture = self.config.moe_layers[number]
            with self._use(number, ATTENTION) as layer:
                self._attention(layer, i, number, x, batch, *angles)
                if self._at_rest and not mixture:
                    self._feed_forward(layer, number, x)
                    continue
                h = self._norm(x, layer.vector("ffn_norm"))
                routed = self._route(layer, h) if mixture else None
            if routed is None:
                self._feed_forward_in_parts(number, h, x)
            else:
                self._add(self._mixture(number, h, *routed), x)
        if self._plain:
            add = kernels.Residual()
            halves = [
                (self._halves[ATTENTION, number], add, self._halves[DOWN, number], add)
                for number in self._layers
            ]
            pools = [self._kv.take(i) for i in range(len(self._layers))]
            self._whole = kernels.LayerStack(halves, self._kv.kv_type, pools)

    def final_norm(self, x: Floats) -> Floats:
        """The rows [m, d] as they enter the output head; what embeddings are pooled from."""
        with self._use(-1, HEAD) as head:
            return self._norm(x, head.vector("final_norm"))

    def logits(self, hidden: Floats) -> Floats:
        """Logits [m, this shard's part of the vocabulary] of rows from `final_norm`."""
        with self._use(-1, HEAD) as head:
            product = self._kept(lambda: kernels.Products(head.matrix("head")), HEAD)
            out = np.empty((len(hidden), len(self.vocab)), np.float32)
            kernels.compute(product, hidden, [out], self._threads)
            return out

    def _use(self, layer: int, part: str) -> Use[Layer]:
        return self._cache.use(self._items[layer, part])

    def _norm(self, x: Floats, weight: Floats) -> Floats:
        out = np.empty(x.shape, np.float32)
        kernels.rms_norm(x, weight, self.config.rms_eps, out, self._threads)
        return out

    def _times(self, x: Floats, matrix: Matrix) -> Floats:
        """x @ matrix.T: [m, n]."""
        out = np.empty((len(x), matrix.n), np.float32)
        kernels.compute(kernels.Products(matrix), x, [out], self._threads)
        return out

    def _kept(self, make: Callable[[], Half], *key: object) -> Half:
        """What `make` makes of the layers in use: made once if all stay in memory, else their bytes may move."""
        if not self._at_rest:
            return make()
        if key not in self._halves:
            self._halves[key] = make()
        return self._halves[key]

    def _add(self, part: Floats, x: Floats) -> None:
        """Add to x what all shards make together."""
        self._group.all_reduce(part)
        x += part

    def _attention(
        self, layer: Layer, i: int, number: int, x: Floats, batch: Batch, cos: Floats, sin: Floats
    ) -> None:
        half = self._kept(lambda: self._attention_half(layer, number), ATTENTION, number)
        out = np.empty_like(x)
        kernels.compute(half, x, cos, sin, self._kv.kv_type, *self._kv.take(i), batch.block, batch.offset,
                        batch.positions, batch.table, batch.table_start, out, self._threads)  # fmt: skip
        self._kv.give(i)
        self._add(out, x)
        if self.config.o_bias:
            x += layer.vector("o_bias")

    def _attention_half(self, layer: Layer, number: int) -> kernels.Attention:
        config, vector = self.config, layer.vector
        biases = (vector("q_bias"), vector("k_bias"), vector("v_bias")) if config.attention_bias else None
        norms = None
        if config.qk_norm:
            q, k = (
                kernels.Norm(config.head_dim, config.rms_eps, vector(role)) for role in ("q_norm", "k_norm")
            )
            norms = q, k
        return kernels.Attention(
            layer.matrix("q"),
            layer.matrix("k"),
            layer.matrix("v"),
            layer.matrix("o"),
            self._kv_of_head,
            self._kv_heads,
            config.head_dim,
            config.head_dim**-0.5,
            window=config.windows[number],
            norm=kernels.Norm(config.hidden, config.rms_eps, vector("attn_norm")),
            biases=biases,
            qk_norms=norms,
        )

    def _feed_forward(self, layer: Layer, number: int, x: Floats) -> None:
        """Add to x [m, d] what a layer without experts makes of it; `layer` has the norm."""
        half = self._kept(lambda: self._feed_forward_half(layer, number), DOWN, number)
        out = np.empty_like(x)
        kernels.compute(half, x, out, self._threads)
        self._add(out, x)
        if self.config.mlp_bias:
            with self._use(number, DOWN) as down:
                x += down.vector("down_bias")

    def _feed_forward_half(self, layer: Layer, number: int) -> kernels.Mlp:
        with ExitStack() as stack:
            gate, up, down = (stack.enter_context(self._use(number, part)) for part in (GATE, UP, DOWN))
            return kernels.Mlp(
                gate.matrix("gate"),
                up.matrix("up"),
                down.matrix("down"),
                norm=kernels.Norm(self.config.hidden, self.config.rms_eps, layer.vector("ffn_norm")),
                biases=(gate.vector("gate_bias"), up.vector("up_bias")) if self.config.mlp_bias else None,
            )

    def _feed_forward_in_parts(self, number: int, h: Floats, x: Floats) -> None:
        """The same of the normed rows h, with one matrix in memory at a time."""
        bias = self.config.mlp_bias
        with self._use(number, GATE) as layer:
            gate = self._times(h, layer.matrix("gate"))
            if bias:
                gate += layer.vector("gate_bias")
        with self._use(number, UP) as layer:
            up = self._times(h, layer.matrix("up"))
            if bias:
                up += layer.vector("up_bias")
        with self._use(number, DOWN) as layer:
            kernels.activate(kernels.Activation.SILU, gate, up, gate, self._threads)
            self._add(self._times(gate, layer.matrix("down")), x)
            if bias:
                x += layer.vector("down_bias")

    def _route(self, layer: Layer, h: Floats) -> tuple[Floats, Ints]:
        """Each row's `experts_per_token` likeliest experts: their weights by the router's softmax, their numbers."""
        scores = self._times(h, layer.matrix("router"))
        router = Router(self.config.experts_per_token, normalise=self.config.norm_topk)
        return route(scores, router, self._threads)

    def _mixture(self, number: int, h: Floats, weights: Floats, ids: Ints) -> Floats:
        """Mixture of experts: the weighted sum of what each row's experts make of it.

        Experts are added up in the order of their numbers within each column panel, and only then are panels
        folded: the sums are the same however many shards the panels are spread over.
        """
        assert self._experts is not None
        order = ids.argsort(axis=None, kind="stable")  # all choices, by their expert and then by their row
        chosen, starts = np.unique(ids.ravel()[order], return_index=True)
        starts = np.append(starts, len(order)).astype(np.int32)
        at, weights = (order // ids.shape[1]).astype(np.int32), weights.ravel()[order]
        panels, done = np.zeros((self._expert_panels, *h.shape), np.float32), 0
        for layers in self._experts.in_turn((self._first_expert[number] + chosen).tolist()):
            work = kernels.Experts([layer.keep(_expert) for layer in layers])
            own = starts[done : done + len(layers) + 1]
            rows = slice(own[0], own[-1])
            kernels.compute(work, h, at[rows], own - own[0], weights[rows], panels, self._threads)
            done += len(layers)
        out = np.empty(h.shape, np.float32)
        kernels.fold(panels, out, self._threads)
        return out


def _expert(layer: Layer) -> kernels.Expert:
    return kernels.Expert(*(layer.matrix(role) for role in ("gate", "up", "down")))
