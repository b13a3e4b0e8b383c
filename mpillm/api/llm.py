"""`LLM`: a model in Python, on ranks that it starts or on the ranks of the caller's MPI program."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, overload

from mpillm.api.answers import (
    Answer,
    Classification,
    Embedding,
    Generation,
    Relevance,
    Score,
    answer_of,
)
from mpillm.api.plain import chats_of, json_of, ranks_of, several
from mpillm.words import count_of

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpillm.api.local import Local
    from mpillm.api.remote import Remote
    from mpillm.spec import Spec

Prompt = str | Sequence[int]  #: a text, or token ids
Messages = Sequence[Mapping[str, Any]]  #: of a chat, each with `role` and `content`
A = TypeVar("A", bound=Answer)


class LLM:
    """A model that stays loaded and answers batches of requests.

    In a script or a notebook it starts `ranks` processes on this machine (with mpiexec if there are several). They end
    with `close`, with the `with` block, or with this process. In a program that mpiexec started, every rank makes the
    same calls. The model is divided among all ranks (or those of `comm`), the requests of rank 0 are answered, and
    every rank gets all answers. `LLM` never finalises MPI.

    Answers have the same bytes as those of `mpillm run` with the same lines and settings. If `wire` is f32, they do not
    depend on the number of ranks.

    >>> with LLM("smollm2-135m", ranks=2) as llm:
    ...     print(llm.chat([{"role": "user", "content": "Why is the sky blue?"}])[0].text)
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        ranks: int | None = None,
        *,
        comm: MPI.Intracomm | None = None,
        **settings: Any,
    ) -> None:
        """Load a model: a catalogue name, a Hugging Face directory, a GGUF file, or hf:owner/name.

        `settings` are those of a job file: `quantize="q8_0"`, or a table such as `memory={"kv": "256MiB"}`,
        `sampling={"temperature": 0.8}`, `layout={"stages": 2}`. Raises MpillmError if the model, a setting or
        the number of ranks is wrong.
        """
        from mpillm.comm import program
        from mpillm.errors import JobError

        if comm is not None and not hasattr(comm, "Dup"):
            raise JobError(
                f"comm must be a communicator of mpi4py, not {comm!r:.60}; leave it out for all ranks."
            )
        self._world = program.world_of(comm) if comm is not None or program.inside() else None
        # What is wrong on one rank is raised on all: the others would wait for it.
        with nullcontext() if self._world is None else self._world.together():
            self._spec = _checked(model, settings)
            if self._world is not None and ranks not in (None, self._world.size):
                raise JobError(
                    f"ranks={ranks}, but the program has {count_of(self._world.size, 'rank')}; leave ranks out."
                )
        if self._world is not None:
            self._world.limit_threads(self._world.threads())
        self._ranks = 1 if ranks is None else ranks_of(ranks)
        self._asking = threading.Lock()  # held by the call whose answers are being read
        self._asks: int | None = None  # the thread that reads them
        self._owner = 0  # the process that has the backend
        self._backend = self._start()

    def _start(self) -> Local | Remote:
        # Imported here: what computes is loaded when the number of threads is known.
        self._owner = os.getpid()
        if self._world is not None:
            from mpillm.api.local import Local

            return Local(self._world, self._spec)
        from mpillm.api.remote import Remote

        return Remote(self._spec, self._ranks)

    @property
    def model(self) -> str:
        """The name of the model, as in answers."""
        return self._backend.model

    @property
    def layout(self) -> str:
        """Stages and shards, as text."""
        return self._backend.layout

    def generate(self, prompts: Prompt | Sequence[Prompt], **body: Any) -> list[Generation]:
        """Continue each prompt; `body` has keys of /v1/completions (`max_tokens`, `temperature`, `n`, `stop`, ...).

        Answers are in the order of the prompts. If a request is wrong, `error` of its answer has the reason, and
        reading its `text` raises RequestError.
        """
        return _kind(Generation, self._answers(self._prompts(prompts, body)))

    def chat(self, messages: Messages | Sequence[Messages], **body: Any) -> list[Generation]:
        """Answer one or several chats; `body` has keys of /v1/chat/completions."""
        lines = [_line({"messages": chat, **body}) for chat in chats_of(messages)]
        return _kind(Generation, self._answers(lines))

    @overload
    def score(self, prompts: Prompt | Sequence[Prompt], **body: Any) -> list[Score]: ...

    @overload
    def score(
        self, prompts: str | Sequence[str], documents: str | Sequence[str], **body: Any
    ) -> Relevance: ...

    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        documents: str | Sequence[str] | None = None,
        **body: Any,
    ) -> list[Score] | Relevance:
        """Return the log-probabilities of the tokens of each prompt, from the second token on.

        With `documents`, the prompts are queries: one for all documents, or one for each. The answer is the relevance
        of the documents, and `body` has keys of /v1/score.
        """
        if documents is not None:
            asked = {"text_1": prompts, "text_2": documents, **body}
            return self._one(Relevance, "/v1/score", asked)
        asked = {"echo": True, "max_tokens": 0, "logprobs": 0, **body}
        return _kind(Score, self._answers(self._prompts(prompts, asked)))

    def embed(self, texts: Prompt | Sequence[Prompt], **body: Any) -> list[Embedding]:
        """Return a vector for each text; `body` has keys of /v1/embeddings (`pooling`, `normalize`, ...)."""
        asked = {"encoding_format": "base64", **body}
        return _kind(Embedding, self._answers(self._prompts(texts, asked, key="input")))

    def rerank(self, query: str, documents: Sequence[str], **body: Any) -> Relevance:
        """Return how relevant each document is to a query; `body` has keys of /v1/rerank (`top_n`, ...)."""
        return self._one(Relevance, "/v1/rerank", {"query": query, "documents": documents, **body})

    def classify(self, texts: Prompt | Sequence[Prompt], **body: Any) -> list[Classification]:
        """Return the label of each text, from a model with a classifier; `body` has keys of /v1/classify."""
        lines = self._prompts(texts, body, key="input")
        asked = [_line({"url": "/v1/classify", "body": json.loads(line)}) for line in lines]
        return _kind(Classification, self._answers(asked))

    def _one(self, kind: type[A], url: str, body: Mapping[str, Any]) -> A:
        """Return the answer of one request."""
        return _kind(kind, self._answers([_line({"url": url, "body": body})]))[0]

    def stream(
        self, requests: Iterable[Prompt | Messages | Mapping[str, Any]], **body: Any
    ) -> Generator[Answer, None, None]:
        """Yield the answers in the order in which they finish; `index` is the number of the request.

        A request is a prompt, the messages of a chat, or a line of the batch format as a dictionary (for any endpoint,
        without the keys of `body`). You may close the iterator before its end. Until then calls of other threads wait,
        and another call of the same thread raises JobError.
        """
        lines = [_request(request, body) for request in several(requests)]
        return self._stream(lines)

    def _stream(self, lines: Sequence[bytes]) -> Generator[Answer, None, None]:
        from mpillm.errors import JobError

        if self._backend.open and os.getpid() != self._owner:
            raise JobError(
                f"The ranks of this LLM answer process {self._owner} alone; make an LLM in each forked process."
            )
        if self._asks == threading.get_ident():
            raise JobError(
                "A stream of this LLM is still open: read it to its end, or close it, before another call."
            )
        with self._asking:
            self._asks = threading.get_ident()
            try:
                if not self._backend.open:
                    self._backend = self._start()
                for index, result in self._backend.ask(lines):
                    yield answer_of(index, result)
                    self._asks = threading.get_ident()  # another thread may read on
            finally:
                self._asks = None

    def _answers(self, lines: Sequence[bytes]) -> list[Answer]:
        """Return all answers, in the order of the lines."""
        answers = list(self._stream(lines))
        return sorted(answers, key=lambda answer: answer.index)

    def _prompts(
        self, prompts: Prompt | Sequence[Prompt], body: Mapping[str, Any], key: str = "prompt"
    ) -> list[bytes]:
        each = several(prompts)
        for prompt in each:
            if isinstance(prompt, Mapping):
                raise TypeError(
                    f"expected a text or token ids, not {prompt!r:.60}; messages are for chat, and lines for stream"
                )
        return [_line({key: prompt, **body}) for prompt in each]

    def close(self) -> None:
        """End the ranks, or release the model in the caller's ranks. A later call loads it again."""
        self._backend.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an LLM cannot be sent to another process; make one there")

    def __repr__(self) -> str:
        return f"<LLM {self.model}, {self.layout}>"


def _checked(model: str | os.PathLike[str], settings: Mapping[str, Any]) -> Spec:
    """Return the job of a model and its settings; JobError says what is wrong."""
    from mpillm import spec
    from mpillm.errors import JobError

    for key in ("input", "output", "request", "prompt", "messages"):
        if key in settings:
            raise JobError(
                f"LLM takes no {key}: requests are for its methods, such as generate; files for Job."
            )
    name = os.fspath(model) if isinstance(model, os.PathLike) else model
    values = {"model": name, "input": "/dev/null", "output": "/dev/null/none", **settings}
    return spec.checked(values, "LLM", arguments={"ranks", "comm"})


def _request(request: Prompt | Messages | Mapping[str, Any], body: Mapping[str, Any]) -> bytes:
    """Return the line of a request of `stream`."""
    if isinstance(request, Mapping):
        return _line(request)
    if isinstance(request, Sequence) and request and isinstance(request[0], Mapping):
        return _line({"messages": request, **body})
    return _line({"prompt": request, **body})


def _line(content: Mapping[str, Any]) -> bytes:
    return json_of(content).encode("utf-8", "surrogatepass")


def _kind(kind: type[A], answers: list[Answer]) -> list[A]:
    """Return the answers as `kind`; those that ended in an error are converted to it."""
    return [
        answer
        if isinstance(answer, kind)
        else kind(index=answer.index, custom_id=answer.custom_id, error=answer.error, body=answer.body)
        for answer in answers
    ]
