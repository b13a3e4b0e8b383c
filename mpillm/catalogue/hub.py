"""Models of Hugging Face repositories, which the huggingface_hub library fetches and keeps."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib
import logging
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mpillm.comm.launch import STOPS
from mpillm.errors import FULL, Interrupted, JobError, MpillmError, NoSpace, OutputError
from mpillm.model.families import gguf_family
from mpillm.model.opening import judge
from mpillm.store.directory import replacing
from mpillm.weights.formats.gguf_parts import gguf_parts
from mpillm.weights.formats.hf import of_text, read_json
from mpillm.weights.opening import CONFIG, is_beside
from mpillm.weights.text_files import MODULES, modules_in

log = logging.getLogger(__name__)

HEAD = 1 << 16  # bytes of a GGUF file in which its architecture stands
# hf:owner/name, hf:owner/name@revision, hf:owner/name/FILE.gguf
HF_NAME = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[^@]+\.gguf))?(?:@(?P<revision>[\w./-]+))?")
HF_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "tiktoken.model"]
HF_NOT = "consolidated*"  # another format of the same weights
UNREACHED = (
    "the hub cannot be reached, and the model is not on this machine; set HTTPS_PROXY if this network has a proxy, "
    "or give the path of a copy from another machine"
)
# What the errors of the library and of its HTTP library mean, by their names or those of their bases.
REMEDIES = {
    "GatedRepoError": "accept its terms on its page, and set HF_TOKEN",
    "RepositoryNotFoundError": "there is no such repository, or it is private; check the name, or set HF_TOKEN",
    "RevisionNotFoundError": "there is no such revision; check what follows @, or leave it out",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, and the model is not on this machine; unset it",
    "LocalEntryNotFoundError": UNREACHED,
    "EntryNotFoundError": "there is no such file; check its name on the repository's page",
    "FileNotFoundError": "there is no such repository, revision or file; check the name",
    "ConnectError": UNREACHED,
    "ConnectionError": UNREACHED,
}
# And what it means that the hub answers with an HTTP status, where the library has no class for it.
STATUSES = {
    401: "HF_TOKEN is not a valid token, or is not set although the repository needs it; set HF_TOKEN",
    403: "the account of HF_TOKEN may not read it; ask for access on its page, or set another HF_TOKEN",
    429: "the hub received too many requests; wait some minutes, and type the same command again",
}


def pull_hf(name: str, notes: Path) -> Path:
    """Let huggingface_hub keep the repository in its own cache; a note in the directory `notes` finds it again offline.

    What cannot be run is refused before more than a configuration or the beginning of a file is fetched. The library
    shows its progress. Files that an earlier pull fetched whole are kept; the library begins the others anew.
    """
    match = HF_NAME.fullmatch(name)
    if match is None:
        raise JobError(f"{name!r} is not hf:owner/name, hf:owner/name@revision or hf:owner/name/FILE.gguf.")
    note = _note(name, notes)
    if path := pulled(name, notes):
        return path
    hub = _library(name)
    repo, file, revision = match["repo"], match["file"], match["revision"]
    try:
        if file:
            _judge_gguf(hub, name, repo, file, revision)
            path = _fetch(hub, name, repo, gguf_parts(file), revision)
        else:
            config, files = _judge_repository(hub, name, repo, revision)
            path = config.parent
            _fetch(hub, name, repo, files, path.name)  # the folder's name is that of the revision's commit
    except MpillmError:
        raise
    except Exception as error:  # errors of the library, its HTTP library and the disk, said in one sentence
        raise _failed(f"{name} could not be pulled", error) from error
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with replacing(note) as out:
            out.write(os.fsencode(path))
    except (OSError, OutputError) as error:  # the model is there all the same
        log.warning("no note of %s in %s: %s", name, note.parent, error)
    return path


def pulled(name: str, notes: Path) -> Path | None:
    """Return the path of a repository's model on this machine, from its note; None if it is not here."""
    with contextlib.suppress(OSError):
        path = Path(os.fsdecode(_note(name, notes).read_bytes()))
        if path.exists():
            return path
    return None


def snapshot_in(folder: Path) -> Path:
    """Return the snapshot of a repository's folder in the cache of huggingface_hub; any other folder itself.

    It is that of the branch main, or the only one; JobError if there is none, or several.
    """
    if (folder / "config.json").exists() or not (folder / "snapshots").is_dir():
        return folder
    found = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    with contextlib.suppress(OSError, ValueError):
        main = (folder / "refs" / "main").read_text().strip()
        found = [path for path in found if path.name == main] or found
    if not found:
        raise JobError(f"{folder} has no snapshot; fetch the model again, with hf:owner/name.")
    if len(found) > 1:
        raise JobError(
            f"{folder} has {len(found)} snapshots, of which none is main; give one, such as {found[0]}."
        )
    return found[0]


def pull_config(name: str) -> Path | None:
    """Return the directory with a repository's config.json, the only file fetched; None if `name` is of a GGUF file."""
    match = HF_NAME.fullmatch(name)
    if match is None or match["file"]:
        return None
    try:
        return Path(
            _library(name).hf_hub_download(match["repo"], "config.json", revision=match["revision"])
        ).parent
    except MpillmError:
        raise
    except Exception as error:  # errors of the library, its HTTP library and the disk
        raise _failed(f"The configuration of {name} could not be fetched", error) from error


def _fetch(hub: Any, name: str, repo: str, files: Sequence[str], revision: str | None) -> Path:
    """Fetch files of a repository and return the path of the first; Interrupted says how many are complete.

    One after another: the library's threads for many files would all be waited for after a signal, and each would lose
    what it has of its file.
    """
    _sweep(Path(hub.constants.HF_HUB_CACHE), f"models--{repo.replace('/', '--')}")
    paths: list[str] = []
    try:
        with _passing_libraries():
            for file in files:
                paths.append(hub.hf_hub_download(repo, file, revision=revision))
    except KeyboardInterrupt as stop:
        raise Interrupted(
            f"Stopped with {len(paths)} of {len(files)} files of {name} complete; run the same command again "
            "to fetch the others."
        ) from stop
    return Path(paths[0])


@contextlib.contextmanager
def _passing_libraries() -> Iterator[None]:
    """Signals that stop the program raise KeyboardInterrupt: a library's `except Exception` swallows Interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [signal.signal(number, signal.default_int_handler) for number in STOPS]
    try:
        yield
    finally:
        for number, handler in zip(STOPS, before, strict=True):
            signal.signal(number, handler)


def _sweep(cache: Path, folder: str) -> None:
    """Remove what killed downloads left of files in the library's cache: parts that nobody holds the lock of.

    Their names, BLOB.ID.incomplete, are of one process; older versions go on with a BLOB.incomplete.
    """
    for part in (cache / folder / "blobs").glob("*.*.incomplete"):
        lock = cache / ".locks" / folder / f"{part.name.partition('.')[0]}.lock"
        with contextlib.suppress(OSError), open(lock, "a") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def _note(name: str, notes: Path) -> Path:
    return notes / (re.sub(r"[^\w.-]", "--", name) + ".path")


def _library(name: str) -> Any:
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise JobError(f"{name} needs the package huggingface_hub: pip install 'mpillm[hub]'.") from error
    # Else it says twice of each try that the hub did not answer; the error says it once.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    log.warning("asking the hub for %s", name)
    return hub


def _failed(what: str, error: Exception) -> MpillmError:
    """Return the error to tell the user, which begins with `what`; the same command may work after a full disk."""
    number = error.errno if isinstance(error, OSError) else None
    if number in FULL or os.strerror(errno.ENOSPC) in str(error):  # Xet's library raises a RuntimeError
        return NoSpace(
            f"{what}: no space left on the disk; free some and run the same command again, or set HF_HOME."
        )
    return JobError(f"{what} ({_reason(error)}).")


def _kinds(error: Exception) -> list[str]:
    """Return the names of the classes of an error and of its cause: the library's versions differ in both."""
    return [kind.__name__ for one in (error.__cause__, error) if one for kind in type(one).__mro__]


def _reason(error: Exception) -> str:
    """Advice on an error, if there is any; else the error's class and its first line."""
    if remedy := next((REMEDIES[kind] for kind in _kinds(error) if kind in REMEDIES), None):
        return remedy
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status >= 500:
        return f"the hub has a problem (status {status}); type the same command again later"
    first = (str(error).strip().splitlines() or [""])[0]
    return STATUSES.get(status) or f"{type(error).__name__}: {first}"


def _judge_repository(hub: Any, name: str, repo: str, revision: str | None) -> tuple[Path, list[str]]:
    """Fetch a repository's config.json; return its path on this machine and the names of the files that a model needs.

    ModelError if its config.json is of a model that cannot be run; JobError if it has no weights.
    """
    files = hub.list_repo_files(repo, revision=revision)
    if not any(file.endswith(".safetensors") and "/" not in file for file in files):
        models = [file for file in files if file.endswith(".gguf") and not is_beside(file)]
        if not models:
            raise JobError(f"{name} has neither safetensors nor GGUF files; other formats cannot be read.")
        raise JobError(
            f"{name} has no safetensors files; for one of its GGUF files write hf:{repo}/FILE.gguf, such as "
            f"hf:{repo}/{models[0]}."
        )
    if CONFIG not in files:
        what = "is an adapter: pull its base model" if "adapter_config.json" in files else "is not a model"
        raise JobError(f"{name} has no {CONFIG}, so it {what}.")

    def fetch(file: str) -> Path:
        return Path(hub.hf_hub_download(repo, file, revision=revision))

    config = fetch(CONFIG)
    judge(of_text(read_json(config)), name)
    folders = [
        "",
        "additional_chat_templates",
        *(modules_in(fetch(MODULES).parent) if MODULES in files else ()),
    ]
    return config, [
        file for file in files if os.path.dirname(file) in folders and _belongs(os.path.basename(file))
    ]


def _belongs(file: str) -> bool:
    """Return whether a file in one of a model's folders belongs to it, by its name."""
    return any(fnmatch(file, kind) for kind in HF_FILES) and not fnmatch(file, HF_NOT)


def _judge_gguf(hub: Any, name: str, repo: str, file: str, revision: str | None) -> None:
    """Raise ModelError if the file's architecture is none that can be run."""
    from mpillm.weights.formats.gguf_header import architecture_in

    path = f"{repo}@{revision}/{file}" if revision else f"{repo}/{file}"
    with hub.HfFileSystem().open(path, "rb", block_size=HEAD) as remote:
        if architecture := architecture_in(remote.read(HEAD)):
            gguf_family(architecture, name)
