"""Lost ranks: who is killed for being stopped, and what ends an agreement that does not come."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from mpillm.comm import faults
from tests.conftest import Mpi, run_bounded


def test_the_launcher_says_whether_ranks_may_die() -> None:
    assert faults.survivable({"OMPI_MCA_mpi_ft_enable": "1"})
    assert not faults.survivable({})
    assert not faults.survivable({"OMPI_MCA_mpi_ft_enable": "0"})


@pytest.mark.parametrize("stopped", [True, False])
def test_only_a_stopped_neighbour_is_killed(stopped: bool) -> None:
    with subprocess.Popen(["sleep", "1000"]) as sleeper:
        try:
            other = faults.Process(
                sleeper.pid, psutil.Process(sleeper.pid).create_time(), faults.Process.own().namespace
            )
            neighbours = faults.Neighbours(faults.Process.own(), [other])
            if stopped:
                os.kill(sleeper.pid, signal.SIGSTOP)
                while psutil.Process(sleeper.pid).status() != psutil.STATUS_STOPPED:
                    time.sleep(0.01)
            for _ in range(faults.STOPPED - 1):
                neighbours.look()
            assert sleeper.poll() is None
            neighbours.look()
            if stopped:
                assert sleeper.wait() == -signal.SIGKILL
            else:
                neighbours.look()
                assert sleeper.poll() is None
        finally:
            sleeper.kill()


def test_another_process_of_that_number_is_left_alone() -> None:
    with subprocess.Popen(["sleep", "1000"]) as sleeper:
        try:
            os.kill(sleeper.pid, signal.SIGSTOP)
            own = faults.Process.own()
            began = psutil.Process(sleeper.pid).create_time()
            others = [faults.Process(sleeper.pid, began - 5, own.namespace)]
            others.append(faults.Process(sleeper.pid, began, own.namespace + 1))  # in another container
            neighbours = faults.Neighbours(own, others)
            for _ in range(faults.STOPPED + 1):
                neighbours.look()
            assert sleeper.poll() is None
        finally:
            sleeper.kill()


def test_an_agreement_that_does_not_come_ends_the_process() -> None:
    program = (
        "import time; from mpillm.comm import faults\nwith faults.bounded(0.1, '[1@here]'): time.sleep(30)"
    )
    done = run_bounded([sys.executable, "-c", program])
    assert done.returncode == 75
    assert done.stderr == (
        "[1@here] The remaining ranks have not agreed within 0.1 s how to continue; run the same command "
        "again to continue.\n"
    )


@pytest.mark.mpiexec
def test_a_vague_error_is_a_loss_if_mpi_hears_of_one_in_a_moment(openmpi: Mpi) -> None:
    """A nonblocking collective that had just begun its next round says MPI_ERR_OTHER, and may say it first."""
    program = """
import time
from mpi4py import MPI
from mpillm.comm.faults import is_loss

class Comm:
    def __init__(self, lost_after):
        self.lost_at = time.monotonic() + lost_after
    def Is_revoked(self):
        return False
    def Get_failed(self):
        return MPI.COMM_SELF.Get_group() if time.monotonic() > self.lost_at else MPI.GROUP_EMPTY

print([is_loss(MPI.Exception(kind), Comm(after)) for kind, after in (
    (MPI.ERR_OTHER, 0.0), (MPI.ERR_OTHER, 0.2), (MPI.ERR_INTERN, 0.2), (MPI.ERR_OTHER, 60.0), (MPI.ERR_TYPE, 0.0)
)])
"""
    run = openmpi.run(1, "-c", program)
    assert run.stdout.strip() == "[True, True, True, False, False]", run.stderr


@pytest.mark.mpiexec
def test_what_no_rank_sent_is_a_loss_where_one_can_be_survived(openmpi: Mpi) -> None:
    """After a kill with ULFM a collective was once reported as done, with a buffer that held no pickle."""
    program = """
from mpi4py import MPI
from mpillm.comm.exchange import Exchange

class Comm:
    def __init__(self, error, revoked):
        self.error, self.revoked = error, revoked
    def Is_revoked(self):
        return self.revoked
    def Get_failed(self):
        return MPI.GROUP_EMPTY
    def Ibcast(self, buffer, root):
        if self.error:
            raise self.error
        return MPI.REQUEST_NULL  # and the buffer stays as it was
    def Iallgather(self, own, buffer):
        return self.Ibcast(buffer, 0)

class World(Exchange):
    rank, size = 1, 2
    def __init__(self, error, revoked, survives):
        self._startup, self.survives = Comm(error, revoked), survives
    def check_losses(self):
        pass

for arguments in (None, True, True), (None, False, True), (None, True, False), (MPI.Exception(3), True, True):
    for name in "gather", "bcast":
        try:
            getattr(World(*arguments), name)(0)
        except Exception as error:
            print(type(error).__name__, end=" ")
"""
    run = openmpi.run(1, "-c", program)
    assert run.stdout.split() == [
        *["RankLost"] * 2,
        *["EOFError"] * 4,
        *["Exception"] * 2,
    ], run.stderr
