"""The search for a layout: on clusters made by hand, beside all layouts one by one, and beside fewer ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillm import spec
from mpillm.errors import Interrupted, LayoutError
from mpillm.model.opening import config_of, open_source
from mpillm.partition.replicas import Replica
from mpillm.planning import stage_time
from mpillm.planning.estimate import DEAR, demand_of, estimate, replica_shares
from mpillm.planning.hosts import Host, machines_of
from mpillm.planning.input_needs import InputNeeds
from mpillm.planning.job_time import Demand
from mpillm.planning.layout import CLEARLY, Layouts, _compared
from mpillm.planning.layout_plans import Found
from mpillm.planning.machines import Machines
from mpillm.planning.placement import Placement
from mpillm.planning.planner import Planner
from mpillm.planning.search import HAND_OVER_UNSEEN, LEAVE_OUT, for_run, search, shards_may_save
from mpillm.planning.speed import Speed
from mpillm.planning.step_time import RankWork, StepRows, StepTime
from tests.sparse import llama

LAYERS = 8
FAST, SLOW = (4.0, 8.0, 12.0), (1.0, 2.0, 3.0)  # 10^9 operations/s
LAN = {"latency_us": 100.0, "mbit": 1000.0}
PLENTY = "8GiB"


@pytest.fixture(scope="module", autouse=True)
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A model of 240 MB, as all tests here plan it."""
    path = llama(tmp_path_factory.mktemp("search") / "model", LAYERS, 1024, 16, 4, 4096, 8192)
    with closing(open_source(path)) as source:
        _planners.append(Planner(source, config_of(source)))
        yield
        _planners.clear()


_planners: list[Planner] = []


def layouts(*settings: str, requests: int = 64) -> Layouts:
    job = spec.load(None, ("memory.kv=64MiB", *settings), model="model", input="in", output="out")
    asked = InputNeeds(
        requests, requests, prompt_tokens=64 * requests, generated_tokens=64 * requests, blocks=None
    )
    return Layouts(job, _planners[0], job.layout.replicas, requests, asked=asked)


def host(products: tuple[float, ...], memory: str | int = PLENTY, **more: object) -> Host:
    return Host(memory=memory, products={"f32": list(products)}, **{**LAN, **more})  # type: ignore[arg-type]


def shapes(found: Found) -> list[tuple[int, int]]:
    return [(replica.stages, replica.shards) for replica in found.chosen.replicas]


def each_alone(asked: Layouts, machines: Machines) -> Iterator[Found]:
    """The layouts that a user can ask for, one by one."""
    for replicas in range(1, len(machines.ranks_per_host) + 1):
        for shards in (1, 2, 4):
            settings = f"layout.replicas={replicas}", f"layout.shards={shards}"
            one = layouts(*settings, requests=asked.requests or 0)
            with suppress(LayoutError):
                found = one.choose(machines)
                if found.fits:
                    yield found


def tight(requests: int) -> int:
    """Bytes of a host that holds two thirds of the model."""
    whole = layouts(requests=requests).choose(machines_of([host(FAST)])).plans[0].ranks[0]
    return whole.held - whole.weights_share // 3


CLUSTERS = {
    "one fast and three slow": [host(FAST), host(SLOW), host(SLOW), host(SLOW)],
    "a slow network": [host(FAST, mbit=1.0, latency_us=5000.0)] * 4,
    "a fast network": [host(FAST, mbit=100_000.0, latency_us=2.0)] * 4,
    "hosts of two ranks": [host(FAST, ranks=2)] * 3,
    "one far away": [host(FAST), host(FAST), host(FAST, mbit=0.5, latency_us=1e5)],
}


@pytest.mark.parametrize("requests", [1, 3, 200])
@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("small", [False, True])
def test_it_is_about_the_best_of_all_layouts(cluster: str, requests: int, small: bool) -> None:
    machines = machines_of(CLUSTERS[cluster])
    if small:  # no rank holds the model alone
        machines = replace(machines, free=[tight(requests)] * machines.ranks)
    asked = layouts(requests=requests)
    found, without = search(asked, machines, needed=1)
    all_of_them = list(each_alone(asked, machines))
    assert all_of_them
    assert found.fits
    assert 0 not in without
    minimum = min(other.time.seconds for other in all_of_them)
    assert found.time.seconds <= CLEARLY * LEAVE_OUT * minimum


def test_what_is_chosen_and_why() -> None:
    found, without = search(layouts(), machines_of([host(FAST)] * 3))
    assert (shapes(found), without) == ([(1, 1)] * 3, [])
    assert found.chosen.reason == "each holds the whole model in memory"
    assert found.chosen.compared.startswith("as good as any of 3 layouts tried; 2 replicas ")
    # One request is computed by one host, unless the network is so fast that shards pay.
    far = host(FAST, mbit=1.0)
    found, without = search(layouts(requests=1), machines_of([far] * 3))
    assert (shapes(found), len(without)) == ([(1, 1)], 2)
    near = host(FAST, mbit=100_000.0, latency_us=1.0)
    found, without = search(layouts(requests=1), machines_of([near] * 4))
    assert (shapes(found), without) == ([(1, 4)], [])
    assert found.chosen.compared.startswith("the best of ")
    assert found.chosen.wire == "f32"
    # A host that would need longer for one request than the others for all of them only keeps them waiting.
    crawling = host((0.01, 0.02, 0.03))
    found, without = search(layouts(requests=8), machines_of([far, far, crawling]))
    assert (shapes(found), without) == ([(1, 1)] * 2, [2])


def test_a_large_host_alone_and_small_ones_together() -> None:
    """Memory decides which neighbours are a replica."""
    large, small = host(FAST), host(FAST, memory=tight(64))
    for cluster, expected in [
        ([small, small, large], [(2, 1), (1, 1)]),
        ([large, small, small], [(1, 1), (2, 1)]),
        ([large, small, small, large], [(1, 1), (2, 1), (1, 1)]),
    ]:
        found, without = search(layouts(), machines_of(cluster))
        assert (shapes(found), without) == (expected, [])


def test_a_run_leaves_out_the_hosts_that_slow_it_down() -> None:
    """Here a pipeline is asked for, and one stage would crawl."""
    asked = layouts("layout.replicas=1", "layout.shards=1")
    crawling = (0.01, 0.02, 0.03)
    machines = machines_of([host(FAST, name="one"), host(crawling, name="two"), host(FAST, name="three")])
    found, without, said = for_run(asked, machines)
    assert (shapes(found), without) == ([(2, 1)], [1])
    assert said.startswith("two is left out and kept in reserve: by the estimated time of a step the run is ")
    assert said.endswith(" times as fast without it.")
    # Rank 0's host is needed, however slow it is; so is one whose values go by the numbers of the ranks.
    first = machines_of([host(crawling, name="one"), host(FAST, name="two")])
    assert for_run(asked, first)[1:] == ([], "")
    numbered = layouts("layout.replicas=1", "layout.shards=1", "layout.threads=[1, 1, 1]")
    assert for_run(numbered, machines)[1:] == ([], "")
    many = machines_of([host(FAST, name="one"), host(crawling, name="old", count=15)])
    found, without, said = for_run(layouts("layout.replicas=1"), many)
    assert (len(without), "and 13 other hosts are left out and kept in reserve" in said) == (15, True)
    alike = machines_of([host(FAST, count=3)])
    assert for_run(layouts(), alike)[1:] == ([], "")
    assert for_run(asked, replace(machines, speeds=()))[1:] == ([], "")


def test_a_host_that_takes_long_to_get_ready_is_left_out_of_a_short_job() -> None:
    """A quota slows down the start as much as the steps; memory that comes slowly delays the weights."""
    for late in (host(FAST, name="late", core=0.004), host(FAST, name="late", fill_gbs=0.002)):
        machines = machines_of([host(FAST, name="here"), late])
        for requests, expected in ((8, [1]), (10_000, [])):
            found, without, said = for_run(layouts("memory.loader=read", requests=requests), machines)
            assert (len(shapes(found)), without) == (2 - len(expected), expected), (late, requests)
            assert said.startswith("late is left out") == bool(expected)
    half = machines_of([host(FAST), host(SLOW, name="slow")])
    asked = layouts(requests=1000)
    assert for_run(asked, half, worth=1.15)[1] == for_run(asked, half)[1] == []
    _, without, said = for_run(asked, half, worth=1.3)
    assert (without, "slow is left out" in said, "is hardly faster with it" in said) == ([1], True, True)


def test_what_is_alike_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many hosts there are, with links as they are or faster ones."""
    calls, rank_time = list[int](), stage_time.rank_time

    def counted(work: RankWork, speed: Speed, batch: StepRows) -> StepTime:
        calls.append(1)
        return rank_time(work, speed, batch)

    monkeypatch.setattr(stage_time, "rank_time", counted)

    def computed(hosts: int) -> int:
        calls.clear()
        settings = f"layout.replicas={hosts // 4}", "layout.shards=2", "wire.activations=f32"
        alike = machines_of([host(FAST, count=hosts)])
        for machines in (alike, alike.with_faster_network(2)):
            layouts(*settings, requests=16 * hosts).choose(machines)
        return len(calls)

    assert computed(32) == computed(8) > 0


def test_replicas_share_requests_so_that_they_end_together() -> None:
    def shared(machines: Machines, *settings: str, requests: int = 64) -> tuple[list[float], list[float]]:
        """The shares, and the seconds that each replica takes for its own."""
        asked = layouts(*settings, requests=requests)
        found, demand = asked.choose(machines), demand_of(asked.asked)
        assert demand is not None
        with_plans = zip(found.chosen.replicas, found.plans, strict=True)
        config, known = _planners[0].config, found.machines
        made = replica_shares(
            Placement(asked.spec, config, known, found.chosen.replicas, found.plans), demand
        )
        own = [Demand(round(part * requests), part * demand.prompt, part * demand.generated) for part in made]
        times = [
            estimate(Placement(asked.spec, config, known, [replica], [plan]), part).seconds
            if part.requests
            else 0.0
            for (replica, plan), part in zip(with_plans, own, strict=True)
        ]
        return made, times

    three = "layout.replicas=3", "layout.shards=1", "wire.activations=f32"
    for requests in (12, 64, 1000):
        made, times = shared(machines_of([host(FAST), host(SLOW), host(FAST)]), *three, requests=requests)
        assert sum(made) == pytest.approx(1)
        assert made[0] == made[2]
        # A step takes little less time for few answers than for many: a slow replica gets less than by its rate.
        assert 3 * made[1] < made[0]
        assert times[1] < 1.1 * times[0]
    alike = machines_of([host(FAST), host((3.9, 7.7, 11.6)), host(FAST)])  # as far as can be measured
    assert shared(alike, *three)[0] == [1 / 3] * 3
    unknown = replace(machines_of([host(FAST)] * 3), speeds=())
    assert shared(unknown, *three)[0] == [1 / 3] * 3


hosts = st.builds(
    host,
    st.sampled_from([FAST, SLOW, (0.1, 0.2, 0.2), (100.0, 400.0, 800.0)]),
    memory=st.sampled_from([PLENTY, PLENTY, 400 * 2**20]),
    ranks=st.sampled_from([1, 1, 2]),
    latency_us=st.sampled_from([1.0, 100.0, 20_000.0]),
    mbit=st.sampled_from([0.1, 10.0, 1000.0, 100_000.0]),
)


@settings(max_examples=25)
@given(
    st.lists(hosts, min_size=2, max_size=4),
    st.one_of(st.integers(1, 6), st.sampled_from([40, 1000])),
    st.booleans(),
)
def test_more_ranks_are_never_slower_than_fewer(cluster: list[Host], requests: int, glimpsed: bool) -> None:
    """Nor do more replicas compute than there are requests, or more hosts wait than one whose replica has none."""
    asked, before = layouts(requests=requests), None
    for count in range(1, len(cluster) + 1):
        machines = replace(machines_of(cluster[:count]), glimpsed=glimpsed)
        found, without, _ = for_run(asked, machines)
        idle = found.time.idle
        assert len(found.chosen.replicas) - len(idle) <= requests
        assert set(idle) <= {0}
        assert len(found.machines.ranks_per_host) + len(without) == count
        if before is not None and before.fits:
            assert found.fits
            # What is only glimpsed must be clearly faster.
            handed = 1.0 if not glimpsed else HAND_OVER_UNSEEN
            assert found.cost <= max(LEAVE_OUT * CLEARLY**2, handed) * before.cost
        before = found


def test_what_shards_may_save_decides_whether_a_network_is_measured() -> None:
    """Nothing, where the network would have to be far better than it is assumed."""
    for latency, saved in ((200_000.0, False), (60.0, True)):
        machines = machines_of([host(SLOW, latency_us=latency)] * 3)
        found = shards_may_save(layouts(requests=1), replace(machines, glimpsed=True))
        assert (found > 0) == saved
        alone = layouts(requests=1).choose(machines.without([1, 2])).cost
        assert found < alone / 2  # that of two hosts; the third one cannot be a shard


@pytest.mark.parametrize(("hosts_of", "ranks"), [(256, 1), (32, 8)])
def test_hundreds_of_ranks_are_laid_out_on_paper(hosts_of: int, ranks: int) -> None:
    found, without = search(layouts(requests=100_000), machines_of([host(FAST, ranks=ranks, count=hosts_of)]))
    assert not without
    assert sum(stages * shards for stages, shards in shapes(found)) == hosts_of * ranks
    assert len(found.chosen.replicas) >= hosts_of


def test_q8_0_must_be_clearly_faster_than_every_exact_layout() -> None:
    """However the job could be laid out, and with fewer hosts; and a run that keeps to f32 does not take it."""
    fast, slow = (machines_of([host(FAST, mbit=mbit)] * 2) for mbit in (1000.0, 100.0))
    assert for_run(layouts(requests=1), fast)[0].chosen.wire == "f32"
    found, _, _ = for_run(layouts(requests=1), slow)
    assert (shapes(found), found.chosen.wire, found.chosen.inexact) == ([(1, 2)], "q8_0", True)
    exact, _, _ = for_run(layouts("wire.activations=f32", requests=1), slow)
    assert exact.time.seconds > DEAR * found.time.seconds
    many, _, _ = for_run(layouts(requests=64), slow)
    assert (shapes(many), many.chosen.wire) == ([(1, 1)] * 2, "f32")


def test_a_layout_that_is_hardly_faster_is_not_said_to_be_slower() -> None:
    """The rule's layout is kept where another one is less than CLEARLY times as fast."""

    def found(seconds: float, stages: int) -> Found:
        made = SimpleNamespace(
            chosen=SimpleNamespace(replicas=(Replica(0, stages, 1),)),
            fits=True,
            time=SimpleNamespace(seconds=seconds),
        )
        return cast(Found, made)

    best, other = found(1.0, 1), found(0.99, 2)
    equal = found(1.004, 2)
    assert _compared(best, [best, equal]).endswith("would take about as long")
    assert _compared(best, [best, other]).endswith("2 stages x 1 shard would take about as long")
    assert _compared(other, [best, other]).endswith("would take 1.01 times as long")


def test_a_stop_is_not_taken_for_a_layout_that_is_impossible(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal may come while hosts are left out on trial."""

    def choose(of: Layouts, machines: Machines) -> Found:
        if len(machines.ranks_per_host) < 3:
            raise Interrupted("Stopped by SIGINT.")
        return found(of, machines)

    found = Layouts.choose
    monkeypatch.setattr(Layouts, "choose", choose)
    hosts = machines_of([Host(memory=PLENTY, count=3, products={"q4_0": list(FAST)}, **LAN)])
    with pytest.raises(Interrupted):
        search(layouts(), hosts)
