"""The interface of an endpoint, and the work that it makes from a line of the input."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import msgspec
from numpy.typing import ArrayLike

from mpillm.engine.request import FinishedCompletion, Request
from mpillm.errors import TOO_LONG, RequestError, UnsuitedError
from mpillm.model.batch import NO_ADAPTER
from mpillm.model.embedding import EmbeddingSettings
from mpillm.model.pooled import Classifier
from mpillm.spec import Spec
from mpillm.text import Tokenizer

NO_LIMIT = 2**31 - 1  # tokens of the longest sequence where the cache does not limit it


@dataclass(frozen=True)
class Model:
    """The facts about the model, and the memory it gets, that decide whether a request can run."""

    vocab: int
    max_position: int
    hidden: int = 0  # values of a hidden state, and so of an embedding
    end_ids: frozenset[int] = frozenset()  # end of sequence and of turn
    kv_tokens: int | None = None  # tokens that the KV cache's budget holds, None if not known
    kv_token_bytes: int = 0  # bytes of one token in the KV cache of one rank
    text: Tokenizer | None = None
    embedding: EmbeddingSettings = field(default_factory=EmbeddingSettings)  # as its files say
    generates: bool = True  # whether it has an LM head
    classifier: Classifier | None = None
    pair_template: str | None = None  # what its files make of a query and a document
    name: str = ""  # as answers give it
    adapters: tuple[str, ...] = ()  # what requests call those beside it, in the order of their numbers

    @property
    def cached_tokens(self) -> int:
        """The tokens that the KV cache can keep; 0 if that is not known, or if all layers keep a window alone."""
        return 0 if self.kv_tokens is None or self.kv_tokens >= NO_LIMIT else self.kv_tokens

    def number_of(self, name: str | None) -> int:
        """Return the number of the adapter that a request's `model` names; any other name is the model's own."""
        return 1 + self.adapters.index(name) if name in self.adapters else NO_ADAPTER

    def answering(self, name: str | None) -> str:
        """Return the adapter that answers a request with this `model`, or the model without an adapter."""
        return name if name is not None and name in self.adapters else self.name


@dataclass(frozen=True, slots=True)
class Line:
    """The place and the name of a line, its error (None: no error), and the key that is wrong."""

    number: int  # from 1
    offset: int  # bytes
    length: int  # bytes
    custom_id: str
    digest: bytes  # 16 bytes, of the content
    error: str | None = None
    param: str | None = None


class ResultColumn(NamedTuple):
    """A group of results.h5 with a row of values for each choice: all rows in one dataset, and `offsets` beside it."""

    group: str
    dataset: str
    dtype: str  # a little-endian NumPy dtype


class Endpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The checked body of a request to a URL; each URL is a subclass.

    The fields are the keys that a body may have, where null means the default. The methods make the engine's
    requests of a body, and the answer of what the engine returns.
    """

    url: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()  # what vLLM also calls the URL
    # A line without a URL whose body has this key is for this endpoint; "": no such line is.
    key: ClassVar[str]
    columns: ClassVar[tuple[ResultColumn, ...]]  # what its choices leave in results.h5
    needs_head: ClassVar[bool] = False  # whether it is for models that generate

    model: str | None = None

    @property
    def choices_per_prompt(self) -> int:
        """The number of requests for each prompt."""
        return 1

    def requests(self, custom_id: str, spec: Spec, model: Model) -> tuple[Request, ...]:
        """Return the engine's requests, prompt by prompt; RequestError if the model cannot do them."""
        raise NotImplementedError

    def response(self, work: Work, completions: Sequence[FinishedCompletion], model: Model) -> dict[str, Any]:
        """Return the body of the answer, as JSON has it; `completions` are those of `work.requests`, in that order."""
        raise NotImplementedError

    def values(self, work: Work, completion: FinishedCompletion, model: Model) -> Mapping[str, ArrayLike]:
        """Return the values of a choice in results.h5: a row for some of `columns`, by their group."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Work:
    """One line of the input, ready to run: a request for each choice of its answer, prompt by prompt."""

    line: Line
    endpoint: Endpoint
    requests: tuple[Request, ...]
    spec: Spec

    @property
    def custom_id(self) -> str:
        return self.line.custom_id

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """Each prompt once, however many choices it has."""
        return [request.prompt for request in self.requests[:: self.endpoint.choices_per_prompt]]

    @property
    def prompt_tokens(self) -> int:
        """The tokens of all prompts."""
        return sum(map(len, self.prompts))


def work_of(line: Line, endpoint: Endpoint, spec: Spec, model: Model) -> Work:
    """Return the work of a body; RequestError if it asks for nothing that the model can do."""
    if endpoint.needs_head and not model.generates:
        can = "classifies" if model.classifier is not None else "makes embeddings"
        raise UnsuitedError(
            f"the model has no LM head: it {can}, and {endpoint.url} needs one that generates"
        )
    try:
        requests = endpoint.requests(line.custom_id, spec, model)
    except RequestError as error:
        error.param = error.param or _param(error, endpoint)
        raise
    if number := model.number_of(endpoint.model):
        requests = tuple(replace(request, adapter=number) for request in requests)
    return Work(line, endpoint, requests, spec)


def _param(error: RequestError, endpoint: Endpoint) -> str | None:
    """Return the key with which what is said begins, or that of the prompt."""
    if error.code == TOO_LONG or re.match(r"the prompt |prompt \d", str(error)):
        return endpoint.key or "input"
    found = re.match(r"(\w+)[\w.\[\]]*", str(error))
    return found[0] if found is not None and found[1] in endpoint.__struct_fields__ else None


def hashed_id(custom_id: str) -> str:
    """Return the part of an answer's ids that stands for its custom_id: 24 hexadecimal digits."""
    return hashlib.blake2b(custom_id.encode(), digest_size=12).hexdigest()
