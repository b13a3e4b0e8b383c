"""The tables of the job file as frozen structs, one for each, and the types of their values."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from mpillm.spec.sizes import byte_size

Auto = Literal["auto"]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Temperature = Annotated[float, Meta(ge=0.0, le=100.0)]
TopP = Annotated[float, Meta(gt=0.0, le=1.0)]
TopK = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
Penalty = Annotated[float, Meta(ge=0.01, le=100.0)]
Subtracted = Annotated[float, Meta(ge=-2.0, le=2.0)]  # from the logits of tokens that were generated
Word = Annotated[str, Meta(min_length=1)]
Tags = tuple[Word, Word]
StopStrings = Word | Annotated[list[Word], Meta(max_length=64)]

TableFormat = Literal["csv", "parquet", "jsonl"]
Quantize = Literal["none", "q8_0", "q4_0", "w8a8"]
# One value for all ranks, one for each of them, or one for each host ("default": for those that are not named).
Size = str | Positive
Threads = Auto | Annotated[int, Meta(ge=1, le=1024)]

ToolCalls = Literal[
    "auto", "none", "hermes", "qwen3_coder", "seed_oss", "glm", "minimax", "deepseek_v3", "deepseek_v31", "kimi",
    "mistral", "mistral_args", "granite", "phi4_mini", "cohere", "tool_calls", "nemotron", "llama3_json", "pythonic",
    "lfm2", "olmo3", "deepseek_v32", "deepseek_v4", "command_r", "functiongemma", "gemma4",
]  # fmt: skip
Pooling = Literal["mean", "last", "cls"]
KVType = Literal["f32", "f16", "q8_0", "q8_0_int8"]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the job file: nothing in it goes unread."""


class JsonSchema(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's `json_schema` of a response format; keywords that cannot be enforced are errors, unless not `strict`."""

    name: str = ""
    description: str | None = None
    schema: dict[str, Any] | bool = True
    strict: bool | None = None


class TagStructure(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a text that begins with `begin`, ends with `end`, and is JSON between them."""

    begin: Word
    schema: dict[str, Any] | bool = True
    end: str


class StructuralTags(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """vLLM's structural tags: a format, or structures of which one follows where one of the triggers comes."""

    type: Literal["structural_tag"] = "structural_tag"
    format: dict[str, Any] | None = None
    structures: list[TagStructure] | None = None
    triggers: list[Word] | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """OpenAI's `response_format`, and vLLM's with structural tags."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    format: dict[str, Any] | None = None
    structures: list[TagStructure] | None = None
    triggers: list[Word] | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """vLLM's `structured_outputs`: one of the first six."""

    json: dict[str, Any] | str | bool | None = None
    regex: str | None = None
    choice: Annotated[list[Word], Meta(min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: StructuralTags | str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None


class SamplingSection(Section, frozen=True):
    """The sampling of a request that has no settings of its own; temperature 0 is greedy."""

    max_tokens: Count = 128
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    min_p: Fraction = 0.0
    repetition_penalty: Penalty = 1.0
    presence_penalty: Subtracted = 0.0
    frequency_penalty: Subtracted = 0.0
    seed: Seed = 0
    stop: StopStrings = []
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None


class ChatSection(Section, frozen=True):
    """The division of answers to chats; auto: by the model's chat template and its tokens."""

    reasoning: Auto | Literal["none"] | Tags = "auto"  # or the tags around it
    tool_calls: ToolCalls = "auto"


class OutputSection(Section, frozen=True):
    """The place of the results, and the kind of table besides results.jsonl."""

    path: Word  # the directory
    format: Literal["none"] | TableFormat = "none"


class LayoutSection(Section, frozen=True):
    """Ranks = replicas x stages x shards, and the threads of each; stages and shards are those of a replica."""

    replicas: Auto | Positive = "auto"
    stages: Auto | Positive = "auto"
    shards: Auto | Positive = "auto"
    threads: Threads | list[Threads] | dict[str, Threads] = "auto"
    # A file of the hosts' speeds that doctor wrote; auto: measured at the start if they matter.
    hosts: Word = "auto"


class MemorySection(Section, frozen=True):
    """The memory of a rank: weights in kernel-ready form, and the KV cache."""

    weights: Size | list[Size] | dict[str, Size] = "all"
    kv: Size | list[Size] | dict[str, Size] = "1GiB"
    kv_spill: str | Positive = "none"
    spill_dir: Word = "auto"
    max_context: Positive = 4096
    policy: Literal["cycle", "lru"] = "cycle"
    loader: Literal["auto", "mmap", "read"] = "auto"
    kv_type: Auto | KVType = "auto"

    @property
    def weights_bytes(self) -> int | None:
        """The weight cache's budget per rank; None for "all"."""
        assert isinstance(self.weights, (str, int)), "on_rank says which one"
        return None if self.weights == "all" else byte_size(self.weights)

    @property
    def kv_bytes(self) -> int:
        """The KV cache's budget per rank."""
        assert isinstance(self.kv, (str, int)), "on_rank says which one"
        return byte_size(self.kv)

    @property
    def kv_spill_bytes(self) -> int:
        """The maximum bytes of the KV cache on disk, per rank."""
        return 0 if self.kv_spill == "none" else byte_size(self.kv_spill)

    def context(self, max_position: int) -> int:
        """Return tokens that a sequence has at most, of a model that was made for `max_position`."""
        return min(self.max_context, max_position)

    @property
    def spill_folder(self) -> Path:
        """The directory of the KV cache on disk, on every node."""
        return Path(tempfile.gettempdir() if self.spill_dir == "auto" else os.path.expanduser(self.spill_dir))

    def __post_init__(self) -> None:
        words = {"weights": "all", "kv_spill": "none"}  # words that stand for a size
        for key, given in (("weights", self.weights), ("kv", self.kv), ("kv_spill", self.kv_spill)):
            values = (
                given if isinstance(given, list) else given.values() if isinstance(given, dict) else [given]
            )
            for value in values:
                if value == words.get(key):
                    continue
                try:
                    byte_size(value)
                except ValueError as error:
                    raise ValueError(f"{key}: {error}") from None


class WireSection(Section, frozen=True):
    """The wire of activations: Q8_0 blocks (34 bytes for 32 values), or exact values.

    What shards sum travels twice a layer, and what goes from stage to stage once a step. What travels exactly makes
    no result depend on the number of shards or stages. "auto" is f32, unless shards are on several hosts whose network
    makes it dear (`planning.wire`).
    """

    activations: Literal["auto", "q8_0", "f32"] = "auto"  # between the shards of a stage
    between_stages: Literal["q8_0", "f32"] = "f32"


class EmbeddingsSection(Section, frozen=True):
    """The vectors that /v1/embeddings makes from a text's hidden states."""

    pooling: Pooling | Auto = "auto"  # auto: as the model's files say
    normalize: bool | Auto = "auto"
    prompt_name: str | None = None  # the name of the model's prompt that is put before each text


class ScoringSection(Section, frozen=True):
    """The text that /v1/score and /v1/rerank make from a query and a document, and the words that answer it.

    `tokens` are of a model that answers in words: that a document is not relevant, and that it is.
    """

    template: str | None = None  # with {query} and {document}, and {instruction}
    instruction: str | None = None
    tokens: Annotated[list[Word], Meta(max_length=2)] = []


class BatchSection(Section, frozen=True):
    """The maximum size of a step; a larger one is faster and changes no result."""

    max_num_seqs: Auto | Positive = "auto"
    max_num_batched_tokens: Auto | Positive = "auto"
    prefix_sharing: bool = True  # prompts that begin alike are computed once up to where they differ
    # Compute guesses at the next tokens along.
    speculation: Literal["auto", "off", "prompt-lookup", "always"] = "auto"


class DraftSection(Section, frozen=True):
    """A small model with the same tokenizer that says what the job's is likely to draw; changes no result."""

    model: Word | None = None
    quantize: Quantize = "none"
    kv: str | Positive = "256MiB"

    @property
    def kv_bytes(self) -> int:
        """The budget of its KV cache, on the first rank of each replica."""
        return byte_size(self.kv)

    def __post_init__(self) -> None:
        try:
            byte_size(self.kv)
        except ValueError as error:
            raise ValueError(f"kv: {error}") from None


class JobSection(Section, frozen=True):
    """Settings of the run that change no result."""

    # Tokens of an answer after which it is saved; 0: when it is complete.
    checkpoint_tokens: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 64
