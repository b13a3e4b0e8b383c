"""The cache of experts: what stays, what is read and how often, and that nothing else is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillm.errors import JobError
from mpillm.weights.paging.experts import ExpertCache, minimum_budget
from mpillm.weights.paging.weights import budgets, streamed
from mpillm.weights.plan import PagePlan
from tests.weights.test_cache import Item, Loader, plans


def experts(layers: int, each: int, size: int = 100) -> list[PagePlan]:
    return [
        PagePlan(str(layer * each + expert), (), size, layer, "expert", expert=expert)
        for layer in range(layers)
        for expert in range(each)
    ]


def run(cache: ExpertCache[Item], steps: Iterable[Iterable[list[int]]]) -> None:
    """Steps of layers of chosen pages."""
    for step in steps:
        for chosen in step:
            ready = (held for some in cache.ready_groups(chosen) for held in some)
            for page, held in zip(chosen, ready, strict=True):
                assert (held.data == (page + 1) % 256).all()
                assert len(held.data) == cache.pages[page].nbytes


@pytest.fixture
def loader() -> Loader:
    return Loader(parallel=3)


def test_only_what_was_chosen_is_read_and_once_a_step(loader: Loader) -> None:
    cache = ExpertCache(experts(3, 4), loader, 500, 0.5)
    run(cache, [[[0, 2], [5], [8, 9, 11]]])
    cache.close()
    assert sorted(loader.loads) == [0, 2, 5, 8, 9, 11]
    counters = cache.counters
    assert (counters.hits, counters.misses, counters.loads) == (0, 6, 6)
    assert counters.loaded == 600
    assert counters.peak <= 500


@pytest.mark.parametrize("budget", [300, 600, 1100])
def test_where_all_are_used_a_fixed_part_stays(loader: Loader, budget: int) -> None:
    """Large batches choose every expert: then hits are what stays, as in the cycle of the other weights."""
    cache = ExpertCache(experts(3, 4), loader, budget, 0.5)
    every = [[[4 * layer + expert for expert in range(4)] for layer in range(3)]]
    run(cache, every * 10)
    before = cache.counters.hits
    run(cache, every * 10)
    cache.close()
    hits = (cache.counters.hits - before) / 10
    stays = budget // 100
    assert stays - 3 <= hits <= stays
    assert cache.counters.peak <= budget


@pytest.mark.parametrize(("budget", "maximum"), [(200, 1), (400, 2), (700, 3), (800, 8)])
def test_what_is_there_comes_together(loader: Loader, budget: int, maximum: int) -> None:
    """All of a layer's pages at once where they stay, else as many as leave half of the room to those that follow."""
    cache = ExpertCache(experts(1, 8), loader, budget, 0.5)
    run(cache, [[list(range(8))]] * 3)
    sizes = []
    for some in cache.ready_groups(range(8)):
        with cache._changed:  # the loaders fetch whatever finds room meanwhile
            cache._changed.wait_for(lambda: cache._choose() is None, timeout=0.1)
        sizes.append(len(some))
    cache.close()
    assert sum(sizes) == 8
    assert max(sizes) <= maximum
    assert budget < 800 or sizes == [8]


def test_the_most_used_stay(loader: Loader) -> None:
    """Each step takes one expert of a layer that all like, and one of the others in turn."""
    layers, each = 4, 8
    cache = ExpertCache(experts(layers, each), loader, 100 * (layers + 2), 2 / each)
    liked = [layer * each + layer for layer in range(layers)]

    def step(number: int) -> list[list[int]]:
        other = number % (each - 1)
        return [sorted([liked[layer], layer * each + other + (other >= layer)]) for layer in range(layers)]

    run(cache, (step(number) for number in range(64)))
    loads = Counter(loader.loads)
    run(cache, (step(number) for number in range(64, 128)))
    cache.close()
    late = Counter(loader.loads) - loads
    assert not any(late[page] for page in liked)
    assert sum(late.values()) == 64 * layers


def test_what_fits_is_all_read_ahead(loader: Loader) -> None:
    cache = ExpertCache(experts(2, 4), loader, 800, 0.5)
    run(cache, [[[0, 1, 2, 3], [4, 5, 6, 7]]] * 3)
    cache.close()
    assert cache.all_resident
    assert cache.streamed == 0
    assert sorted(loader.loads) == list(range(8))
    assert (cache.counters.hits, cache.counters.misses) == (16, 8)


@settings(max_examples=40)
@given(st.data())
def test_any_choice_gives_the_same_bytes_within_the_budget(data: st.DataObject) -> None:
    layers, each = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    pages = [
        PagePlan(plan.name, (), data.draw(st.integers(1, 50)), plan.layer, "expert", expert=plan.expert)
        for plan in experts(layers, each)
    ]
    budget = minimum_budget(pages) + data.draw(st.integers(0, 300))
    choice = st.lists(st.integers(0, each - 1), unique=True, max_size=each).map(sorted)
    steps = [
        [[layer * each + expert for expert in data.draw(choice)] for layer in range(layers)] for _ in range(4)
    ]
    cache = ExpertCache(pages, Loader(parallel=data.draw(st.integers(1, 4))), budget, 0.5)
    try:
        for step in steps:
            for chosen in step:
                guessed = data.draw(st.integers(0, layers - 1)) * each
                cache.expect([guessed + expert for expert in data.draw(choice)])
                run(cache, [[chosen]])
        uses = sum(len(chosen) for step in steps for chosen in step)
        assert cache.counters.hits + cache.counters.misses == uses
        assert cache.counters.peak <= budget
    finally:
        cache.close()
    assert cache.counters.held == 0


def settle(cache: ExpertCache[Item]) -> None:
    """Wait until nothing more is to be loaded."""
    with cache._changed:
        loaded = all(slot.page is not None for slot in cache._slots.values())
        while not (loaded and cache._choose() is None):
            cache._changed.wait(0.01)
            loaded = all(slot.page is not None for slot in cache._slots.values())


def test_right_guesses_are_there_before_they_are_asked_for(loader: Loader) -> None:
    layers, each = 4, 8
    cache = ExpertCache(experts(layers, each), loader, 1200, 2 / each)
    for step in range(6):
        for layer in range(layers):
            chosen = [layer * each + (step + layer) % each, layer * each + (step + layer + 3) % each]
            cache.expect(chosen)
            settle(cache)
            run(cache, [[sorted(chosen)]])
    cache.close()
    assert cache.counters.stalls == 0
    assert cache.counters.loads == cache.counters.misses  # each was read once for its use
    assert cache.counters.peak <= 1200


def test_wrong_guesses_are_given_up_by_their_place(loader: Loader) -> None:
    """The first guess is always right and the second never: soon only the first one is read ahead."""
    layers, each = 4, 8
    cache = ExpertCache(experts(layers, each), loader, 1200, 1 / each)
    for step in range(12):
        if step == 6:
            early = cache.counters.loads, cache.counters.misses
        for layer in range(layers):
            right = layer * each + step % each
            cache.expect([right, layer * each + (step + 3) % each])
            settle(cache)
            run(cache, [[[right]]])
    cache.close()
    assert early[0] > early[1]
    assert cache.counters.loads - early[0] == cache.counters.misses - early[1]
    assert cache.counters.stalls == 0


def test_most_experts_of_a_layer_are_guessed_too(loader: Loader) -> None:
    """Large batches need nearly all of them, and the disk would be idle while the last ones of a layer are computed."""
    cache = ExpertCache(experts(2, 4), loader, 400, 1.0)
    cache.expect([4, 5, 6])
    settle(cache)
    cache.close()
    assert sorted(loader.loads) == [4, 5, 6]


@pytest.mark.parametrize(("small", "buffers"), [(80, 1), (20, 2)])
def test_experts_of_two_sizes_share_buffers_unless_much_of_them_stayed_unused(
    small: int, buffers: int, loader: Loader
) -> None:
    """As in llama.cpp's mixtures of types, where every other layer has larger experts."""
    pages = [replace(page, nbytes=small if page.layer % 2 else 100) for page in experts(4, 4)]
    cache = ExpertCache(pages, loader, 500, 0.5)
    steps = [[[4 * layer + expert for expert in range(4)] for layer in range(4)]] * 5
    run(cache, steps)
    assert len({len(slot.buffer) for slot in cache._slots.values()}) == buffers
    assert cache.counters.peak <= 500
    cache.close()


def test_what_the_loader_raises_is_raised_in_use(loader: Loader) -> None:
    loader.fail_at = 2
    cache = ExpertCache(experts(1, 4), loader, 200, 0.5)
    with pytest.raises(OSError, match="page 2 cannot be read"):
        run(cache, [[[0, 1, 2, 3]]])
    with pytest.raises(OSError, match="page 2 cannot be read"):
        run(cache, [[[0]]])
    cache.close()


def test_a_use_that_breaks_off_gives_the_item_back(loader: Loader) -> None:
    cache = ExpertCache(experts(1, 4), loader, 200, 0.5)
    for _ in range(3):
        turn = cache.ready_groups([0, 1, 2, 3])
        next(turn)
        turn.close()
    run(cache, [[[0, 1, 2, 3]]])
    cache.close()
    with pytest.raises(RuntimeError, match="the cache of experts is closed"):
        next(cache.ready_groups([0]))


def test_too_small_a_budget_is_refused(loader: Loader) -> None:
    with pytest.raises(JobError, match=r"Experts get 199 bytes of memory\.weights, but need at least 200"):
        ExpertCache(experts(2, 2), loader, 199, 0.5)


def test_experts_get_what_the_parts_leave() -> None:
    pages = [*plans(30, 10, 50), *experts(2, 4, 10)]
    assert minimum_budget(pages[3:]) == 20
    assert budgets(pages, 80) == (60, 20)
    assert budgets(pages, 120) == (90, 30)
    assert budgets(pages, 500) == (90, 410)
    assert streamed(pages, 120, "cycle") == 50
    assert streamed(pages, 169, "lru") == 1
    assert streamed(pages, 170, "cycle") == streamed(pages, None, "lru") == 0
    assert np.isclose(streamed(pages, 100, "lru"), 170 - 20)
