"""The output directory: made, claimed by one run at a time, and never taken from somebody else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mpillm.errors import Interrupted, OutputError
from mpillm.store.directory import replacing
from mpillm.store.journal import Journal
from mpillm.store.output import Claim
from tests.conftest import Mount, run_bounded
from tests.job_helpers import lines, result


def test_a_second_run_is_refused_at_once(tmp_path: Path) -> None:
    with Claim(tmp_path / "out"):
        with pytest.raises(OutputError) as caught:
            Claim(tmp_path / "out")
        assert f"Another run (process {os.getpid()} on " in str(caught.value)
        assert str(caught.value).endswith(
            f" is writing to {tmp_path / 'out'}; wait for its end or give another output."
        )
        assert caught.value.exit_code == 2
    Claim(tmp_path / "out").close()


def test_who_takes_over_waits_for_the_lock(tmp_path: Path) -> None:
    with Claim(tmp_path) as claim:
        timer = threading.Timer(0.2, claim.close)
        timer.start()
        Claim(tmp_path, patience=10).close()
        timer.join()


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    script = "import sys, time; from pathlib import Path; from mpillm.store.output import Claim\n"
    script += "claim = Claim(Path(sys.argv[1])); print('claimed', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "out"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "claimed\n"
        with pytest.raises(OutputError, match=f"process {process.pid} on"):
            Claim(tmp_path / "out")
        process.kill()
    Claim(tmp_path / "out").close()


# Lets the kernel answer flock with ENOLCK, as a file system without locks does: seccomp(2), in the words of its BPF.
WITHOUT_LOCKS = """
import ctypes, errno, platform, struct, sys
number = {"x86_64": 73, "aarch64": 32}[platform.machine()]
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (6, 0, 0, 0x50000 | errno.ENOLCK), (6, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
program = struct.pack("HP", len(rules), ctypes.addressof(code))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, program, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
"""


def test_a_file_system_without_locks_is_used_and_said(tmp_path: Path) -> None:
    script = WITHOUT_LOCKS + "from pathlib import Path; from mpillm.store.output import Claim\n"
    script += "with Claim(Path(sys.argv[1])), Claim(Path(sys.argv[1])): pass"
    done = run_bounded([sys.executable, "-c", script, tmp_path])
    assert done.returncode == 0, done.stderr
    said = f"{tmp_path} has no file locks: a second run on it would not be noticed."
    assert done.stderr.splitlines() == [said, said]


def test_foreign_directories_and_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputError) as caught:
        Claim(tmp_path)
    assert str(caught.value) == (
        f"The output directory {tmp_path} holds 'thesis.tex' and no journal of a run; give a new or an empty "
        "directory."
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(OutputError, match=r"thesis\.tex is a file; give a directory\.$"):
        Claim(tmp_path / "thesis.tex")
    with pytest.raises(OutputError, match="cannot be written: Not a directory"):
        Claim(tmp_path / "thesis.tex/out")


def test_a_directory_with_a_journal_may_hold_more(tmp_path: Path) -> None:
    (tmp_path / "journal").touch()
    (tmp_path / "slurm-17.out").touch()
    Claim(tmp_path).close()


def test_no_permission_to_write(mounted: Mount) -> None:
    disk = mounted("size=64k")
    (disk / "out").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for path in (disk / "out", disk / "new"):
        with pytest.raises(OutputError, match=r"^The output .* cannot be written: Read-only file system\.$"):
            Claim(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not hold for root")
def test_no_permission_by_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="cannot be written: Permission denied"):
            Claim(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as file:
        file.write(b"old")
        assert not path.exists()
    assert path.read_bytes() == b"old"
    with pytest.raises(ZeroDivisionError), replacing(path) as file:  # noqa: PT012 - what happens inside is the test
        file.write(b"new")
        file.write(b"%d" % (1 // 0))
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_keeps_what_was_there(mounted: Mount) -> None:
    disk = mounted("size=64k")
    path = disk / "file"
    path.write_bytes(b"old")
    words = r"no space left for .*file \(No space left on device\)"
    with pytest.raises(Interrupted, match=words), replacing(path) as file:
        file.write(bytes(200_000))
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in disk.iterdir()] == ["file"]


def test_symbolic_links_in_the_directory_are_not_followed(tmp_path: Path) -> None:
    """Whoever may write to the directory cannot have the run write anywhere else."""
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_bytes(b"precious")
    out.mkdir()
    for name in ("journal.lock", "journal"):
        (out / name).symlink_to(victim)
        words = f"{name} is a symbolic link, which is not followed; remove it"
        with pytest.raises(OutputError, match=words), Claim(out) as claim:
            Journal(claim, {}, lines("a"))
        (out / name).unlink()
        (out / "journal.lock").unlink(missing_ok=True)
    (out / "journal.lock").hardlink_to(victim)
    with Claim(out) as claim, Journal(claim, {}, lines("a")):
        for name in ("file", "file.tmp", "journal.tmp"):
            (out / name).symlink_to(victim)
        with claim.directory.replacing("file") as file:
            file.write(b"new")
    assert (out / "file").read_bytes() == b"new"
    assert not (out / "file").is_symlink()
    assert victim.read_bytes() == b"precious"
    (out / "journal").unlink()
    os.mkfifo(out / "journal")
    with Claim(out) as claim, pytest.raises(OutputError, match="journal is not a regular file; remove it"):
        Journal(claim, {}, lines("a"))


def test_what_a_killed_run_was_replacing_is_removed(tmp_path: Path) -> None:
    with Claim(tmp_path) as claim:
        Journal(claim, {}, lines("a")).close()
    script = "import os, sys; from pathlib import Path; from mpillm.store.directory import replacing\n"
    script += (
        "with replacing(Path(sys.argv[1])) as file: file.write(b'x'); file.flush(); os.kill(os.getpid(), 9)"
    )
    run_bounded([sys.executable, "-c", script, tmp_path / "results.h5"])
    assert len(list(tmp_path.glob("results.h5.*.tmp"))) == 1
    (tmp_path / "mine.tmp").touch()
    with Claim(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["journal", "journal.lock", "mine.tmp"]


def test_a_directory_that_is_moved_is_noticed_and_the_one_in_its_place_is_left_alone(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    with Claim(old) as claim, Journal(claim, {}, lines("a", "b")) as journal:
        claim.check()
        old.rename(new)
        with Claim(old) as other:  # another job takes the path
            other.check()
            journal.append(result("a"))
            journal.flush()
            with claim.directory.replacing("results.jsonl") as file:
                file.write(b"the first job's")
            with pytest.raises(Interrupted) as caught:
                claim.check()
        assert str(caught.value) == (
            f"The output directory {old} was moved during the run; its journal is now {new}/journal: move the "
            f"directory back, or give {new} as the output, and run the command again."
        )
        assert [path.name for path in old.iterdir()] == ["journal.lock"]
        assert (new / "results.jsonl").read_bytes() == b"the first job's"
    with Claim(new) as claim, Journal(claim, {}, lines("a", "b")) as journal:
        assert list(journal.finished()) == ["a"]


def test_a_directory_that_is_deleted_or_emptied_is_noticed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Claim(out) as claim, Journal(claim, {}, lines("a")) as journal:
        (out / "journal.lock").unlink()
        with pytest.raises(Interrupted, match=r"were deleted during the run \(journal.lock is missing\)"):
            claim.check()
        shutil.rmtree(out)
        for replaced in (False, True):
            with pytest.raises(Interrupted, match="was deleted during the run, with the journal"):
                claim.check()
            out.mkdir(exist_ok=replaced)
        with pytest.raises(Interrupted):
            journal.check()
