"""The HTTP side of the server: OpenAI's URLs, health and metrics, and the web page."""

from __future__ import annotations

import asyncio
import hmac
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
from mpillm.batch.endpoints import ENDPOINTS
from mpillm.batch.endpoints.prompts import context
from mpillm.engine.request import FinishedCompletion
from mpillm.errors import FULL, NOT_FINITE, MpillmError, NoSpace, NotFiniteError, RequestError
from mpillm.serve import answers
from mpillm.serve.arrivals import Closed, Full, Ticket
from mpillm.serve.connections import ENDED, Quiet, gone
from mpillm.serve.state import ServerState
from mpillm.version import __version__

PAGE = Path(__file__).parent / "page"
MAX_BODY = 32 << 20  # bytes of a request
IN_MEMORY = 1 << 16  # of these that are in memory while it comes and waits; more are in a file without a name


def make_app(service: ServerState, more_routes: list[Route]) -> ASGIApp:
    """The ASGI application; `more_routes` are those of files and batches."""
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
    return Quiet(_Guard(app, service.api_key))


class _Guard:
    """Asks for the API key, if there is one, on every URL below /v1 and on other names of endpoints.

    Without a key it refuses there what the page of another site sends from a browser on this machine.
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app, self._key = app, api_key
        self._guarded = ("/v1", *(url for endpoint in ENDPOINTS for url in endpoint.aliases))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(self._guarded):
            headers = dict(scope["headers"])
            given, origin = headers.get(b"authorization", b""), headers.get(b"origin")
            if self._key:
                if not hmac.compare_digest(given, f"Bearer {self._key}".encode()):
                    wrong = answers.error("The API key is missing or wrong.", 401, "authentication_error")
                    await JSONResponse(wrong, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
                    return
            elif origin is not None and origin.partition(b"://")[2] != headers.get(b"host"):
                wrong = answers.error(
                    "Requests from pages of other sites are refused.", 403, "permission_error"
                )
                await JSONResponse(wrong, 403)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Ask:
    """A POST to one of the endpoints that a batch has too."""

    def __init__(self, service: ServerState, url: str) -> None:
        self._service, self._url = service, url

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        began, status = time.monotonic(), 500
        try:
            response = await self._answer(request)
            status = response.status_code
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
            self._service.metrics.answered(self._url, status, time.monotonic() - began)
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        service, loop = self._service, asyncio.get_running_loop()
        with tempfile.SpooledTemporaryFile(max_size=IN_MEMORY, dir=str(service.spec.output_path)) as body:
            async for piece in _pieces(request, MAX_BODY):
                body.write(piece)
            asked = await loop.run_in_executor(service.preparing, service.prepare, self._url, body)
        work, streams = asked.work, asked.streams
        events: asyncio.Queue[tuple[int, int] | list[FinishedCompletion] | None] = asyncio.Queue()

        def put(event: tuple[int, int] | list[FinishedCompletion] | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        ticket = Ticket(work, put, (lambda choice, token: put((choice, token))) if streams else None)
        try:
            service.arrivals.submit(ticket)
        except (Full, Closed) as error:
            raise HTTPException(429 if isinstance(error, Full) else 503, str(error)) from None
        if streams:
            stream = answers.Stream(work, service.model, asked.usage)
            return StreamingResponse(self._chunks(stream, ticket, events), media_type="text/event-stream")
        completions = await self._wait(request, ticket, events)
        if completions is None:
            raise HTTPException(503, ENDED)
        try:
            check_finite(completions)
            made = await loop.run_in_executor(None, answers.body, work, completions, service.model)
        except NotFiniteError as error:
            raise HTTPException(500, str(error)) from None
        service.metrics.count(work, completions)
        return Response(msgspec.json.encode(made), media_type="application/json")

    async def _chunks(
        self,
        stream: answers.Stream,
        ticket: Ticket,
        events: asyncio.Queue[tuple[int, int] | list[FinishedCompletion] | None],
    ) -> AsyncIterator[bytes]:
        try:
            for chunk in stream.begin():
                yield chunk
            while isinstance(event := await events.get(), tuple):
                for chunk in stream.push(*event):
                    yield chunk
            if event is not None and all(completion.finite for completion in event):
                self._service.metrics.count(ticket.work, event)
                for chunk in stream.end(event):
                    yield chunk
            else:
                for chunk in stream.fail(ENDED if event is None else NOT_FINITE):
                    yield chunk
        finally:  # also when the client has gone
            ticket.cancel()

    async def _wait(
        self,
        request: Request,
        ticket: Ticket,
        events: asyncio.Queue[tuple[int, int] | list[FinishedCompletion] | None],
    ) -> list[FinishedCompletion] | None:
        """The completions, None if there will be none; withdraws the request when the client goes away."""
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
    """A request's body; 413 if it has more than `maximum` bytes."""
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
            raise HTTPException(404, service.no_model(name))
        return JSONResponse(_described(service, model.answering(name)))

    return models


def _described(service: ServerState, name: str) -> dict[str, Any]:
    """The model or one of its adapters, as OpenAI's clients and vLLM's have it."""
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
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    message, path = error.detail, request.url.path
    if error.status_code == 405:
        message = f"{path[:100]} allows {(error.headers or {})['Allow']}, not {request.method}."
    elif message == "Not Found":
        message = f"There is no {path[:100]}; /openapi.json lists all URLs."
    return JSONResponse(answers.error(message, error.status_code, kind), error.status_code, error.headers)


async def _request_error(_: Request, error: Exception) -> Response:
    said = str(error).replace("the line", "the body", 1)  # which is what a client's line is
    return JSONResponse(answers.error(f"{said}.", 400), 400)


async def _not_written(request: Request, error: Exception) -> Response:
    """What the server's disk did not take."""
    if isinstance(error, NoSpace) or (isinstance(error, OSError) and error.errno in FULL):
        said = "The server's disk is full, so nothing was stored; try again when there is space."
        return JSONResponse(answers.error(said, 507, "server_error"), 507)
    if not isinstance(error, MpillmError):
        return await _bug(request, error)
    return JSONResponse(answers.error(str(error), 500, "server_error"), 500)


async def _bug(_: Request, error: Exception) -> Response:
    return JSONResponse(answers.error(f"{type(error).__name__}: {error}", 500, "server_error"), 500)
