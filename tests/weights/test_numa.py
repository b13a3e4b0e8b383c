"""NUMA nodes of other machines, and that memory is touched only where there are several."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from mpillm import kernels
from mpillm.weights.io.numa import count_nodes, spread
from mpillm.weights.io.reading import new_buffer
from tests.weights.residency import resident


def test_count_nodes(tmp_path: Path) -> None:
    assert count_nodes(range(4), tmp_path) == 1  # the system does not say
    for node, cpus in enumerate(["0-3,8-11", "4-7,12-15", ""]):  # the third has memory only
        path = tmp_path / f"sys/devices/system/node/node{node}/cpulist"
        path.parent.mkdir(parents=True)
        path.write_text(f"{cpus}\n")
    assert count_nodes(range(16), tmp_path) == 2
    assert count_nodes([1, 9], tmp_path) == 1
    assert count_nodes([3, 12], tmp_path) == 2
    assert count_nodes([99], tmp_path) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are there")
@pytest.mark.skipif(kernels.available() == ("numpy",), reason="the extension is not built")
@pytest.mark.parametrize(("threads", "nodes", "share"), [(2, 2, 1.0), (3, 4, 1.0), (2, 1, 0.0), (1, 2, 0.0)])
def test_spread(threads: int, nodes: int, share: float) -> None:
    if kernels.path() == "numpy":
        pytest.skip("NumPy has no threads")
    memory = new_buffer(40 * 2**20 + 3 * mmap.PAGESIZE + 5, mmap.PAGESIZE)
    before = resident(memory)
    spread(memory, threads, nodes)
    assert resident(memory) == max(before, share)
    assert not memory.any()
