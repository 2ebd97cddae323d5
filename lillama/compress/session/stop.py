"""Ctrl-C and SIGTERM as a request: the step under way is finished and saved first."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from lillama.errors import RunError

__all__ = ["StopRequest"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While the context lasts, the first signal sets `wanted` and the second ends the process as
    ever. Outside the main thread, where no handler can be set, nothing changes."""

    def __init__(self) -> None:
        self.wanted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def check(self) -> None:
        """Raises RunError once a stop is wanted."""
        if self.wanted:
            raise RunError("interrupted")
