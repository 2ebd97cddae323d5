"""The server of one model: the call, its API keys and its address."""

import importlib.util
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lillama.checkpoint.remote import find_model
from lillama.config import ServeConfig
from lillama.errors import InputError
from lillama.integrations.loading import load_tokenizer
from lillama.serve.engine import LocalEngine

__all__ = ["bind", "make_server", "read_keys", "serve"]

EXTRA = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    model: str | Path, *, on_ready: Callable[[str], None] | None = None, **options: Any
) -> None:
    """Serve `model` until SIGTERM or SIGINT. Same as `lillama serve`.

    Args:
        model: local checkpoint folder, or ORG/NAME[@REVISION] of the Hub.
        on_ready: called once with the server's address.
        options: the other fields of `lillama.config.ServeConfig`.

    Raises:
        InputError: a model, key file or address that cannot be used, or lillama[serve] is missing.
    """
    config = ServeConfig(model=find_model(model), **options)
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"serving needs packages that are not installed ({', '.join(missing)}); "
            "pip install 'lillama[serve]'"
        )
    keys = read_keys(config.api_key_file)
    # before the model, which takes a while to load
    with bind(config.host, config.port) as listener:
        tokenizer = load_tokenizer(config.model)
        names = ("device", "dtype", "max_batch", "max_length", "max_queue")
        engine = LocalEngine(config.model, **{name: getattr(config, name) for name in names})
        engine.start()
        try:
            make_server(engine, tokenizer, config, keys, on_ready).run(sockets=[listener])
        finally:
            engine.stop()


def make_server(
    engine: LocalEngine,
    tokenizer: Any,
    config: ServeConfig,
    keys: list[str],
    on_ready: Callable[[str], None] | None = None,
) -> Any:
    """Return a `lillama.serve.http.connection.Server` over a started engine; its run(sockets=[...])
    calls on_ready with the address, and returns after a signal, or stop(), and a drain. Without
    keys everybody may ask."""
    # not before: fastapi and uvicorn are an extra
    from lillama.serve.http.app import Service, create_app, drain
    from lillama.serve.http.connection import Server

    service = Service(engine, tokenizer, config)
    gate = create_app(service, keys)
    refused = service.metrics.refused_connections
    return Server(gate, config, refused.inc, lambda: drain(gate, service), on_ready)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address; InputError where that fails."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"--host {host} is no address of this machine: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise InputError(
            f"cannot listen on {host} port {port}: {error.strerror}; "
            "choose another --port (0 takes one that is free) or --host"
        ) from error
    return listener


def read_keys(path: Path | None) -> list[str]:
    """Return one key a line, empty lines left out; InputError where there is none."""
    if path is None:
        return []
    try:
        lines = path.read_text("ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--api-key-file {path} cannot be read as ASCII text: {error}") from error
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise InputError(f"--api-key-file {path} holds no key; write one a line")
    if any(len(key) < 16 or not key.isprintable() or " " in key for key in keys):
        raise InputError(
            f"--api-key-file {path} has a key that is no good: 16 or more printable "
            "characters without spaces are wanted (openssl rand -hex 32 makes one)"
        )
    return keys
