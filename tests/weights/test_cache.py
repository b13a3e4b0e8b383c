from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillm.errors import JobError
from mpillm.kernels import BlockType
from mpillm.model.opening import open_source
from mpillm.partition.grid import Place
from mpillm.weights.fill import load
from mpillm.weights.io.reading import HUGE, Bytes, new_buffer
from mpillm.weights.packed.layout import panels_of, shard_extent
from mpillm.weights.paging.cache import WeightCache, fixed_part, minimum_budget
from mpillm.weights.paging.pager import BufferLoader
from mpillm.weights.paging.weights import PATIENCE, Weights, beyond_budget
from mpillm.weights.plan import PagePlan
from mpillm.weights.source import rank_plans
from tests.shapes import shape
from tests.weights.build import Tiny, write_hf


def plans(*sizes: int) -> list[PagePlan]:
    return [PagePlan(str(i), (), size) for i, size in enumerate(sizes)]


class Item:
    """What a use hands out."""

    def __init__(self, buffer: np.ndarray) -> None:
        self.data = buffer

    def drop(self) -> None:
        self.data = np.empty(0, np.uint8)


class Loader(BufferLoader[Item]):
    """Fills a buffer with the page's number, and knows what it did."""

    def __init__(self, seconds: float = 0.0, parallel: int = 1) -> None:
        super().__init__(self._make, parallel)
        self.seconds = seconds
        self.loads: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fail_at: int | None = None

    def _make(self, plan: PagePlan, buffer: np.ndarray) -> Item:
        self.gate.wait()
        time.sleep(self.seconds)
        page = int(plan.name)
        self.loads.append(page)
        if page == self.fail_at:
            raise OSError(f"page {page} cannot be read")
        buffer[:] = page + 1
        return Item(buffer)


def run(cache: WeightCache[Item], order: Iterable[int]) -> None:
    for number in order:
        with cache.use(number) as page:
            assert (page.data == number + 1).all()
            assert len(page.data) == cache.pages[number].nbytes


def settle(cache: WeightCache) -> None:
    """Wait until the threads have read ahead as far as they can."""
    with cache._changed:
        cache._changed.wait_for(
            lambda: cache._choose() is None and all(slot.page is not None for slot in cache._slots.values())
        )


@pytest.fixture
def threads() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("policy", ["cycle", "lru"])
@pytest.mark.parametrize("budget", [None, 1000, 5000])
def test_everything_fits(policy, budget):
    loader = Loader()
    cache = WeightCache(plans(*[100] * 10), loader, budget, policy)
    run(cache, [*range(10)] * 5)
    counters = cache.counters
    assert (counters.hits, counters.misses, counters.loads) == (40, 10, 10)
    assert (counters.loaded, counters.held, counters.peak) == (1000, 1000, 1000)
    assert loader.loads == list(range(10))
    cache.close()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("budget", "fixed"), [(200, 0), (299, 0), (300, 1), (500, 3), (800, 6), (999, 7)])
def test_a_cycle_hits_its_fixed_part(budget, fixed):
    """Hits are exact: after the first round, one per fixed page and round; everything else is loaded once a round."""
    loader = Loader()
    cache = WeightCache(plans(*[100] * 10), loader, budget)
    rounds = 6
    run(cache, [*range(10)] * rounds)
    counters = cache.counters
    assert len(cache.fixed) == fixed
    assert counters.hits == fixed * (rounds - 1)
    assert counters.misses == 10 * rounds - counters.hits
    cache.close()
    # What was read ahead at the end was not used.
    assert counters.misses <= counters.loads <= counters.misses + 10
    assert counters.peak <= budget


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("budget", [200, 500, 999])
def test_lru_hits_nothing_in_a_cycle_that_does_not_fit(budget):
    cache = WeightCache(plans(*[100] * 10), Loader(), budget, "lru")
    run(cache, [*range(10)] * 5)
    assert (cache.counters.hits, cache.counters.misses) == (0, 50)
    assert cache.counters.peak <= budget
    run(cache, [9, 9, 9])  # what was used last is still there
    assert cache.counters.hits == 3
    cache.close()


@pytest.mark.usefixtures("threads")
def test_stalls_are_what_had_to_be_waited_for():
    """Slow use: everything but the first page is read ahead in time. Slow loads: every miss is a stall."""
    slow_use = WeightCache(plans(*[8] * 4), Loader(0.001), 16)
    for page in [*range(4)] * 3:
        with slow_use.use(page):
            time.sleep(0.05)
    assert slow_use.counters.misses == 12
    assert slow_use.counters.stalls <= 2  # the first, and one for a machine that was busy
    slow_use.close()
    slow_load = WeightCache(plans(*[8] * 4), Loader(0.01), 16)
    run(slow_load, [*range(4)] * 3)
    assert slow_load.counters.misses == 12
    assert slow_load.counters.stalls >= 6  # a machine that is busy elsewhere may leave time to load
    assert slow_load.counters.stall_seconds > 0.08
    assert slow_load.counters.load_seconds >= slow_load.counters.loads * 0.01
    slow_load.close()


@pytest.mark.usefixtures("threads")
def test_reads_ahead_without_being_asked():
    loader = Loader()
    cache = WeightCache(plans(*[8] * 4), loader, None)
    while len(loader.loads) < 4:
        time.sleep(0.005)
    run(cache, range(4))
    assert (cache.counters.misses, cache.counters.stalls) == (4, 0)
    cache.close()


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=9),
    st.integers(0, 200),
    st.sampled_from(["cycle", "lru"]),
    st.randoms(use_true_random=False),
)
def test_any_order_gives_the_same_bytes_within_the_budget(sizes, extra, policy, random):
    """Also orders that are no cycle: a step may leave pages out, or use one twice."""
    pages = plans(*sizes)
    budget = minimum_budget(pages) + extra
    buffers: list[weakref.ref[np.ndarray]] = []
    live: list[int] = [0]

    def loader(plan: PagePlan, buffer: np.ndarray) -> Item:
        buffer[:] = int(plan.name) + 1
        if not any(known() is buffer for known in buffers):
            buffers.append(weakref.ref(buffer))
        live.append(sum(known.nbytes for known in [ref() for ref in buffers] if known is not None))
        return Item(buffer)

    cache = WeightCache(pages, BufferLoader(loader), budget, policy)
    try:
        order = list(range(len(sizes))) * 3
        for _ in range(6):
            order.insert(random.randrange(len(order)), random.randrange(len(sizes)))
            order.pop(random.randrange(len(order)))
        run(cache, order)
        assert cache.counters.hits + cache.counters.misses == len(order)
        assert max(live) <= cache.counters.peak <= budget
    finally:
        cache.close()
    assert cache.counters.held == 0


def test_the_fixed_part_leaves_room_for_two_neighbours():
    random = np.random.default_rng(1)
    for _ in range(200):
        pages = plans(*random.integers(1, 60, random.integers(1, 12)).tolist())
        total = sum(page.nbytes for page in pages)
        budget = minimum_budget(pages) + int(random.integers(0, total + 1))
        fixed = fixed_part(pages, budget)
        streamed = [page for i, page in enumerate(pages) if i not in fixed]
        assert sum(pages[i].nbytes for i in fixed) + minimum_budget(streamed) <= budget
        assert (len(fixed) == len(pages)) == (total <= budget)
    head_stays = plans(10, 10, 10, 10, 80)
    assert fixed_part(head_stays, 110) == {4, *fixed_part(head_stays, 110)}
    spread = sorted(fixed_part(plans(*[10] * 16), 100))
    assert len(spread) == 8
    assert max(b - a for a, b in zip(spread, [*spread[1:], spread[0] + 16], strict=True)) <= 4


def test_too_small_a_budget_is_refused():
    pages = plans(30, 10, 50, 20)
    assert minimum_budget(pages) == 70
    with pytest.raises(
        JobError, match=r"memory\.weights is too small: this rank needs at least 70B .*of 110B"
    ):
        WeightCache(pages, Loader(), 69)
    cache = WeightCache(pages, Loader(), 70)
    run(cache, [0, 1, 2, 3, 0, 1])
    cache.close()
    with pytest.raises(JobError, match='has no policy "fifo"; it has cycle and lru'):
        WeightCache(pages, Loader(), 70, "fifo")
    assert minimum_budget(plans(30)) == 30
    assert minimum_budget([]) == 0


@pytest.mark.usefixtures("threads")
def test_an_item_is_not_used_after_its_end(tmp_path):
    """Whoever keeps a layer beyond its `with` block keeps no memory, and notices when the layer has gone."""
    model = Tiny(n_layers=3)
    source = open_source(write_hf(tmp_path, model.weights(), model.config()))
    pages = rank_plans(model.model(1), Place(0, 1, 1), source)
    cache = WeightCache(
        pages, BufferLoader(lambda plan, buffer: load(plan, source, buffer)), minimum_budget(pages)
    )
    with cache.use(0) as first:
        first.matrix("q")
    for page in (1, 2, 3):
        with cache.use(page):
            pass
    with pytest.raises(AssertionError, match="layer 0, attention is used after it was dropped"):
        first.matrix("q")
    cache.close()
    source.close()


@pytest.mark.usefixtures("threads")
def test_no_items():
    WeightCache([], Loader(), 0).close()


@pytest.mark.usefixtures("threads")
def test_what_the_loader_raises_is_raised_in_use():
    loader = Loader()
    loader.fail_at = 2
    cache = WeightCache(plans(*[8] * 4), loader, 16)
    run(cache, [0])
    with pytest.raises(OSError, match="page 2 cannot be read"):
        run(cache, [1, 2])
    with pytest.raises(OSError, match="page 2 cannot be read"):
        run(cache, [0])
    cache.close()


@pytest.mark.usefixtures("threads")
def test_an_error_in_a_use_gives_the_item_back():
    cache = WeightCache(plans(*[8] * 4), Loader(), 16)
    for page in [*range(4)] * 2:
        with pytest.raises(KeyError), cache.use(page):
            raise KeyError(page)
    run(cache, [*range(4)] * 2)
    assert cache.counters.peak <= 16
    cache.close()


@pytest.mark.usefixtures("threads")
def test_a_use_that_is_never_entered_costs_nothing():
    cache = WeightCache(plans(*[8] * 4), Loader(), 16)
    for page in range(4):
        cache.use(page)
    run(cache, range(4))
    cache.close()


@pytest.mark.usefixtures("threads")
def test_uses_within_uses():
    cache = WeightCache(plans(*[8] * 4), Loader(), 16)
    with cache.use(0) as a, cache.use(1) as b:
        assert (a.data[0], b.data[0]) == (1, 2)
        with (
            pytest.raises(RuntimeError, match="the pages in use exceed the budget of the weight cache"),
            cache.use(3),
        ):
            pass
    run(cache, [3, 0])
    cache.close()
    roomy = WeightCache(plans(*[8] * 5), Loader(), 32)
    (kept, *_), streamed = roomy.fixed, [i for i in range(5) if i not in roomy.fixed]
    with (
        roomy.use(streamed[0]),
        roomy.use(streamed[1]),
        roomy.use(kept),
        pytest.raises(RuntimeError, match="the pages in use exceed the budget of the weight cache"),
    ):
        run(roomy, [streamed[2]])
    roomy.close()


@pytest.mark.usefixtures("threads")
def test_close_in_the_middle():
    loader = Loader()
    loader.gate.clear()
    cache = WeightCache(plans(*[8] * 4), loader, 16)
    threading.Timer(0.05, loader.gate.set).start()
    cache.close()  # waits for the page that is being loaded
    with pytest.raises(RuntimeError, match="the weight cache is closed"), cache.use(0):
        pass
    cache.close()


@pytest.mark.usefixtures("threads")
def test_close_within_a_use():
    cache = WeightCache(plans(8, 8), Loader(), 16)
    with cache.use(0):
        cache.close()


@pytest.mark.usefixtures("threads")
def test_an_item_used_twice_in_a_row_stays():
    """The head's norm and the head are two uses; reading ahead must not come between them."""
    cache = WeightCache(plans(*[8] * 6), Loader(), 16)
    for _ in range(5):
        for page in range(6):
            run(cache, [page])
            time.sleep(0.002)
            run(cache, [page])
    assert (cache.counters.hits, cache.counters.misses) == (30, 30)
    cache.close()


@pytest.mark.usefixtures("threads")
def test_real_layers_are_the_same_whatever_the_budget(tmp_path):
    model = Tiny(n_layers=5, seed=3)
    source = open_source(write_hf(tmp_path, model.weights(), model.config(), "BF16"), "q8_0")
    pages = rank_plans(model.model(32), Place(0, 1, 1), source)
    seen = []
    for policy, budget in (
        ("cycle", None),
        ("cycle", minimum_budget(pages)),
        ("lru", 2 * minimum_budget(pages)),
    ):
        cache = WeightCache(
            pages, BufferLoader(lambda plan, buffer: load(plan, source, buffer)), budget, policy
        )
        contents = []
        for page in [*range(6)] * 2:
            with cache.use(page) as layer:
                parts = [
                    layer.buffer[entry.offset : entry.offset + entry.nbytes] for entry in layer.plan.entries
                ]
                contents.append(np.concatenate(parts).tobytes())
        cache.close()
        seen.append(contents)
    assert seen[0] == seen[1] == seen[2]
    source.close()
    gc.collect()


@pytest.mark.parametrize(
    "model", [shape(32, 4096, 32, 8, 128, 14336, 128256), shape(80, 8192, 64, 8, 128, 28672, 128256)]
)
@pytest.mark.parametrize("shards", [1, 4])
def test_what_stays_of_large_models_is_nearly_the_budget(model, shards):
    """Models of 8B and 70B, in Q4_0, planned as they lie in packed files."""
    place = Place(shards - 1, 1, shards)
    pages = [page for layer in range(model.n_layers) for page in model.pages(layer)]
    sizes = [
        shard_extent(panels_of(page.tensors, model.max_shards, lambda _: BlockType.Q4_0), place)[2]
        for page in [*pages, model.head]
    ]
    pages, total = plans(*sizes), sum(sizes)
    for share in (0.25, 0.5, 0.75):
        stays = sum(sizes[i] for i in fixed_part(pages, int(share * total)))
        assert share - 0.02 < stays / total <= share
    assert minimum_budget(pages) < 0.08 * total


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("head", "given_up"), [(300, 100), (100, 100), (50, 100)])
def test_more_is_read_ahead_when_one_that_stayed_goes(head, given_up):
    """A page as large as those that are streamed, but not a large head."""
    loader = Loader(parallel=2)
    cache = WeightCache(plans(*[100] * 40, head), loader, 1000)
    pages, before = len(cache.pages), 0  # the threads have begun already
    for gone in (0, given_up):
        streamed = cache.streamed
        run(cache, [*range(pages)] * 3)
        settle(cache)
        fixed = cache.total - streamed
        ahead = cache.counters.loaded - before - 3 * streamed - (0 if gone else fixed)
        assert -(1000 - fixed) <= ahead <= 1000 - fixed
        assert cache.counters.peak <= 1000
        before = cache.counters.loaded
        cache.read_further_ahead()
        assert cache.streamed == streamed + given_up
    cache.close()


@pytest.mark.usefixtures("threads")
def test_a_large_part_is_not_given_up():
    cache = WeightCache(plans(*[100] * 10), Loader(), 500)
    streamed = cache.streamed
    cache.read_further_ahead()
    assert cache.streamed == streamed
    cache.close()


@pytest.mark.usefixtures("threads")
def test_it_reads_further_ahead_if_steps_compute_and_wait():
    for waited, deeper in ((0.01, False), (0.2, True), (0.9, False)):  # of each step of a second
        weights = Weights(plans(*[100] * 40), lambda streamed, small: Loader(), 500)
        fixed = weights.cycle.fixed
        for step in range(8):
            assert (weights.cycle.fixed < fixed) == (deeper and step >= PATIENCE)
            weights.cycle.counters.stall_seconds += waited
            weights.note_step(1.0)
        assert len(weights.cycle.fixed) == len(fixed) - deeper  # by one, once
        weights.close()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("budget", [600, 850])
def test_streamed_pages_of_several_sizes_share_buffers(budget):
    """The same memory serves all of them, for new memory takes long, and its end is not in huge pages."""
    where: list[tuple[int, int]] = []

    def loader(plan: PagePlan, buffer: np.ndarray) -> Item:
        where.append((int(plan.name), buffer.ctypes.data))
        buffer[:] = int(plan.name) + 1
        return Item(buffer)

    cache = WeightCache(plans(*[70, 100, 100, 90] * 6, 300), BufferLoader(loader, 2), budget)
    fixed = cache.fixed
    run(cache, [*range(25)] * 5)
    cache.close()
    assert cache.counters.peak <= budget
    shared = {address for page, address in where if page not in fixed}
    assert 2 <= len(shared) <= (budget - sum(cache.pages[page].nbytes for page in fixed)) // 100


@pytest.mark.parametrize("nbytes", [HUGE // 3, HUGE + 10 * 4096, 3 * HUGE - 100])
def test_the_plan_counts_what_equal_buffers_take_beyond_the_budget(nbytes, monkeypatch):
    """They end with a whole huge page, and each of them with a whole sector."""
    taken: list[int] = []

    def buffer(size: int, alignment: int) -> Bytes:
        taken.append(size)
        return new_buffer(size, alignment)

    monkeypatch.setattr("mpillm.weights.io.reading.new_buffer", buffer)
    pages = plans(*[nbytes] * 12)
    for budget in (7 * nbytes, 7 * nbytes + nbytes // 2):
        taken.clear()
        cache = WeightCache(pages, BufferLoader(lambda _, buffer: Item(buffer), 2), budget)
        rest = budget - len(cache.fixed) * nbytes
        cache.close()
        assert rest // nbytes * nbytes < taken[0] <= rest + beyond_budget(pages, budget, "cycle")
    assert beyond_budget(pages, 12 * nbytes, "cycle") == beyond_budget(pages, None, "cycle") == 0


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("policy", ["cycle", "lru"])
@pytest.mark.parametrize("budget", [200, 350, 1000])
def test_several_loads_at_a_time(policy, budget):
    """The next page is on its way before this one is there, and the budget holds all the same."""
    loader = Loader(0.001, parallel=3)
    cache = WeightCache(plans(*[100] * 10), loader, budget, policy)
    run(cache, [*range(10)] * 6)
    assert cache.counters.hits + cache.counters.misses == 60
    assert cache.counters.loaded == cache.counters.loads * 100
    assert cache.counters.peak <= budget
    cache.close()
