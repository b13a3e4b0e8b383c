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
    ranks = [RankInfo(f"box{n}", boot, cores, Process(n, 0.0, 0), 1, "") for n, boot in enumerate(boots)]
    assert Nodes(0, ranks).crowded([0, 3]) == crowded
