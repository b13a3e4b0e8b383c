"""Mixture of experts: a router sends each token to a few of many MLPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpillm import kernels
from mpillm.kernels.router import Router, route
from mpillm.kernels.types import Activation
from mpillm.model.layers.mixture import ExpertPages, Ints, Prepared, Routed
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import NormSpec
from mpillm.model.layers.rank import Floats, Rank
from mpillm.partition.grid import Axis, Place, axis
from mpillm.weights.inventory import SHARED, PageSpec, TensorSpec
from mpillm.weights.page import Page
from mpillm.weights.roles import Key

APART = "router_norm", "experts_norm", "shared_post_norm", "experts_post_norm"


@dataclass(frozen=True)
class RouterSpec(Router):
    """A router; with `correction` the model has a learned correction of its scores (see `route`)."""

    correction: bool = False
    bias: bool = False  # a bias of the router's logits
    expert_scales: bool = False  # weights are multiplied by a learned number of their expert


@dataclass(frozen=True)
class ExpertsSpec:
    """`count` experts of `width` inner columns each, and perhaps a `shared` MLP that every token goes through.

    With `shared_router` what the shared MLP makes is multiplied by the sigmoid of a learned product. `bias`: all three
    matrices of an expert have one. `limit` and `alpha` are the clamped SwiGLU's. With `scaled_input` a row is
    multiplied by its weight before an expert, not after it. With `apart` the router, the mixture, what it makes, and
    what the shared MLP makes have a norm each (Gemma 4). `gated` is as in `MlpSpec`. With a `latent` above 0 experts
    are of rows of that many columns, which a matrix makes and another one widens again, beside a shared MLP (Nemotron 3
    Super); with `latent_bias` both have one.
    """

    count: int
    width: int
    router: RouterSpec
    activation: Activation = Activation.SILU
    shared: MlpSpec | None = None
    shared_router: bool = False
    bias: bool = False
    limit: float = 0.0
    alpha: float = 1.702
    scaled_input: bool = False
    apart: NormSpec | None = None
    gated: bool = True
    latent: int = 0
    latent_bias: bool = False

    def __post_init__(self) -> None:
        assert self.shared or not self.latent, self

    @property
    def share(self) -> float:
        """The part of the experts that a token goes to."""
        return self.router.chosen / self.count

    @property
    def pages(self) -> tuple[str, ...]:
        """The names of its pages that every step uses."""
        return (SHARED,) if self.shared else ()

    @property
    def adaptable(self) -> tuple[str, ...]:
        """The roles of the shared MLP's matrices."""
        return self.shared.adaptable if self.shared else ()

    @property
    def fused(self) -> bool:
        """Whether its kernel may be part of a `kernels.LayerStack`: its router decides what is loaded."""
        return False

    def columns(self, block: int) -> Axis:
        """Return the axis of an expert's inner columns; `block` as in `grid.axis`."""
        return axis(self.width, block=block)

    def axes(self, block: int) -> tuple[Axis, ...]:
        """Return the axes that limit the number of shards."""
        return (self.columns(block), *(self.shared.axes(block) if self.shared else ()))

    def first_page(self, layer: int, hidden: int) -> Iterator[TensorSpec]:
        """Tensors that belong to the page before its own ones: what decides on the experts, whole on every rank."""
        yield TensorSpec(Key("router", layer), (self.count, hidden))
        if self.router.bias:
            yield TensorSpec(Key("router_bias", layer), (self.count,))
        if self.router.correction:
            yield TensorSpec(Key("router_correction", layer), (self.count,))
        if self.router.expert_scales:
            yield TensorSpec(Key("expert_scales", layer), (self.count,))
        if self.apart:
            for role in APART:
                yield from self.apart.tensors(role, layer, hidden)
        if self.shared_router:
            yield TensorSpec(Key("shared_router", layer), (1, hidden))
        if self.latent:
            yield from self._latent_tensors("latent_in", layer, (self.latent, hidden))

    def _latent_tensors(self, role: str, layer: int, shape: tuple[int, int]) -> Iterator[TensorSpec]:
        """Yield one of both matrices, whole on every rank."""
        yield TensorSpec(Key(role, layer), shape)
        if self.latent_bias:
            yield TensorSpec(Key(f"{role}_bias", layer), shape[:1])

    def tensors(self, page: str, layer: int, hidden: int, block: int) -> Iterator[TensorSpec]:
        """Yield the tensors of its page: those of the shared MLP, and what widens the experts' rows."""
        assert self.shared is not None
        for matrix in self.shared.pages:
            yield from self.shared.tensors(matrix, layer, hidden, block)
        if self.latent:
            yield from self._latent_tensors("latent_out", layer, (hidden, self.latent))

    def experts(self, layer: int, hidden: int, block: int) -> Sequence[PageSpec]:
        """Return a page for each expert."""
        columns, rows = self.columns(block), self.latent or hidden
        tensors = [
            *([TensorSpec(Key("gate", layer, 0), (self.width, rows), columns)] if self.gated else []),
            TensorSpec(Key("up", layer, 0), (self.width, rows), columns),
            TensorSpec(Key("down", layer, 0), (rows, self.width), cols=columns),
        ]
        if self.bias:
            tensors += [
                TensorSpec(Key("gate_bias", layer, 0), (self.width,), columns),
                TensorSpec(Key("up_bias", layer, 0), (self.width,), columns),
                TensorSpec(Key("down_bias", layer, 0), (rows,)),
            ]
        return ExpertPages(layer, self.count, tuple(tensors))

    def row_nbytes(self, place: Place, block: int, hidden: int, copied: float) -> int:
        """Return bytes that a row takes at most: an expert's with the sums of all panels, or the shared MLP's."""
        sums = 4 * (self.columns(block).panels // place.shards) * hidden
        widest = sums + self.mixed_row_nbytes(place, block, hidden, copied)
        if self.scaled_input:
            widest += 4 * self.router.chosen * hidden
        if self.apart:
            widest += 4 * 4 * hidden
        if self.latent:
            widest += 4 * 2 * self.latent + int(copied * (hidden + self.latent))
        if self.shared:  # while what the mixture makes is kept
            widest = max(widest, 4 * hidden + self.shared.row_nbytes(place, block, hidden, copied))
        return widest

    def mixed_row_nbytes(self, place: Place, block: int, hidden: int, copied: float) -> int:
        """Return bytes that a row of an expert takes at most."""
        return MlpSpec(self.width).row_nbytes(place, block, hidden, copied)

    def prepare(self, rank: Rank, layer: int, first: Page, norm: NormSpec | None, x: Floats) -> Prepared:
        """Return the normed rows of x [m, hidden], and the experts that the router chooses for them."""
        h = self._normed(rank, layer, first, norm, x)
        own, after = h, None
        if self.latent:
            own = self._through(rank, first, "latent_in", h)
        if self.apart:
            norms = {role: self._own_norm(rank, layer, first, role) for role in APART[1:]}
            own = rank.normalise(x, norms["experts_norm"])
            after = norms["shared_post_norm"], norms["experts_post_norm"]
        weights, ids = self._route(rank, layer, first, h, x)
        mixed = [(own, Routed.of(weights, ids))]
        if self.scaled_input:
            ones = np.ones((len(h), 1), np.float32)
            choices = (slice(i, i + 1) for i in range(self.router.chosen))
            mixed = [(own * weights[:, one], Routed.of(ones, ids[:, one])) for one in choices]
        gate = None
        if self.shared_router:
            gate = rank.times(h, first, "shared_router")
            kernels.activate(Activation.SIGMOID, gate, None, gate, rank.threads)
        return Prepared(h, mixed, gate, after)

    def foresee(
        self, rank: Rank, layer: int, first: Page, norm: NormSpec | None, x: Floats
    ) -> NDArray[np.integer[Any]]:
        """Return the experts that the router would choose for x [m, hidden], those that weigh most first.

        Rows change little from one layer to the next, so for those that enter the MLP of the layer before this is a
        guess at what this layer needs (arXiv 2312.17238).
        """
        weights, ids = self._route(rank, layer, first, self._normed(rank, layer, first, norm, x), x)
        weight = np.bincount(ids.ravel(), weights.ravel(), self.count)
        likely = (-weight).argsort(kind="stable")
        return likely[: np.count_nonzero(weight)]

    def _normed(self, rank: Rank, layer: int, first: Page, norm: NormSpec | None, x: Floats) -> Floats:
        """Return the rows that the MLP sees."""
        before = rank.kept(lambda: norm.kernel(first, "ffn_norm") if norm else None, "ffn_norm", layer)
        return rank.normalise(x, before)

    def _route(self, rank: Rank, layer: int, first: Page, h: Floats, x: Floats) -> tuple[Floats, Ints]:
        """Return the weights and numbers [m, chosen] of the experts of rows x, whose norm is h."""
        seen = h
        if self.apart:
            seen = rank.normalise(x, self._own_norm(rank, layer, first, "router_norm"))
            seen *= np.float32(x.shape[1] ** -0.5)
        logits = rank.times(seen, first, "router")
        if self.router.bias:
            logits += first.vector("router_bias")
        correction = first.vector("router_correction") if self.router.correction else None
        weights, ids = route(logits, self.router, correction, rank.threads)
        if self.router.expert_scales:
            weights *= first.vector("expert_scales")[ids]
        return weights, ids

    def _own_norm(self, rank: Rank, layer: int, first: Page, role: str) -> kernels.Norm:
        """Return one of the norms of what is `apart`, which outlives the page."""
        assert self.apart is not None
        norm, copy = self.apart, not rank.all_resident
        return rank.kept(lambda: norm.kernel(first, role, copy), role, layer)

    def compute(self, rank: Rank, layer: int, prepared: Prepared, x: Floats) -> tuple[Floats, None]:
        """Return the output of all shards for x [m, hidden]; no bias is left to add."""
        part, shared = self._mixture(rank, layer, prepared), None
        rank.group.all_reduce(part)
        if self.shared:
            with rank.page(layer, SHARED) as page:
                if self.latent:
                    part = self._through(rank, page, "latent_out", part)
                if rank.adapts(layer, self.adaptable):
                    shared = self.shared.in_steps(rank, lambda _: nullcontext(page), prepared.h)
                else:
                    work = rank.kept(lambda: self._shared_kernel(page), "shared", layer)
                    shared = np.empty_like(x)
                    rank.compute(work, prepared.h, shared)
                bias = page.vector("shared_down_bias").copy() if self.shared.bias else None
            rank.group.all_reduce(shared)
            if bias is not None:
                shared += bias
            if prepared.gate is not None:
                shared *= prepared.gate
        if prepared.after is not None:
            assert shared is not None
            shared, part = (
                rank.normalise(rows, norm) for rows, norm in zip((shared, part), prepared.after, strict=True)
            )
        if shared is not None:
            part += shared
        return part, None

    def _through(self, rank: Rank, page: Page, role: str, rows: Floats) -> Floats:
        """Return the product of rows and one of the latent's matrices."""
        out = rank.times(rows, page, role)
        if self.latent_bias:
            out += page.vector(f"{role}_bias")
        return out

    def _shared_kernel(self, page: Page) -> kernels.Mlp:
        assert self.shared is not None
        return self.shared.of_pages(dict.fromkeys(self.shared.pages, page))

    def _mixture(self, rank: Rank, layer: int, prepared: Prepared) -> Floats:
        """Return the weighted sum [m, hidden or latent] of what each row's experts make of it.

        Experts are added up in the order of their numbers within each of the shard's column panels, and only then are
        panels folded: the sums are the same however many shards the panels are spread over.
        """
        shape = prepared.mixed[0][0].shape
        sums = np.zeros((self.columns(rank.block).panels // rank.place.shards, *shape), np.float32)
        for h, routed in prepared.mixed:
            done = 0
            for pages in rank.experts(layer, routed.experts):
                work = kernels.Experts(
                    [page.keep(self._expert(rank.place)) for page in pages],
                    activation=self.activation,
                    limit=self.limit,
                    alpha=self.alpha,
                )
                own = routed.starts[done : done + len(pages) + 1]
                rows = slice(own[0], own[-1])
                rank.compute(work, h, routed.rows[rows], own - own[0], routed.weights[rows], sums)
                done += len(pages)
        out = np.empty(shape, np.float32)
        kernels.fold(sums, out, rank.threads)
        return out

    def _expert(self, place: Place) -> Callable[[Page], kernels.Expert]:
        """Return a function that makes the kernels' expert from a page; the first shard adds the bias of its output."""

        def make(page: Page) -> kernels.Expert:
            gate = page.matrix("gate") if self.gated else None
            matrices = gate, page.matrix("up"), page.matrix("down")
            if not self.bias:
                return kernels.Expert(*matrices)
            return kernels.Expert(
                *matrices,
                biases=(page.vector("gate_bias"), page.vector("up_bias")),
                down_bias=page.vector("down_bias") if place.shard == 0 else None,
            )

        return make
