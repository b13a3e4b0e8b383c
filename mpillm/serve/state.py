"""The state of the server that the URLs share, and the conversion of a body to work, one at a time."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO

from mpillm.batch import bodies
from mpillm.batch.endpoints.generate import Generate
from mpillm.batch.work import Model, Work
from mpillm.errors import RequestError
from mpillm.planning.input_memory import checking_bytes
from mpillm.serve.answers import Refused
from mpillm.serve.arrivals import Arrivals
from mpillm.serve.metrics import Metrics
from mpillm.serve.prepare import prepare
from mpillm.spec import Spec

CHECKED = 128 << 20  # bytes that a request may take while it is checked: one at a time is


@dataclass(frozen=True)
class Prepared:
    """A body that has been checked; `usage` says that a stream ends with the numbers of its tokens."""

    work: Work
    streams: bool
    usage: bool


@dataclass
class ServerState:
    """The state of the server that the URLs share."""

    spec: Spec
    model: Model
    names: frozenset[str]  # what requests may call the model
    arrivals: Arrivals
    metrics: Metrics
    api_key: str | None = None
    origins: tuple[str, ...] = ()  # other sites whose pages may send requests
    loopback: bool = True  # whether it listens on this machine alone
    # Templates and tokenizers run one at a time, beside the event loop.
    preparing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "prepare"))
    started: float = field(default_factory=time.time)

    def no_model(self, name: str) -> Refused:
        """Return the error for a model that the server does not have."""
        has = ", ".join(map(repr, (self.model.name, *self.model.adapters)))
        said = f"There is no model {name[:100]!r}; this server has {has}."
        return Refused(404, said, "model", "model_not_found")

    def prepare(self, url: str, body: IO[bytes]) -> Prepared:
        """Return the work of a body; RequestError or Refused says what is wrong with it."""
        body.seek(0)
        raw = body.read()
        if checking_bytes(raw, self.model.max_position) > CHECKED:
            raise Refused(
                413, f"The request has so many values that it would take more than {CHECKED} bytes."
            )
        content = bodies.decode_line(raw)
        streams = content.pop("stream", None) or False
        if not isinstance(streams, bool):
            raise RequestError("stream must be true or false", "stream")
        options = content.get("stream_options") or {}
        name = content.get("model")
        if isinstance(name, str) and name not in self.names:
            raise self.no_model(name)
        work = prepare(url, content, self.spec, self.model)
        if streams and not isinstance(work.endpoint, Generate):
            raise RequestError("stream is for text", "stream")
        return Prepared(work, streams, isinstance(options, dict) and bool(options.get("include_usage")))
