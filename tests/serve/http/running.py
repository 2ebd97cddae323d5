"""A real server on a free port over the fake engine, and raw requests to it."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lillama.config import ServeConfig
from lillama.serve.http import bind, make_server
from tests.serve.http.fake_engine import CHAT_TEMPLATE, FakeEngine

JSON = {"Content-Type": "application/json"}


class Running:
    """Attributes: engine, tokenizer, server, host, port, url."""

    def __init__(self, engine: FakeEngine, tokenizer: Any, server: Any) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.server = server
        host, _, port = server.url.removeprefix("http://").rpartition(":")
        self.host = host.strip("[]")
        self.port = int(port)
        self.url = server.url

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """-> status, headers in small letters, the document (or bytes that are none)."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=20)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, JSON if headers is None else headers)
            response = connection.getresponse()
            raw = response.read()
        finally:
            connection.close()
        found = {key.lower(): value for key, value in response.getheaders()}
        is_json = found.get("content-type", "").startswith("application/json")
        return response.status, found, json.loads(raw) if is_json else raw

    def complete(self, **fields: Any) -> tuple[int, Any]:
        status, _, document = self.request("POST", "/v1/completions", fields)
        return status, document

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=20)

    def metric(self, name: str) -> float:
        text = self.request("GET", "/metrics")[2].decode()
        lines = [line for line in text.splitlines() if line.startswith(name + " ")]
        return float(lines[0].split()[-1])


def post_bytes(body: bytes, *headers: str, length: int | None = None) -> bytes:
    """A POST to /v1/completions as it goes over the wire."""
    head = [
        "POST /v1/completions HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        *headers,
    ]
    if not any("Transfer-Encoding" in header for header in headers):
        head.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([*head, "", ""]).encode() + body


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes; a reset counts as that."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def wait_for(holds: Callable[[], Any], what: str, seconds: float = 60) -> None:
    deadline_s = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline_s, f"not within {seconds} s: {what}"
        time.sleep(0.005)


@contextmanager
def running(
    tokenizer: Any, *, chat: bool = True, keys: list[str] | None = None, **options: Any
) -> Iterator[Running]:
    """options: of FakeEngine and of ServeConfig, told apart by name."""
    names = ("step_s", "max_batch", "max_queue", "max_length")
    engine = FakeEngine(tokenizer, **{n: options.pop(n) for n in names if n in options})
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    config = ServeConfig(model=Path("tiny"), port=0, **options)
    engine.start()
    ready = threading.Event()
    listener = bind(config.host, config.port)
    server = make_server(engine, tokenizer, config, keys or [], lambda url: ready.set())
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert ready.wait(20)
        yield Running(engine, tokenizer, server)
    finally:
        engine.paused = False
        server.stop()
        thread.join(20)
        assert not thread.is_alive()
        engine.stop()
        listener.close()
