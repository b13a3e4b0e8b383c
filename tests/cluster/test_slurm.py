"""The scripts in slurm/ on a real Slurm that the test starts on loopback, with both MPIs and both launchers."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster import slurm as tools
from tests.cluster.jobs import reference, results, write_job
from tests.cluster.slurm import Slurm
from tests.conftest import ROOT, Mpi, run_bounded

pytestmark = [pytest.mark.slurm, pytest.mark.mpiexec]

NODES = ("n0", "n1", "n2", "n3")

# Stands for mpillm where the scripts themselves are looked at: says who it is, and can be made to wait.
STUB = """
import os, signal, sys, time
from pathlib import Path
from mpi4py import MPI

told = []
signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
world = MPI.COMM_WORLD
nodes = world.allgather(os.environ.get("SLURMD_NODENAME", "?"))
world.Barrier()
if world.rank == 0:
    cpus = os.environ.get("SLURM_CPUS_PER_TASK")
    print(f"ranks={world.size} nodes={','.join(sorted(set(nodes)))} cpus={cpus} words={sys.argv[1:]}", flush=True)
if "--wait" in sys.argv and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    Path(f"ready{world.rank}").touch()
    end = time.monotonic() + 60
    while not told and time.monotonic() < end:
        time.sleep(0.05)
    world.Barrier()
    sys.exit(75 if told else 3)
if "--killed" in sys.argv:
    print(sys.argv[-1], file=sys.stderr, flush=True)
    sys.exit(1)
if "--fail" in sys.argv:
    sys.exit(int(sys.argv[-1]))
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    reason = tools.missing()
    if reason:
        pytest.skip(reason)
    with Slurm(tmp_path_factory.mktemp("slurm"), NODES, cpus=2).running() as running:
        yield running


def place(folder: Path, mpi: Mpi) -> None:
    """Make a directory to type sbatch in: the repository's scripts, and a .venv that has this MPI."""
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name, target in {"python": Path(sys.executable), "mpiexec": mpi.mpiexec}.items():
        program = binaries / name
        program.write_text(f'#!/bin/sh\nexec "{target}" "$@"\n')
        program.chmod(0o755)
    settings = [f'export {name}="{value}"' for name, value in {**mpi.env, "PYTHONPATH": str(ROOT)}.items()]
    (binaries / "activate").write_text("\n".join([f'PATH="{binaries}:$PATH"', *settings]) + "\n")


@pytest.fixture
def checkout(tmp_path: Path, mpi: Mpi) -> Path:
    place(tmp_path, mpi)
    return tmp_path


@pytest.fixture
def stub(checkout: Path) -> Path:
    (checkout / "mpillm").mkdir()
    (checkout / "mpillm" / "__init__.py").touch()
    (checkout / "mpillm" / "__main__.py").write_text(STUB)
    return checkout


# Says whether a fence without data, with which Open MPI ends MPI_Init, waits for the last rank.
FENCE = """
import ctypes, time
from mpi4py import MPI

world = MPI.COMM_WORLD
pmix = next(line.split()[-1] for line in open("/proc/self/maps") if "/libpmix.so" in line)
time.sleep(0.5 if world.rank == 1 else 0)
begin = time.monotonic()
assert ctypes.CDLL(pmix).PMIx_Fence(None, ctypes.c_size_t(0), None, ctypes.c_size_t(0)) == 0
times = world.gather((begin, time.monotonic()))
if times:
    begins, ends = zip(*times)
    print("all ranks met" if max(begins) <= min(ends) else "a rank left before the last one came")
"""

# What does not depend on the MPI is looked at with one.
one_mpi = pytest.mark.parametrize("mpi", ["openmpi"], indirect=True)

Submit = Callable[..., tools.Job]


@pytest.fixture
def submit(slurm: Slurm) -> Submit:
    def type_and_wait(folder: Path, *words: str, env: dict[str, str] | None = None) -> tools.Job:
        job = slurm.submit("--output=log", *words, cwd=folder, env=env)
        return slurm.wait(job, folder / "log")

    return type_and_wait


def srun_can_start(slurm: Slurm, mpi: Mpi) -> bool:
    protocol = "pmix" if mpi.name == "openmpi" else "pmi2"
    return run_bounded(["srun", f"--mpi={protocol}", "true"], 30, slurm.environment()).returncode == 0


@pytest.mark.parametrize("launcher", ["", "mpiexec"])
def test_one_node(stub: Path, mpi: Mpi, slurm: Slurm, submit: Submit, launcher: str) -> None:
    srun_works = srun_can_start(slurm, mpi)
    words = ["--ntasks=2", "slurm/one-node.sbatch", "job.toml", "--set", "a=b c"]
    job = submit(stub, *words, env={"MPILLM_LAUNCHER": launcher})
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    assert re.search(r"ranks=2 nodes=n\d cpus=1 words=\['run', 'job.toml', '--set', 'a=b c'\]", job.log), (
        job.log
    )
    # Left to itself the script takes srun where it works, and mpiexec where it does not.
    assert ("srun --mpi=" in job.log) is (launcher != "mpiexec" and srun_works), job.log


@one_mpi
def test_a_conda_environment(stub: Path, submit: Submit) -> None:
    """Its scripts, and those of a site, use variables that are not set."""
    scripts = stub / ".venv/etc/conda/activate.d"
    scripts.mkdir(parents=True)
    text = (stub / ".venv/bin/activate").read_text()
    (stub / ".venv/bin/activate").unlink()
    (scripts / "mpi.sh").write_text(f': "$not_set"\n[ "$CONDA_PREFIX" = {stub}/.venv ] || exit 9\n{text}')
    (stub / "slurm/site.sh").write_text(': "$not_set"\n')
    job = submit(stub, "--ntasks=2", "slurm/one-node.sbatch", "job.toml")
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    assert "ranks=2 " in job.log


@one_mpi
@pytest.mark.parametrize("beside", [True, False])
def test_the_mpi_of_the_site(stub: Path, mpi: Mpi, submit: Submit, beside: bool) -> None:
    """Its mpiexec is taken though the environment has another one: beside its library, or else from PATH."""
    library = next(mpi.mpiexec.parent.parent.glob("lib/libmpi.so.*"), None)
    if library is None:
        pytest.skip("the library of this Open MPI is not beside its mpiexec")
    (stub / ".venv/bin/mpiexec").write_text("#!/bin/sh\necho this belongs to another MPI; exit 9\n")
    env = {"MPILLM_LAUNCHER": "mpiexec", "MPI4PY_LIBMPI": str(library)}
    if not beside:
        (stub / "lib").symlink_to(library.parent)
        env |= {
            "MPI4PY_LIBMPI": str(stub / "lib" / library.name),
            "PATH": f"{mpi.mpiexec.parent}:{os.environ['PATH']}",
        }
    job = submit(stub, "--ntasks=2", "slurm/one-node.sbatch", "job.toml", env=env)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    assert "ranks=2 " in job.log


@pytest.mark.parametrize("launcher", ["srun", "mpiexec"])
def test_many_nodes(stub: Path, mpi: Mpi, slurm: Slurm, submit: Submit, launcher: str) -> None:
    if launcher == "srun" and not srun_can_start(slurm, mpi):
        pytest.skip("this Slurm cannot load PMIx (apt install libpmix-dev)")
    words = ["--nodes=3", "--cpus-per-task=2", "slurm/many-nodes.sbatch", "job.toml"]
    job = submit(stub, *words, env={"MPILLM_LAUNCHER": launcher})
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    assert re.search(r"ranks=3 nodes=n\d,n\d,n\d cpus=2 ", job.log), job.log


@one_mpi
def test_no_rank_leaves_mpi_init_before_the_others_are_in_its_last_fence(
    stub: Path, mpi: Mpi, slurm: Slurm, submit: Submit
) -> None:
    """Its first message would reach a rank that cannot take one yet, and crash it."""
    if not srun_can_start(slurm, mpi):
        pytest.skip("this Slurm cannot load PMIx (apt install libpmix-dev)")
    (stub / "mpillm" / "__main__.py").write_text(FENCE)
    job = submit(stub, "--nodes=2", "slurm/many-nodes.sbatch", env={"MPILLM_LAUNCHER": "srun"})
    assert "all ranks met" in job.log, job.log


@pytest.mark.parametrize("launcher", ["", "mpiexec"])
def test_a_warning_reaches_the_ranks_and_the_job_goes_on_later(
    stub: Path, slurm: Slurm, launcher: str
) -> None:
    """USR1 is what comes ahead of the time limit (#SBATCH --signal=B:USR1@120)."""
    job = start_waiting(stub, slurm, launcher)
    slurm.command("scancel", "--batch", "--signal=USR1", str(job))
    done = slurm.wait(job, stub / "log")
    assert (done.state, done.exit_code, done.restarts) == ("COMPLETED", 0, 1), done.log
    assert "stopping (signal USR1)" in done.log
    assert "the job is queued again" in done.log
    assert len(re.findall("ranks=2 nodes=n", done.log)) == 2  # the log is appended to


@pytest.mark.parametrize("launcher", ["", "mpiexec"])
def test_a_job_that_is_cancelled_stays_cancelled(stub: Path, slurm: Slurm, launcher: str) -> None:
    job = start_waiting(stub, slurm, launcher)
    slurm.command("scancel", str(job))
    until(lambda: not slurm.command("squeue", "--noheader", f"--jobs={job}").strip())
    done = slurm.wait(job, stub / "log")
    assert (done.state, done.restarts) == ("CANCELLED", 0), done.log
    assert "after scancel the same sbatch command continues the run" in done.log
    assert "stopping (signal TERM)" in done.log
    assert "the job is queued again" not in done.log


def start_waiting(folder: Path, slurm: Slurm, launcher: str) -> int:
    """Submit a job on two nodes whose ranks wait to be told to stop; return its number when they do."""
    words = ["--nodes=2", "slurm/many-nodes.sbatch", "job.toml", "--wait"]
    job = slurm.submit("--output=log", *words, cwd=folder, env={"MPILLM_LAUNCHER": launcher})
    until(lambda: all((folder / f"ready{rank}").exists() for rank in range(2)))
    return job


@one_mpi
def test_the_warning_comes_before_the_time_limit(stub: Path, slurm: Slurm) -> None:
    """The option in the scripts, with times that a test can wait for; a job that may not restart ends with 75."""
    words = ["--time=1", "--signal=B:USR1@57", "slurm/one-node.sbatch", "job.toml", "--wait"]
    job = slurm.submit("--output=log", *words, cwd=stub, env={"MPILLM_RESTARTS": "0"})
    done = slurm.wait(job, stub / "log")
    assert (done.state, done.exit_code, done.restarts) == ("FAILED", 75, 0), done.log
    assert "run the same sbatch command again to continue" in done.log


@one_mpi
def test_a_warning_before_the_ranks_start(stub: Path, slurm: Slurm) -> None:
    (stub / "slurm/site.sh").write_text("touch starting; sleep 2\n")
    job = slurm.submit("--output=log", "slurm/one-node.sbatch", "job.toml", cwd=stub)
    until((stub / "starting").exists)
    slurm.command("scancel", "--batch", "--signal=USR1", str(job))
    done = slurm.wait(job, stub / "log")
    assert (done.state, done.exit_code, done.restarts) == ("COMPLETED", 0, 1), done.log
    assert len(re.findall("ranks=2 nodes=n", done.log)) == 1


@one_mpi
def test_how_a_run_ends_is_how_its_job_ends(stub: Path, slurm: Slurm) -> None:
    """A full disk, say, ends it with 75 without a warning, and it is not tried again; of a run that was killed for
    memory the log has what srun says, for its exit code is that of a complete run with errors."""
    ends = {
        ("--fail", "1"): (1, "run.sh: the run ended with exit code 1; "),
        ("--fail", "2"): (2, "run.sh: the run ended with exit code 2; "),
        ("--fail", "75"): (75, "run the same sbatch command again to continue"),
        ("--killed", "task 0: Out Of Memory"): (137, "type sbatch --mem=SIZE"),
        ("--killed", "error: StepId=1.0 exceeded memory limit"): (137, "type sbatch --mem=SIZE"),
    }
    jobs = {
        words: slurm.submit(
            f"--output={words[-1]}.log", "--ntasks=1", "slurm/one-node.sbatch", "job.toml", *words, cwd=stub
        )
        for words in ends
    }
    for words, (code, says) in ends.items():
        job = slurm.wait(jobs[words], stub / f"{words[-1]}.log")
        assert (job.state, job.exit_code, job.restarts) == ("FAILED", code, 0), job.log
        assert says in job.log.splitlines()[-1]


@one_mpi
def test_a_preempted_job_goes_on_later(stub: Path, slurm: Slurm) -> None:
    words = ["--nodes=4", "--cpus-per-task=2", "slurm/many-nodes.sbatch", "job.toml", "--wait"]
    job = slurm.submit("--output=log", *words, cwd=stub)
    until(lambda: all((stub / f"ready{rank}").exists() for rank in range(4)))
    other = slurm.submit("--output=log2", "--partition=urgent", "--nodes=4", "--wrap=true", cwd=stub)
    done = slurm.wait(job, stub / "log")
    assert (done.state, done.exit_code, done.restarts) == ("COMPLETED", 0, 1), done.log
    assert len(re.findall("ranks=4 nodes=n", done.log)) == 2
    assert slurm.wait(other, stub / "log2").state == "COMPLETED"


@one_mpi
def test_array(stub: Path, slurm: Slurm) -> None:
    """Each task takes the file of its number; one that has no file says so."""
    parts = stub / "parts"
    parts.mkdir()
    for name in ("000", "001"):
        (parts / f"{name}.jsonl").touch()
    words = ["--array=0-2", "slurm/array.sbatch", "job.toml", "parts", "out/all", "--set", "sampling.seed=3"]
    job = slurm.submit("--output=log%a", *words, cwd=stub)
    ends = [slurm.wait(f"{job}_{task}", stub / f"log{task}") for task in range(3)]
    assert [end.exit_code for end in ends] == [0, 0, 2], ends
    for name, end in zip(("000", "001"), ends, strict=False):
        words = ["run", "job.toml", "--input", f"parts/{name}.jsonl", "--output", f"out/all/{name}"]
        assert f"words={[*words, '--set', 'sampling.seed=3']}" in end.log
    assert "parts has 2 .jsonl files, none for array task 2; type sbatch --array=0-1 ..." in ends[2].log


@one_mpi
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--array=0", "slurm/array.sbatch", "job.toml", "nothing", "out"], "nothing has no .jsonl files"),
        (
            ["slurm/array.sbatch", "job.toml", "parts", "out"],
            "none for array task ?; type sbatch --array=0-0 ...",
        ),
        (
            ["--chdir=out", "slurm/one-node.sbatch", "job.toml"],
            "type sbatch in the directory that has slurm/",
        ),
    ],
)
def test_what_to_type_instead(stub: Path, slurm: Slurm, words: list[str], says: str) -> None:
    for name in ("parts", "out"):
        (stub / name).mkdir()
    (stub / "parts/000.jsonl").touch()
    outside = "--chdir=out" in words
    typed = [f"../{word}" if word.startswith("slurm/") else word for word in words[1:]] if outside else words
    log = stub / "log"
    job = slurm.submit(f"--output={log}", *typed, cwd=stub / "out" if outside else stub)
    array = any(word.startswith("--array") for word in words)
    done = slurm.wait(f"{job}_0" if array else job, log)
    assert (done.state, done.exit_code) == ("FAILED", 2), done.log
    assert says in done.log


@one_mpi
def test_what_is_wrong_is_said(stub: Path, slurm: Slurm) -> None:
    wrong = {
        "MPILLM_VENV": (
            "/nowhere",
            "no virtual environment at /nowhere; type 'make install' in the checkout",
        ),
        "MPI4PY_LIBMPI": (
            "/nowhere/a.so",
            "run.sh: no MPI library can be loaded (/nowhere/a.so: cannot open shared object file: No such file or "
            "directory); correct MPI4PY_LIBMPI, or make mpi4py for that library: ",
        ),
        "MPILLM_LAUNCHER": (
            "aprun",
            "MPILLM_LAUNCHER=aprun is not a launcher; set it to srun or mpiexec",
        ),
    }
    words = ("slurm/one-node.sbatch", "job.toml")
    jobs = {
        name: slurm.submit(f"--output={name}.log", *words, cwd=stub, env={name: value})
        for name, (value, _) in wrong.items()
    }
    for name, (_, says) in wrong.items():
        job = slurm.wait(jobs[name], stub / f"{name}.log")
        assert (job.state, job.exit_code) == ("FAILED", 2), job.log
        assert says in job.log


@pytest.mark.parametrize(
    ("options", "script"), [("--ntasks=2", "one-node.sbatch"), ("--nodes=3", "many-nodes.sbatch")]
)
def test_the_real_job_gives_the_same_bytes(
    checkout: Path, mpi: Mpi, submit: Submit, options: str, script: str
) -> None:
    job = write_job(checkout)
    all_compute = "--set", "layout.replicas=1"  # though the nodes of these tests are one machine
    done = submit(checkout, options, f"slurm/{script}", "job.toml", *all_compute)
    assert (done.state, done.exit_code) == ("COMPLETED", 0), done.log
    assert results(checkout) == reference(checkout, mpi, job)


@one_mpi
def test_a_refused_job_ends_with_its_exit_code(checkout: Path, slurm: Slurm, submit: Submit) -> None:
    """srun ends the ranks that are left as soon as one has ended; that changes no code, and hides no message."""
    write_job(checkout, requests=2, max_tokens=2)
    words = ["--nodes=4", "slurm/many-nodes.sbatch", "job.toml"]
    assert submit(checkout, *words).exit_code == 0
    job = slurm.submit("--output=log2", *words, "--set", "sampling.max_tokens=3", cwd=checkout)
    done = slurm.wait(job, checkout / "log2")
    assert (done.state, done.exit_code) == ("FAILED", 2), done.log
    assert "mpillm: The output directory out belongs to another job: sampling.max_tokens" in done.log


@one_mpi
def test_the_real_job_goes_on_after_a_warning(checkout: Path, mpi: Mpi, slurm: Slurm) -> None:
    """Told to stop when some requests are done, it comes back, runs the others, and ends in the same bytes."""
    job = write_job(checkout, requests=16, max_tokens=60)
    words = ["--nodes=2", "slurm/many-nodes.sbatch", "job.toml", "--set", "batch.max_num_seqs=1"]
    number = slurm.submit("--output=log", *words, cwd=checkout)
    journal = checkout / "out" / "journal"
    sizes: set[int] = set()

    def two_are_done() -> bool:
        if journal.exists():
            sizes.add(journal.stat().st_size)
        return len(sizes) > 2

    until(two_are_done)
    slurm.command("scancel", "--batch", "--signal=USR1", str(number))
    done = slurm.wait(number, checkout / "log")
    assert (done.state, done.exit_code, done.restarts) == ("COMPLETED", 0, 1), done.log
    assert re.search(r"16 requests \([1-9]\d* by earlier runs\): 16 answered", done.log), done.log
    assert results(checkout) == reference(checkout, mpi, job)


@one_mpi
def test_the_real_job_as_an_array(checkout: Path, mpi: Mpi, slurm: Slurm) -> None:
    job = write_job(checkout)
    lines = (checkout / "input.jsonl").read_bytes().splitlines(keepends=True)
    parts = checkout / "parts"
    parts.mkdir()
    for part in range(2):
        (parts / f"{part:03}.jsonl").write_bytes(b"".join(lines[part * 6 : part * 6 + 6]))
    number = slurm.submit(
        "--output=log%a", "--array=0-1", "slurm/array.sbatch", "job.toml", "parts", "out", cwd=checkout
    )
    ends = [slurm.wait(f"{number}_{part}", checkout / f"log{part}") for part in range(2)]
    assert [end.exit_code for end in ends] == [0, 0], ends
    assert results(checkout, "out/000") + results(checkout, "out/001") == reference(checkout, mpi, job)


def until(ready: Callable[[], bool]) -> None:
    while not ready():
        time.sleep(0.05)
