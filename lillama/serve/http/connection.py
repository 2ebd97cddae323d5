"""uvicorn's HTTP/1.1 connection and server with what they lack against slow clients, and a stop
that answers while it drains."""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lillama.config import ServeConfig
from lillama.serve.http.errors import ApiError, error_response

__all__ = ["Server"]

logger = logging.getLogger(__name__)


class Connection(H11Protocol):
    """One connection.

    uvicorn waits without end for a header that trickles in and for a client that does not read.
    Here a header must be complete `client_timeout_s` after its first byte (or after the connection
    was made), and what was sent must leave this process within as long. A connection beyond
    `max_connections` is answered 503 and closed, and `on_refused` is called.
    """

    def __init__(
        self, *args: Any, limits: ServeConfig, on_refused: Callable[[], None], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.limits, self.on_refused = limits, on_refused
        self.timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # pause_writing is called as soon as the kernel takes no more
        transport.set_write_buffer_limits(high=0)
        if len(self.connections) > self.limits.max_connections:
            self.on_refused()
            later = {"retry-after": "1"}
            self._refuse(ApiError(503, "too many connections", "too_many_connections", None, later))
        else:
            self._start("header", self._header_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("header")
        self._stop("write")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop("header")
        elif "header" not in self.timers and not self.transport.is_closing():
            self._start("header", self._header_is_late)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start("write", self._reader_is_late)

    def resume_writing(self) -> None:
        self._stop("write")
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "not a valid HTTP request", "invalid_http"))

    def _start(self, timer: str, late: Callable[[], None]) -> None:
        self._stop(timer)
        self.timers[timer] = self.loop.call_later(self.limits.client_timeout_s, late)

    def _stop(self, timer: str) -> None:
        if timer in self.timers:
            self.timers.pop(timer).cancel()

    def _header_is_late(self) -> None:
        self._stop("header")
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            text = f"the header did not arrive within {self.limits.client_timeout_s:g} s"
            self._refuse(ApiError(408, text, "header_timeout"))
        else:  # a browser opens connections that it may never use
            self.transport.close()

    def _reader_is_late(self) -> None:
        logger.info("a client took in nothing for %g s; closed", self.limits.client_timeout_s)
        self.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        """Answer without a request, and close."""
        response = error_response(error, connection="close")
        lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode("ascii")]
        lines += [b"%s: %s" % header for header in response.raw_headers]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(response.body)]))
        self.transport.close()


class Server(uvicorn.Server):
    """Stops in two steps: the first signal begins `drain`, during which it still answers, and it
    ends when that returns; a second signal ends it at once. on_ready is called with the address
    once it listens."""

    def __init__(
        self,
        app: Any,
        limits: ServeConfig,
        on_refused: Callable[[], None],
        drain: Callable[[], Awaitable[None]],
        on_ready: Callable[[str], None] | None,
    ) -> None:
        connection: Any = functools.partial(Connection, limits=limits, on_refused=on_refused)
        config = uvicorn.Config(
            app,
            http=connection,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="error",  # what clients send wrong would otherwise fill the log
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=limits.client_timeout_s,  # type: ignore[arg-type]
            timeout_graceful_shutdown=3,
        )
        super().__init__(config)
        self._drain, self._on_ready = drain, on_ready
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        if self._on_ready is not None:
            self._on_ready(self.url)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Not recorded as uvicorn does: it would raise the signal again after a clean stop."""
        self.stop()

    def stop(self) -> None:
        """Do what a signal does, from any thread."""
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._finish())
        else:
            self.should_exit = self.force_exit = True

    async def _finish(self) -> None:
        try:
            await self._drain()
        finally:
            self.should_exit = True
