"""The layout of a run on eight clusters with three models, beside every layout on every part of their hosts.

Where the network is slow, shards may send Q8_0, if that is 5 % faster than every exact layout.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace

import msgspec
import pytest

from mpillm import spec
from mpillm.comm.parts import CROWDED_ADDER
from mpillm.errors import LayoutError
from mpillm.model.opening import config_of, open_source
from mpillm.planning import pace
from mpillm.planning.hosts import Host, machines_of
from mpillm.planning.input_memory import InputNeeds
from mpillm.planning.layout import Layouts
from mpillm.planning.layout_plans import Found
from mpillm.planning.machines import Machines
from mpillm.planning.planner import Planner
from mpillm.planning.search import for_run
from tests.sparse import llama

NEAR = 1.05  # times as long as the best of all
# layers, hidden, heads, KV heads, width, vocabulary
MODELS = {
    "0.1B": (12, 768, 12, 4, 2048, 16000),
    "1B": (16, 2048, 32, 8, 5632, 32000),
    "8B": (32, 4096, 32, 8, 14336, 128256),
}


def host(speed: float, **more: object) -> Host:
    """A host that is so many times as fast as a Raspberry Pi 5."""
    products = {kind: [8.0 * speed, 15.0 * speed, 20.0 * speed] for kind in ("bf16", "f32")}
    usual = {"memory": "32GiB", "memory_gbs": 10.0 * speed, "mbit": 940.0, "latency_us": 80.0, "core": 0.4}
    return Host(products=products, **{**usual, **more})  # type: ignore[arg-type]


CLUSTERS = {
    "four alike": [host(1)] * 4,
    "two on a slow network": [host(1, mbit=94.0, latency_us=400.0)] * 2,
    "a fast one first": [host(6), host(1), host(1)],
    "a fast one last": [host(1), host(1), host(6)],
    "a host at a third of the speed": [host(1), host(1), host(0.33)],
    "two ranks on each": [host(2, ranks=2)] * 3,
    "slow disks, fast network": [host(2, disk_gbs=0.05, mbit=10_000.0, latency_us=10.0)] * 3,
    "one has little memory, one is far away": [
        host(2),
        host(2, memory="2GiB"),
        host(2, mbit=5.0, latency_us=20_000.0),
    ],
}


@pytest.fixture(scope="module", params=MODELS)
def planner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planner]:
    path = llama(tmp_path_factory.mktemp("clusters") / "model", *MODELS[request.param])
    with closing(open_source(path)) as source:
        yield Planner(source, config_of(source))


def layouts(planner: Planner, requests: int, *settings: str, answer: int = 64) -> Layouts:
    job = spec.load(None, ("memory.kv=1GiB", *settings), model="model", input="in", output="out")
    asked = InputNeeds(
        requests, requests, prompt_tokens=64 * requests, generated_tokens=answer * requests, blocks=None
    )
    return Layouts(job, planner, job.layout.replicas, requests, asked=asked)


def parts(machines: Machines) -> Iterator[Machines]:
    """All of the machines, and every part of them with the first host."""
    others = range(1, len(machines.ranks_per_host))
    for count in range(len(others) + 1):
        for without in itertools.combinations(others, count):
            yield machines.without(without)


def each_alone(
    planner: Planner, requests: int, machines: Machines, cuts: Sequence[int] = (1, 2, 4)
) -> Iterator[float]:
    """The cost of each number of replicas and shards that a user can ask for."""
    for replicas, shards in itertools.product(range(1, len(machines.ranks_per_host) + 1), cuts):
        settings = f"layout.replicas={replicas}", f"layout.shards={shards}"
        with suppress(LayoutError):
            found = layouts(planner, requests, *settings).choose(machines)
            if found.fits:
                yield found.cost


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_run_takes_about_as_long_as_with_the_best_of_all_layouts(planner: Planner, cluster: str) -> None:
    """All of the time counts: loading weights as well as steps; and no run is slower than on fewer hosts."""
    machines = machines_of(CLUSTERS[cluster])
    for requests in (1, 32, 1000):
        found, _, _ = for_run(layouts(planner, requests), machines)
        assert found.fits
        best = min(cost for part in parts(machines) for cost in each_alone(planner, requests, part))
        assert found.cost <= NEAR * best


@pytest.mark.parametrize(
    "planner", ["0.1B"], indirect=True
)  # jobs with others are long enough to be measured
@pytest.mark.parametrize(
    ("paces", "loads", "used"),
    [
        ((1.0, 1.0), (), {1: 1, 16: 2}),
        ((1.0, 0.33), (), {1: 1, 32: 1, 256: 2}),  # for whose imports and start the others would wait
        ((0.33, 1.0, 1.0), (), {1: 2, 2: 3}),  # rank 0 only distributes the lines
        ((0.6, 1.0, 1.0), (), {1: 1, 64: 3}),  # not worth it
        ((1.0, 1.0, 1.0, 0.2), (), {1: 1, 64: 3}),
        ((0.5,) * 4, [("one machine", 0.5)] * 4, {1: 1, 64: 2}),  # containers that share two cores
    ],
)
def test_a_short_run_looks_how_fast_cores_are(
    planner: Planner,
    paces: tuple[float, ...],
    loads: Sequence[tuple[str, float]],
    used: dict[int, int],
) -> None:
    """Where it is too short to measure more: so many hosts compute, and it takes as long as with the best part."""
    hosts = [1] * len(paces)
    speeds = list(pace.by_pace(paces, hosts))
    machines = Machines(hosts, [2**33] * len(hosts), speeds=speeds, glimpsed=True, loads=loads)
    for requests, count in used.items():
        found, without, _ = for_run(layouts(planner, requests), machines, 1.15)
        assert len(hosts) - len(without) == count
        assert {replica.shards for replica in found.chosen.replicas} == {1}  # the network is not known
        best = min(cost for part in parts(machines) for cost in each_alone(planner, requests, part, (1,)))
        assert found.cost <= (1.15 if paces[0] == max(paces) or count > 1 else 2.0) * best


def test_those_who_share_a_machine_have_its_cores_alone_without_the_others() -> None:
    speeds = list(pace.by_pace((0.5, 0.5, 1.0), [1, 1, 1]))
    loads = [("a", 0.5), ("a", 1.5), ("b", 1.0)]
    machines = Machines([1, 1, 1], [2**33] * 3, speeds=speeds, loads=loads)
    assert [speed.core for speed in machines.of_ranks([0, 2]).speeds] == [1.0, 1.0]
    assert [speed.core for speed in machines.of_ranks([1, 2]).speeds] == [0.5 / 0.75, 1.0]
    assert machines.of_ranks([0, 1, 2]).speeds == speeds
    assert [speed.core for speed in machines.of_ranks([1]).of_ranks([0]).speeds] == [0.5 / 0.75]


@pytest.mark.parametrize("planner", ["0.1B"], indirect=True)
def test_hosts_that_share_cores_compute_one_answer_in_turn(planner: Planner) -> None:
    """Of four containers on two cores, measured while all compute.

    One stage works at a time and has a core of its own: all stages take about as long as one host would. Two shards
    have cores of their own while the others wait. Four have not, and each sum waits for their turns.
    """
    apart = machines_of([host(1.0)] * 4)
    half = replace(apart, speeds=[apart.speeds[0].slowed(2)] * 4)
    shared = replace(half, loads=[("one machine", 0.5)] * 4)

    def step(machines: Machines, stages: int, shards: int) -> float:
        words = "layout.replicas=1", f"layout.stages={stages}", f"layout.shards={shards}"
        return 1 / layouts(planner, 1, *words).choose(machines).time.decode_one

    assert step(half, 4, 1) > 1.5 * step(apart, 4, 1)
    assert step(shared, 4, 1) == pytest.approx(step(apart, 4, 1))
    turns = 2 * planner.config.n_layers * CROWDED_ADDER
    assert step(shared, 2, 2) == pytest.approx(step(apart, 2, 2) + turns)
    assert step(shared, 1, 4) > step(half, 1, 4) + 2.5 * turns


@pytest.mark.parametrize("planner", ["0.1B"], indirect=True)
def test_replicas_without_a_request_leave_their_cores_to_the_others(planner: Planner) -> None:
    """Four share two cores; with cores of their own, all take as long as one."""
    apart = machines_of([host(1.0)] * 4)
    half = replace(apart, speeds=[apart.speeds[0].slowed(2)] * 4)
    shared = replace(half, loads=[("one machine", 0.5)] * 4)
    crowded = machines_of([host(2.0, ranks=4, cores=2)])

    def seconds(machines: Machines, requests: int) -> float:
        return layouts(planner, requests, "layout.replicas=4").choose(machines).time.seconds

    assert seconds(shared, 1) == pytest.approx(seconds(apart, 4))
    for machines in (shared, crowded):
        for requests, times in {2: 1.0, 3: 1.5, 4: 2.0}.items():
            assert seconds(machines, requests) == pytest.approx(times * seconds(machines, 1))
    assert seconds(half, 1) == seconds(half, 4)  # machines of their own


def test_hosts_with_a_quota_compute_one_answer_as_stages(planner: Planner) -> None:
    """Each has a quarter of a core, which is a whole one while the others compute; a slow core is none.

    A stage of a larger model computes for longer than a quota's period, and is stopped as shards are.
    """
    slow = host(0.25, mbit=94.0, latency_us=100.0, core=0.1)
    quotas, cores = (machines_of([msgspec.structs.replace(slow, part=part)] * 4) for part in (0.25, 1.0))
    one, small = layouts(planner, 1, answer=256), planner.config.n_layers == MODELS["0.1B"][0]
    found, _, _ = for_run(one, quotas)
    assert shape(found) == ((4, 1) if small else (1, 4))
    if small:
        whole, _, _ = for_run(one, machines_of([slow]))
        assert found.time.decode > 3 * whole.time.decode
    found, _, _ = for_run(one, cores)
    assert shape(found) == (1, 4)
    many, _, _ = for_run(layouts(planner, 1000), quotas)
    assert len(many.chosen.replicas) == 4


def shape(found: Found) -> tuple[int, int]:
    """The stages and shards of its only replica."""
    (replica,) = found.chosen.replicas
    return replica.stages, replica.shards
