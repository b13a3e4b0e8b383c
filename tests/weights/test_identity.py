"""What a model is: every file that decides an answer, as long as a run lasts and when it goes on."""

from __future__ import annotations

import builtins
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpillm.errors import ModelError
from mpillm.model.adapters import Adapters
from mpillm.model.embedding import embedding_settings
from mpillm.model.opening import config_of, open_source
from mpillm.text import load_tokenizer
from mpillm.weights import identity
from mpillm.weights.formats.hf import read_config
from mpillm.weights.identity import ModelChangedError, Watch
from tests.job_helpers import CHAT
from tests.model.golden import FIXTURES
from tests.weights.stored import MODELS


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return shutil.copytree(CHAT, tmp_path / "model")


def overwrite(path: Path, offset: int = -1) -> None:
    """Change a byte in place, without a trace in the file's times."""
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_every_file_that_decides_an_answer_counts(model: Path, name: str) -> None:
    before = identity.identity(open_source(model))
    path = model / name
    path.write_text((path.read_text() if path.exists() else "") + " ")
    after = identity.identity(open_source(model))
    assert [key for key in after if after[key] != before.get(key)] == [name]


def test_a_model_under_another_name_is_the_same(tmp_path: Path) -> None:
    """A table by host may name one file twice; another content is another model under any name."""
    path = CHAT / "model.safetensors"
    prints = []
    for name, extra in (("a.safetensors", b""), ("b.safetensors", b""), ("b.safetensors", b" ")):
        (tmp_path / name).write_bytes(path.read_bytes() + extra)
        file = identity._identify(tmp_path / name, None)
        prints.append(identity.contents({name: file}))
    assert prints[0] == prints[1]
    assert prints[1] != prints[2]


def test_small_tensors_count_whole_and_large_ones_by_samples_and_time(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "SAMPLES", 2)
    monkeypatch.setattr(identity, "SAMPLE_BYTES", 8)
    monkeypatch.setattr(identity, "ENDS_BYTES", 8)
    source = open_source(model)
    path = next(model.glob("*.safetensors"))
    smallest = min(nbytes for _, _, nbytes in source.extents())
    monkeypatch.setattr(identity, "SMALL", smallest)
    before = identity.identity(source)[path.name]
    assert before.modified == int(path.stat().st_mtime)
    extents = sorted((offset, nbytes) for file, offset, nbytes in source.extents() if file == path)
    small = [offset for offset, nbytes in extents if nbytes <= smallest]
    large = [offset + nbytes // 2 for offset, nbytes in extents if nbytes > smallest]
    assert small
    assert large
    hidden = [at for at in large if 8 <= at < path.stat().st_size - 16]
    for offset, seen in ((int(np.random.default_rng().choice(small)), True), (hidden[0], False)):
        overwrite(path, offset)
        assert (identity.identity(open_source(model))[path.name] != before) == seen
        overwrite(path, offset)
    os.utime(path, (0, 0))
    assert identity.identity(open_source(model))[path.name] != before
    assert identity.summed({"": identity.identity(open_source(model))[path.name]}) == identity.summed(
        {"": before}
    )


def test_no_matrix_of_a_small_model_is_hashed_whole(tmp_path: Path) -> None:
    path, norm, matrix = tmp_path / "m.gguf", 576 * 4, 576 * 192 // 32 * 20  # SmolLM2's, in F32 and Q4_1
    extents = [(path, 4096, norm), (path, 8192, matrix)]
    source = SimpleNamespace(path=path, files=(path,), tokenizer={}, extents=lambda: iter(extents))
    assert identity._files(source) == {path: [(0, 4096), (4096, norm)]}


def test_a_change_while_it_is_used_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(open_source(model))
    assert not watch.check()  # it is not time yet
    monkeypatch.setattr(identity, "CHECK_EVERY", 0.0)
    assert watch.check()
    state = watch.state
    shutil.copy(model / "tokenizer.json", model / "copy")
    (model / "copy").rename(model / "tokenizer.json")  # another file with the same bytes
    assert watch.check()
    assert watch.state != state
    watch.check_all()
    weights = next(model.glob("*.safetensors"))
    overwrite(weights)
    with pytest.raises(
        ModelChangedError, match=rf"The model's file {weights} has changed while the run was using"
    ):
        watch.check()
    with pytest.raises(ModelChangedError, match=rf"The model's file {weights} has changed while"):
        watch.check_all()
    overwrite(weights)
    watch.check_all()
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(ModelChangedError, match=r"tokenizer_config\.json has changed"):
        watch.check()


def test_a_file_that_is_gone_is_named(model: Path) -> None:
    source = open_source(model)
    next(model.glob("*.safetensors")).unlink()
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        Watch(source)


@pytest.mark.parametrize("kind", MODELS)
def test_each_file_that_is_read_counts(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is opened below a model's directory is watched, and is part of what the model is."""
    path = MODELS[kind](tmp_path / "model")
    read: set[str] = set()

    def noting(plain: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, *more: Any, **keys: Any) -> Any:
            if isinstance(file, str | os.PathLike):
                read.add(os.fspath(file))
            return plain(file, *more, **keys)

        return opened

    for module in (builtins, io, os):
        monkeypatch.setattr(module, "open", noting(module.open))
    source = open_source(path)
    config = config_of(source)
    tuned = {"tuned": str(FIXTURES / "adapters" / "chat_all")} if kind == "directory" else {}
    adapters = Adapters(tuned, source, config)
    load_tokenizer(source.tokenizer, config.vocab)
    embedding_settings(source)
    watched = {str(file) for file, _ in Watch(source, adapters.files)._named.values()}
    ours = (str(tmp_path / "model"), str(FIXTURES / "adapters"))
    assert {one for one in read if one.startswith(ours) and os.path.isfile(one)} <= watched
    assert len(watched) > 1


def test_what_modelopt_says_of_a_checkpoint_is_part_of_it(tmp_path: Path) -> None:
    said = {"quantization": {"quant_algo": "FP8"}}
    for name, value in ("config.json", {"model_type": "llama"}), ("hf_quant_config.json", said):
        (tmp_path / name).write_text(json.dumps(value))
    config, files = read_config(tmp_path)
    assert config["quantization_config"] == {"quant_method": "modelopt", "quant_algo": "FP8"}
    assert files == (tmp_path / "config.json", tmp_path / "hf_quant_config.json")
