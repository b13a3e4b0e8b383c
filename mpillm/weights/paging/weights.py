"""A rank's weights under one budget: the pages that every step uses, and the experts that only some tokens need."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpillm.errors import JobError
from mpillm.weights.io.reading import HUGE, SECTOR
from mpillm.weights.page import Page
from mpillm.weights.paging import cache, experts
from mpillm.weights.paging.cache import Policy, WeightCache, fixed_part
from mpillm.weights.paging.experts import ExpertCache
from mpillm.weights.paging.pager import CacheCounters, Loader
from mpillm.weights.plan import PagePlan
from mpillm.words import enough

TOLERATED_WAIT = 0.05  # the share of a step that may be spent waiting for weights
PATIENCE = 3  # steps with longer waits before more is read ahead

OpenLoader = Callable[[Sequence[PagePlan], bool], Loader[Page]]  # opens a loader for (pages, streamed)


class Weights:
    """The caches of a rank's pages: `cycle`, and `experts` where the model has any."""

    def __init__(
        self,
        plans: Sequence[PagePlan],
        open_loader: OpenLoader,
        budget: int | None = None,
        policy: Policy = "cycle",
        chosen: float = 1.0,
    ) -> None:
        """`chosen` is the share of a layer's experts that a token is sent to. JobError if the budget is too small."""
        self._waited, self._waits = 0.0, 0  # seconds of stalls up to the last step; steps with long waits
        common, mixture = split(plans)
        self.total = _nbytes(plans)
        self.budget = self.total if budget is None else budget
        check_budget(plans, self.budget)
        for_common, for_experts = budgets(plans, self.budget)
        self.cycle = WeightCache(
            common, open_loader(common, for_common < _nbytes(common)), for_common, policy
        )
        self.experts: ExpertCache[Page] | None = None
        if mixture:
            loader = open_loader(mixture, for_experts < _nbytes(mixture))
            self.experts = ExpertCache(mixture, loader, for_experts, chosen)

    @property
    def pages(self) -> tuple[PagePlan, ...]:
        """All pages of the rank."""
        return self.cycle.pages + (self.experts.pages if self.experts else ())

    @property
    def streamed(self) -> int:
        """Bytes that a step loads again if its tokens choose every expert."""
        return self.cycle.streamed + (self.experts.streamed if self.experts else 0)

    @property
    def loaded(self) -> int:
        """Bytes that were loaded so far."""
        return sum(counters.loaded for counters in self._counters)

    @property
    def stall_seconds(self) -> float:
        """Seconds of stalls so far."""
        return sum(counters.stall_seconds for counters in self._counters)

    @property
    def load_seconds(self) -> float:
        """Seconds of loading so far, summed over all threads."""
        return sum(counters.load_seconds for counters in self._counters)

    def renew(self, let_go: Callable[[], object]) -> None:
        """Use pages that the loader makes anew (`Loader.renewed`); `let_go` of what is held of those before."""
        self.cycle.renew(let_go)

    def note_step(self, seconds: float) -> None:
        """Note that a step took so long, and read further ahead if steps that mostly compute keep waiting.

        Where only the disk is the limit (a few sequences), the largest fixed part is best. Where computing takes about
        as long as reading, pages of unequal cost make one wait for the other, unless one more page is read ahead.
        """
        waited, self._waited = (
            self.cycle.counters.stall_seconds - self._waited,
            self.cycle.counters.stall_seconds,
        )
        if TOLERATED_WAIT * seconds < waited < seconds / 2:
            self._waits += 1
            if self._waits == PATIENCE and self.cycle.fixed:
                self.cycle.read_further_ahead()

    def close(self) -> None:
        """Stop reading ahead, and release all buffers."""
        self.cycle.close()
        if self.experts:
            self.experts.close()

    @property
    def _counters(self) -> list[CacheCounters]:
        return [self.cycle.counters, *([self.experts.counters] if self.experts else [])]


def check_budget(plans: Sequence[PagePlan], budget: int) -> None:
    """Raise JobError if a budget is too small for these pages."""
    minimum = minimum_budget(plans)
    if budget < minimum:
        experts_too = " and two experts" if split(plans)[1] else ""
        raise JobError(
            f"memory.weights is too small: this rank needs at least {enough(minimum)} for the two largest "
            f"neighbouring pages{experts_too} (of {enough(_nbytes(plans))} for all); raise it, or use more ranks."
        )


def split(plans: Sequence[PagePlan]) -> tuple[list[PagePlan], list[PagePlan]]:
    """Return the pages that every step uses, and the experts."""
    return [page for page in plans if page.expert < 0], [page for page in plans if page.expert >= 0]


def minimum_budget(plans: Sequence[PagePlan]) -> int:
    """Return the minimum budget of these pages, in bytes."""
    common, mixture = split(plans)
    return cache.minimum_budget(common) + experts.minimum_budget(mixture)


def budgets(plans: Sequence[PagePlan], budget: int) -> tuple[int, int]:
    """Return the budgets of the pages that every step uses and of the experts; the former, used more, come first."""
    common, mixture = split(plans)
    for_common = min(_nbytes(common), budget - experts.minimum_budget(mixture))
    return for_common, budget - for_common


def streamed(plans: Sequence[PagePlan], budget: int | None, policy: Policy) -> int:
    """Return bytes that a step loads again if its tokens choose every expert."""
    total = _nbytes(plans)
    if budget is None or total <= budget or budget < minimum_budget(plans):
        return 0
    common, mixture = split(plans)
    for_common, for_experts = budgets(plans, budget)
    all_stay = for_common == _nbytes(common)
    fixed = fixed_part(common, for_common) if policy == "cycle" or all_stay else ()
    return total - sum(common[index].nbytes for index in fixed) - min(for_experts, _nbytes(mixture))


def beyond_budget(plans: Sequence[PagePlan], budget: int | None, policy: Policy) -> int:
    """Return bytes, at most, that buffers of one size take beyond the budget: a cache ends with a whole huge page."""
    if budget is None or not streamed(plans, budget, policy):
        return 0
    found = 0
    for pages, part in zip(split(plans), budgets(plans, budget), strict=True):
        if part < _nbytes(pages):
            largest = max(page.nbytes for page in pages)
            found += (HUGE if part >= HUGE else 0) + -largest % SECTOR * (part // largest)
    return found


def streamed_page(plans: Sequence[PagePlan], budget: int | None, policy: Policy) -> float:
    """Return the average bytes of the pages that every step loads again; of all pages if none is."""
    again = list(plans)
    if streamed(plans, budget, policy) and budget is not None:
        common, mixture = split(plans)
        for_common, for_experts = budgets(plans, budget)
        fixed = fixed_part(common, for_common) if policy == "cycle" or for_common == _nbytes(common) else ()
        again = [page for index, page in enumerate(common) if index not in fixed]
        again += mixture if for_experts < _nbytes(mixture) else []
    return _nbytes(again) / max(len(again), 1)


def streamed_experts(plans: Sequence[PagePlan], budget: int | None) -> int:
    """Return the experts' part of `streamed`."""
    if budget is None or budget < minimum_budget(plans):
        return 0
    _, mixture = split(plans)
    return max(_nbytes(mixture) - budgets(plans, budget)[1], 0)


def _nbytes(plans: Sequence[PagePlan]) -> int:
    return sum(page.nbytes for page in plans)
