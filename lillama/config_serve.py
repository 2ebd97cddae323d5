"""Every default of `lillama serve`, in a frozen dataclass."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lillama.config import check_at_least, check_choice, check_device
from lillama.errors import InputError

__all__ = ["ServeConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Options of `lillama serve`."""

    model: Path
    host: str = "127.0.0.1"
    # 0: one that is free
    port: int = 8000
    device: str = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    # requests computed together, and those that may wait for a place
    max_batch: int = 8
    max_queue: int = 64
    # tokens of prompt and output together; None: what the model allows
    max_length: int | None = None
    # None: the name of the model's folder
    served_name: str | None = None
    # one key a line; None: everybody may ask
    api_key_file: Path | None = None
    # from a request's arrival to the end of its answer
    request_timeout_s: float = 600.0
    # how long a client may take to send a header, to send a body, to take in what it was sent, and
    # to send the next request on a connection
    client_timeout_s: float = 20.0
    # how long requests that were accepted may go on after SIGTERM
    drain_s: float = 30.0
    max_body_bytes: int = 2 * 2**20
    # a process may have 1,024 files open unless told otherwise
    max_connections: int = 512
    # prompts times n of one HTTP request
    max_choices: int = 16

    def __post_init__(self) -> None:
        if not self.host:
            raise InputError("--host must not be empty; 127.0.0.1 is this machine alone")
        if not 0 <= self.port <= 65535:
            raise InputError(f"--port must lie between 0 and 65535, got {self.port}")
        if self.served_name == "":
            raise InputError("--served-name must not be empty")
        check_device(self.device)
        check_choice("--dtype", self.dtype, ("auto", "float32", "float16", "bfloat16"))
        for name in ("max_batch", "max_queue", "max_body_bytes", "max_connections", "max_choices"):
            check_at_least("--" + name.replace("_", "-"), getattr(self, name), 1)
        if self.max_length is not None:
            check_at_least("--max-length", self.max_length, 2)
        for name in ("request_timeout_s", "client_timeout_s", "drain_s"):
            value = getattr(self, name)
            if not (0 < value < math.inf or (name == "drain_s" and value == 0)):
                raise InputError(
                    f"--{name.replace('_', '-')} must be a finite number of seconds > 0, "
                    f"got {value}"
                )
