"""A rank's weights under one budget: the parts that every step uses, and the experts that only some tokens need."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpillm.errors import JobError
from mpillm.weights.layer import Layer
from mpillm.weights.paging import cache, experts
from mpillm.weights.paging.cache import Loader, Policy, WeightCache, fixed_part
from mpillm.weights.paging.experts import ExpertCache
from mpillm.weights.plan import LayerPlan

EVEN = 0.05  # of a step may be waited for weights without a remedy
PATIENCE = 3  # steps that wait for longer before there is one

OpenLoader = Callable[[Sequence[LayerPlan], bool], Loader[Layer]]  # of (items, streamed)


class Weights:
    """The caches that page a rank's items."""

    def __init__(
        self,
        plans: Sequence[LayerPlan],
        open_loader: OpenLoader,
        budget: int | None = None,
        policy: Policy = "cycle",
        chosen: float = 1.0,
    ) -> None:
        """`chosen` is the share of a layer's experts that a token is sent to. JobError if the budget is too small."""
        self._waited, self._uneven = 0.0, 0  # seconds up to the last step; steps that computed and waited
        parts, mixture = split(plans)
        self.total = sum(item.nbytes for item in plans)
        self.budget = self.total if budget is None else budget
        least = minimum_budget(plans)
        if self.budget < least:
            raise JobError(
                f"memory.weights is {self.budget} bytes, but this rank needs at least {least} bytes for the two "
                f"neighbouring items that are largest{' and two experts' if mixture else ''} (of {self.total} for "
                "all); give it more, or use more ranks."
            )
        for_parts, for_experts = budgets(plans, self.budget)
        streamed = for_parts < sum(item.nbytes for item in parts)
        self.cycle = WeightCache(parts, open_loader(parts, streamed), for_parts, policy)
        self.experts: ExpertCache[Layer] | None = None
        if mixture:
            streamed = for_experts < sum(item.nbytes for item in mixture)
            self.experts = ExpertCache(mixture, open_loader(mixture, streamed), for_experts, chosen)

    @property
    def items(self) -> tuple[LayerPlan, ...]:
        """All that is paged."""
        return self.cycle.items + (self.experts.items if self.experts else ())

    @property
    def streamed(self) -> int:
        """Bytes that a step loads anew if its tokens choose every expert."""
        return self.cycle.streamed + (self.experts.streamed if self.experts else 0)

    @property
    def loaded(self) -> int:
        """Bytes that were made ready so far."""
        return sum(counters.loaded for counters in self._counters)

    @property
    def stall_seconds(self) -> float:
        """Seconds that were waited for weights."""
        return sum(counters.stall_seconds for counters in self._counters)

    @property
    def load_seconds(self) -> float:
        """Seconds of loading, of all threads together."""
        return sum(counters.load_seconds for counters in self._counters)

    def stepped(self, seconds: float) -> None:
        """Note that a step took so long, and read further ahead if steps keep waiting though they compute as well.

        Where the disk alone is the limit (a few sequences), the largest fixed part is best. Where computing takes
        about as long, parts that need longer than others to read or to compute make either wait for the other, unless
        one more is on its way.
        """
        waited, self._waited = (
            self.cycle.counters.stall_seconds - self._waited,
            self.cycle.counters.stall_seconds,
        )
        if EVEN * seconds < waited < seconds / 2:
            self._uneven += 1
            if self._uneven == PATIENCE and self.cycle.fixed:
                self.cycle.deepen()

    def close(self) -> None:
        """Stop reading ahead, and let all buffers go."""
        self.cycle.close()
        if self.experts:
            self.experts.close()

    @property
    def _counters(self) -> list[cache.Counters]:
        return [self.cycle.counters, *([self.experts.counters] if self.experts else [])]


def split(plans: Sequence[LayerPlan]) -> tuple[list[LayerPlan], list[LayerPlan]]:
    """What every step uses, and the experts."""
    return [item for item in plans if item.expert < 0], [item for item in plans if item.expert >= 0]


def minimum_budget(plans: Sequence[LayerPlan]) -> int:
    """The least bytes that paging works with."""
    parts, mixture = split(plans)
    return cache.minimum_budget(parts) + experts.minimum_budget(mixture)


def budgets(plans: Sequence[LayerPlan], budget: int) -> tuple[int, int]:
    """What of a budget the parts get, and the experts: no byte of an expert is used as often as one of a part."""
    parts, mixture = split(plans)
    for_parts = min(sum(item.nbytes for item in parts), budget - experts.minimum_budget(mixture))
    return for_parts, budget - for_parts


def streamed(plans: Sequence[LayerPlan], budget: int | None, policy: Policy) -> int:
    """Bytes that a step loads anew if its tokens choose every expert."""
    total = sum(item.nbytes for item in plans)
    if budget is None or total <= budget or budget < minimum_budget(plans):
        return 0
    parts, mixture = split(plans)
    for_parts, for_experts = budgets(plans, budget)
    fixed = (
        fixed_part(parts, for_parts) if policy == "cycle" or for_parts == sum(i.nbytes for i in parts) else ()
    )
    stays = sum(parts[index].nbytes for index in fixed) + min(for_experts, sum(i.nbytes for i in mixture))
    return total - stays
