"""Poor environments: limits, directories that are missing, and paths that are not UTF-8."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import pytest

from mpillm import cli
from mpillm.cli import commands, main
from mpillm.errors import of_system
from mpillm.store import report
from tests.conftest import HANGS, clean_environment
from tests.e2e.jobs import CHAT, command, results, write_lines

AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
LINES = [{"prompt": "the quick", "max_tokens": 2}]


def bash(line: str, *words: str | bytes | Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    """A shell line, in which "$@" stands for the words."""
    return subprocess.run(
        ["bash", "-c", line, "bash", *(os.fsencode(word) for word in words)],
        env=clean_environment(**AS_ROOT, **env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=HANGS,
        check=False,
    )


def job(folder: Path) -> list[str]:
    """A job of one rank."""
    return [sys.executable, *command(write_lines(folder / "in.jsonl", LINES), folder / "out")]  # type: ignore[arg-type]


@pytest.mark.parametrize("command", ["run", "serve"])
@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("-n 10", "The limit of open files (ulimit -n) is 10, but a rank needs 64; raise it."),
        (
            "-v 100000",
            "The limit of memory (ulimit -v) is 100000 KiB, but a rank needs at least 262144",
        ),
        ("-d 100000", "The limit of data (ulimit -d) is 100000 KiB, but a rank needs at least 163840"),
        ("-s 256", "The limit of the stack (ulimit -s) is 256 KiB, but a rank needs at least 1024"),
    ],
)
def test_limits_under_which_nothing_starts(limit: str, words: str, command: str, tmp_path: Path) -> None:
    serve = [sys.executable, "-m", "mpillm", "serve", "--model", str(CHAT), "--data", str(tmp_path)]
    done = bash(f'ulimit {limit}; "$@"', *(job(tmp_path) if command == "run" else serve))
    assert done.returncode == 2
    assert done.stderr.decode().startswith(f"mpillm: {words}")


def test_a_low_limit_is_raised_where_that_is_allowed(tmp_path: Path) -> None:
    assert bash('ulimit -S -n 20; "$@"', *job(tmp_path)).returncode == 0


def test_a_limit_of_processes(tmp_path: Path) -> None:
    nobody = ["setpriv", "--reuid=65534", "--clear-groups", "--inh-caps", "+dac_read_search"]
    nobody += ["--ambient-caps", "+dac_read_search"]
    if os.geteuid() != 0 or bash('"$@"', *nobody, "true").returncode != 0:
        pytest.skip("needs root, and setpriv")
    done = bash('ulimit -u 3; exec "$@"', *nobody, *job(tmp_path))
    assert done.returncode == 2
    assert b"The limit of processes and threads (ulimit -u) is 3" in done.stderr


def test_no_home_and_no_temporary_directory(tmp_path: Path) -> None:
    assert bash('unset HOME; "$@"', *job(tmp_path)).returncode == 0
    hidden = "for where in /tmp /var/tmp; do mount -t tmpfs -o ro none $where; done; cd /proc; "
    if os.geteuid() != 0 or bash(f"unshare -m bash -c '{hidden}'").returncode != 0:
        pytest.skip("needs root for a mount namespace")
    done = bash(
        f"""unshare -m bash -c '{hidden} exec "$@"' bash "$@" """, sys.executable, "-m", "mpillm", "plan"
    )
    assert done.returncode == 2
    assert done.stderr == b"mpillm: There is no directory for temporary files (/tmp); set TMPDIR to one.\n"


def test_paths_that_are_not_utf8(tmp_path: Path) -> None:
    """They work, and answers, report and HDF5 show the odd bytes as escapes."""
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/n\xe9\xff"))
    odd.mkdir()
    model, source, output = odd / "m\udce9", write_lines(odd / "in.jsonl", LINES), odd / "out"  # type: ignore[arg-type]
    model.symlink_to(CHAT)
    named = odd / "named\udcff"
    named.mkdir()
    for file in CHAT.iterdir():
        (named / file.name).symlink_to(file)
    done = bash('"$@"', sys.executable, *command(source, output, model=named))
    assert done.returncode == 0, done.stderr
    assert rb"n\xe9\xff/out/results.jsonl" in done.stderr
    assert results(output)[0]["response"]["body"]["model"] == r"named\xff"
    assert report.read(output).job["input"].endswith(r"n\xe9\xff/in.jsonl")
    with h5py.File(output / "results.h5") as h5:
        assert json.loads(h5.attrs["model"])["name"] == r"named\xff"
    for words in (["report", output], ["plan", "--json", *command(source, output, model=model)[3:]]):
        done = bash('"$@"', sys.executable, "-m", "mpillm", *words)
        assert done.returncode == 0, done.stderr


def test_what_the_system_refused() -> None:
    for error, words, code in [
        (MemoryError(), "There is not enough memory (MemoryError); lower memory.weights or memory.kv", 75),
        (OSError(12, "Cannot allocate memory"), "There is not enough memory", 75),
        (OSError(24, "Too many open files"), "Too many files are open", 75),
        (BlockingIOError(11, "Resource temporarily unavailable"), "No more processes or threads can be", 75),
        (RuntimeError("can't start new thread"), "No more processes or threads can be started", 75),
        (ImportError("x.so: failed to map segment from shared object"), "There is not enough memory", 75),
        (OSError(28, "No space left on device"), "A file cannot be read or written (No space left", 75),
        (OSError(5, "Input/output error", "a/b"), "a/b cannot be read or written (Input/output error); ", 75),
        (FileExistsError(17, "File exists", "a/b"), "a/b cannot be used: File exists.", 2),
        (
            NotADirectoryError(20, "Not a directory", b"a/\xff"),
            "a/\udcff cannot be used: Not a directory.",
            2,
        ),
        (OSError(36, "File name too long", "n" * 300), f"{'n' * 300} cannot be used: File name too long.", 2),
    ]:
        found = of_system(error)
        assert found is not None
        assert str(found).startswith(words)
        assert found.exit_code == code
    for error in (OSError(2, "No such file"), RuntimeError("else"), ValueError("can't start new thread")):
        assert of_system(error) is None


@pytest.mark.parametrize(("rank", "said"), [(None, 1), ("0", 1), ("1", 0)])
def test_ctrl_c_while_it_starts(
    rank: str | None, said: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before ranks have met nothing else answers it; a sentence of rank 0, and no traceback."""

    def stopped(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run", stopped)
    for name in ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if rank is not None:
        monkeypatch.setenv("PMI_RANK", rank)
        monkeypatch.setenv("PMI_SIZE", "2")
    assert main(["run"]) == 75
    sentence = "mpillm: Stopped before anything was computed; run the same command again.\n"
    assert capsys.readouterr().err == sentence * said


def test_a_python_that_lacks_a_library_ends_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPICH's mpiexec would let the others wait for this one."""
    monkeypatch.delattr(cli, "commands", raising=False)
    monkeypatch.setitem(sys.modules, "mpillm.cli.commands", None)
    told, tell = os.pipe()
    for name, value in (("PMI_SIZE", "2"), ("PMI_RANK", "1"), ("PMI_FD", str(tell))):
        monkeypatch.setenv(name, value)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["run"])
    assert os.read(told, 100) == b"cmd=abort exitcode=1\n"
    os.close(told)
    os.close(tell)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: NumPy starts no threads")
def test_numpy_starts_no_threads_before_their_number_is_known() -> None:
    """It starts one for each core, and they look for work while everything else is loaded."""
    script = """if True:
        import os
        from mpillm.cli.environment import prepare
        prepare()
        import numpy
        from mpillm.comm.cores import limit_threads
        started = len(os.listdir("/proc/self/task"))
        limit_threads(2, oversubscribed=False)
        numpy.ones((900, 900)) @ numpy.ones((900, 900))
        print(started, len(os.listdir("/proc/self/task")))
    """
    done = bash('unset OPENBLAS_NUM_THREADS; exec "$@"', sys.executable, "-c", script)
    assert done.stdout.split() == [b"1", b"2"], done
