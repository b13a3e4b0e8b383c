"""The MLP: two or three matrices with an activation between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpillm import kernels
from mpillm.kernels.types import Activation
from mpillm.model.layers.norm import NormSpec
from mpillm.model.layers.rank import Floats, Rank
from mpillm.partition.grid import Axis, Place, axis
from mpillm.weights.inventory import DOWN, GATE, UP, PageSpec, TensorSpec
from mpillm.weights.page import Page
from mpillm.weights.roles import Key


@dataclass(frozen=True)
class MlpSpec:
    """down(f(gate(x)) * up(x)), or without a gate down(f(up(x))), of `width` inner columns; f is the `activation`.

    `prefix` stands before the names of its roles. `alpha` is SILU_SCALED's.
    """

    width: int
    activation: Activation = Activation.SILU
    gated: bool = True
    bias: bool = False
    prefix: str = ""
    alpha: float = 1.702

    @property
    def pages(self) -> tuple[str, ...]:
        """The names of its pages, in the order of use: one for each matrix."""
        return (GATE, UP, DOWN) if self.gated else (UP, DOWN)

    @property
    def adaptable(self) -> tuple[str, ...]:
        """The roles of its matrices."""
        return tuple(self.prefix + page for page in self.pages)

    @property
    def count(self) -> int:
        """The number of experts: 0."""
        return 0

    @property
    def share(self) -> float:
        """The part of the weights of all its MLPs that a token meets."""
        return 1.0

    @property
    def fused(self) -> bool:
        """Whether its kernel may be part of a `kernels.LayerStack`: an output's bias is added after it."""
        return not self.bias

    def columns(self, block: int) -> Axis:
        """Return the axis of its inner columns; `block` as in `grid.axis`."""
        return axis(self.width, block=block)

    def axes(self, block: int) -> tuple[Axis, ...]:
        """Return the axes that limit the number of shards."""
        return (self.columns(block),)

    def first_page(self, layer: int, hidden: int) -> Iterator[TensorSpec]:
        """Tensors that belong to the page before its own ones."""
        yield from ()

    def tensors(self, page: str, layer: int, hidden: int, block: int) -> Iterator[TensorSpec]:
        """Yield the tensors of one of its pages."""
        role, columns = self.prefix + page, self.columns(block)
        if page == DOWN:
            yield TensorSpec(Key(role, layer), (hidden, self.width), cols=columns)
        else:
            yield TensorSpec(Key(role, layer), (self.width, hidden), columns)
        if self.bias:
            width, rows = (hidden, None) if page == DOWN else (self.width, columns)
            yield TensorSpec(Key(f"{role}_bias", layer), (width,), rows)

    def experts(self, layer: int, hidden: int, block: int) -> Sequence[PageSpec]:
        """Return the pages of experts: there are none."""
        return ()

    def row_nbytes(self, place: Place, block: int, hidden: int, copied: float) -> int:
        """Return bytes that a row takes at most: gate, up, and products' inputs (see `AttentionSpec.row_nbytes`)."""
        width = len(self.columns(block).entries(place))
        return 4 * 2 * width + int(copied * (hidden + width))

    def mixed_row_nbytes(self, place: Place, block: int, hidden: int, copied: float) -> int:
        """Return bytes that a row of an expert takes at most: there are none."""
        return 0

    def prepare(self, rank: Rank, layer: int, first: Page, norm: NormSpec | None, x: Floats) -> Any:
        """Prepare `compute` while page `first` is in use: the MLP as one operation, or x [m, hidden] after `norm`."""
        if self._whole(rank, layer):
            return self.kernel(rank, layer, first, norm)
        return rank.normalise(x, norm.kernel(first, "ffn_norm") if norm else None)

    def compute(self, rank: Rank, layer: int, prepared: Any, x: Floats) -> tuple[Floats, Floats | None]:
        """Return the output of all shards for x [m, hidden], and the bias that is still to be added to it."""
        if self._whole(rank, layer):
            part = np.empty_like(x)
            rank.compute(prepared, x, part)
            bias = rank.kept(lambda: self.output_bias(rank, layer), "down_bias", layer) if self.bias else None
        else:
            part = self.in_steps(rank, lambda name: rank.page(layer, name), prepared)
            bias = self.output_bias(rank, layer)
        rank.group.all_reduce(part)
        return part, bias

    def _whole(self, rank: Rank, layer: int) -> bool:
        """Return whether it is computed as one operation, not page by page."""
        return rank.all_resident and not rank.adapts(layer, self.adaptable)

    def kernel(self, rank: Rank, layer: int, first: Page, norm: NormSpec | None) -> kernels.Mlp:
        """Return the whole MLP as one operation of the kernels, which refers to the memory of its pages."""

        def make() -> kernels.Mlp:
            with ExitStack() as stack:
                pages = {name: stack.enter_context(rank.page(layer, name)) for name in self.pages}
                return self.of_pages(pages, norm.kernel(first, "ffn_norm") if norm else None)

        return rank.kept(make, "mlp", layer)

    def of_pages(self, pages: dict[str, Page], norm: kernels.Norm | None = None) -> kernels.Mlp:
        """Return the kernels' object for loaded pages, which name their own tensors."""
        gate, up = self.prefix + GATE, self.prefix + UP
        biases = None
        if self.bias:
            biases = (
                pages[GATE].vector(f"{gate}_bias") if self.gated else None,
                pages[UP].vector(f"{up}_bias"),
            )
        return kernels.Mlp(
            pages[GATE].matrix(gate) if self.gated else None,
            pages[UP].matrix(up),
            pages[DOWN].matrix(self.prefix + DOWN),
            activation=self.activation,
            alpha=self.alpha,
            norm=norm,
            biases=biases,
        )

    def output_bias(self, rank: Rank, layer: int) -> Floats | None:
        """Return the bias [hidden] of its output, which is added once all shards have been summed."""
        if not self.bias:
            return None
        with rank.page(layer, DOWN) as page:
            bias: Floats = page.vector(f"{self.prefix}down_bias").copy()
            return bias

    def in_steps(
        self, rank: Rank, page_of: Callable[[str], AbstractContextManager[Page]], h: Floats
    ) -> Floats:
        """Return the output of this shard for normed rows h, both f32 [m, hidden]. Each matrix is used once."""
        inputs = []
        for name in self.pages[:-1]:
            with page_of(name) as page:
                inputs.append(rank.times(h, rank.adapted(page), self.prefix + name))
                if self.bias:
                    inputs[-1] += page.vector(f"{self.prefix}{name}_bias")
        with page_of(DOWN) as page:
            first, factor = (inputs[0], inputs[1]) if self.gated else (inputs[0], None)
            kernels.activate(self.activation, first, factor, first, rank.threads, alpha=self.alpha)
            return rank.times(first, rank.adapted(page), self.prefix + DOWN)
