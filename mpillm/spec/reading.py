"""Read a job file and what the command line adds."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from mpillm.errors import JobError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

from mpillm.spec.job import Spec, known_keys
from mpillm.spec.messages import explain, instead_of, nearest, other_job

LINE = "The command line"
PYTHON = ("Job", "LLM")  # callers whose keys are arguments
ADDRESS = "://"  # what no path has
UNREAD = "-"  # standard input, which no plan reads


def load(
    path: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    input: str | None = None,
    output: str | None = None,
    planned: bool = False,
    caller: str = LINE,
) -> Spec:
    """Return the checked job of a file (or of none), the command line's word on top; JobError says what is wrong.

    `overrides` are "section.key=value" in TOML; a bare word is a string. `model`, `input` and `output` win over
    both. What those leave out and the file does not have either is an error, but for the model (the default one) and,
    in a job that is only `planned`, for the input (`UNREAD`) and the output. `caller` gave the overrides.
    """
    for override in overrides:
        _refuse_incomplete(override)
    values = _read(Path(path)) if path is not None else {}
    where = caller if path is None else f"The job file {path}"
    _take_shorthands(values, where)
    _refuse_unknown(values, where)
    if path is not None:
        _find_beside(values, Path(path).parent)
    for override in overrides:
        _override(values, override)
    values.update({k: v for k, v in (("model", model), ("input", input)) if v is not None})
    if output is not None:
        values.setdefault("output", {})["path"] = output
    _take_shorthands(values, where)
    _refuse_unknown(values, caller)
    if planned:
        values.setdefault("input", UNREAD)
        values.setdefault("output", {}).setdefault("path", "out")
    for key, given in (("input", "input" in values), ("output", "path" in values.get("output", {}))):
        if not given:
            add = f'{key}="..."' if caller in PYTHON else f'{key} = "..." or --{key} PATH'
            raise JobError(f"{where} does not say where its {key} is; add {add}.")
    blamed = dict[str, str]()
    for override in overrides:
        key = ".".join(_keys(override.partition("=")[0]))
        blamed[f"{key}."] = caller if caller != LINE else f"--set {override}"
    return checked(values, where, blamed=blamed)


def checked(
    values: dict[str, Any],
    where: str,
    *,
    arguments: Set[str] = frozenset(),
    blamed: Mapping[str, str] = MappingProxyType({}),
) -> Spec:
    """Return the job of these tables; JobError says what is wrong, of `where`, which also takes other `arguments`.

    `blamed` names what else gave the keys that begin so.
    """
    _take_shorthands(values, where)
    _refuse_unknown(values, where, arguments)
    try:
        spec = msgspec.convert(values, Spec)
    except msgspec.ValidationError as error:
        said = explain(error, values)
        key = f"{said.partition(':')[0].partition('[')[0]}."
        by = next((name for begin, name in blamed.items() if key.startswith(begin)), where)
        raise JobError(f"{by}: {said}.") from None
    if ADDRESS in spec.input:
        raise JobError(f"The input {spec.input} is a URL; download it first, and give the path of the file.")
    if ADDRESS in spec.output.path:
        raise JobError(
            f"The output {spec.output.path} is a URL; give a directory, and copy the results later."
        )
    paths = {
        "model": "".join(spec.model_names),
        "draft.model": spec.draft.model or "",
        "input": spec.input,
        "output": spec.output.path,
    }
    for key, path in (paths | {f"adapters.{name}": path for name, path in spec.adapters.items()}).items():
        if "\0" in path:
            raise JobError(f"{where}: {key} contains a zero byte, which a path cannot contain.")
        if drive := re.match(r"([A-Za-z]):[/\\]+", path):
            there = f"/mnt/{drive[1].lower()}/{path[drive.end() :]}".replace("\\", "/")
            raise JobError(f"{where}: {key} {path!r} is a path of Windows; in its Linux (WSL) it is {there}.")
    for name in spec.model_names:
        if name in spec.adapters:
            raise JobError(f"{where}: the adapter {name!r} has the name of the model; give it another name.")
    _refuse_overwriting(spec)
    return spec


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        return toml(text)
    except FileNotFoundError:
        raise JobError(f"The job file {path} does not exist; {other_job(path)}") from None
    except OSError as error:
        if path.is_dir():
            raise JobError(
                f"{path} is a directory, not a job file (TOML); if it holds a model, type --model {path}."
            ) from None
        raise JobError(f"The job file {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise JobError(f"The job file {path} is not UTF-8 text (byte {error.start}).") from None
    except ValueError as error:
        raise JobError(f"The job file {path} is not TOML: {error}{instead_of(text, str(error))}.") from None


def toml(text: str) -> dict[str, Any]:
    """Return the tables of a TOML text; ValueError says what is wrong with it."""
    try:
        values: dict[str, Any] = tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:  # Python reads no number of more than 4300 digits
        raise ValueError("a number in it has too many digits") from None
    return values


def _take_shorthands(values: dict[str, Any], where: str) -> None:
    """`prompt` and `messages` at the top of a job are those of `request`, and a string `output` is its `path`."""
    if isinstance(values.get("output"), str):
        values["output"] = {"path": values["output"]}
    elif not isinstance(values.get("output", {}), dict):
        raise JobError(f"{where}: output: expected the path of a directory, or a table.")
    for key in ("prompt", "messages"):
        if key in values:
            request = values.setdefault("request", {})
            if not isinstance(request, dict) or key in request:
                raise JobError(f"{where} has both {key} and request, which must then be a table without it.")
            request[key] = values.pop(key)


def _find_beside(values: dict[str, Any], folder: Path) -> None:
    """Make a job file's `input`, its `adapters`, and models that are paths, start from the job file's directory."""
    source = values.get("input")
    if isinstance(source, str) and source not in ("", "-") and ADDRESS not in source:
        values["input"] = str(folder / os.path.expanduser(source))
    for table in (values, values.get("draft")):
        if isinstance(table, dict) and "model" in table:
            table["model"] = _beside(table["model"], folder)
    if isinstance(values.get("model"), dict):
        values["model"] = {host: _beside(model, folder) for host, model in values["model"].items()}
    adapters = values.get("adapters")
    if isinstance(adapters, dict):
        for name, folder_of in adapters.items():
            if isinstance(folder_of, str) and folder_of:
                adapters[name] = str(folder / os.path.expanduser(folder_of))


def _beside(model: Any, folder: Path) -> Any:
    """Return a model's path from the job file's directory; one that begins with a variable is each host's own."""
    if not isinstance(model, str) or not model or model.startswith(("hf:", "$")):
        return model
    path = "/" in model or model.endswith((".gguf", ".m"))
    return str(folder / os.path.expanduser(model)) if path else model


def _refuse_incomplete(override: str) -> None:
    """Said before the job is read: what follows `--set` a word later would be taken for its file."""
    name, equals, _ = override.partition("=")
    if not equals or not all(_keys(name)):
        raise JobError(f"--set {override!r} is not of the form section.key=value, such as sampling.seed=3.")


def _override(values: dict[str, Any], override: str) -> None:
    """Put "a.b=value" into the tables."""
    name, _, text = override.partition("=")
    keys = _keys(name)
    if keys == ["output"]:
        keys = ["output", "path"]
    table = values
    for depth, key in enumerate(keys[:-1], 1):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise JobError(f"--set {override!r}: {'.'.join(keys[:depth])} is a value, not a table.")
    table[keys[-1]] = _value(text.strip())


def _keys(name: str) -> list[str]:
    """Return the keys of a dotted name, which may be quoted as in TOML."""
    try:
        value: Any = toml(f"{name} = 0")
    except ValueError:
        return [key.strip() for key in name.split(".")]
    keys: list[str] = []
    while isinstance(value, dict):
        ((key, value),) = value.items()
        keys.append(key)
    return keys


def _value(text: str) -> Any:
    """Return a TOML value; else a list, an object or a string of JSON; else the text itself."""
    try:
        parsed = toml(f"value = {text}")
        if set(parsed) == {"value"}:
            return parsed["value"]
    except ValueError:
        pass
    try:
        return json.loads(text) if text.startswith(("[", "{", '"')) else text
    except (ValueError, RecursionError):
        return text


def _refuse_unknown(values: dict[str, Any], where: str, arguments: Set[str] = frozenset()) -> None:
    known = set(known_keys())
    tables = {key.split(".")[0] for key in known if "." in key}
    given: list[str] = []
    for key, value in values.items():
        if key in tables and isinstance(value, dict):
            given += [f"{key}.{inner}" for inner in value]
        elif key not in tables:
            given.append(key)
    for key in given:
        if key not in known:
            instead = nearest(key, known | tables | arguments)
            if where in PYTHON:  # as Python writes a key of a table
                instead = re.sub(r"'(\w+)\.(\w+)'", r"\1={'\2': ...}", instead)
            raise JobError(f"{where} has an unknown key {key!r}; {instead}")


def _refuse_overwriting(spec: Spec) -> None:
    """An input inside the output directory would be taken for a result, or replaced by one."""
    source, target = (Path(os.path.realpath(path)) for path in (spec.input_path, spec.output_path))
    if source == target or target in source.parents:
        how = "are the same" if source == target else "overlap: the input lies inside"
        raise JobError(
            f"The input {spec.input} and the output {spec.output.path} {how}; "
            "give the results a directory of their own."
        )
