"""What every request passes before a route sees it: who may ask, how large a body may be and how
long it may take to arrive. Also counts, and turns what nobody caught into a 500."""

import asyncio
import hmac
import ipaddress
import logging
import time
from typing import Any

from lillama.config import ServeConfig
from lillama.serve.http.errors import ApiError, error_response
from lillama.serve.http.metrics import Metrics

__all__ = ["Gate"]

logger = logging.getLogger(__name__)

OPEN_ROUTES = ("/", "/health")
ROUTES = (*OPEN_ROUTES, "/metrics", "/openapi.json", "/v1/models")
ROUTES += ("/v1/completions", "/v1/chat/completions")


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Gate:
    """ASGI middleware; `app` gets requests whose body is here in full. Any of the keys opens every
    route; none: no key is asked for."""

    def __init__(self, app: Any, config: ServeConfig, metrics: Metrics, keys: list[str]) -> None:
        self.app, self.config, self.metrics = app, config, metrics
        self.keys = [key.encode() for key in keys]
        # a page of the web whose name was made to point here could otherwise ask in the name of
        # whoever looks at it (DNS rebinding)
        self.local_only = is_loopback(config.host) and not keys
        self.draining = False  # True refuses new generations with 503
        self.active = 0  # POST requests between their header and the end of their answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} here")
        begin_s = time.perf_counter()
        status, complete = 499, False
        posts = scope["method"] == "POST"
        self.active += posts

        async def note(message: Any) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                complete = not message.get("more_body", False)
            await send(message)

        async def refuse(error: ApiError) -> None:
            # the body may be unread: the connection is of no further use
            await error_response(error, connection="close")(scope, receive, note)

        try:
            await self._pass(scope, receive, note)
        except ApiError as error:
            await refuse(error)
        except Exception:
            logger.exception("%s %r", scope["method"], scope["path"])
            if status == 499:
                await refuse(ApiError(500, "internal error", "internal_error"))
            elif not complete:
                raise  # half an answer is out: uvicorn closes the connection
        finally:
            self.active -= posts
            seconds = time.perf_counter() - begin_s
            route = scope["path"] if scope["path"] in ROUTES else "other"
            self.metrics.answers.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            logger.info("%s %s %d in %.3f s", scope["method"], route, status, seconds)

    async def _pass(self, scope: Any, receive: Any, send: Any) -> None:
        headers = {key.lower(): value for key, value in scope["headers"]}
        if self.local_only:
            self._check_host(headers)
        if self.keys and scope["path"] not in OPEN_ROUTES:
            self._check_key(headers)
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if self.draining:
            later = {"retry-after": "5"}
            raise ApiError(503, "the server is shutting down", "draining", headers=later)
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        # a page of another site can send a body of any type but this one
        if kind != b"application/json":
            raise ApiError(415, "send Content-Type: application/json", "unsupported_type")
        body = await self._body(headers, receive)
        if body is None:
            return
        whole = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Any:
            return whole.pop() if whole else await receive()

        await self.app(scope, receive_again, send)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
        if not is_loopback(name.strip("[]").lower()):
            message = f"this server answers to localhost only, not to {name[:80]!r}; start it with "
            raise ApiError(403, message + "--api-key-file or another --host", "wrong_host")

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        given = given.strip() if scheme.lower() == b"bearer" else b""
        # every key is compared, whether or not one has matched
        if not any([hmac.compare_digest(given, key) for key in self.keys]):
            message = "wrong API key" if given else "no API key; send Authorization: Bearer KEY"
            asks = {"www-authenticate": "Bearer"}
            raise ApiError(401, message, "invalid_api_key", headers=asks)

    async def _body(self, headers: dict[bytes, bytes], receive: Any) -> bytes | None:
        """Return the body; None when the client left."""
        limit = self.config.max_body_bytes
        too_large = ApiError(413, f"the body is larger than {limit:,} bytes", "body_too_large")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > limit:
            raise too_large
        body = bytearray()
        seconds = self.config.client_timeout_s
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            text = f"the body did not arrive within {seconds:g} s"
            raise ApiError(408, text, "body_timeout") from None
