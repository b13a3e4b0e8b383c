"""Replicas share all ranks out, at borders of hosts where there are enough of them, and are alike in what matters."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mpillm.errors import LayoutError
from mpillm.partition import grid, replicas
from mpillm.partition.replicas import Replica
from tests.shapes import shape

MODEL = shape(30, 576, 9, 3, 64, 1536, 49152)  # 8 shards at most


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(1, 6))
def test_every_rank_has_one_place(ranks_per_host: list[int], count: int) -> None:
    ranks = sum(ranks_per_host)
    assume(count <= ranks)
    found = replicas.choose(MODEL, ranks, count, ranks_per_host=ranks_per_host)
    assert len(found) == count
    assert [rank for replica in found for rank in replica.ranks] == list(range(ranks))
    assert len({replica.shards for replica in found}) == 1
    for replica in found:
        assert [place.first + place.rank for place in replica.places] == list(replica.ranks)
    if count <= len(ranks_per_host):
        assert {replica.first for replica in found} <= {0, *itertools.accumulate(ranks_per_host)}
    else:
        sizes = [len(replica.ranks) for replica in found]
        assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 16), st.sampled_from([None, [4, 4, 4, 4]]))
def test_one_replica_is_laid_out_as_ever(ranks: int, ranks_per_host: list[int] | None) -> None:
    (found,) = replicas.choose(MODEL, ranks, 1, ranks_per_host=ranks_per_host)
    assert (found.stages, found.shards) == grid.choose(MODEL, ranks, ranks_per_host=ranks_per_host)


@pytest.mark.parametrize(
    ("ranks", "count", "hosts", "layouts"),
    [
        (3, 2, None, [(2, 1), (1, 1)]),
        (4, 2, [2, 2], [(1, 2), (1, 2)]),
        (7, 2, [1, 1, 1, 1, 1, 1, 1], [(4, 1), (3, 1)]),
        (6, 2, [4, 2], [(2, 2), (1, 2)]),
        (3, 1, [1, 2], [(3, 1)]),
    ],
)
def test_uneven_replicas(
    ranks: int, count: int, hosts: list[int] | None, layouts: list[tuple[int, int]]
) -> None:
    found = replicas.choose(MODEL, ranks, count, ranks_per_host=hosts)
    assert [(replica.stages, replica.shards) for replica in found] == layouts


@pytest.mark.parametrize(
    ("ranks", "count", "asked", "words"),
    [
        (2, 3, {}, "layout.replicas = 3 needs at least 3 ranks, and there are 2"),
        (5, 2, {"stages": 2}, "cannot be laid out on 3 ranks as 2 stages"),
        (3, 2, {"shards": 2}, "cannot be laid out on 1 rank as 2 shards"),
    ],
)
def test_what_is_impossible_is_said(ranks: int, count: int, asked: dict[str, int], words: str) -> None:
    with pytest.raises(LayoutError, match=re.escape(words)):
        replicas.choose(MODEL, ranks, count, **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "ranks", "same", "layouts"),
    [
        ([(1, 1), (1, 1)], 1, False, [(1, 1)]),
        ([(1, 2), (1, 2)], 3, False, [(3, 1)]),  # each needs the memory of two ranks
        ([(1, 2), (1, 2)], 3, True, [(1, 2)]),
        ([(2, 1), (1, 1)], 2, False, [(1, 1), (1, 1)]),
        ([(2, 2), (1, 2)], 5, True, [(1, 2), (1, 2)]),
        ([(2, 1), (2, 1)], 3, False, [(3, 1)]),
    ],
)
def test_fewer_ranks(
    before: list[tuple[int, int]], ranks: int, same: bool, layouts: list[tuple[int, int]]
) -> None:
    firsts = itertools.accumulate((stages * shards for stages, shards in before), initial=0)
    was = tuple(Replica(first, *layout) for first, layout in zip(firsts, before, strict=False))
    found = replicas.choose_fewer(MODEL, ranks, was, same, same_stages=False)
    assert [(replica.stages, replica.shards) for replica in found] == layouts


def test_fewer_replicas_have_the_same_number_of_stages_if_results_depend_on_it() -> None:
    was = (Replica(0, 2, 1), Replica(2, 2, 1), Replica(4, 2, 1))
    free = replicas.choose_fewer(MODEL, 5, was, same_shards=False, same_stages=False)
    alike = replicas.choose_fewer(MODEL, 5, was, same_shards=False, same_stages=True)
    assert [replica.stages for replica in free] == [3, 2]
    assert [replica.stages for replica in alike] == [5]
