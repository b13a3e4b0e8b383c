"""Check who may ask the server: clients with the API key, and pages of allowed sites. Each answer gets an id."""

from __future__ import annotations

import hmac
import ipaddress
import uuid
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mpillm.batch.endpoints import ENDPOINTS
from mpillm.serve import answers
from mpillm.serve.state import ServerState

REQUEST_ID = "x-request-id"  # OpenAI's clients show it as _request_id


def guarded(app: ASGIApp, service: ServerState) -> ASGIApp:
    """Return the application for those who may ask it."""
    inner: ASGIApp = _Named(_Guard(app, service))
    if not service.origins:
        return inner
    return CORSMiddleware(
        inner,
        service.origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=[REQUEST_ID],
    )


class _Named:
    """Gives each answer the id of its request: the client's or a proxy's own, if it sent one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = Headers(scope=scope).get(REQUEST_ID)
                MutableHeaders(scope=message)[REQUEST_ID] = given or f"req_{uuid.uuid4().hex}"
            await send(message)

        await self._app(scope, receive, sending)


class _Guard:
    """Asks for the API key, if there is one, on every URL below /v1 and on other names of endpoints.

    Pages of other sites must be allowed to ask, where no key protects the server or a browser asks for them first.
    """

    def __init__(self, app: ASGIApp, service: ServerState) -> None:
        self._app, self._service = app, service
        self._guarded = ("/v1", *(url for endpoint in ENDPOINTS for url in endpoint.aliases))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(self._guarded):
            refusal = self._refusal(scope["method"], Headers(scope=scope))
            if refusal is not None:
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, method: str, headers: Headers) -> Response | None:
        key = self._service.api_key
        preflight = method == "OPTIONS" and "access-control-request-method" in headers
        foreign = self._foreign(headers)
        if foreign is not None and (preflight or not key):
            said = f"Requests from pages of other sites are refused; --allowed-origins {foreign} allows this one."
            return JSONResponse(answers.error(said, 403), 403)
        given = headers.get("authorization", "")
        if key and not preflight and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            wrong = answers.error("The API key is missing or wrong.", 401)
            return JSONResponse(wrong, 401, {"WWW-Authenticate": "Bearer"})
        return None

    def _foreign(self, headers: Headers) -> str | None:
        """Return the origin of a page of another site that asks from a browser and may not; None if there is none."""
        origin, host = headers.get("origin"), headers.get("host", "")
        allowed = self._service.origins
        if "*" in allowed or origin in allowed or not (origin or "sec-fetch-site" in headers):
            return None
        if origin is not None and origin.partition("://")[2] != host:
            return origin[:100]
        # A name of another site may lead to this machine, and its page then seems to be ours.
        own = (
            not self._service.loopback
            or _is_local(host)
            or host in (url.partition("://")[2] for url in allowed)
        )
        return None if own else f"http://{host[:100]}"


def _is_local(host: str) -> bool:
    """Return whether a browser's name of a server is an address, or localhost."""
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False
