"""What happens in a run, one JSON object a line, for dashboards and for reading after the fact."""

import json
import time
from pathlib import Path
from typing import Any

from lillama.errors import InputError, RunError

__all__ = ["Events"]


class Events:
    """Appends to `path`, or does nothing where it is None. Every line has "time" (seconds since the
    epoch) and "event".

    Raises (on construction):
        InputError: the file cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        if path is not None:
            try:
                path.open("a", encoding="utf-8").close()
            except OSError as error:
                raise InputError(f"--events {path} cannot be written: {error}") from error

    def __call__(self, event: str, **values: Any) -> None:
        """Add a line, at once visible to others.

        Raises:
            RunError: the disk is full, or went away.
        """
        if self.path is None:
            return
        line = json.dumps({"time": round(time.time(), 3), "event": event, **values})
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error}") from error
