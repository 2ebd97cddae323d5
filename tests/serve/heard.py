"""What the tests of the engine share: listeners, prompts, and how long to wait."""

import threading
import time
from collections.abc import Callable
from typing import Any

from lillama.serve.engine.requests import Event, Finished, SamplingParams, Token

WAIT_S = 60.0
PROMPTS = [[5], [7, 8, 9, 10, 11], list(range(20, 57)), [3, 250, 40], [9, 9], [60, 61, 62, 63]]


class Heard:
    """What a request was told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()

    def __call__(self, event: Event) -> None:
        assert not self.ended.is_set(), "nothing follows Finished"
        self.events.append(event)
        if isinstance(event, Finished):
            self.ended.set()

    def finished(self) -> Finished:
        assert self.ended.wait(WAIT_S), "no end"
        last = self.events[-1]
        assert isinstance(last, Finished)
        return last

    @property
    def ids(self) -> list[int]:
        return [event.token_id for event in self.events if isinstance(event, Token)]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def greedy(count: int, **changes: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, ignore_eos=True, **changes)
