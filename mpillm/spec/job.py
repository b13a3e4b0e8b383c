"""A checked job: all sections of the job file, a rank's own values of them, and what of them changes a result."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from mpillm.errors import JobError
from mpillm.spec.sections import (
    BatchSection,
    ChatSection,
    DraftSection,
    EmbeddingsSection,
    JobSection,
    LayoutSection,
    MemorySection,
    OutputSection,
    Quantize,
    SamplingSection,
    ScoringSection,
    Section,
    WireSection,
    Word,
)
from mpillm.spec.sizes import byte_size
from mpillm.words import count_of, some_of

# Keys that earlier versions did not have: where they ask for nothing, a job is the same as theirs.
_ADDED = (
    *("sampling.presence_penalty", "sampling.frequency_penalty"),
    *("sampling.response_format", "sampling.structured_outputs"),
    *("chat.reasoning", "chat.tool_calls"),
    *("scoring.template", "scoring.instruction", "scoring.tokens"),
)


class Spec(Section, frozen=True, kw_only=True):
    """A checked job: what the job file and the command line say together."""

    model: Word | Annotated[dict[Word, Word], Meta(min_length=1)] = "smollm2-135m"  # or a table by host
    input: Annotated[str, Meta(min_length=1)]
    output: OutputSection
    # Directories or files by the names that requests call as `model`. (msgspec copies an empty default.)
    adapters: dict[Word, Word] = {}  # noqa: RUF012
    quantize: Quantize = "none"
    request: dict[str, Any] | None = None  # what is asked of a row, with its columns in braces
    sampling: SamplingSection = SamplingSection()
    chat: ChatSection = ChatSection()
    layout: LayoutSection = LayoutSection()
    memory: MemorySection = MemorySection()
    wire: WireSection = WireSection()
    embeddings: EmbeddingsSection = EmbeddingsSection()
    scoring: ScoringSection = ScoringSection()
    batch: BatchSection = BatchSection()
    draft: DraftSection = DraftSection()
    job: JobSection = JobSection()

    @property
    def input_path(self) -> Path:
        """The path of the requests."""
        return Path(self.input)

    @property
    def output_path(self) -> Path:
        """The output directory."""
        return Path(self.output.path)

    def model_on(self, host: str) -> str:
        """Return the model as a host knows it; JobError if the job says nothing for this host."""
        own: str = _own("model", self.model, 0, host)
        return own

    @property
    def model_names(self) -> list[str]:
        """The model as all hosts know it."""
        return [self.model] if isinstance(self.model, str) else list(self.model.values())

    def on_rank(self, rank: int, host: str) -> Spec:
        """Return the job as a rank on a host goes about it: with one value of each key that can have several.

        JobError if there is none for it.
        """
        memory, layout = self.memory, self.layout
        if all(isinstance(value, (str, int)) for value in (memory.weights, memory.kv, layout.threads)):
            return self
        weights, kv = (_own(f"memory.{key}", getattr(memory, key), rank, host) for key in ("weights", "kv"))
        threads = _own("layout.threads", layout.threads, rank, host)
        return msgspec.structs.replace(
            self,
            memory=msgspec.structs.replace(memory, weights=weights, kv=kv),
            layout=msgspec.structs.replace(layout, threads=threads),
        )

    def unused(self, hosts: Sequence[str]) -> Iterator[str]:
        """Yield sentences about values for hosts, or for more ranks, than the run has: `hosts` is that of each rank."""
        memory = self.memory
        for key, value in (
            ("model", self.model),
            ("memory.weights", memory.weights),
            ("memory.kv", memory.kv),
            ("layout.threads", self.layout.threads),
        ):
            if isinstance(value, dict) and (names := sorted(value.keys() - {"default", *hosts})):
                yield (
                    f"{key} has a value for {some_of(names, 'host')}, where no rank is; "
                    f"the ranks are on {some_of(sorted(set(hosts)), 'host')}."
                )
            elif isinstance(value, list) and len(value) > len(hosts):
                yield (
                    f"{key} is a list of {count_of(len(value), 'value')}, and there "
                    f"{'is' if len(hosts) == 1 else 'are'} only {count_of(len(hosts), 'rank')}."
                )

    def of_ranks(self, numbers: Sequence[int]) -> Spec:
        """Return the job for ranks that had these numbers when the run began: lists have values for those numbers.

        JobError if a list has none for one of them.
        """

        def of(key: str, value: Any) -> Any:
            return [_own(key, value, number, "") for number in numbers] if isinstance(value, list) else value

        memory, layout = self.memory, self.layout
        weights, kv = of("memory.weights", memory.weights), of("memory.kv", memory.kv)
        return msgspec.structs.replace(
            self,
            memory=msgspec.structs.replace(memory, weights=weights, kv=kv),
            layout=msgspec.structs.replace(layout, threads=of("layout.threads", layout.threads)),
        )

    def with_automatic_layout(self) -> Spec:
        """Return the job with an automatic number of replicas, stages and shards: its own may not fit other ranks."""
        layout = msgspec.structs.replace(self.layout, replicas="auto", stages="auto", shards="auto")
        return msgspec.structs.replace(self, layout=layout)

    def identity(self) -> dict[str, Any]:
        """Return the settings that change a result, by dotted key: equal ones may share an output directory.

        Not in it: the layout, the budgets, the batch, `job` (they change no result), and the model's and the input's
        content, which the journal knows by their own fingerprints.
        """
        values: dict[str, Any] = {"quantize": self.quantize}
        for name in ("sampling", "chat", "wire", "embeddings", "scoring"):
            section = getattr(self, name)
            values.update({f"{name}.{key}": getattr(section, key) for key in section.__struct_fields__})
        for key in _ADDED:
            if values[key] in (None, 0.0, "auto"):
                del values[key]
        if self.request is not None:
            values["request"] = self.request
        values["memory.max_context"] = self.memory.max_context
        values["memory.kv_type"] = self.memory.kv_type
        return values

    def fingerprint(self) -> str:
        """Return a hash of `identity`, 32 hexadecimal digits."""
        return hashlib.blake2b(
            msgspec.json.encode(self.identity(), order="sorted"), digest_size=16
        ).hexdigest()


def tightest(specs: Sequence[Spec]) -> Spec:
    """Return a job of one rank each with the smallest budgets of all of them."""
    weights = min((spec.memory.weights for spec in specs), key=_budget)
    kv = min((spec.memory.kv for spec in specs), key=_budget)
    return msgspec.structs.replace(
        specs[0], memory=msgspec.structs.replace(specs[0].memory, weights=weights, kv=kv)
    )


def _budget(value: Any) -> float:
    return float("inf") if value == "all" else byte_size(value)


def _own(key: str, value: Any, rank: int, host: str) -> Any:
    """Return a rank's own value of a key; equal hosts on paper have a number behind their name.

    If hosts are not known (""), as for the supervisor, it is any that a table has.
    """
    if isinstance(value, list):
        if rank >= len(value):
            count = count_of(len(value), "value")
            raise JobError(
                f"{key} is a list of {count}, and there is none for rank {rank}; add one for each."
            )
        return value[rank]
    if isinstance(value, dict):
        for name in (host, host.partition(" (")[0], "default"):
            if name in value:
                return value[name]
        if value and not host:
            return next(iter(value.values()))
        raise JobError(f'{key} has no value for the host {host!r}; add one, or one for "default".')
    return value


def known_keys() -> Iterator[str]:
    """Return every key that a job can have, dotted."""
    for field in msgspec.structs.fields(Spec):
        if isinstance(field.type, type) and issubclass(field.type, Section):
            yield from (f"{field.name}.{key}" for key in field.type.__struct_fields__)
        else:
            yield field.name


# What other programs call a key of the job.
_CALLED_ELSEWHERE = {
    **dict.fromkeys(("batch_size", "max_batch_size", "parallel"), "batch.max_num_seqs"),
    **dict.fromkeys(("num_threads", "n_threads", "nthreads"), "layout.threads"),
    **dict.fromkeys(("ctx", "ctx_size", "n_ctx", "max_model_len", "context", "context_length"), "memory.max_context"),
    **dict.fromkeys(("max_new_tokens", "n_predict"), "sampling.max_tokens"),
    **dict.fromkeys(("tensor_parallel_size", "tensor_parallel", "tp"), "layout.shards"),
    **dict.fromkeys(("pipeline_parallel_size", "pipeline_parallel", "pp"), "layout.stages"),
    "temp": "sampling.temperature", "repeat_penalty": "sampling.repetition_penalty",
    **dict.fromkeys(("cache_type", "kv_cache_dtype"), "memory.kv_type"), "prompts": "input", "out": "output.path",
}  # fmt: skip


def key_called(name: str) -> str | None:
    """Return the dotted key of a job whose last word this is, or that others call so; None if there is none."""
    own = (key for key in known_keys() if key.rpartition(".")[2] == name)
    return next(own, None) or _CALLED_ELSEWHERE.get(name)
