"""The decoder of one rank: its stage's layers, its shard of each, for all rows of a step.

What a layer is made of is data (`LayerSpec`), and each kind of part computes itself. Shapes: m rows (tokens of the
step, of any sequences), d = hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from mpillm import kernels
from mpillm.comm.channel import Pipe
from mpillm.comm.collectives import Group
from mpillm.model.adapters import RankAdapters
from mpillm.model.batch import Batch, ForwardPass, Rows
from mpillm.model.config import ModelConfig
from mpillm.model.kv import KVCache
from mpillm.model.layers.attention import AttentionSpec
from mpillm.model.layers.experts import ExpertsSpec
from mpillm.model.layers.mixer import MixerInput
from mpillm.model.layers.norm import NormSpec
from mpillm.model.layers.rank import Floats, Rank
from mpillm.model.layers.spec import LayerSpec
from mpillm.partition import grid
from mpillm.weights.inventory import ATTENTION, HEAD
from mpillm.weights.page import Page
from mpillm.weights.paging.weights import Weights
from mpillm.weights.roles import Key
from mpillm.weights.source import Source


class Decoder:
    """Runs steps through the layers of a rank's stage; all its arguments belong to the caller."""

    def __init__(
        self,
        config: ModelConfig,
        place: grid.Place,
        source: Source,
        weights: Weights,
        kv: KVCache,
        group: Group,
        pipe: Pipe,
        threads: int,
        adapters: RankAdapters | None = None,
    ) -> None:
        self.config = config
        self.place = place
        self._source = source
        self._kv = kv
        self._pipe = pipe
        self._threads = threads
        self._adapters = adapters or RankAdapters([])
        self._rank = Rank(place, config.block, weights, group, threads)
        layers = grid.stage_layers(config.n_layers, place)
        self._layers = [
            _RankLayer(config.layers[number], number, i, self._rank, kv) for i, number in enumerate(layers)
        ]
        if self._rank.foresees:
            for layer, following in pairwise(self._layers):
                layer.following = following if isinstance(following.spec.mlp, ExpertsSpec) else None
        # Where nothing but a sum comes between the parts of layers, all are one call once their operations are made.
        self._stackable = (
            self._rank.all_resident and kv.spill is None and all(layer.stackable for layer in self._layers)
        )
        self._group = group if place.shards > 1 else None
        self._stack: _Stack | None = None
        vocab = grid.vocab_axis(config.vocab)
        self.vocab = vocab.entries(place)
        self.vocab_bounds = np.array(vocab.own_panels(place), np.int32)

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
        return self._rank.weights.stall_seconds, self._rank.weights.load_seconds

    def note_step(self, seconds: float) -> None:
        """Note how long a step took (see `Weights.note_step`)."""
        self._rank.weights.note_step(seconds)

    def renew_weights(self) -> None:
        """Between steps: use weights that the loader makes anew."""
        self._rank.weights.renew(self._forget_pages)

    def _forget_pages(self) -> None:
        """Keep nothing that was made of pages."""
        self._rank.forget_kept()
        self._stack = None

    def forward(self, batch: Batch) -> Floats | None:
        """Run the step's rows through this stage: the last layer's output [m, d] on the last stage, else None."""
        if self.is_first:
            x = self._source.read_f32(Key("embed"), batch.tokens)
            if self.config.embedding_scale != 1.0:
                x *= np.float32(self.config.embedding_scale)
        else:
            x = self._pipe.recv(len(batch.tokens), self.config.hidden)
        step = ForwardPass(batch)
        self._rank.low_ranks = self._adapters.of_step(batch.adapters)
        self._kv.begin(batch.groups, batch.offset, batch.states)
        if self._stack is None or self._rank.low_ranks:
            for layer in self._layers:
                self._pipe.progress()  # what the previous step sent on leaves while this one computes
                layer(x, step)
            if self._stackable and not self._rank.low_ranks:
                self._stack = _Stack(self._layers, self._kv)
        else:
            rows = self._stack.rows(step)
            between = self._pipe.progress if self.place.stages > 1 else None
            begin, lanes = None, None
            if self._group is not None:
                begin, lanes = self._group.begin, self._group.lanes(*x.shape)
            kernels.compute(self._stack.work, x, rows, between, begin, self._threads, lanes)
            self._rank.weights.cycle.count_hits(len(self._layers))
        self._kv.end(batch.states)
        if self.is_last:
            return x
        self._pipe.send(x)
        return None

    def final_norm(self, x: Floats) -> Floats:
        """Return the rows [m, d] as they enter the LM head; what embeddings are pooled from."""
        final = self.config.final_norm
        if final is None:
            return x
        with self._rank.page(-1, HEAD) as head:
            norm = self._rank.kept(lambda: final.kernel(head, "final_norm"), "final_norm")
            return self._rank.normalise(x, norm)

    def logits(self, hidden: Floats) -> Floats:
        """Logits [m, this shard's part of the vocabulary] of rows from `final_norm`."""
        with self._rank.page(-1, HEAD) as head:
            product = self._rank.kept(lambda: kernels.Products(head.matrix("head")), HEAD)
            out = np.empty((len(hidden), len(self.vocab)), np.float32)
            self._rank.compute(product, hidden, [out])
            if self.config.head_bias:
                out += head.vector("head_bias")
        if self.config.logit_scale != 1.0:
            out *= np.float32(self.config.logit_scale)
        if self.config.logit_softcap:
            kernels.softcap(out, self.config.logit_softcap, self._threads)
        return out


class _RankLayer:
    """A layer on its rank: x += mixer(x), x += mlp(x), with the norms and the scales that its spec has."""

    def __init__(self, spec: LayerSpec, number: int, i: int, rank: Rank, kv: KVCache) -> None:
        """`i` is its number among the rank's layers."""
        self.spec, self._number, self._rank, self.cache = spec, number, rank, kv.of_layer(i)
        self.following: _RankLayer | None = None  # the next layer, if its experts are read ahead

    def __call__(self, x: Floats, step: ForwardPass) -> None:
        rank, spec, number = self._rank, self.spec, self._number
        norms = spec.mixer_norms
        with rank.page(number, ATTENTION) as page:
            if spec.entry:
                spec.entry.apply(rank, page, x, step.batch)
            own = self._beside(page, x) if spec.parallel else x  # what the MLP is of
            if spec.mixer:
                adapted = rank.adapted(page)
                part, bias = spec.mixer.compute(
                    MixerInput(rank, number, adapted, norms.before, x, step, self.cache)
                )
                after = self._after(page, norms.after, "attn_post_norm")
                self._residual("mixer residual", bias, after, spec.residual_scale, x, part)
                self._normalise_sum(self._after(page, norms.of_sum, "attn_sum_norm"), x)
            if not spec.mlp:
                return
            prepared = spec.mlp.prepare(rank, number, page, spec.mlp_norms.before, own)
            after = self._after(page, spec.mlp_norms.after, "ffn_post_norm")
            of_sum = self._after(page, spec.mlp_norms.of_sum, "ffn_sum_norm")
            scale = page.vector("layer_scale")[0] if spec.scaled else None
        if self.following:
            self.following.foresee(x)
        part, bias = spec.mlp.compute(rank, number, prepared, own)
        self._residual("mlp residual", bias, after, spec.residual_scale * spec.mlp_scale, x, part)
        self._normalise_sum(of_sum, x)
        if scale is not None:
            x *= scale

    def foresee(self, x: Floats) -> None:
        """Have the experts read that rows x [m, d] of the layer before seem to need here."""
        spec, number, rank = self.spec, self._number, self._rank
        assert isinstance(spec.mlp, ExpertsSpec), spec
        with rank.page(number, ATTENTION) as page:
            rank.expect(number, spec.mlp.foresee(rank, number, page, spec.mlp_norms.before, x))

    @property
    def stackable(self) -> bool:
        """Whether `kernels.LayerStack` takes it."""
        return self.spec.stackable(self._rank.place)

    @property
    def operations(self) -> tuple[Any, ...]:
        """The layer for `kernels.LayerStack`, if all pages stay in memory and the layer has run once."""
        kept, number = self._rank.kept, self._number
        return (
            kept(_missing, "attention", number),
            kept(kernels.Residual, "mixer residual", number),  # a plain one has not been made
            kept(_missing, "mlp", number),
            kept(kernels.Residual, "mlp residual", number),
        )

    def _beside(self, page: Page, x: Floats) -> Floats:
        """Return the input of an MLP beside the mixer: x if the MLP has its own norm, else the mixer's input rows."""
        if self.spec.mlp_norms.before:
            own: Floats = x.copy()
            return own
        norm = self.spec.mixer_norms.before
        return self._rank.normalise(x, norm.kernel(page, "attn_norm") if norm else None)

    def _after(self, page: Page, norm: NormSpec | None, role: str) -> kernels.Norm | None:
        """Return the norm of a part's output, or of what that is added to; it outlives the page."""
        if norm is None:
            return None
        return self._rank.kept(
            lambda: norm.kernel(page, role, copy=not self._rank.all_resident), role, self._number
        )

    def _normalise_sum(self, norm: kernels.Norm | None, x: Floats) -> None:
        """x = norm(x), if there is one."""
        if norm is not None:
            x[:] = self._rank.normalise(x, norm)

    def _residual(
        self,
        name: str,
        bias: Floats | None,
        after: kernels.Norm | None,
        scale: float,
        x: Floats,
        part: Floats,
    ) -> None:
        """x += scale * norm(part + bias); without norm and scale (x + part) + bias, which NumPy does at less cost."""
        if after is not None or scale != 1.0:
            work = self._rank.kept(lambda: kernels.Residual(bias, after, scale), name, self._number)
            self._rank.compute(work, x, part)
            return
        x += part
        if bias is not None:
            x += bias


class _Stack:
    """All layers of a rank, attention each, as one operation of the kernels; each of them has run once."""

    def __init__(self, layers: Sequence[_RankLayer], kv: KVCache) -> None:
        views = [(_attention(layer).turn, layer.cache.group) for layer in layers]
        self._views = list(dict.fromkeys(views))  # what differs between layers in how they see a step's rows
        self.work = kernels.LayerStack(
            [layer.operations for layer in layers],
            kv.kv_type,
            [kv.acquire(i) for i in range(len(layers))],
            [self._views.index(view) for view in views],
        )

    def rows(self, step: ForwardPass) -> list[Rows]:
        """Return a step's rows as the layers see them."""
        return [step.rows(*view) for view in self._views]


def _attention(layer: _RankLayer) -> AttentionSpec:
    assert isinstance(layer.spec.mixer, AttentionSpec), layer.spec
    return layer.spec.mixer


def _missing() -> None:
    raise AssertionError("a layer is stacked before it has run")
