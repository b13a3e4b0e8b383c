"""The HTTP side of the server: OpenAI's URLs, health and metrics, and the web page."""

from __future__ import annotations

import asyncio
import difflib
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from mpillm.batch.answers import check_finite
from mpillm.batch.endpoints import ENDPOINTS, OTHERS
from mpillm.batch.endpoints.prompts import context
from mpillm.engine.request import FinishedCompletion
from mpillm.errors import FULL, NOT_FINITE, MpillmError, NoSpace, NotFiniteError, RequestError
from mpillm.serve import answers
from mpillm.serve.arrivals import Closed, Full, Ticket
from mpillm.serve.connections import ENDED, Quiet, gone
from mpillm.serve.guard import guarded
from mpillm.serve.state import ServerState
from mpillm.version import __version__

# A choice's token, the completions, or that there are none.
Event = tuple[int, int] | list[FinishedCompletion] | None
Events = asyncio.Queue[Event]

PAGE = Path(__file__).parent / "page"
MAX_BODY = 32 << 20  # bytes of a request
IN_MEMORY = 1 << 16  # bytes of a body that are in memory while it arrives and waits; the rest is in a file


def make_app(service: ServerState, more_routes: list[Route]) -> ASGIApp:
    """Return the ASGI application; `more_routes` are those of files and batches."""
    routes = [
        *(
            Route(url, _Ask(service, endpoint.url), methods=["POST"])
            for endpoint in ENDPOINTS
            for url in (endpoint.url, *endpoint.aliases)
        ),
        Route("/v1/models", _models(service), methods=["GET"]),
        Route("/v1/models/{name:path}", _models(service), methods=["GET"]),
        *more_routes,
        Route("/health", _health(service), methods=["GET"]),
        Route("/metrics", _metrics(service), methods=["GET"]),
        Route("/", lambda _: FileResponse(PAGE / "index.html"), methods=["GET"]),
        Mount("/page", StaticFiles(directory=PAGE)),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            HTTPException: _http_error,
            RequestError: _request_error,
            ClientDisconnect: gone,
            MpillmError: _not_written,
            OSError: _not_written,
            Exception: _bug,
        },
    )
    return Quiet(guarded(app, service))


class _Streamed(StreamingResponse):
    """A streamed answer. `ended` is the status that the whole of it has: 499 if its client goes before the end."""

    def __init__(self, stream: answers.Stream, ticket: Ticket, events: Events) -> None:
        self._stream, self._ticket, self._events = stream, ticket, events
        self.ended = 499
        super().__init__(self._chunks(), media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # also when the client has gone, and before the first chunk
            self._ticket.cancel()

    async def _chunks(self) -> AsyncIterator[bytes]:
        for chunk in self._stream.begin():
            yield chunk
        while isinstance(event := await self._events.get(), tuple):
            for chunk in self._stream.push(*event):
                yield chunk
        if event is None:
            self.ended, chunks = 503, self._stream.fail(ENDED, 503)
        elif all(completion.finite for completion in event):
            self.ended, chunks = 200, self._stream.end(event)
        else:
            self.ended, chunks = 500, self._stream.fail(NOT_FINITE, 500)
        for chunk in chunks:
            yield chunk


class _Ask:
    """A POST to one of the endpoints that a batch has too."""

    def __init__(self, service: ServerState, url: str) -> None:
        self._service, self._url = service, url

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        metrics, began, status = self._service.metrics, time.monotonic(), 500
        try:
            try:
                response = await self._answer(request)
            finally:
                metrics.began(self._url, time.monotonic() - began)
            status = response.status_code
            try:
                await response(scope, receive, send)
            finally:
                if isinstance(response, _Streamed):
                    status = response.ended
        except RequestError:
            status = 400
            raise
        except ClientDisconnect:
            status = 499
            raise
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            metrics.ended(self._url, status)

    async def _answer(self, request: Request) -> Response:
        service, loop = self._service, asyncio.get_running_loop()
        with tempfile.SpooledTemporaryFile(max_size=IN_MEMORY, dir=str(service.spec.output_path)) as body:
            async for piece in _pieces(request, MAX_BODY):
                body.write(piece)
            asked = await loop.run_in_executor(service.preparing, service.prepare, self._url, body)
        work, streams = asked.work, asked.streams
        events: Events = asyncio.Queue()

        def put(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        ticket = Ticket(work, put, (lambda choice, token: put((choice, token))) if streams else None)
        try:
            service.arrivals.submit(ticket)
        except Full as error:
            raise HTTPException(429, str(error), {"Retry-After": "1"}) from None
        except Closed as error:
            raise HTTPException(503, str(error)) from None
        if streams:
            return _Streamed(answers.Stream(work, service.model, asked.usage), ticket, events)
        completions = await self._wait(request, ticket, events)
        if completions is None:
            raise HTTPException(503, ENDED)
        try:
            check_finite(completions)
            made = await loop.run_in_executor(None, answers.body, work, completions, service.model)
        except NotFiniteError as error:
            raise HTTPException(500, str(error)) from None
        return Response(msgspec.json.encode(made), media_type="application/json")

    async def _wait(
        self,
        request: Request,
        ticket: Ticket,
        events: Events,
    ) -> list[FinishedCompletion] | None:
        """Return the completions, None if there will be none; withdraws the request when the client goes away."""
        answer = asyncio.ensure_future(events.get())
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise HTTPException(499, "The client has disconnected.")
            found = answer.result()
            assert not isinstance(found, tuple)
            return found
        finally:
            ticket.cancel()
            answer.cancel()
            gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def read_body(request: Request, maximum: int) -> bytes:
    """Return a request's body. Status 413 if it has more than `maximum` bytes."""
    return b"".join([piece async for piece in _pieces(request, maximum)])


async def _pieces(request: Request, maximum: int) -> AsyncIterator[bytes]:
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > maximum:
            raise HTTPException(413, f"The request has more than {maximum} bytes.")
        yield piece


def _models(service: ServerState) -> Callable[[Request], Awaitable[Response]]:
    async def models(request: Request) -> Response:
        model, name = service.model, request.path_params.get("name")
        if name is None:
            data = [_described(service, each) for each in (model.name, *model.adapters)]
            return JSONResponse({"object": "list", "data": data})
        if name not in service.names:
            raise service.no_model(name)
        return JSONResponse(_described(service, model.answering(name)))

    return models


def _described(service: ServerState, name: str) -> dict[str, Any]:
    """Return the model or one of its adapters, as OpenAI's clients and vLLM's have it."""
    model = service.model
    return {
        "id": name,
        "object": "model",
        "created": int(service.started),
        "owned_by": "mpillm",
        "max_model_len": context(service.spec, model),
        **({"parent": model.name} if name != model.name else {}),
    }


def _health(service: ServerState) -> Callable[[Request], Awaitable[Response]]:
    async def health(_: Request) -> Response:
        arrivals = service.arrivals
        return JSONResponse(
            {
                "status": "ok",
                "version": __version__,
                "model": service.model.name,
                "running": arrivals.running,
                "waiting": arrivals.waiting,
            }
        )

    return health


def _metrics(service: ServerState) -> Callable[[Request], Awaitable[Response]]:
    async def metrics(_: Request) -> Response:
        text, kind = service.metrics.exposition(service.arrivals)
        return Response(text, media_type=kind)

    return metrics


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message, path = error.detail, request.url.path
    if error.status_code == 405:
        message = f"{path[:100]} allows {(error.headers or {})['Allow']}, not {request.method}."
    elif message == "Not Found":
        message = f"There is no {path[:100]}; {_instead(path)}"
    param, code = (error.param, error.code) if isinstance(error, answers.Refused) else (None, None)
    return JSONResponse(
        answers.error(message, error.status_code, param, code), error.status_code, error.headers
    )


def _instead(path: str) -> str:
    """Return a sentence that names the URL to use instead of an unknown one."""
    urls = [endpoint.url for endpoint in ENDPOINTS] + ["/v1/models", "/v1/files", "/v1/batches"]
    if f"/v1{path}" in urls:
        return f"the base URL ends in /v1, so that this becomes /v1{path}."
    if path in OTHERS:
        return f"use {OTHERS[path]}."
    close = difflib.get_close_matches(path[:100], urls, n=1, cutoff=0.9)
    return f"did you mean {close[0]}?" if close else "/openapi.json lists all URLs."


async def _request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    said = str(error).replace("the line", "the body", 1)  # a client sends a body, not a line
    return JSONResponse(answers.error(f"{said}.", 400, error.param, error.code), 400)


async def _not_written(request: Request, error: Exception) -> Response:
    """Return the answer if the server's disk is full."""
    if isinstance(error, NoSpace) or (isinstance(error, OSError) and error.errno in FULL):
        said = "The server's disk is full, so nothing was stored; try again when there is space."
        return JSONResponse(answers.error(said, 507), 507)
    if not isinstance(error, MpillmError):
        return await _bug(request, error)
    return JSONResponse(answers.error(str(error), 500), 500)


async def _bug(_: Request, error: Exception) -> Response:
    return JSONResponse(answers.error(f"{type(error).__name__}: {error}", 500), 500)
