"""The job file: TOML to frozen structs, with every unknown key, wrong type and wrong value named by its path.

Paths: what a job file reads (`input`, and `model` where it is a path) is found from the job file's own
directory; what it writes (`output`) goes under the directory the command was started in. A path typed on the
command line always starts from there.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from mpillm.errors import JobError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

Auto = Literal["auto"]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Temperature = Annotated[float, Meta(ge=0.0, le=100.0)]
TopP = Annotated[float, Meta(gt=0.0, le=1.0)]
TopK = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
Penalty = Annotated[float, Meta(gt=0.0, le=100.0)]
Subtracted = Annotated[float, Meta(ge=-2.0, le=2.0)]  # from the logits of tokens that were generated
Word = Annotated[str, Meta(min_length=1)]
Stop = Word | Annotated[list[Word], Meta(max_length=64)]

Quantize = Literal["none", "q8_0", "q4_0"]
Pooling = Literal["mean", "last"]
KVType = Literal["f32", "f16", "q8_0"]

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", 1):
    _UNITS[f"{_letter}iB".upper()] = 1024**_power
    _UNITS[f"{_letter}B"] = 1000**_power

_PLAIN = {"int": "a whole number", "float": "a number", "str": "a string", "bool": "true or false"}
_PLAIN |= {"object": "a table", "array": "a list"}
_MISSING = object()
# Keys that earlier versions did not have: where they ask for nothing, a job is the same as theirs.
_ADDED = tuple(
    f"sampling.{key}"
    for key in ("presence_penalty", "frequency_penalty", "response_format", "structured_outputs")
)


def byte_size(value: str | int) -> int:
    """Bytes meant by 1073741824, "2GiB" (powers of 1024) or "500MB" (powers of 1000); ValueError says what is wrong."""
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{_short(value)} is no size; write bytes as 2GiB, 512MiB or 500MB")
    size = float(match[1]) * unit
    if size < 1:
        raise ValueError(f"{value!r} is no size; it must be at least one byte")
    if size >= 2**63:
        raise ValueError(f"{_short(value)} is no size; it must be less than 8 EiB")
    return int(size)


def _short(value: object) -> str:
    """A value in a message, not at its whole length."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def shown_bytes(count: float) -> str:
    """Bytes for people: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the job file: nothing in it goes unread."""


class JsonSchema(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's `json_schema` of a response format; keywords that cannot be enforced are errors, unless not `strict`."""

    name: str = ""
    description: str | None = None
    schema: dict[str, Any] | bool = True
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """vLLM's `structured_outputs`: one of the first five."""

    json: dict[str, Any] | str | bool | None = None
    regex: str | None = None
    choice: Annotated[list[Word], Meta(min_length=1)] | None = None
    grammar: str | None = None
    json_object: Literal[True] | None = None
    disable_any_whitespace: bool = False


class Sampling(Section, frozen=True):
    """What a request that does not say otherwise is sampled with; temperature 0 is greedy."""

    max_tokens: Count = 128
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    min_p: Fraction = 0.0
    repetition_penalty: Penalty = 1.0
    presence_penalty: Subtracted = 0.0
    frequency_penalty: Subtracted = 0.0
    seed: Seed = 0
    stop: Stop = []
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None


class Layout(Section, frozen=True):
    """Ranks = stages x shards, and the threads of each."""

    stages: Auto | Positive = "auto"
    shards: Auto | Positive = "auto"
    threads: Auto | Positive = "auto"


class Memory(Section, frozen=True):
    """What a rank may hold: weights in kernel-ready form, and the KV cache."""

    weights: str | Positive = "all"
    kv: str | Positive = "1GiB"
    kv_spill: str | Positive = "none"
    spill_dir: Word = "auto"
    max_context: Positive = 4096
    policy: Literal["cycle", "lru"] = "cycle"
    loader: Literal["auto", "mmap", "read"] = "auto"
    kv_type: Auto | KVType = "auto"

    @property
    def weights_bytes(self) -> int | None:
        """The weight cache's budget per rank; None for "all"."""
        return None if self.weights == "all" else byte_size(self.weights)

    @property
    def kv_bytes(self) -> int:
        """The KV cache's budget per rank."""
        return byte_size(self.kv)

    @property
    def kv_spill_bytes(self) -> int:
        """How much of the KV cache may lie on disk, per rank."""
        return 0 if self.kv_spill == "none" else byte_size(self.kv_spill)

    @property
    def spill_folder(self) -> Path:
        """Where it lies, on every node."""
        return Path(tempfile.gettempdir() if self.spill_dir == "auto" else os.path.expanduser(self.spill_dir))

    def __post_init__(self) -> None:
        words = {"weights": "all", "kv_spill": "none"}  # that stand for a size
        for key, value in (("weights", self.weights), ("kv", self.kv), ("kv_spill", self.kv_spill)):
            if value == words.get(key):
                continue
            try:
                byte_size(value)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None


class Wire(Section, frozen=True):
    """How activations travel: Q8_0 blocks (34 bytes for 32 values), or exactly.

    What shards sum travels twice a layer; what goes from stage to stage travels once a step. The latter is exact by
    default, so that the number of stages changes no result, at a cost that only slow networks feel.
    """

    activations: Literal["q8_0", "f32"] = "q8_0"  # between the shards of a stage
    between_stages: Literal["q8_0", "f32"] = "f32"


class Embeddings(Section, frozen=True):
    """What becomes of a text's hidden states where /v1/embeddings is asked."""

    pooling: Pooling | Auto = "auto"  # auto: as the model's files say
    normalize: bool | Auto = "auto"
    prompt_name: str | None = None  # of the model's prompts, what stands before each text


class BatchLimits(Section, frozen=True):
    """How much one step takes on; more is faster and changes no result."""

    max_num_seqs: Auto | Positive = "auto"
    max_num_batched_tokens: Auto | Positive = "auto"
    prefix_sharing: bool = True  # prompts that begin alike are computed once up to where they differ


class Job(Section, frozen=True):
    """How the run goes about it; changes no result."""

    checkpoint_tokens: Annotated[int, Meta(ge=0, le=2**63 - 1)] = (
        64  # answers are saved every so many tokens; 0: when done
    )


class Spec(Section, frozen=True, kw_only=True):
    """A checked job: what the job file and the command line say together."""

    model: Annotated[str, Meta(min_length=1)] = "smollm2-135m"
    input: Annotated[str, Meta(min_length=1)]
    output: Annotated[str, Meta(min_length=1)]
    quantize: Quantize = "none"
    sampling: Sampling = Sampling()
    layout: Layout = Layout()
    memory: Memory = Memory()
    wire: Wire = Wire()
    embeddings: Embeddings = Embeddings()
    batch: BatchLimits = BatchLimits()
    job: Job = Job()

    @property
    def input_path(self) -> Path:
        """Where the requests are."""
        return Path(self.input)

    @property
    def output_path(self) -> Path:
        """The output directory."""
        return Path(self.output)

    def identity(self) -> dict[str, Any]:
        """What of the job changes a result, by dotted key: two jobs that agree in it may share an output directory.

        Not in it: the layout, the budgets, the batch, `job` (they change no result), and the model's and the input's
        content, which the journal knows by their own fingerprints.
        """
        values: dict[str, Any] = {"quantize": self.quantize}
        for name in ("sampling", "wire", "embeddings"):
            section = getattr(self, name)
            values.update({f"{name}.{key}": getattr(section, key) for key in section.__struct_fields__})
        for key in _ADDED:
            if not values[key]:
                del values[key]
        values["memory.max_context"] = self.memory.max_context
        values["memory.kv_type"] = self.memory.kv_type
        return values

    def fingerprint(self) -> str:
        """A hash of `identity`, 32 hexadecimal digits."""
        return hashlib.blake2b(
            msgspec.json.encode(self.identity(), order="sorted"), digest_size=16
        ).hexdigest()


def load(
    path: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    input: str | None = None,
    output: str | None = None,
) -> Spec:
    """Return the checked job of a file (or of none), the command line's word on top; JobError says what is wrong.

    `overrides` are "section.key=value" in TOML; a bare word is a string. `model`, `input` and `output` win over
    both. What those leave out and the file does not have either is an error, but for the model (the default one).
    """
    values = _read(Path(path)) if path is not None else {}
    where = "The command line" if path is None else f"The job file {path}"
    _refuse_unknown(values, where)
    if path is not None:
        _find_beside(values, Path(path).parent)
    for override in overrides:
        _override(values, override)
    values.update(
        {k: v for k, v in (("model", model), ("input", input), ("output", output)) if v is not None}
    )
    _refuse_unknown(values, "The command line")
    for key in ("input", "output"):
        if key not in values:
            raise JobError(f'{where} does not say where its {key} is; add {key} = "..." or --{key} PATH.')
    return checked(values, where)


def checked(values: dict[str, Any], where: str) -> Spec:
    """Return the job of these tables; JobError says what is wrong, of `where`."""
    _refuse_unknown(values, where)
    try:
        spec = msgspec.convert(values, Spec)
    except msgspec.ValidationError as error:
        raise JobError(f"{where}: {_explain(error, values)}.") from None
    for key in ("model", "input", "output"):
        if "\0" in getattr(spec, key):
            raise JobError(f"{where}: {key} holds a zero byte, which no path can.")
    _refuse_overwriting(spec)
    return spec


def _read(path: Path) -> dict[str, Any]:
    try:
        return _toml(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise JobError(f"There is no job file {path}.") from None
    except OSError as error:
        raise JobError(f"The job file {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise JobError(f"The job file {path} is not UTF-8 text (byte {error.start}).") from None
    except ValueError as error:
        raise JobError(f"The job file {path} is not TOML: {error}.") from None


def _toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text; ValueError says what is wrong with it."""
    try:
        values: dict[str, Any] = tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:  # Python reads no number of more than 4300 digits
        raise ValueError("a number in it has too many digits") from None
    return values


def _find_beside(values: dict[str, Any], folder: Path) -> None:
    """Make a job file's `input`, and a `model` that is a path, start from the job file's directory."""
    source = values.get("input")
    if isinstance(source, str) and source:
        values["input"] = str(folder / os.path.expanduser(source))
    model = values.get("model")
    if isinstance(model, str) and model and not model.startswith("hf:"):
        path = folder / os.path.expanduser(model)
        if "/" in model or model.endswith(".gguf"):
            values["model"] = str(path)


def _override(values: dict[str, Any], override: str) -> None:
    """Put "a.b=value" into the tables."""
    name, equals, text = override.partition("=")
    keys = [key.strip() for key in name.split(".")]
    if not equals or not all(keys):
        raise JobError(f"--set {override!r} is not of the form section.key=value, such as sampling.seed=3.")
    table = values
    for depth, key in enumerate(keys[:-1], 1):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise JobError(f"--set {override!r}: {'.'.join(keys[:depth])} is a value, not a table.")
    table[keys[-1]] = _value(text.strip())


def _value(text: str) -> Any:
    """A TOML value, or the text itself."""
    try:
        parsed = _toml(f"value = {text}")
    except ValueError:
        return text
    return parsed["value"] if set(parsed) == {"value"} else text


def _known() -> Iterator[str]:
    """Every key a job can have, dotted."""
    for field in msgspec.structs.fields(Spec):
        if isinstance(field.type, type) and issubclass(field.type, Section):
            yield from (f"{field.name}.{key}" for key in field.type.__struct_fields__)
        else:
            yield field.name


def key_called(name: str) -> str | None:
    """The dotted key of a job whose last word this is, or whose only name; None if there is none."""
    return next((key for key in _known() if key.rpartition(".")[2] == name), None)


def _refuse_unknown(values: dict[str, Any], where: str) -> None:
    known = set(_known())
    tables = {key.split(".")[0] for key in known if "." in key}
    given: list[str] = []
    for key, value in values.items():
        if key in tables and isinstance(value, dict):
            given += [f"{key}.{inner}" for inner in value]
        elif key not in tables:
            given.append(key)
    for key in given:
        if key not in known:
            raise JobError(f"{where} has an unknown key {key!r}; {_nearest(key, known | tables)}")


def _nearest(key: str, known: set[str]) -> str:
    """The known key that was likely meant."""
    leaves = {name.rpartition(".")[2]: name for name in sorted(known)}
    if close := difflib.get_close_matches(key, known, n=1, cutoff=0.75):
        return f"did you mean {close[0]!r}?"
    if close := difflib.get_close_matches(key.rpartition(".")[2], leaves, n=1, cutoff=0.7):
        return f"did you mean {leaves[close[0]]!r}?"
    section = key.rpartition(".")[0]
    siblings = sorted(name for name in known if name.rpartition(".")[0] == section)
    return f"there are {', '.join(siblings)}."


def _explain(error: msgspec.ValidationError, values: dict[str, Any]) -> str:
    """msgspec's sentence with the key first and the value that was given."""
    text, _, place = str(error).rpartition(" - at `$")
    text, path = (text, place.rstrip("`").lstrip(".")) if text else (str(error), "")
    if path == "memory":  # said by Memory.__post_init__, which knows the key
        return f"memory.{text}" if ": " in text else f"memory: {text}"
    given = _look_up(values, path)
    text = plain_words(text)
    if text.startswith("invalid enum value") and (choices := _choices(path)):
        text = f"expected one of {choices}"
    shown = "" if given is _MISSING or isinstance(given, dict) else f", not {_short(given)}"
    text = re.sub(r", got [\w ]+$", "", text) if shown else text
    return f"{path}: {text}{shown}"


def plain_words(text: str) -> str:
    """One of msgspec's sentences, in the words of those who write TOML and JSON, to go on another one with."""
    text = re.sub(r"`([^`]*)`", lambda found: " or ".join(map(_plain, found[1].split(" | "))), text)
    return text[0].lower() + text[1:]


def _plain(word: str) -> str:
    return _PLAIN.get(word, word)


def _look_up(values: Any, path: str) -> Any:
    for key in re.findall(r"[^.\[\]]+", path):
        try:
            values = values[int(key)] if isinstance(values, list) else values[key]
        except (KeyError, IndexError, TypeError, ValueError):
            return _MISSING
    return values


def _choices(path: str) -> str:
    """The words a key takes, and that it takes a number where it does."""
    kind: Any = Spec
    for key in path.split("."):
        struct = next((part for part in (kind, *get_args(kind)) if hasattr(part, "__struct_fields__")), Spec)
        fields = {field.name: field.type for field in msgspec.structs.fields(struct)}
        kind = fields.get(key)
    words = [repr(word) for word in _literals(kind)]
    takes_number = any(get_args(part) and get_args(part)[0] is int for part in get_args(kind))
    return ", ".join([*words, "a whole number"] if takes_number else words)


def _literals(kind: Any) -> list[str]:
    arguments = get_args(kind)
    if arguments and all(isinstance(word, str) for word in arguments):
        return list(arguments)
    return [word for part in arguments for word in _literals(part)]


def _refuse_overwriting(spec: Spec) -> None:
    """An input inside the output directory would be taken for a result, or replaced by one."""
    source, target = spec.input_path.resolve(), spec.output_path.resolve()
    if source == target or target in source.parents:
        how = "are the same" if source == target else "overlap: the input lies inside"
        raise JobError(
            f"The input {spec.input} and the output {spec.output} {how}; "
            "give the results a directory of their own."
        )
