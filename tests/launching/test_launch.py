"""The supervisor's pure parts: hostfiles, mpiexec's words, how many ranks a model takes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from mpillm import version
from mpillm.cli import main, supervise
from mpillm.comm.launch import Library
from mpillm.comm.program import library
from mpillm.errors import Interrupted, JobError, LayoutError
from mpillm.launching import mpiexec, once, reach, supervisor, watch
from mpillm.launching.hostfile import HostSlots, read_hosts, write_hosts
from mpillm.launching.mpiexec import Settings
from mpillm.launching.reach import why_silent
from mpillm.launching.remarks import Remarks
from mpillm.launching.supervisor import Supervisor, on_fewer_ranks, ranks_that_work
from mpillm.store.status import LAUNCH, Reader
from mpillm.version import with_sources
from tests.conftest import ROOT
from tests.job_helpers import job
from tests.model.golden import model_path

OPENMPI = Library("Open MPI", (5, 0, 8), "Open MPI v5.0.8")
MPICH = Library("MPICH", (4, 3, 0), "MPICH Version: 4.3.0")


@pytest.mark.parametrize("name", ["openmpi", "mpich"])
def test_the_example_hostfiles_are_read(name: str) -> None:
    hosts = read_hosts(ROOT / "slurm" / "hosts" / f"{name}.hosts")
    assert hosts == [HostSlots(f"node{number}", 1) for number in (1, 2, 3, 4)]


@pytest.mark.parametrize("library", [OPENMPI, MPICH])
def test_what_is_written_is_read(library: Library, tmp_path: Path) -> None:
    hosts = [HostSlots("node1", 2), HostSlots("10.0.0.7", 1)]
    write_hosts(tmp_path / "hosts", hosts, library)
    assert read_hosts(tmp_path / "hosts") == hosts


def test_bad_hostfiles(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("node1,node2\n")
    with pytest.raises(JobError, match=r"has the line 'node1,node2'; .*, a line for each host\.$"):
        read_hosts(path)
    path.write_text("# nobody\n\n")
    with pytest.raises(JobError, match="names no host"):
        read_hosts(path)
    path.write_text("node1 ranks=2\n")
    with pytest.raises(JobError, match="has the line 'node1 ranks=2'; write 'node1 slots=2'"):
        read_hosts(path)


def test_the_words_for_each_mpi() -> None:
    hosts, folder = Path("h"), Path("f")
    plain, agent = Settings(ranks=2), Settings(hostfile=hosts, agent="/a", mpi_options=("-x", "A"))
    assert mpiexec.command(OPENMPI, plain, 2, None, folder) == [
        *["mpiexec", "--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none"],
        *["-x", "MPILLM_SUPERVISED", "-x", "MPILLM_RESTARTED=1", "--with-ft", "ulfm"],
        *["--prtemca", "prte_local_tmpdir_base", "f", "-n", "2"],
    ]
    assert mpiexec.command(OPENMPI, agent, 3, hosts, folder)[14:] == [
        *["--hostfile", "h", "--prtemca", "plm_ssh_agent", "/a", "-x", "A", "-n", "3"]
    ]
    assert mpiexec.command(MPICH, plain, 2, None, folder) == [
        *["mpiexec", "-genv", "MPILLM_RESTARTED", "1", "-n", "2"]
    ]
    assert mpiexec.command(MPICH, agent, 3, hosts, folder)[1:] == [
        *["-f", "h", "-launcher", "ssh", "-launcher-exec", "/a", "-genv", "MPILLM_RESTARTED", "1"],
        *["-x", "A", "-n", "3"],
    ]


@pytest.mark.parametrize("name", ["serve", "bench", "doctor", "pack a b", "chat"])
def test_what_is_started_once_ends_with_the_first_rank_that_dies(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ULFM mpiexec's exit code would be 0, and an idle server with a lost rank would seem well."""
    started: list[Sequence[str]] = []

    def start(words: Sequence[str], remarks: Remarks, attended: bool) -> subprocess.Popen[bytes]:
        started.append(words)
        assert attended == (name == "chat")
        return mpiexec.start(["true"], remarks, attended)

    monkeypatch.setattr(watch, "start", start)
    monkeypatch.setattr(supervise, "library", lambda: OPENMPI)
    assert main(["launch", "-n", "2", *name.split()]) == 0
    assert "ulfm" not in started[0]
    assert not any("RESTARTED" in word for word in started[0])


def test_mpiexec_that_waits_for_a_host_that_is_out_of_reach_is_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Open MPI's does so for ever, when the ranks on this machine have ended."""
    here = iter([True])
    monkeypatch.setattr(watch, "ranks_below", lambda pid: next(here, False))
    monkeypatch.setattr(once, "command", lambda *words, restarted: ["sh", "-c", "sleep 1000"])
    monkeypatch.setattr(supervise, "library", lambda: OPENMPI)
    for name in ("WATCH", "LOOK", "LINGER"):
        monkeypatch.setattr(watch, name, 0.1)
    assert main(["launch", "-n", "2", "serve"]) == 75
    assert (
        "The ranks ended (mpiexec waited for a host that was lost); run the same" in capsys.readouterr().err
    )


LOST = "prterun noticed that process rank 1 with PID 7 on node pi exited on\nsignal 9 (Killed)."
RULE = "-" * 74
DAEMON = (
    f"{RULE}\nPRTE has lost communication with a remote daemon.\n\nRemote daemon: [a@0,1] on node pi2\n{RULE}"
)
BANNER = f"{'-' * 74}\n{LOST}\n{'-' * 74}"


@pytest.mark.parametrize(
    ("script", "code", "shown"),
    [
        ("exit 0", 0, ""),
        ("echo 'mpillm: No such model.' >&2; exit 2", 2, "mpillm: No such model.\n"),
        (f"echo '{BANNER}' >&2; exit 137", 75, "The ranks ended (a rank on pi was ended by SIGKILL); run the same"),
        (f"echo '{DAEMON}' >&2; exit 0", 75, "The ranks ended (mpiexec lost its daemon on pi2); run the same"),
        (f"echo '{'-' * 74}' >&2; echo No slots. >&2; exit 1", 1, f"{'-' * 74}\nNo slots.\n"),
        ("trap 'exit 3' USR1; kill -INT $PPID; while :; do sleep 0.1; done", 75, "Stopped by SIGINT; run the same"),
        ("trap 'exit 0' USR1; kill -TERM $PPID; while :; do sleep 0.1; done", 0, ""),
    ],
)  # fmt: skip
def test_how_a_command_that_is_started_once_ends(
    script: str, code: int, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(once, "command", lambda *words, restarted: ["sh", "-c", script])
    monkeypatch.setattr(supervise, "library", lambda: OPENMPI)
    assert main(["launch", "-n", "2", "doctor"]) == code
    said = capsys.readouterr().err
    assert shown in said
    assert bool(shown) == bool(said)
    assert "Killed" not in said


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("exit 9", 75, "mpillm: The ranks ended (a rank was ended by SIGKILL); run the same command again.\n"),
        (f"echo '{BANNER}' >&2; exit 137", 75, "mpillm: The ranks ended (a rank on pi was ended by SIGKILL); run "),
        ("kill -INT $PPID; sleep 0.1; exit 1", 0, ""),
        ("kill -INT $PPID; sleep 0.1; exit 255", 0, ""),
        ("kill -INT $PPID; sleep 0.1; exit 9", 75, "mpillm: The ranks ended (a rank was ended by SIGKILL)"),
        ("echo 'mpillm: No such model.' >&2; exit 2", 2, "mpillm: No such model.\n"),
        ("trap 'exit 0' USR1; kill -TERM $PPID; while :; do sleep 0.1; done", 0, ""),
    ],
)  # fmt: skip
def test_how_a_chat_ends(
    script: str, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is left with Ctrl-C, which the terminal sends to mpiexec as well: MPICH's ends at the second one."""
    monkeypatch.setattr(once, "command", lambda *words, restarted: ["sh", "-c", f"echo an answer; {script}"])
    monkeypatch.setattr(supervise, "library", lambda: OPENMPI)
    assert main(["launch", "-n", "2", "chat"]) == code
    out, err = capfd.readouterr()
    assert out == "an answer\n"
    assert err.startswith(said)
    assert bool(err) == bool(said)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("exit 0", ""),
        ('shift; sh -c "$*"', ""),
        (
            'echo Welcome; shift; sh -c "$(echo "$*" | sed s/-x/-d/)"',
            "has no {python}: install mpillm there, in the same directory",
        ),
        (
            "echo Warning: a banner. >&2; echo ssh: connect to host $1 port 22: No route to host >&2; exit 255",
            "does not answer (ssh: connect to host pi9 port 22: No route to host)",
        ),
        (
            "echo pi@$1: Permission denied '(publickey)'. >&2; exit 255",
            "does not answer (pi@pi9: Permission denied (publickey))",
        ),
        (
            f"echo {reach.HAS} mpillm 0.0.1 and MPI",
            f"has mpillm 0.0.1 and MPI, and this host mpillm {with_sources()} and {{mpi}}; install the same there",
        ),
        (
            'shift; export MPI4PY_LIBMPI=/gone/libmpi.so.40; sh -c "$*"',
            "cannot start mpillm (No MPI library can be loaded (cannot load MPI library): correct MPI4PY_LIBMPI, "
            "which is '/gone/libmpi.so.40', or make mpi4py for that library, with its mpicc in PATH: "
            "pip install --force-reinstall --no-deps "
            "--no-binary=mpi4py mpi4py)",
        ),
        (
            'shift; sh -c "$(echo "$*" | sed "s/; /; cd gone \\&\\& /")"',
            "cannot start mpillm (sh: 1: cd: can't cd to gone); install it there as on this host",
        ),
        ("exit 3", "does not answer ({agent} ended with 3)"),
        ("", "does not answer ({agent}: Exec format error)"),
    ],
)
def test_why_a_host_does_not_answer(
    script: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MPI4PY_LIBMPI", raising=False)
    agent = tmp_path / "agent"
    agent.write_text(f"#!/bin/sh\n{script}\n" if script else "")
    agent.chmod(0o755)
    assert why_silent(str(agent), "pi9", loads=True) == why.format(
        agent=agent, python=sys.executable, mpi=library().name
    )
    assert why_silent(str(agent), "localhost") == ""


def test_checkouts_of_a_version_may_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as when only one machine has pulled: ranks would fail in ways that do not name the cause."""
    source = tmp_path / "mpillm" / "comm" / "world.py"
    source.parent.mkdir(parents=True)
    source.write_text("SIZE = 1\n")
    monkeypatch.setattr(version, "__file__", str(tmp_path / "mpillm" / "version.py"))
    assert with_sources() == version.__version__, "of what is installed no two differ"
    (tmp_path / ".git").mkdir()
    before = with_sources()
    source.write_text("SIZE = 10\n")
    assert before.startswith(f"{version.__version__} (sources ")
    assert with_sources() != before


def test_lost_ranks_cost_replicas_or_the_layout(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    three, pipelines = ["layout.replicas=3"], ["layout.replicas=3", "layout.stages=2"]
    shards = ["layout.stages=2", "layout.shards=2"]

    def left(words: list[str], ranks: int) -> tuple[object, ...]:
        layout = on_fewer_ranks(job(tmp_path, f"model={model_path('chat')}", *words), ranks).layout
        return layout.replicas, layout.stages, layout.shards

    assert left([], 2) == ("auto", "auto", "auto")
    assert [left(three, ranks)[0] for ranks in (4, 3, 2, 1)] == [3, 3, 2, 1]
    assert [left(pipelines, ranks)[:2] for ranks in (6, 5, 2, 1)] == [
        (3, 2),
        (2, 2),
        (1, 2),
        ("auto", "auto"),
    ]
    assert [left(shards, ranks) for ranks in (4, 3)] == [("auto", 2, 2), ("auto", "auto", "auto")]


def test_as_many_ranks_as_work(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    model = f"model={model_path('chat')}"  # two layers, two shards at most
    spec = job(tmp_path, model)
    assert [ranks_that_work(spec, maximum) for maximum in (1, 2, 3, 4, 9)] == [1, 2, 2, 4, 4]
    assert ranks_that_work(job(tmp_path, model, "layout.stages=2"), 3) == 2
    assert ranks_that_work(job(tmp_path, model, 'memory.kv={pi="1GiB", nuc="2GiB"}'), 2) == 2
    with pytest.raises(LayoutError, match="cannot be laid out on 1 rank"):
        ranks_that_work(job(tmp_path, model, "layout.stages=2"), 1)
    with pytest.raises(LayoutError, match=r"memory\.weights = 1KiB is too small"):
        ranks_that_work(job(tmp_path, model, "memory.weights=1KiB"), 2)


def test_a_hostfile_of_which_no_host_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is started: it would fail five times in a minute and a half."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    hostfile = tmp_path / "machines"
    hostfile.write_text("pi1\npi2\n")
    settings = Settings(hostfile=hostfile, agent="false")
    run = Supervisor(job(tmp_path, f"model={model_path('chat')}"), OPENMPI, settings, ["false"], *[print] * 3)
    with pytest.raises(JobError, match=r"^No host of .*machines can take ranks; try: false pi1 true$"):
        run.run()
    assert capsys.readouterr().out.splitlines() == [
        f"The host {name} does not answer (false ended with 1)." for name in ("pi1", "pi2")
    ]
    assert run._hosts(first=False) == [HostSlots("pi1", 1), HostSlots("pi2", 1)], "they may come back"


def test_ranks_keep_their_own_values_without_a_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list has a value for each rank of the hostfile: those behind a lost host must not get its values."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    hostfile, words = tmp_path / "machines", list[str]()
    hostfile.write_text("pi1 slots=2\npi2\npi3\n")
    spec = job(
        tmp_path,
        f"model={model_path('chat')}",
        "memory.kv=[1,2,'3GiB','4GiB']",
        "layout.threads={pi3=2, default=1}",
    )
    of = Supervisor(spec, OPENMPI, Settings(hostfile=hostfile), ["mpillm", "run"], *[print] * 3)
    monkeypatch.setattr(
        supervisor, "answering", lambda settings, say: [HostSlots("pi1", 2), HostSlots("pi3", 1)]
    )
    monkeypatch.setattr(supervisor, "ranks_that_work", lambda spec, maximum: maximum)

    def run_watched(started: list[str], *_: object) -> int:
        words[:] = started
        return 2

    monkeypatch.setattr(supervisor, "run_watched", run_watched)
    assert of.run() == 2
    assert words[words.index("mpillm") :] == ["mpillm", "run", '--set=memory.kv=[1,2,"4GiB"]']
    assert of._numbers([HostSlots("pi1", 2), HostSlots("pi2", 1), HostSlots("pi3", 1)]) == []


AGAIN = "The run ended before it was complete ({}); the next start is in 1 s."
COMPLETE = "The run is complete; the results are in {results}."


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ([0], []),
        ([14], [COMPLETE]),
        ([-9, 0], [AGAIN.format("SIGKILL ended mpiexec")]),
        ([137, 14], [AGAIN.format("exit code 137 of mpiexec"), COMPLETE]),
    ],
)
def test_the_last_sentence_is_not_mpiexecs(
    codes: list[int],
    said: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    of = Supervisor(job(tmp_path, f"model={model_path('chat')}"), OPENMPI, Settings(1), [], *[print] * 3)
    of._spec.output_path.mkdir()
    journal = of._spec.output_path / "journal"
    journal.write_bytes(b"of a model whose file was touched since")
    os.utime(journal, ns=(0, 0))
    left = list(codes)

    def once(*arguments: object) -> tuple[int, bool]:
        if len(left) == 1:
            journal.write_bytes(b"shorter")
        return left.pop(0), False

    monkeypatch.setattr(of, "_once", once)
    monkeypatch.setattr(of, "_sleep", lambda seconds: None)
    monkeypatch.setattr(supervisor, "finished", lambda path: SimpleNamespace(errors=0))
    assert of.run() == 0
    path = of._spec.output_path / "results.jsonl"
    assert capsys.readouterr().out.splitlines() == [line.format(results=path) for line in said]


def started(folder: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings) -> Supervisor:
    """A supervisor in a hurry, whose mpiexec sleeps."""
    (folder / "in.jsonl").write_text('{"prompt": "a"}\n')
    monkeypatch.setattr(supervisor, "command", lambda *words: ["sleep", "1000"])
    for name in ("WATCH", "ASK", "LOOK", "LINGER"):
        monkeypatch.setattr(watch, name, 0.1)
    return Supervisor(job(folder, f"model={model_path('chat')}"), OPENMPI, settings, [], *[print] * 3)


def test_a_host_that_is_lost_while_ranks_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open MPI waits for ever for the daemon of a host that was switched off just then."""
    answers = iter(["", "", "", "Connection timed out"])  # of two hosts, asked twice
    monkeypatch.setattr(reach, "why_silent", lambda agent, host, loads: next(answers))
    of, remarks = (
        started(tmp_path, monkeypatch, Settings(hostfile=tmp_path / "machines")),
        Remarks(print, print),
    )
    assert of._once(2, [HostSlots("pi1", 1), HostSlots("pi2", 1)], tmp_path, remarks, of._spec) == (-9, False)
    assert remarks.cause() == "mpiexec waited for a host that was lost"


def test_between_two_starts_the_run_is_not_said_to_be_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`status` would say that its command should be run again, and `watch` would end."""
    of = started(tmp_path, monkeypatch, Settings(1))
    output = of._spec.output_path
    model, source = str(model_path("chat")), str(tmp_path / "in.jsonl")
    assert main(["run", "--model", model, "--input", source, "--output", str(output)]) == 0
    journal = (output / "journal").read_bytes()
    (output / "journal").write_bytes(journal[: len(journal) * 2 // 3])
    seen = []

    def once(*arguments: object) -> tuple[int, bool]:
        (output / "journal").write_bytes(journal[: len(journal) * (2 + len(seen)) // 3])
        with contextlib.closing(Reader(output)) as reader:
            now = reader.look()
        seen.append((now.state, now.owner))
        return -9, False

    monkeypatch.setattr(of, "_once", once)
    monkeypatch.setattr(supervisor, "BACK_OFF", (0.0,))
    assert of.run() == 0
    assert seen == [("running", LAUNCH), ("complete", "")]
    (output / "journal").write_bytes(journal[: len(journal) * 2 // 3])
    with contextlib.closing(Reader(output)) as reader:
        assert reader.look().state == "stopped"


def test_reading_a_hostfile_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that nobody writes makes it last."""
    os.mkfifo(tmp_path / "machines")
    of = started(tmp_path, monkeypatch, Settings(hostfile=tmp_path / "machines"))
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(Interrupted, match=r"^Stopped by SIGTERM; run the same command again to continue\.$"):
        of.run()
    timer.join()


def test_planning_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For 100,000 ranks it takes longer than anybody waits."""
    of = started(tmp_path, monkeypatch, Settings(100_000))
    monkeypatch.setattr(
        supervisor, "ranks_that_work", lambda spec, ranks: os.kill(os.getpid(), signal.SIGTERM)
    )
    with pytest.raises(Interrupted, match=r"^Stopped by SIGTERM; run the same command again to continue\.$"):
        of.run()


def test_others_may_go_on_when_this_machine_has_lost_its_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the journal grows; then mpiexec waits for what is lost."""
    here, grows = iter([True]), iter(range(1, 20))
    monkeypatch.setattr(watch, "ranks_below", lambda pid: next(here, False))
    of = started(tmp_path, monkeypatch, Settings(2))
    monkeypatch.setattr(of, "_journal_size", lambda: next(grows, 20))
    assert of._once(2, [], tmp_path, Remarks(print, print), of._spec) == (-9, False)
    assert next(grows, None) is None
