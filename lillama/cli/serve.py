"""`lillama serve`: its options and the call."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from lillama.cli.options import DeviceOption, DtypeOption, Model, Revision, at_revision, defaults
from lillama.config import ServeConfig

__all__ = ["serve"]

_DEFAULTS = defaults(ServeConfig)

Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")]
Port = Annotated[int, typer.Option(help="0 takes one that is free.")]
MaxBatch = Annotated[int, typer.Option(help="Requests computed together.")]
MaxQueue = Annotated[int, typer.Option(help="Requests that may wait; one more gets 429.")]
MaxLength = Annotated[
    int | None,
    typer.Option(help="Tokens of prompt and output together.", show_default="the model's"),
]
ServedName = Annotated[
    str | None, typer.Option(help="The model's name in the API.", show_default="its folder's")
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(help="File with one API key a line.", show_default="no key is asked for"),
]
RequestTimeout = Annotated[float, typer.Option(help="A whole answer may take so long.")]
ClientTimeout = Annotated[
    float, typer.Option(help="A client may take so long to send a header or a body, or to read.")
]
Drain = Annotated[float, typer.Option(help="After SIGTERM accepted requests may take so long.")]
MaxBodyBytes = Annotated[int, typer.Option(help="Of one request.")]
MaxConnections = Annotated[int, typer.Option(help="Open at a time; one more gets 503.")]
MaxChoices = Annotated[int, typer.Option(help="Prompts times n of one request.")]


def serve(
    model: Model,
    revision: Revision = None,
    host: Host = _DEFAULTS["host"],
    port: Port = _DEFAULTS["port"],
    device: DeviceOption = _DEFAULTS["device"],
    dtype: DtypeOption = _DEFAULTS["dtype"],
    max_batch: MaxBatch = _DEFAULTS["max_batch"],
    max_queue: MaxQueue = _DEFAULTS["max_queue"],
    max_length: MaxLength = _DEFAULTS["max_length"],
    served_name: ServedName = _DEFAULTS["served_name"],
    api_key_file: ApiKeyFile = _DEFAULTS["api_key_file"],
    request_timeout_s: RequestTimeout = _DEFAULTS["request_timeout_s"],
    client_timeout_s: ClientTimeout = _DEFAULTS["client_timeout_s"],
    drain_s: Drain = _DEFAULTS["drain_s"],
    max_body_bytes: MaxBodyBytes = _DEFAULTS["max_body_bytes"],
    max_connections: MaxConnections = _DEFAULTS["max_connections"],
    max_choices: MaxChoices = _DEFAULTS["max_choices"],
) -> None:
    """Answer OpenAI's API over HTTP, with a web page at /."""
    from lillama.serve.http import serve as run

    def ready(url: str) -> None:
        print(f"lillama: {model} is at {url}; Ctrl-C ends it", file=sys.stderr, flush=True)

    run(
        at_revision(model, revision),
        on_ready=ready,
        host=host,
        port=port,
        device=device,
        dtype=dtype,
        max_batch=max_batch,
        max_queue=max_queue,
        max_length=max_length,
        served_name=served_name,
        api_key_file=api_key_file,
        request_timeout_s=request_timeout_s,
        client_timeout_s=client_timeout_s,
        drain_s=drain_s,
        max_body_bytes=max_body_bytes,
        max_connections=max_connections,
        max_choices=max_choices,
    )
