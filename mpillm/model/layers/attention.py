"""Attention, the token mixer that compares a query with the keys of earlier tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any, Protocol

import numpy as np

from mpillm import kernels
from mpillm.kernels import adapted
from mpillm.model.batch import Turn
from mpillm.model.cache_spec import LayerCache, TokenCache
from mpillm.model.layers.mixer import MixerInput
from mpillm.model.layers.norm import NormSpec
from mpillm.model.layers.rank import Floats, Rank
from mpillm.model.layers.row_norms import HeadRows, normalise_rows
from mpillm.model.rope import RopeConfig
from mpillm.partition.grid import Axis, Place, axis
from mpillm.weights.inventory import TensorSpec
from mpillm.weights.page import Page
from mpillm.weights.roles import Key


@dataclass(frozen=True)
class Rotary:
    """RoPE of the first `dim` dimensions of each head, in halves (i, i + dim / 2) or `interleaved` (2 i, 2 i + 1)."""

    config: RopeConfig
    dim: int
    interleaved: bool = False


@dataclass(frozen=True)
class Tuning:
    """Scores at position p are multiplied by 1 + `beta` ln(1 + floor((p + `offset`) / `length`))."""

    beta: float
    length: int
    offset: int


@dataclass(frozen=True)
class AttentionSpec:
    """Multi-head attention in which n_heads / n_kv_heads query heads share a head of keys and values.

    Scores are multiplied by `scale`, and by a factor of the query's position if there is a `tuning`. A `window` above 0
    lets a token see itself and the window - 1 tokens before it, or with `chunked` those before it in its own chunk of
    `window` tokens.
    `qk_norm` is applied to each head of q and k, or with `qk_norm_whole` to all heads of a row
    together, before RoPE or `normed_after_rope`; with `qk_norm_by_head` each head has weights of its own. `v_norm`,
    which has no weights, to each head of v. With `v_is_k` v is the product that k is made of. `sinks` are learned
    logits, one a head, that join the softmax's denominator. `softcap` c > 0 makes a score s c tanh(s / c). With a
    `gate` what each head makes is multiplied by the sigmoid of a product of its own, before the output's.
    `bidirectional`: a token sees as many tokens after it as before it, so a prompt is computed in one step.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    rotary: Rotary | None
    window: int = 0
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: NormSpec | None = None
    qk_norm_whole: bool = False
    qk_norm_by_head: bool = False
    sinks: bool = False
    softcap: float = 0.0
    gate: bool = False
    gate_bias: bool = False
    chunked: bool = False
    tuning: Tuning | None = None
    v_norm: NormSpec | None = None
    normed_after_rope: bool = False
    v_is_k: bool = False
    bidirectional: bool = False

    adaptable = ("q", "q_gate", "k", "v", "o")

    @property
    def turn(self) -> Turn | None:
        """The RoPE of the attention, if it has one."""
        return (self.rotary.config, self.rotary.dim) if self.rotary else None

    @property
    def fused(self) -> bool:
        """Whether its kernel may be part of a `kernels.LayerStack`: an output's bias is added after it."""
        return not (self.o_bias or self.qk_norm_by_head)

    def norms_shards(self, place: Place) -> bool:
        """Return whether q and k are normalised over heads of several shards, which then exchange sums."""
        return self.qk_norm_whole and place.shards > 1

    def norms_apart(self, place: Place) -> bool:
        """Return whether q and k are normalised outside of the kernel."""
        return self.qk_norm_by_head or self.norms_shards(place)

    def heads(self, block: int) -> Axis:
        """Return the axis of query heads."""
        return axis(self.n_heads, self.head_dim, block)

    def axes(self, block: int) -> tuple[Axis, ...]:
        """Return the axes that limit the number of shards; `block`: block size of weights that are cut by columns."""
        return (self.heads(block),)

    def tensors(self, layer: int, hidden: int, block: int) -> Iterator[TensorSpec]:
        """Yield the tensors of attention in a layer, in the order of a page."""
        heads, hd = self.heads(block), self.head_dim
        kv_heads = heads.shared(self.n_heads // self.n_kv_heads)
        queries, keys = self.n_heads * hd, self.n_kv_heads * hd
        yield TensorSpec(Key("q", layer), (queries, hidden), heads)
        if self.gate:
            yield TensorSpec(Key("q_gate", layer), (queries, hidden), heads)
        yield TensorSpec(Key("k", layer), (keys, hidden), kv_heads)
        if not self.v_is_k:
            yield TensorSpec(Key("v", layer), (keys, hidden), kv_heads)
        if self.qkv_bias:
            yield TensorSpec(Key("q_bias", layer), (queries,), heads)
            yield TensorSpec(Key("k_bias", layer), (keys,), kv_heads)
            if not self.v_is_k:
                yield TensorSpec(Key("v_bias", layer), (keys,), kv_heads)
        if self.gate_bias:
            yield TensorSpec(Key("q_gate_bias", layer), (queries,), heads)
        if self.qk_norm and self.qk_norm_by_head:
            yield TensorSpec(Key("q_norm", layer), (queries,), heads)
            yield TensorSpec(Key("k_norm", layer), (keys,), kv_heads)
        elif self.qk_norm:
            widths = (queries, keys) if self.qk_norm_whole else (hd, hd)
            for role, width in zip(("q_norm", "k_norm"), widths, strict=True):
                yield from self.qk_norm.tensors(role, layer, width)
        if self.sinks:
            yield TensorSpec(Key("sinks", layer), (self.n_heads,), Axis(heads.bounds))
        yield TensorSpec(Key("o", layer), (hidden, queries), cols=heads)
        if self.o_bias:
            yield TensorSpec(Key("o_bias", layer), (hidden,))

    def cache(self, place: Place, block: int) -> tuple[LayerCache, ...]:
        """Return the part of a sequence that a layer keeps on the rank at `place`."""
        kept = not self.bidirectional  # what later tokens do not change, they need
        window = self.window if kept else 0
        return (TokenCache(len(self.kv_heads(place, block)), self.head_dim, self.head_dim, window, kept),)

    def row_nbytes(self, place: Place, block: int, hidden: int, copied: float) -> int:
        """Return bytes that a row takes at most: queries, keys, values, gates, attention's output, what is multiplied.

        `copied` is the bytes of a value in the forms in which matrices take their input.
        """
        heads, kv_heads = len(self.heads(block).units(place)), len(self.kv_heads(place, block))
        widest = 4 * ((2 + self.gate) * heads + 2 * kv_heads) * self.head_dim
        return widest + int(copied * (hidden + heads * self.head_dim))

    def compute(self, given: MixerInput) -> tuple[Floats, Floats | None]:
        """Return the output of all shards for x [m, hidden], and the output's bias."""
        if self.norms_apart(given.rank.place):
            return self._with_norms_apart(given)
        return attend(self, given)

    def _with_norms_apart(self, given: MixerInput) -> tuple[Floats, Floats | None]:
        """Compute attention with kernels for each part, and normalise q and k between them."""
        rank, layer, page, norm, x, step, cache = given
        matrices = tuple(page.matrix(role) for role in "qkv")
        rows = rank.normalise(x, norm.kernel(page, "attn_norm") if norm else None)
        q, k, v = outs = [np.empty((len(x), matrix.n), np.float32) for matrix in matrices]
        products = adapted.AdaptedProducts if page.adapted else kernels.Products
        made = rank.kept_of(page, lambda: products(*matrices), "q, k and v", layer)
        rank.compute_of(page, len(x), made, rows, outs)
        if self.qkv_bias:
            for values, role in zip(outs, "qkv", strict=True):
                values += page.vector(f"{role}_bias")
        if self.qk_norm_by_head:
            self._normalise_heads(rank, page, q, k)
        else:
            self._normalise_rows(rank, page, q, k)
        part = np.empty_like(x)
        cos, sin, *where = step.rows(self.turn, cache.group)
        work = rank.kept_of(page, lambda: self.kernel(page, None, rank.place, rank.block), "attention", layer)
        pools = cache.acquire()
        rank.compute_of(page, len(x), work.attend, q, k, v, cos, sin, cache.kv_type, *pools, *where, part)
        cache.release()
        rank.group.all_reduce(part)
        return part, page.vector("o_bias") if self.o_bias else None

    def _normalise_rows(self, rank: Rank, page: Page, q: Floats, k: Floats) -> None:
        """Normalise q and k over the heads of all shards, which have to be asked for."""
        assert self.qk_norm is not None
        shards = [Place(shard, 1, rank.place.shards) for shard in range(rank.place.shards)]
        heads = [self.heads(rank.block).units(shard) for shard in shards]
        kv_heads = [self.kv_heads(shard, rank.block) for shard in shards]
        norms = self.qk_norm.kernel(page, "q_norm"), self.qk_norm.kernel(page, "k_norm")
        normalise_rows(
            rank,
            [HeadRows(q, norms[0], self.head_dim, heads), HeadRows(k, norms[1], self.head_dim, kv_heads)],
        )

    def _normalise_heads(self, rank: Rank, page: Page, q: Floats, k: Floats) -> None:
        """Normalise each head of q and k, and multiply it by its own weights."""
        assert self.qk_norm is not None
        norm = kernels.Norm(self.head_dim, self.qk_norm.eps, centred=self.qk_norm.centred)
        for values, role in ((q, "q_norm"), (k, "k_norm")):
            normed = rank.normalise(values.reshape(-1, self.head_dim), norm)
            np.multiply(normed.reshape(values.shape), page.vector(role), out=values)

    def kernel(self, page: Page, norm: kernels.Norm | None, place: Place, block: int) -> kernels.Attention:
        """Return the kernels' attention of a loaded page, whose memory it refers to; `norm` is that of its input."""
        vector, v = page.vector, "k" if self.v_is_k else "v"
        heads, kv_heads, share = (
            self.heads(block),
            self.kv_heads(place, block),
            self.n_heads // self.n_kv_heads,
        )
        of_head = [head // share - kv_heads.start for head in heads.units(place)]
        norms = None
        if self.qk_norm and not self.norms_apart(place):
            norms = (
                self.qk_norm.kernel(page, "q_norm", width=self.head_dim),
                self.qk_norm.kernel(page, "k_norm", width=self.head_dim),
            )
        attention = adapted.AdaptedAttention if page.adapted else kernels.Attention
        return attention(
            page.matrix("q"),
            page.matrix("k"),
            page.matrix(v),
            page.matrix("o"),
            np.array(of_head, np.int32),
            len(kv_heads),
            self.head_dim,
            self.scale,
            window=self.window,
            norm=norm,
            biases=(vector("q_bias"), vector("k_bias"), vector("k_bias" if self.v_is_k else "v_bias"))
            if self.qkv_bias
            else None,
            qk_norms=norms,
            rotary=self.rotary.dim if self.rotary else 0,
            interleaved=self.rotary is not None and self.rotary.interleaved,
            sinks=vector("sinks") if self.sinks else None,
            softcap=self.softcap,
            **self._gate(page),
            chunked=self.chunked,
            tuning=astuple(self.tuning) if self.tuning else None,
            v_norm=self.v_norm.kernel(page, "", width=self.head_dim) if self.v_norm else None,
            normed_after_rope=self.normed_after_rope,
            bidirectional=self.bidirectional,
        )

    def _gate(self, page: Page) -> dict[str, Any]:
        """Return the kernel's gate and its bias, where there are any."""
        gate = {"gate": page.matrix("q_gate")} if self.gate else {}
        return gate | ({"gate_bias": page.vector("q_gate_bias")} if self.gate_bias else {})

    def kv_heads(self, place: Place, block: int) -> range:
        """Return the KV heads of the rank at `place`."""
        return self.heads(block).shared(self.n_heads // self.n_kv_heads).units(place)


class _Attention(Protocol):
    """A kind of attention: its kernel reads and writes a cache of tokens."""

    @property
    def o_bias(self) -> bool:
        """Whether its output has a bias, which is added after all shards' parts."""

    @property
    def turn(self) -> Turn | None:
        """The RoPE of the attention, if it has one."""

    def kernel(
        self, page: Page, norm: kernels.Norm | None, place: Place, block: int
    ) -> kernels.Attention | kernels.LatentAttention:
        """Return the kernels' attention of a loaded page; `norm` is that of its input."""


def attend(spec: _Attention, given: MixerInput) -> tuple[Floats, Floats | None]:
    """`Mixer.compute` of any kind of attention."""
    rank, layer, page, norm, x, step, cache = given

    def make() -> kernels.Attention | kernels.LatentAttention:
        return spec.kernel(page, norm.kernel(page, "attn_norm") if norm else None, rank.place, rank.block)

    part = np.empty_like(x)
    cos, sin, *where = step.rows(spec.turn, cache.group)
    work, pools = rank.kept_of(page, make, "attention", layer), cache.acquire()
    rank.compute_of(page, len(x), work, x, cos, sin, cache.kv_type, *pools, *where, part)
    cache.release()
    rank.group.all_reduce(part)
    return part, page.vector("o_bias") if spec.o_bias else None
