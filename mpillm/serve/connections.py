"""Limit how long a connection may stay in the middle of a request, and close those that stay longer."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from mpillm.serve import answers

ENDED = "The server stopped before the answer was complete."


class Connection(H11Protocol):
    """A connection that is closed when nothing comes for `PATIENCE` seconds before a request is complete.

    uvicorn waits for ever: clients that send half a request would hold all descriptors in the end.
    """

    PATIENCE = 60.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Take what has come; wait on if it is no whole request."""
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._end_wait()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._end_wait()
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._timer = self.loop.call_later(self.PATIENCE, self.transport.close)

    def _end_wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class Quiet:
    """Ends without a word what its client has left or the server gives up.

    uvicorn writes a traceback for each, by the thread that answers everybody: into a pipe that nobody reads, that
    thread would stop.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application."""
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except asyncio.CancelledError:  # after the seconds in which connections may end
            if not started:
                await JSONResponse(answers.error(ENDED, 503), 503)(scope, receive, send)


async def gone(_: Any, error: Exception) -> JSONResponse:
    """Return the answer, which nobody gets, to a request whose client has gone before its end."""
    assert isinstance(error, ClientDisconnect)
    return JSONResponse(answers.error("The client has disconnected.", 499), 499)
