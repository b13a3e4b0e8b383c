"""The URLs of files and batches."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from mpillm.batch import bodies
from mpillm.batch.endpoints import ENDPOINTS
from mpillm.errors import RequestError
from mpillm.serve.answers import Refused
from mpillm.serve.app import read_body
from mpillm.serve.batches import Batches, InUse
from mpillm.serve.files import FileStore

MAX_REQUEST = 1 << 20  # bytes of a body that begins a batch
PURPOSE = "batch"  # the purpose of all files that clients send
# What lists are asked for in the URL.
PAGES: dict[str, Any] = {"after": {"type": "string"}, "limit": {"type": "integer", "minimum": 1}}
FILE_PAGES = PAGES | {"order": {"enum": ["asc", "desc"]}, "purpose": {"type": "string"}}
STAYS = "expires_after is not supported: files stay until they are deleted."

Handler = Callable[[Request], Awaitable[Response]]


class Wanted(msgspec.Struct, forbid_unknown_fields=True):
    """The body that begins a batch; without an endpoint each line is for its own."""

    input_file_id: str
    endpoint: str | None = None
    completion_window: Literal["24h"] = "24h"
    metadata: dict[str, str] | None = None
    output_expires_after: None = None


def routes(files: FileStore, batches: Batches) -> list[Route]:
    """Return the routes below /v1/files and /v1/batches."""

    async def upload(request: Request) -> Response:
        try:
            async with request.form(max_files=1, max_fields=8) as form:
                source, purpose = form.get("file"), form.get("purpose")
                if unknown := sorted(form.keys() - {"file", "purpose"}):
                    expires = unknown[0].startswith("expires_after")
                    said = f"{unknown[0][:100]} is not supported in the form; there are file and purpose."
                    raise Refused(
                        400, STAYS if expires else said, "expires_after" if expires else unknown[0][:100]
                    )
                if not isinstance(source, UploadFile):
                    raise Refused(400, "The form needs a file.", "file")
                if purpose not in (None, PURPOSE):
                    raise Refused(400, f"The purpose of a file must be {PURPOSE!r}.", "purpose")
                made = await run_in_threadpool(files.add, source.filename or "file", PURPOSE, source.file)
        except MultiPartException as error:
            raise Refused(400, f"The body is not a form: {error.message}.") from None
        return _json(made)

    async def list_files(request: Request) -> Response:
        _check_query(request, FILE_PAGES)
        order, purpose = request.query_params.get("order", "desc"), request.query_params.get("purpose")
        if order not in FILE_PAGES["order"]["enum"]:
            raise Refused(400, f"order: expected one of 'asc', 'desc', not {order[:100]!r}.", "order")
        found = [
            each for each in await run_in_threadpool(files.all) if purpose is None or each.purpose == purpose
        ]
        return _json(_part(request, found if order == "desc" else found[::-1]))

    async def read_file(request: Request) -> Response:
        return _json(files.read(request.path_params["id"]))

    async def content(request: Request) -> Response:
        name = request.path_params["id"]
        return FileResponse(
            files.content(name), media_type="application/jsonl", filename=files.read(name).filename
        )

    async def delete(request: Request) -> Response:
        name = request.path_params["id"]
        try:
            await run_in_threadpool(batches.delete_file, name)
        except InUse as error:
            raise Refused(409, str(error)) from None
        return _json({"id": name, "object": "file", "deleted": True})

    async def begin(request: Request) -> Response:
        content = bodies.decode_line(await read_body(request, MAX_REQUEST))
        if content.get("output_expires_after") is not None:
            raise RequestError(
                "output_expires_after is not supported: results stay until they are deleted",
                "output_expires_after",
            )
        wanted = bodies.converted(content, Wanted)
        urls = [endpoint.url for endpoint in ENDPOINTS]
        if wanted.endpoint is not None and wanted.endpoint not in urls:
            raise RequestError(
                f"the endpoint {wanted.endpoint[:100]!r} is unknown; there are {', '.join(urls)}", "endpoint"
            )
        try:
            made = await run_in_threadpool(
                batches.add, wanted.input_file_id, wanted.endpoint, wanted.metadata
            )
        except KeyError:
            raise Refused(404, f"There is no file {wanted.input_file_id!r}.", "input_file_id") from None
        return _json(made)

    async def list_batches(request: Request) -> Response:
        _check_query(request, PAGES)
        part = _part(request, await run_in_threadpool(batches.all))
        return _json({**part, "data": [batches.now(batch) for batch in part["data"]]})

    async def read_batch(request: Request) -> Response:
        return _json(batches.now(batches.read(request.path_params["id"])))

    async def cancel(request: Request) -> Response:
        return _json(await run_in_threadpool(batches.cancel, request.path_params["id"]))

    return [
        _route("/v1/files", GET=list_files, POST=upload),
        _route("/v1/files/{id}", GET=read_file, DELETE=delete),
        _route("/v1/files/{id}/content", GET=content),
        _route("/v1/batches", GET=list_batches, POST=begin),
        _route("/v1/batches/{id}", GET=read_batch),
        _route("/v1/batches/{id}/cancel", POST=cancel),
    ]


def _route(path: str, **handlers: Handler) -> Route:
    """Return a URL with a handler for each method; 404 for what they do not find."""

    async def handle(request: Request) -> Response:
        try:
            return await handlers["GET" if request.method == "HEAD" else request.method](request)
        except KeyError as error:
            raise Refused(404, f"There is no {error.args[0]!r}.") from None

    return Route(path, handle, methods=list(handlers))


def _check_query(request: Request, known: dict[str, Any]) -> None:
    if unknown := sorted(request.query_params.keys() - known):
        raise Refused(
            400,
            f"{unknown[0][:100]} is not supported in the URL; there are {', '.join(known)}.",
            unknown[0][:100],
        )


def _part(request: Request, found: list[Any]) -> dict[str, Any]:
    """Return the part of a list that the query asks for: up to `limit` entries (all) after the id `after`."""
    after, limit = request.query_params.get("after"), request.query_params.get("limit")
    ids = [each.id for each in found]
    if after is not None and after not in ids:
        raise Refused(400, f"after: there is no {after[:100]!r}.", "after")
    if limit is not None and not (limit.isdecimal() and int(limit[:9]) > 0):
        raise Refused(400, f"limit: expected a whole number >= 1, not {limit[:100]!r}.", "limit")
    rest = found[ids.index(after) + 1 if after else 0 :]
    part = rest if limit is None else rest[: int(limit[:9])]
    ends = {"first_id": part[0].id, "last_id": part[-1].id} if part else {"first_id": None, "last_id": None}
    return {"object": "list", "data": part, **ends, "has_more": len(part) < len(rest)}


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
