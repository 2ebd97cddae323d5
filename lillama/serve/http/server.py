"""An HTTP server for one model: OpenAI's API, metrics and a web page. Needs lillama[serve]."""

import importlib.util
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lillama.config_serve import ServeConfig
from lillama.errors import InputError
from lillama.hub_checkpoint import find_model
from lillama.loading import load_tokenizer
from lillama.serve.engine import LocalEngine
from lillama.serve.engine.requests import Engine

__all__ = ["bind", "make_server", "read_keys", "serve"]

EXTRA = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    model: str | Path, *, on_ready: Callable[[str], None] | None = None, **options: Any
) -> None:
    """Serve `model` until SIGTERM or SIGINT. Same as `lillama serve`.

    Args:
        model: local checkpoint folder, or ORG/NAME[@REVISION] of the Hub.
        on_ready: called once with the server's address.
        options: the other fields of `lillama.config_serve.ServeConfig`.

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
        engine = LocalEngine(
            config.model,
            device=config.device,
            dtype=config.dtype,
            max_batch=config.max_batch,
            max_length=config.max_length,
            max_queue=config.max_queue,
        )
        engine.start()
        try:
            make_server(engine, tokenizer, config, keys, on_ready).run(sockets=[listener])
        finally:
            engine.stop()


def make_server(
    engine: Engine,
    tokenizer: Any,
    config: ServeConfig,
    keys: list[str],
    on_ready: Callable[[str], None] | None = None,
) -> Any:
    """A `lillama.serve.http.connection.Server` over a started engine; its run(sockets=[...])
    returns after a signal, or stop(), and a drain.

    Args:
        keys: that open the API; none: everybody may ask.
        on_ready: called with the address once it listens.
    """
    from lillama.serve.http.app import Service, create_app, drain
    from lillama.serve.http.connection import Server, uvicorn_config

    service = Service(engine, tokenizer, config)
    gate = create_app(service, keys)
    settings = uvicorn_config(gate, config, service.metrics.refused_connections.inc)
    return Server(settings, lambda: drain(gate, service), on_ready)


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address; InputError where that fails."""
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
    """One key a line, empty lines left out. Raises InputError where there is none."""
    if path is None:
        return []
    try:
        lines = path.read_text("ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--api-key-file {path} cannot be read as ASCII text: {error}") from error
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise InputError(f"--api-key-file {path} holds no key; write one a line")
    for key in keys:
        if len(key) < 16 or not key.isprintable() or " " in key:
            raise InputError(
                f"--api-key-file {path} has a key that is no good: 16 or more printable "
                "characters without spaces are wanted (openssl rand -hex 32 makes one)"
            )
    return keys
