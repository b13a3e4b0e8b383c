"""Tests of this folder run inside the ranks, all of them in every rank, with the plugin pytest-mpi:

    mpiexec -n 4 python -m pytest --with-mpi tests/mpi

Rank 0 reports. A test that fails on any rank is reported by that rank and ends all of them, for the others would wait
for its messages.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator

import pytest

from mpillm.comm import launch
from mpillm.comm.program import start
from mpillm.comm.world import World

LAUNCHED = launch.launched_by(os.environ)
RANK, SIZE = (LAUNCHED.rank, LAUNCHED.size) if LAUNCHED else (0, 1)


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """The world of all ranks that mpiexec has started."""
    world = start()
    assert (world.rank, world.size) == (RANK, SIZE)
    world.start_heartbeat()
    yield world
    world.barrier()
    world.stop_heartbeat()


@pytest.hookimpl(trylast=True)  # after the reporter was made
def pytest_configure(config: pytest.Config) -> None:
    if RANK > 0 and config.getoption("--with-mpi"):
        config.pluginmanager.unregister(name="terminalreporter")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and SIZE > 1 and item.config.getoption("--with-mpi"):
        from mpi4py import MPI

        sys.stderr.write(f"\n{item.nodeid} failed on rank {RANK} of {SIZE}:\n{report.longreprtext}\n")
        sys.stderr.flush()
        if MPI.Is_initialized():
            MPI.COMM_WORLD.Abort(1)
        os._exit(1)  # the launcher ends the others
    return report
