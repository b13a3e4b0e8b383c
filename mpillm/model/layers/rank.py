"""The facts about a rank that the parts of layers need to compute on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mpillm import kernels
from mpillm.comm.collectives import Group
from mpillm.kernels import adapted
from mpillm.partition.grid import Place
from mpillm.weights.page import AdaptedPage, Page
from mpillm.weights.paging.cache import Use
from mpillm.weights.paging.weights import Weights
from mpillm.weights.roles import Key

Floats = NDArray[np.float32]
T = TypeVar("T")
LowRanks = Mapping[Key, Sequence[adapted.LowRank]]  # what adapters add to products with matrices

WORTH_THREADS = 2**22  # rows times bytes of weights


class Rank:
    """A rank's place, its pages, the shards that it sums with, and its threads. `block`: see `grid.axis`."""

    def __init__(self, place: Place, block: int, weights: Weights, group: Group, threads: int) -> None:
        self.place, self.block, self.group, self.threads = place, block, group, threads
        self.weights = weights
        self.low_ranks: LowRanks = {}  # the low-rank products of the current step
        #: Whether pages that were loaded stay where they are, so that objects may refer to their memory.
        self.all_resident = weights.cycle.budget >= weights.cycle.total
        self._pages = {(page.layer, page.kind): number for number, page in enumerate(weights.cycle.pages)}
        experts = weights.experts.pages if weights.experts else ()
        self._first_expert = {page.layer: number for number, page in enumerate(experts) if not page.expert}
        self._kept: dict[tuple[object, ...], Any] = {}

    def page(self, layer: int, name: str) -> Use[Page]:
        """Return a page, loaded and kept in memory while in the `with` block."""
        return self.weights.cycle.use(self._pages[layer, name])

    def adapted(self, page: Page) -> Page:
        """Return the page with what adapters add in this step; the page itself if they add nothing."""
        if not self.low_ranks:
            return page
        keys = ((role, Key(role, page.plan.layer)) for role in page.plan.index)
        low = {role: self.low_ranks[key] for role, key in keys if key in self.low_ranks}
        return AdaptedPage(page, low) if low else page

    def adapts(self, layer: int, roles: Sequence[str]) -> bool:
        """Return whether adapters add to one of a layer's matrices in this step."""
        return bool(self.low_ranks) and any(Key(role, layer) in self.low_ranks for role in roles)

    def experts(self, layer: int, experts: NDArray[np.integer[Any]]) -> Any:
        """Return the loaded pages of a layer's experts [n], by ascending numbers, as many at a time as fit."""
        assert self.weights.experts is not None
        return self.weights.experts.ready_groups((self._first_expert[layer] + experts).tolist())

    @property
    def foresees(self) -> bool:
        """Whether experts are read ahead: some are streamed, and what decides on them stays in memory."""
        experts = self.weights.experts
        return experts is not None and not experts.all_resident and self.all_resident

    def expect(self, layer: int, experts: NDArray[np.integer[Any]]) -> None:
        """Read experts [n] of the next layer ahead, in this order; they are guesses."""
        assert self.weights.experts is not None
        self.weights.experts.expect((self._first_expert[layer] + experts).tolist())

    def kept(self, make: Callable[[], T], *key: object) -> T:
        """Return the result of `make` for loaded pages: made once if all pages stay in memory, else for each step."""
        if not self.all_resident:
            return make()
        found: T | None = self._kept.get(key)
        if found is None:
            found = self._kept[key] = make()
        return found

    def forget_kept(self) -> None:
        """Pages have other memory now: what refers to the old one is made anew."""
        self._kept.clear()

    def kept_of(self, page: Page, make: Callable[[], T], *key: object) -> T:
        """Like `kept`, for what is made of one page; it is made anew for a page that is adapted."""
        return make() if page.adapted else self.kept(make, *key)

    def compute(self, work: Any, *args: Any) -> None:
        """Run an operation of the kernels with this rank's threads."""
        kernels.compute(work, *args, self.threads)

    def compute_of(self, page: Page, rows: int, work: Any, *args: Any) -> None:
        """Run an operation on a page.

        On an adapted page it is many small operations in turn; threads do not pay where there is little to do.
        """
        small = page.adapted and rows * page.plan.nbytes < WORTH_THREADS
        kernels.compute(work, *args, 1 if small else self.threads)

    def normalise(self, x: Floats, norm: kernels.Norm | None) -> Floats:
        """Return the norm of rows f32 [m, hidden], as a new array; without a norm the rows themselves."""
        if norm is None:
            return x
        out = np.empty(x.shape, np.float32)
        if norm.centred:
            kernels.layer_norm(x, norm.weight, norm.bias, norm.eps, out, self.threads)
        else:
            kernels.rms_norm(x, norm.weight, norm.eps, out, self.threads)
        return out

    def times(self, x: Floats, page: Page, role: str) -> Floats:
        """Return x @ matrix.T: f32 [m, n]."""
        matrix = page.matrix(role)
        out = np.empty((len(x), matrix.n), np.float32)
        products = adapted.AdaptedProducts if page.adapted else kernels.Products
        self.compute_of(page, len(x), products(matrix), x, [out])
        return out
