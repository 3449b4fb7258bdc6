"""Refuses requests for other host names, and closes connections whose headers come too late."""

from __future__ import annotations

from asyncio import TimerHandle, Transport
from collections.abc import Collection
from typing import Any

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from mtp_lightning.hosts import is_called
from mtp_lightning.serving.refusal import Refusal
from mtp_lightning.serving.schemas import shown

_HEADER_SECONDS = 10  # the longest time for sending a request's headers


class OwnNames:
    """Refuses requests for other host names than ``names`` and localhost with status 421
    (misdirected request, RFC 9110)."""

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app = app
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as an ASGI application."""
        host = Headers(scope=scope).get("host")
        if is_called(host, self._names):
            await self._app(scope, receive, send)
            return
        text = f"The Host header {shown(host)} is not allowed: start the server with hosts=[NAME]."
        await JSONResponse(Refusal(text, status=421).body, 421)(scope, receive, send)


class Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's connection with a time limit for headers, which uvicorn lacks: idle connections
    could use up all sockets."""

    _timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:
        super().connection_made(transport)
        self._wait()  # for the first request

    def data_received(self, data: bytes) -> None:
        """Run the timer except while a request is answered."""
        super().data_received(data)
        cycle: Any = self.cycle
        if cycle is None or cycle.response_complete:
            self._wait()
        else:
            self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(_HEADER_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
