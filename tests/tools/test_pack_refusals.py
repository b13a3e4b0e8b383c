"""Packing that is refused or interrupted, and packed files that change."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpillm.errors import Interrupted, JobError, ModelError, OutputError
from mpillm.model.opening import config_of, open_source
from mpillm.partition.grid import Place
from mpillm.weights.io.reading import read_at
from mpillm.weights.packed.layout import INDEX, UNFINISHED
from mpillm.weights.paging.cache import WeightCache
from mpillm.weights.paging.loaders import Kind
from mpillm.weights.paging.weights import minimum_budget
from mpillm.weights.source import rank_plans
from tests.conftest import Mount, run_bounded
from tests.tools.packing import content, model_path, packed


def test_what_is_refused(tmp_path: Path) -> None:
    source = content(model_path("llama3"))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match=r"holds 'thesis.tex' and no packed model; give a new or an empty"):
        packed("llama3", foreign)
    with pytest.raises(OutputError, match="which is never changed; pack to another directory"):
        packed("llama3", model_path("llama3") / "inside")
    with pytest.raises(OutputError, match="is a file; give a directory to pack to"):
        packed("llama3", foreign / "thesis.tex")
    packed("llama3", tmp_path / "p")
    with pytest.raises(OutputError, match="has another model, or this one packed otherwise"):
        packed("llama3", tmp_path / "p", "q8_0")
    with pytest.raises(JobError, match="is packed already; pack the model that it was made from"):
        packed(tmp_path / "p", tmp_path / "q")
    with pytest.raises(JobError, match=r"is quantised already \(.*Q4_0.*\), and packing cannot undo that"):
        packed("llama_mixed.gguf", tmp_path / "q", "q8_0")
    with pytest.raises(JobError, match="is packed already; leave quantize"):
        open_source(tmp_path / "p", "q8_0")
    with (tmp_path / "p" / INDEX).open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match=r"Another process is packing to .*; wait for its end"):
            packed("llama3", tmp_path / "p")
    assert content(model_path("llama3")) == source


def test_too_small_a_disk_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"needs .* more, but its disk has 1000 B free; free some space"):
        packed("llama3", tmp_path / "p")
    assert {path.name for path in (tmp_path / "p").iterdir()} == {UNFINISHED}


@pytest.mark.parametrize("loader", ["mmap", "read"])
@pytest.mark.parametrize("change", ["shorter", "touched"])
def test_a_file_that_changes_while_it_is_in_use(tmp_path: Path, loader: Kind, change: str) -> None:
    packed("llama3", tmp_path / "p")
    source = open_source(tmp_path / "p")
    config = config_of(source)
    items = rank_plans(config, Place(0, 1, 1), source)
    cache = WeightCache(items, source.open_loader(loader, 1, items, streamed=True), minimum_budget(items))
    with cache.use(0):
        pass
    file = tmp_path / "p" / "layer-00001.safetensors"
    if change == "shorter":
        os.truncate(file, 4096)
    else:
        os.utime(file)

    def sweep() -> None:
        for number in [*range(len(items))] * 2:
            with cache.use(number):
                pass

    with pytest.raises(
        ModelError, match="was shortened or changed while it was in use; put the model's file"
    ):
        sweep()
    cache.close()
    source.close()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda p: (p / "layer-00001.safetensors").unlink(),
            "names layer-00001.safetensors, which is missing",
        ),
        (lambda p: os.truncate(p / "head.safetensors", 8192), "has 8192 bytes, not"),
        (lambda p: (p / INDEX).write_text('{"format": "mpillm-packed", "version": 1}'), "version 1, not"),
        (lambda p: (p / INDEX).write_text("{}"), "is of format 'None', version None"),
        (
            lambda p: (p / INDEX).write_text(
                re.sub(r'"bytes": *\d+', '"bytes": 1e999', (p / INDEX).read_text(), count=1)
            ),
            "does not list the model's files",
        ),
    ],
)
def test_what_is_not_as_it_was_packed(tmp_path: Path, spoil: Any, words: str) -> None:
    packed("llama3", tmp_path / "p")
    spoil(tmp_path / "p")
    with pytest.raises(ModelError, match=words):
        open_source(tmp_path / "p")


def test_a_lost_page_is_a_sentence(tmp_path: Path) -> None:
    """The file is cut while a kernel, without the interpreter's lock, works on pages that are not in memory."""
    file = tmp_path / "mapped"
    shutil.copy(next(model_path("smol_bf16").glob("*.safetensors")), file)
    program = f"""
import os
from pathlib import Path
import numpy as np
from mpillm import kernels
from mpillm.kernels import BlockType
from mpillm.weights.io.lost_pages import say_when_lost
from mpillm.weights.io.mapped import MappedFile
say_when_lost("[0@here]", Path("the model"))
file = MappedFile(Path({str(file)!r}))
raw = file.view(0, file.size // 64 * 64).reshape(-1, 64)
os.truncate({str(file)!r}, 0)
kernels.dequantize(BlockType.BF16, raw, 32, np.empty((len(raw), 32), np.float32), 2)
"""
    done = run_bounded([sys.executable, "-c", program])
    assert done.returncode == 2
    assert done.stderr == (
        f"[0@here] {file} was shortened or cannot be read any more while it was in use (or /dev/shm is full); "
        "put it back and run the same command again.\n"
    )


def test_a_full_disk_keeps_what_is_finished(mounted: Mount, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up while packing (its free space was not what it seemed): run the same command again."""
    target = mounted("size=600k") / "p"
    usage = shutil.disk_usage(target.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**12))
    with pytest.raises(Interrupted, match=r"There is no space left for .*nothing that was finished is lost"):
        packed("llama3", target)
    with pytest.raises(ModelError, match="is not packed completely"):
        open_source(target)


def test_what_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 10)
    descriptor = os.open(file, os.O_RDONLY)
    out = np.zeros(8, np.uint8)
    read_at(descriptor, file, 2, out)
    assert (out == ord("x")).all()
    with pytest.raises(ModelError, match="was shortened or changed while it was in use"):
        read_at(descriptor, file, 3, out)
    os.close(descriptor)
    with pytest.raises(ModelError, match=r"file cannot be read any more: Bad file descriptor"):
        read_at(descriptor, file, 2, out)
