"""The server's URLs as an OpenAPI document, made of the classes that check the bodies."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response
from starlette.routing import Route

from mpillm.batch.endpoints import ENDPOINTS
from mpillm.batch.endpoints.generate import Generate
from mpillm.batch.other_keys import Ignored
from mpillm.batch.work import Endpoint
from mpillm.serve.batches import BatchObject
from mpillm.serve.files import File
from mpillm.serve.uploads import FILE_PAGES, PAGES, PURPOSE, Wanted
from mpillm.version import __version__

Described = dict[str, Any]

URL = "/openapi.json"

_KINDS = (*ENDPOINTS, Ignored, Wanted, File, BatchObject)
_ERROR: Described = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def route(key: bool) -> Route:
    """Return the route of the document; `key` says whether this server asks for an API key."""
    made = msgspec.json.encode(document(key))
    return Route(URL, lambda _: Response(made, media_type="application/json"), methods=["GET"])


def document(key: bool = False) -> Described:
    """Return the OpenAPI document of all URLs but the page's; with `key` those below /v1 ask for the API key."""
    named = "#/components/schemas/{name}"
    references, schemas = msgspec.json.schema_components(_KINDS, ref_template=named)
    of = dict(zip(_KINDS, references, strict=True))
    for endpoint in ENDPOINTS:
        _add_keys(schemas[endpoint.__name__], schemas[Ignored.__name__], _streams(endpoint))
    schemas["Error"] = _ERROR
    paths = {
        url: {
            "post": _operation(
                f"As {endpoint.url} in a batch.", body=of[endpoint], streams=_streams(endpoint)
            )
        }
        for endpoint in ENDPOINTS
        for url in (endpoint.url, *endpoint.aliases)
    }
    made: Described = {
        "openapi": "3.1.0",
        "info": {"title": "mpillm", "version": __version__},
        "paths": {**paths, **_others(of)},
        "components": {"schemas": schemas},
    }
    if key:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
    return made


def _streams(endpoint: type[Endpoint]) -> bool:
    return issubclass(endpoint, Generate)


def _add_keys(schema: Described, ignored: Described, streams: bool) -> None:
    """Keys that bodies may have beside the fields: of a stream, and those that change nothing."""
    keys = schema["properties"]
    for name, kind in ignored["properties"].items():
        keys.setdefault(name, {**kind, "description": "accepted and ignored"})
    keys["stream"] = {"type": ["boolean", "null"]} if streams else {"enum": [False, None]}
    keys["stream_options"].pop("description", None)


def _others(of: dict[Any, Any]) -> Described:
    file, batch = of[File], of[BatchObject]
    form = {
        "type": "object",
        "required": ["file"],
        "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"enum": [PURPOSE]}},
    }
    id, name = (_parameter(word) for word in ("id", "name"))
    pages, file_pages = (
        [{"name": word, "in": "query", "schema": schema} for word, schema in asked.items()]
        for asked in (PAGES, FILE_PAGES)
    )
    return {
        "/v1/models": {
            "get": _operation("List the model and its adapters.", answer=_list({"type": "object"}))
        },
        "/v1/models/{name}": {
            "get": _operation("The model or one of its adapters.", name, answer={"type": "object"})
        },
        "/v1/files": {
            "post": _operation("Upload a file.", answer=file, body=form, kind="multipart/form-data"),
            "get": _operation("List the files, the newest first.", *file_pages, answer=_list(file)),
        },
        "/v1/files/{id}": {
            "get": _operation("Show the metadata of a file.", id, answer=file),
            "delete": _operation("Delete a file.", id, answer={"type": "object"}),
        },
        "/v1/files/{id}/content": {
            "get": _operation("Download the content of a file.", id, answers="application/jsonl")
        },
        "/v1/batches": {
            "post": _operation("Create a batch.", answer=batch, body=of[Wanted]),
            "get": _operation("List the batches, the newest first.", *pages, answer=_list(batch)),
        },
        "/v1/batches/{id}": {"get": _operation("Show the status of a batch.", id, answer=batch)},
        "/v1/batches/{id}/cancel": {"post": _operation("Cancel a batch.", id, answer=batch)},
        "/health": {"get": _operation("Check that the server answers.", key=False)},
        "/metrics": {"get": _operation("Metrics for Prometheus.", key=False, answers="text/plain")},
    }


def _parameter(name: str) -> Described:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _list(of: Described) -> Described:
    data = {"type": "array", "items": of}
    return {"type": "object", "required": ["object", "data"], "properties": {"data": data}}


def _operation(
    summary: str,
    *parameters: Described,
    answer: Described | None = None,
    body: Described | None = None,
    kind: str = "application/json",
    answers: str = "application/json",
    key: bool = True,
    streams: bool = False,
) -> Described:
    """Return the description of a URL and a method. `answers`: media type; `key`: False if it needs no API key."""
    shown: Described = {"schema": answer or {"type": "object"}} if answers == "application/json" else {}
    error = {
        "description": "what is wrong",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    made: Described = {
        "summary": summary,
        "parameters": list(parameters),
        "responses": {
            "200": {"description": "the answer", "content": {answers: shown}},
            "default": error,
        },
    }
    if not key:
        made["security"] = []
    if streams:
        made["responses"]["200"]["content"]["text/event-stream"] = {}
    if body is not None:
        made["requestBody"] = {"required": True, "content": {kind: {"schema": body}}}
    return made
