"""As many replicas as hosts can hold the model, as memory, the KV cache and requests justify, and the reason."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

import pytest

from mpillm import spec
from mpillm.comm.free_memory import free_memory
from mpillm.errors import JobError, LayoutError
from mpillm.model.opening import config_of, open_source
from mpillm.partition.replicas import Replica
from mpillm.planning import hosts, layout, plan, plan_text
from mpillm.planning.input_needs import InputNeeds
from mpillm.planning.layout_plans import Chosen
from mpillm.planning.machines import Machines
from mpillm.planning.planner import Planner
from mpillm.planning.speed import ASSUMED, Speed
from tests.model.golden import model_path

MODEL = model_path("llama3")
PLENTY = 8 * 2**30


def chosen(
    per_host: list[int],
    *overrides: str,
    free: list[int] | None = None,
    requests: int | None = 100,
    shards: int | None = None,
) -> Chosen:
    job = spec.load(None, overrides, model=str(MODEL), input="in", output="out")
    machines = Machines(per_host, free or [PLENTY] * sum(per_host))
    with closing(open_source(MODEL, job.quantize)) as source:
        config = config_of(source)
        layouts = layout.Layouts(job, Planner(source, config), job.layout.replicas, requests, shards)
        return layouts.choose(machines).chosen


def shapes(found: Chosen) -> list[tuple[int, int]]:
    return [(replica.stages, replica.shards) for replica in found.replicas]


@pytest.mark.parametrize(
    ("per_host", "overrides", "expected"),
    [
        ([4], [], [(1, 4)]),  # as ever on one host
        ([1, 1, 1], [], [(1, 1)] * 3),
        ([2, 2], [], [(1, 2)] * 2),
        ([2, 1], [], [(2, 1), (1, 1)]),
        ([1, 1, 1], ["layout.stages=3"], [(3, 1)]),
        ([1, 1], ["layout.shards=2"], [(1, 2)]),
        ([1, 1], ["layout.replicas=1"], [(2, 1)]),
        ([1, 1], ["wire.between_stages=q8_0"], [(2, 1)]),
        ([4] * 64, [], [(1, 4)] * 64),  # more ranks than one copy can be cut into
    ],
)
def test_a_host_is_a_replica(
    per_host: list[int], overrides: list[str], expected: list[tuple[int, int]]
) -> None:
    assert shapes(chosen(per_host, *overrides)) == expected


def test_requests_and_memory_are_the_limit() -> None:
    few = chosen([1] * 4, requests=2)
    assert (len(few.replicas), few.reason) == (
        2,
        "each holds the whole model in memory; there are no more requests",
    )
    assert len(chosen([1] * 3, requests=1).replicas) == 1
    tight = chosen([1, 1, 1], free=[PLENTY, 2**20, PLENTY])
    assert len(tight.replicas) == 1
    assert "rank 1 would hold " in tight.reason
    assert tight.reason.endswith("1.0 MiB are free")
    share = plan.make(spec.load(None, [], model=str(MODEL), input="in", output="out"), 1).ranks[0]
    paged = f"memory.weights={share.weights_share - 1}"
    assert "read weights from disk in each step" in chosen([1, 1], paged).reason
    assert len(chosen([1, 1], f"memory.weights={share.weights_share}").replicas) == 2
    # A replica's cache must hold a request as long as memory.max_context allows; stages hold a part of each token's.
    cache = f"memory.kv={share.kv_token * 256}"
    assert "the KV cache of each would hold 256 tokens" in chosen([1, 1], cache).reason


def test_shards_of_an_earlier_run_are_kept_where_they_work() -> None:
    assert shapes(chosen([2, 2], shards=1)) == [(2, 1)] * 2
    assert shapes(chosen([2, 2], shards=16)) == [(1, 2)] * 2
    with pytest.raises(LayoutError, match="cannot be laid out on 7 ranks"):
        chosen([7])


@pytest.mark.parametrize("times", [1.0, 3.0])
def test_the_cache_of_a_replica_is_planned_for_its_share(times: float, tmp_path: Path) -> None:
    """Of 40 alike lines, each with blocks of its own; the second host is so many times as slow."""

    def held(count: int, settings: tuple[str, ...] = (), speeds: tuple[Speed, ...] = ()) -> list[int]:
        (tmp_path / "in").write_text("".join(f'{{"prompt": {[n + 5] * 40}}}\n' for n in range(count)))
        job = spec.load(None, settings, model=str(MODEL), input=str(tmp_path / "in"), output="out")
        ranks = len(speeds) or 1
        machines = Machines([1] * ranks, [sys.maxsize] * ranks, speeds=speeds)
        return [rank.kv_held for rank in plan.make(job, ranks, machines).ranks]

    settings = "layout.replicas=2", "memory.max_context=200", "sampling.max_tokens=20"
    first, second = held(40, settings, (ASSUMED, ASSUMED.slowed(times)))
    assert [first + second] == held(40, settings[1:])
    assert first == second if times == 1 else first > 2 * second


def test_hosts_on_paper(tmp_path: Path) -> None:
    path = tmp_path / "hosts.toml"
    path.write_text(
        '[[hosts]]\nname = "pi"\ncount = 3\nmemory = "4GiB"\n[[hosts]]\nranks = 2\nmemory = "6GiB"\n'
    )
    assert hosts.read(path) == Machines([1, 1, 1, 2], [4 * 2**30] * 3 + [3 * 2**30] * 2)
    assert hosts.read(path, 4) == Machines([1, 1, 1, 1], [4 * 2**30] * 3 + [6 * 2**30])
    job = spec.load(None, [], model=str(MODEL), input="in", output="out")
    text = plan_text.as_text(plan.make(job, 4, hosts.read(path, 4)))
    assert "layout    4 replicas of 1 stage x 1 shard on 4 ranks\n" in text
    assert "          each holds the whole model in memory\n" in text
    for wrong, words in [
        ("[[hosts]]\n", "missing required field `memory`"),
        ('[[hosts]]\nmemory = "much"\n', "much"),
        ("[[hosts]\n", "is wrong"),
        ('[[hosts]]\nmemory = "1GiB"\nspeed = 3\n', "speed"),
        ('[[hosts]]\nmemory = "1GiB"\n', "have 1 rank, not 4"),
    ]:
        path.write_text(wrong)
        with pytest.raises(JobError, match=words):
            hosts.read(path, 4)


def test_one_answer_on_four_replicas_has_the_cores_of_the_others(tmp_path: Path) -> None:
    """Four share two cores: it takes half of the time that four answers take."""
    path = tmp_path / "hosts.toml"
    path.write_text('[[hosts]]\nranks = 4\ncores = 2\nmemory = "6GiB"\n')
    seconds = []
    for count in (1, 4):
        (tmp_path / "in").write_text(count * '{"prompt": [5, 6], "max_tokens": 9}\n')
        job = spec.load(
            None, ["layout.replicas=4"], model=str(MODEL), input=str(tmp_path / "in"), output="out"
        )
        made = plan.make(job, 4, hosts.read(path))
        assert "          a step of 1 sequence takes " in plan_text.as_text(made)
        seconds.append(made.time.seconds)
    assert seconds[0] == pytest.approx(seconds[1] / 2)


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_what_every_group_above_allows(version: int, tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    line = "5:memory:/job/step\n" if version == 1 else "0::/job/step\n"
    (tmp_path / "proc/self/cgroup").write_text(line)
    mount = tmp_path / "sys/fs/cgroup" / ("memory" if version == 1 else "")
    names = ("limit_in_bytes", "usage_in_bytes") if version == 1 else ("max", "current")
    prefix = "total_" if version == 1 else ""
    for group, limit, used in [("job", 5000, 3000), ("job/step", 9000, 1000)]:
        (mount / group).mkdir(parents=True)
        for name, value in zip(names, (limit, used), strict=True):
            (mount / group / f"memory.{name}").write_text(f"{value}\n")
        (mount / group / "memory.stat").write_text(f"{prefix}inactive_file 200\n{prefix}active_file 50\n")
    assert free_memory(tmp_path) == 5000 - 3000 + 250
    unlimited = "max" if version == 2 else str(2**63 - 4096)
    for group in ("job", "job/step"):
        (mount / group / f"memory.{names[0]}").write_text(unlimited)
    assert 2**20 < free_memory(tmp_path) < 2**50


@pytest.mark.parametrize(
    ("model", "settings", "stacked"),
    [
        ("llama3", (), True),
        ("llama3", ("memory.weights=90KiB",), False),
        ("qwen3_moe", (), False),
        ("falcon_h1", (), False),
        ("olmo2", (), False),  # q and k are normalised over the heads of both shards
    ],
)
def test_layers_that_are_one_operation(model: str, settings: tuple[str, ...], stacked: bool) -> None:
    """As in `Decoder`: layers in memory, without experts and states; their rows may go in lanes."""
    asked = spec.load(None, settings, model=str(model_path(model)), input="in", output="out")
    with closing(open_source(model_path(model))) as source:
        replicas = (Replica(0, 1, 2),)
        [made] = Planner(source, config_of(source)).replicas(
            asked, replicas, InputNeeds(), Machines([2], [0, 0]), [1.0]
        )
    assert [work.stacked for work in made.works] == [stacked] * 2
    assert [work.apart for work in made.works] == [not stacked] * 2
