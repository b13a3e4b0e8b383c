"""What ranks know of the machines that they are on."""

from __future__ import annotations

import pytest

from mpillm.comm.cores import Cores
from mpillm.comm.faults import Process
from mpillm.comm.nodes import Nodes, RankInfo


@pytest.mark.parametrize(
    ("boots", "crowded"),
    [("aaaa", True), ("aabb", False), ("aaab", True), (("", "", "", ""), False)],
    ids=str,
)
def test_containers_of_one_machine_share_its_cores(boots: str, crowded: bool) -> None:
    """Two cores each, and ranks 0 and 3; others on their machines count too."""
    cores = Cores(frozenset({0, 1}))
    ranks = [RankInfo(f"box{n}", boot, cores, Process(n, 0.0, 0), 1, "", 0.0) for n, boot in enumerate(boots)]
    assert Nodes(0, ranks).crowded([0, 3]) == crowded


@pytest.mark.parametrize(
    ("ranks", "cores", "threads", "used"),
    [
        (4, Cores(frozenset(range(2))), "auto", [0, 1]),
        (2, Cores(frozenset(range(2))), "auto", [0, 1]),
        (4, Cores(frozenset(range(16)), 2.5, "group"), "auto", [0, 1]),
        (8, Cores(frozenset(range(6))), "auto", [0, 1]),  # with three threads each
        (8, Cores(frozenset(range(6))), 1, [0, 1, 2, 3]),
        (4, Cores(frozenset(range(3))), "auto", [0]),
        (3, Cores(frozenset({0})), "auto", [0]),
    ],
)
def test_ranks_that_have_cores(ranks: int, cores: Cores, threads: int | str, used: list[int]) -> None:
    """As few cores as possible are idle. Behind these ranks, another host with a rank."""
    own = [RankInfo("a", "a", cores, Process(n, 0.0, 0), 1, "", 0.0) for n in range(ranks)]
    nodes = Nodes(0, [*own, RankInfo("b", "b", Cores(frozenset({0})), Process(9, 0.0, 0), 1, "", 0.0)])
    assert nodes.with_cores(threads) == [*used, ranks]
    said = [f"On a, {ranks - len(used)} of {ranks} ranks are kept in reserve, because there "]
    assert [words[: len(said[0])] for words in nodes.surplus_in_words(threads)] == (
        said if ranks > len(used) else []
    )


def test_ranks_that_are_bound_to_cores_of_their_own_have_them() -> None:
    bound = [RankInfo("a", "a", Cores(frozenset({n % 2})), Process(n, 0.0, 0), 1, "", 0.0) for n in range(4)]
    assert Nodes(0, bound).with_cores("auto") == [0, 1, 2, 3]
    many = [
        RankInfo(host, host, Cores(frozenset({0, 1})), Process(n, 0.0, 0), 1, "", 0.0)
        for n, host in enumerate("aaabbb")
    ]
    assert Nodes(0, many).surplus_in_words("auto") == [
        "On a and b, 1 of 3 ranks is kept in reserve, because there are only 2 cores; set layout.shards, "
        "layout.stages or layout.replicas to use all."
    ]


def test_clocks_that_are_wrong_are_said_with_their_host() -> None:
    """Once for each host: a Raspberry Pi without a network begins years ago."""
    clocks = {"pc": 1e9, "near": 1e9 + 50, "pi": 1e6, "late": 1e9 + 3600}
    hosts = ["pc", "pi", "pi", "near", "late"]
    cores = Cores(frozenset({0}))
    ranks = [
        RankInfo(host, host, cores, Process(n, 0.0, 0), 1, "", clocks[host]) for n, host in enumerate(hosts)
    ]
    behind, ahead = Nodes(0, ranks).clocks
    assert behind.startswith("The clock of pi is 999000000 seconds behind that of pc: ")
    assert ahead.startswith("The clock of late is 3600 seconds ahead of that of pc: ")
    assert "timedatectl" in ahead


def test_what_many_hosts_have_alike_is_said_once() -> None:
    there = frozenset(range(2))
    ranks = [
        RankInfo(f"n{n}", f"n{n}", Cores(frozenset({0}), launcher=there), Process(n, 0.0, 0), 1, "", 0.0)
        for n in range(5)
    ]
    (said,) = Nodes(0, ranks).bindings
    assert said.startswith("On n0, n1 and 3 other hosts, mpiexec bound the ranks to 1 of 2 cores;")
    (few,) = Nodes(0, ranks[:3]).bindings
    assert few.startswith("On n0, n1 and n2, mpiexec bound")
    (one,) = Nodes(0, ranks[:1]).bindings
    assert one.startswith("On n0, mpiexec bound")


def test_the_part_of_a_machine_that_ranks_keep_busy() -> None:
    """Containers of one machine of four cores: a rank has all of its threads, or what a quota leaves of them."""
    four = frozenset(range(4))
    ranks = [
        RankInfo(f"box{n}", "one", cores, Process(n, 0.0, 0), 1, "", 0.0, 1.0, environ)
        for n, (cores, environ) in enumerate(
            [(Cores(four), {}), (Cores(four), {"OMP_NUM_THREADS": "2"}), (Cores(four, 0.5, "group"), {})]
        )
    ]
    ranks.append(RankInfo("other", "other", Cores(frozenset({0, 1})), Process(9, 0.0, 0), 1, "", 0.0))
    nodes = Nodes(0, ranks)
    assert nodes.loads(["auto"] * 4) == [("one", 1.0), ("one", 0.5), ("one", 0.125), ("other", 1.0)]
    assert nodes.loads([1, 3, 1, 1]) == [("one", 0.25), ("one", 0.75), ("one", 0.125), ("other", 0.5)]


TWO = frozenset({0, 1})


@pytest.mark.parametrize(
    ("boots", "cores", "threads", "expected"),
    [
        ("a", Cores(TWO), 2, False),
        ("a", Cores(TWO), 3, True),
        ("a", Cores(TWO, 1.5, "group"), 1, False),
        ("a", Cores(TWO, 1.5, "group"), 2, True),
        ("a", Cores(TWO, 0.9, "group"), 1, True),  # there is no smaller number of threads
        ("ab", Cores(TWO, 1.0, "group"), 1, False),
        ("aab", Cores(TWO), 1, False),
        ("aaa", Cores(TWO), 1, True),  # containers of one machine
    ],
)
def test_threads_that_may_find_no_core(boots: str, cores: Cores, threads: int, expected: bool) -> None:
    """Then ranks poll for a shorter time. Each rank is on a host of its own."""
    ranks = [RankInfo(f"box{n}", boot, cores, Process(n, 0.0, 0), 1, "", 0.0) for n, boot in enumerate(boots)]
    assert Nodes(0, ranks).oversubscribed(threads) == expected


def test_the_part_of_a_core_that_a_quota_leaves() -> None:
    """Of each thread; ranks of one control group share it."""
    groups = [Cores(TWO, 0.5, "pod"), Cores(TWO, 1.5, "job"), Cores(TWO, 1.5, "job"), Cores(TWO)]
    ranks = [RankInfo("a", "a", cores, Process(n, 0.0, 0), 1, "", 0.0) for n, cores in enumerate(groups)]
    assert [Nodes(n, ranks).part_by_quota(1) for n in range(4)] == [0.5, 0.75, 0.75, 1.0]
    assert [Nodes(n, ranks).part_by_quota(2) for n in range(4)] == [0.25, 0.375, 0.375, 1.0]
