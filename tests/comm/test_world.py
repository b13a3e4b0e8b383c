"""How a world begins, waits and ends, under both MPIs: what is said, how often, and the exit code."""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from mpillm.comm.cores import physical
from tests.conftest import Mpi, clean_environment, run_bounded

PROGRAM = Path(__file__).with_name("endings.py")
pytestmark = pytest.mark.mpiexec


def run_ending(mpi: Mpi, ranks: int, name: str, **env: str) -> CompletedProcess[str]:
    """Without the deadline: what ends the world is not that somebody was silent for long."""
    run = mpi.run(ranks, PROGRAM, name, env={"MPILLM_DEADLINE": "0", **env})
    assert "Traceback" not in run.stderr
    return run


def test_all_end_well(mpi: Mpi) -> None:
    run = run_ending(mpi, 3, "fine")
    assert run.returncode == 1
    assert sorted(re.findall(r"alive .*", run.stdout)) == [f"alive {rank} of 3" for rank in range(3)]
    assert "mpillm" not in run.stderr


# Under MPICH only what asks something of the MPI: to end with messages under way, and by a signal.
@pytest.mark.parametrize(("mpi", "name", "code", "sentence"), [
    ("openmpi", "under_way", 2, "mpillm: There is no such job."),
    ("mpich", "under_way", 2, "mpillm: There is no such job."),
    ("openmpi", "other_version", 2, "mpillm: Rank 1 on "),
    ("openmpi", "agreed", 2, "mpillm: Rank 1 cannot read the model. (on rank 1 of 3, host "),
    ("openmpi", "terminated", 75, "mpillm: Stopped by SIGTERM; run the same command again to continue."),
    ("mpich", "terminated", 75, "mpillm: Stopped by SIGTERM; run the same command again to continue."),
    ("openmpi", "warned", 75, "mpillm: Stopped by SIGUSR1; run the same command again to continue."),
], indirect=["mpi"])  # fmt: skip
def test_what_all_raise_is_said_once(mpi: Mpi, name: str, code: int, sentence: str) -> None:
    run = run_ending(mpi, 3, name)
    assert run.returncode == code
    assert run.stderr.count(sentence) == 1
    assert run.stderr.count("mpillm: ") == 1


@pytest.mark.parametrize(("name", "code", "words"), [
    ("bug_on_one", 70, r"\[1@\S+\] ValueError: boom \(endings\.py:\d+ in bug_on_one; "),
    ("error_on_one", 2, r"\[1@\S+\] This machine's model file is broken\."),
    ("bug_at_start", 70, r"mpillm: ValueError: boom \(endings\.py:\d+ in boom; .*\(on rank 3 of 4, host "),
])  # fmt: skip
def test_an_error_on_one_rank_ends_all(mpi: Mpi, name: str, code: int, words: str) -> None:
    run = run_ending(mpi, 4, name)
    assert len(re.findall(words, run.stderr)) == 1
    # MPICH's mpiexec may tell instead by which signal it ended the others.
    assert run.returncode in ({code, 9} if mpi.name == "mpich" else {code})


def test_an_error_is_no_lost_rank(openmpi: Mpi) -> None:
    """Where ranks may be lost, the others do not take one that ends all for lost, and end with its code."""
    words = [openmpi.mpiexec, "--with-ft", "ulfm", "-n", "3", sys.executable, PROGRAM, "error_on_one"]
    done = run_bounded(words, env=openmpi.environment(MPILLM_DEADLINE="0"))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("This machine's model file is broken.") == 1
    assert "lost" not in done.stderr


def test_ranks_that_may_be_lost_end_together(openmpi: Mpi) -> None:
    """Open MPI's mpiexec hung in a quarter of such ends, because each rank called MPI_Abort."""
    words = [openmpi.mpiexec, "--with-ft", "ulfm", "-n", "4", sys.executable, PROGRAM, "all_bug"]
    for _ in range(5):
        done = run_bounded(words, env=openmpi.environment())
        assert done.returncode == 70, done.stderr
        assert "ValueError: boom" in done.stderr


def test_a_rank_that_is_lost_when_rank_0_is_done_keeps_nobody_waiting(openmpi: Mpi) -> None:
    """It leaves at once: a spare rank that wants to agree with it how to go on would wait until the deadline."""
    words = [openmpi.mpiexec, "--with-ft", "ulfm", "-n", "3", sys.executable, PROGRAM, "lost_at_last"]
    done = run_bounded(words, env=openmpi.environment(MPILLM_DEADLINE="8"))
    assert done.returncode == 0, done.stderr
    assert "agreed" not in done.stderr


@pytest.mark.parametrize("rows", ["1", "3"])
def test_a_message_of_another_size_ends_all(mpi: Mpi, rows: str) -> None:
    run = run_ending(mpi, 2, "out_of_step", ROWS=rows)
    assert run.returncode in ({70, 9} if mpi.name == "mpich" else {70})
    assert re.search(rf"\[1@\S+\] .*WireError: .*{32 * int(rows)}\b", run.stderr)


def test_waiting_ranks_leave_the_cores_alone(mpi: Mpi) -> None:
    """Four ranks on two cores, or as many as make this machine crowded."""
    ranks = max(4, len(os.sched_getaffinity(0)) + 1)
    run = run_ending(mpi, ranks, "waiting", SECONDS="1.5")
    assert run.returncode == 0, run.stderr
    burnt = [float(part) for part in re.findall(r"burnt (\S+)", run.stdout)]
    assert len(burnt) == ranks - 1
    assert max(burnt) < 0.1  # of the time waited; measured: one hundredth


def test_threads(mpi: Mpi) -> None:
    """The node's cores are shared out; what the user says wins; idle OpenMP threads sleep where cores are short."""
    run = mpi.run(2, PROGRAM, "threads")
    chosen, policy, ranks, cores = run.stdout.split("\n")[0].split()
    assert int(ranks) == 2
    assert int(chosen) == max(1, int(cores) // 2)
    assert policy == "unset"
    assert "bound" not in run.stdout
    many = str(int(cores) + 1)
    run = mpi.run(2, PROGRAM, "threads", env={"OMP_NUM_THREADS": many})
    assert run.stdout.startswith(f"{many} passive")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: nothing to bind away")
def test_a_rank_that_mpiexec_bound_to_one_core_is_told(mpi: Mpi) -> None:
    mpiexec, *rest = mpi.command(1, PROGRAM, "threads")
    run = run_bounded([mpiexec, "--bind-to", "core", *rest], env=mpi.environment())
    assert run.stdout.startswith("1 unset 1 1")
    cores = len(physical(os.sched_getaffinity(0), Path("/")))
    assert f"mpiexec bound the ranks to 1 of {cores} cores" in run.stdout
    assert "Add --bind-to none after mpiexec" in run.stdout


@pytest.mark.parametrize(("name", "code", "words"), [
    ("fine", 1, ""),
    ("all_refuse", 2, "mpillm: There is no such job."),
    ("all_bug", 70, "boom (endings.py:"),
    ("bug_at_start", 70, "boom (endings.py:"),
])  # fmt: skip
def test_one_process_needs_no_mpiexec(mpi: Mpi, name: str, code: int, words: str) -> None:
    run = run_bounded([sys.executable, PROGRAM, name], env=mpi.environment())
    assert run.returncode == code
    assert words in run.stderr
    assert ("alive 0 of 1" in run.stdout) == (name == "fine")


def test_threads_of_one_process(mpi: Mpi) -> None:
    def run_one(**env: str) -> CompletedProcess[str]:
        return run_bounded([sys.executable, PROGRAM, "threads"], env=mpi.environment(**env))

    assert run_one(ASKED="999", OMP_WAIT_POLICY="active").stdout.startswith("999 active 1")
    run = run_one(OMP_NUM_THREADS="many")
    assert run.returncode == 2
    assert "OMP_NUM_THREADS = 'many' is not a number of threads" in run.stderr


def test_no_mpi_library() -> None:
    run = run_bounded(
        [sys.executable, PROGRAM, "fine"], env=clean_environment(MPI4PY_LIBMPI="/nowhere/libmpi.so.12")
    )
    assert run.returncode == 2
    assert run.stderr.startswith("mpillm: No MPI library can be loaded (")
    assert (
        "correct MPI4PY_LIBMPI, which is '/nowhere/libmpi.so.12', or make mpi4py for that library"
        in run.stderr
    )


def test_a_library_where_mpi4py_does_not_look() -> None:
    """As pip of Debian's Python puts it for root, or with `--prefix`: the package that brought it says where it is."""
    program = (
        "import mpi4py._mpiabi as abi; abi.LIBMPI_PATH[:] = ['/nowhere']; "
        "from mpillm.comm.program import library; print(library().name)"
    )
    found = run_bounded([sys.executable, "-c", program], env=clean_environment())
    assert found.stdout in ("Open MPI\n", "MPICH\n"), found.stderr


def test_the_other_mpiexec_is_noticed(openmpi: Mpi, mpich: Mpi) -> None:
    for started, loaded, library in ((openmpi, mpich, "MPICH"), (mpich, openmpi, "Open MPI")):
        both = {**started.env, "MPI4PY_LIBMPI": loaded.env.get("MPI4PY_LIBMPI", "")}
        env = {name: value for name, value in both.items() if value}
        run = run_bounded(started.command(3, PROGRAM, "fine"), env=clean_environment(**env))
        assert run.returncode == 2
        assert "alive" not in run.stdout
        sentence = re.findall(r"mpillm: .*", run.stderr)
        assert len(sentence) == 1, run.stderr
        name = {"openmpi": "Open MPI's mpiexec", "mpich": "MPICH's mpiexec"}[started.name]
        assert sentence[0].startswith(
            f"mpillm: {name} ({started.mpiexec.parent}) started 3 ranks, but this Python "
        )
        assert f"loaded another MPI, {library}" in sentence[0]
        assert f"Type: {loaded.mpiexec} -n 3 python {PROGRAM} fine" in sentence[0]


def test_another_mpi_on_one_host_is_said_with_its_name(openmpi: Mpi, mpich: Mpi) -> None:
    """Rank 0 has the right one, and waits."""
    first = openmpi.command(1, PROGRAM, "fine")
    second = ["env", *(f"{name}={value}" for name, value in mpich.env.items())]
    words = [*first, ":", "-n", "1", *second, sys.executable, PROGRAM, "fine"]
    run = run_bounded(words, env=clean_environment(**openmpi.env))
    assert run.returncode == 2
    said = next(line for line in run.stderr.splitlines() if "another MPI" in line)
    assert said.startswith(
        "mpillm: Open MPI's mpiexec started this rank, but its Python has loaded another MPI, MPICH"
    )
    assert said.endswith(f"(on rank 1 of 2, host {socket.gethostname()})")
