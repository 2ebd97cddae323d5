"""uvicorn's HTTP/1.1 connection and server with what they lack against slow clients, and a stop
that answers while it drains."""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lillama.config_serve import ServeConfig
from lillama.serve.http.errors import ApiError, error_body

__all__ = ["Connection", "Server", "uvicorn_config"]

logger = logging.getLogger(__name__)


def _raw_answer(error: ApiError, reason: str) -> bytes:
    body = error_body(error)
    head = (
        f"HTTP/1.1 {error.status} {reason}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n"
    )
    head += "".join(f"{key}: {value}\r\n" for key, value in error.headers.items())
    return head.encode("ascii") + b"\r\n" + body


class Connection(H11Protocol):
    """One connection.

    uvicorn waits without end for a header that trickles in and for a client that does not read.
    Here a header must be complete `client_timeout_s` after its first byte (or after the connection
    was made), and what was sent must leave this process within as long.

    Args:
        config, server_state, app_state, _loop: uvicorn's.
        client_timeout_s: the limit of both.
        max_connections: one more is answered 503 and closed.
        on_refused: called then.
    """

    def __init__(
        self,
        *args: Any,
        client_timeout_s: float,
        max_connections: int,
        on_refused: Callable[[], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.client_timeout_s = client_timeout_s
        self.max_connections = max_connections
        self.on_refused = on_refused
        self.header_timer: asyncio.TimerHandle | None = None
        self.write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # pause_writing is called as soon as the kernel takes no more
        transport.set_write_buffer_limits(high=0)
        if len(self.connections) > self.max_connections:
            self.on_refused()
            error = ApiError(
                503,
                "too many connections",
                code="too_many_connections",
                headers={"retry-after": "1"},
            )
            transport.write(_raw_answer(error, "Service Unavailable"))
            transport.close()
            return
        self._expect_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_header_timer()
        elif self.header_timer is None and not self.transport.is_closing():
            self._expect_header()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_write_timer()
        self.write_timer = self.loop.call_later(self.client_timeout_s, self._abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self.transport.write(
            _raw_answer(
                ApiError(400, "not a valid HTTP request", code="invalid_http"), "Bad Request"
            )
        )
        self.transport.close()

    def _expect_header(self) -> None:
        self.header_timer = self.loop.call_later(self.client_timeout_s, self._header_is_late)

    def _header_is_late(self) -> None:
        self.header_timer = None
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:  # a browser opens connections that it may never use
            seconds = f"{self.client_timeout_s:g}"
            error = ApiError(
                408, f"the header did not arrive within {seconds} s", code="header_timeout"
            )
            self.transport.write(_raw_answer(error, "Request Timeout"))
        self.transport.close()

    def _abort(self) -> None:
        logger.info("a client took in nothing for %g s; closed", self.client_timeout_s)
        self.transport.abort()

    def _stop_header_timer(self) -> None:
        if self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None

    def _stop_write_timer(self) -> None:
        if self.write_timer is not None:
            self.write_timer.cancel()
            self.write_timer = None


def uvicorn_config(app: Any, config: ServeConfig, on_refused: Callable[[], None]) -> uvicorn.Config:
    connection: Any = functools.partial(
        Connection,
        client_timeout_s=config.client_timeout_s,
        max_connections=config.max_connections,
        on_refused=on_refused,
    )
    return uvicorn.Config(
        app,
        http=connection,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="error",  # what clients send wrong would otherwise fill the log
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=config.client_timeout_s,  # type: ignore[arg-type]
        timeout_graceful_shutdown=3,
    )


class Server(uvicorn.Server):
    """Stops in two steps: the first signal begins `drain`, during which it still answers, and it
    ends when that returns; a second signal ends it at once."""

    def __init__(
        self,
        config: uvicorn.Config,
        drain: Callable[[], Awaitable[None]],
        on_ready: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(config)
        self._drain = drain
        self._on_ready = on_ready
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
        """What a signal does. Thread-safe."""
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
