"""The lines of results.jsonl, as readers of OpenAI's and vLLM's batches expect them.

Nothing here knows the time or draws a number: the same completions give the same bytes. `id` and `request_id`
come from the custom_id, and `created` is 0, because results must not differ between two runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from mpillm.batch.work import Line, Model, Work, hashed_id
from mpillm.engine.request import FinishedCompletion
from mpillm.errors import NotFiniteError

BAD, FAILED = "bad_request", "failed"  # codes of errors: the request's fault, and the server's


def check_finite(completions: Sequence[FinishedCompletion]) -> None:
    """Raise NotFiniteError if the model's output for any of a request's choices is not finite."""
    if not all(completion.finite for completion in completions):
        raise NotFiniteError


def result_line(work: Work, completions: Sequence[FinishedCompletion], model: Model) -> bytes:
    """Return the line of results.jsonl (without its newline) for a request that went well.

    `completions` are those of `work.requests`, in that order. NotFiniteError if the answer is not finite.
    """
    assert len(completions) == len(work.requests)
    return _line(work.custom_id, 200, work.endpoint.response(work, completions, model), None)


def error_line(custom_id: str, message: str, status: int = 400, param: str | None = None) -> bytes:
    """Return the line of results.jsonl for a request that ended in an error; `message` is one sentence.

    `param` is the key that is wrong.
    """
    kind, code = ("invalid_request_error", BAD) if status < 500 else ("server_error", FAILED)
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return _line(custom_id, status, body, {"code": code, "message": message})


def bad_line(line: Line) -> bytes:
    """Return the line of results.jsonl for a line of the input that is wrong."""
    assert line.error is not None
    return error_line(line.custom_id, line.error, param=line.param)


def _line(custom_id: str, status: int, body: dict[str, Any], error: dict[str, str] | None) -> bytes:
    name = hashed_id(custom_id)
    response = {"status_code": status, "request_id": f"req-{name}", "body": body}
    values = {"id": f"batch-{name}", "custom_id": custom_id, "response": response, "error": error}
    return msgspec.json.encode(values)
