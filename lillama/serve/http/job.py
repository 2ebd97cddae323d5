"""One HTTP request at the engine: its choices, their events, and what ends it early.

The engine calls from its own thread; the server runs on an event loop. Events cross in a deque, and
the loop is woken once for all that wait there, not once for each: under load a slow step of the
loop makes the next one larger, not the queue of wake-ups longer.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from lillama.errors import InputError
from lillama.serve.engine.batching import LocalEngine, Request
from lillama.serve.engine.requests import Busy, Event, SamplingParams, Token
from lillama.serve.http.errors import ApiError
from lillama.serve.http.metrics import Metrics

__all__ = ["Disconnected", "Job"]

T = TypeVar("T")


class Disconnected(Exception):
    """The client went away; there is nobody to answer."""


@dataclass
class _Open:
    """A choice that is not done."""

    request: Request
    tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0


class Job:
    """Every choice that one HTTP request asks for. receive is ASGI's, its body consumed: what it
    says next is that the client left. limit_s is from now to the last event."""

    def __init__(self, engine: LocalEngine, metrics: Metrics, receive: Any, limit_s: float) -> None:
        self._engine, self._metrics = engine, metrics
        self._loop = asyncio.get_running_loop()
        self._inbox: deque[tuple[int, Event]] = deque()
        self._wake = asyncio.Event()
        self._awake = False
        self._failure: Exception | None = None
        self._reason = "cancelled"  # of what close ends
        self._guarded: asyncio.Task[Any] | None = None
        self._open: dict[int, _Open] = {}
        self._started_s = time.perf_counter()
        self._timer = self._loop.call_later(limit_s, self._expire, limit_s)
        self._watch = self._loop.create_task(self._watch_client(receive))

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """Await what comes before the events; give it up, raising as `events`, when the client
        leaves or the time is up."""
        self._guarded = self._loop.create_task(work)
        try:
            return await self._guarded
        except asyncio.CancelledError:
            if self._failure is not None:
                raise self._failure from None
            raise
        finally:
            self._guarded = None

    def submit(self, requests: Sequence[tuple[Sequence[int], SamplingParams]]) -> None:
        """Queue all of them, or none: ApiError where the queue is full (429), the engine refuses a
        request (400), or takes none at all (503)."""
        try:
            for index, (prompt_ids, params) in enumerate(requests):
                on_event = partial(self._put, index)
                self._open[index] = _Open(self._engine.submit(prompt_ids, params, on_event))
        except Busy as error:
            self.close()
            if self._engine.stopped:  # although nobody told it to: its thread has died
                raise ApiError(503, "the engine has stopped", "engine_stopped") from error
            later = {"retry-after": "1"}
            raise ApiError(429, str(error), "queue_full", headers=later) from error
        except InputError as error:
            self.close()
            raise ApiError(400, str(error), "invalid_value") from error

    async def events(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """Yield (choice, event) in lists of what has come since the last one, until every choice is
        done. Raises ApiError where the engine failed or stopped, or the time is up, and
        Disconnected where the client left."""
        while self._open:
            await self._wake.wait()
            self._wake.clear()
            self._awake = False  # before the inbox is read: what comes later wakes again
            if self._failure is not None:
                raise self._failure
            batch = []
            while self._inbox:
                batch.append(self._inbox.popleft())
                self._note(*batch[-1])
            if batch:
                yield batch

    def close(self) -> None:
        """Cancel what still runs. Can be called again."""
        self._timer.cancel()
        self._watch.cancel()
        for choice in self._open.values():
            choice.request.cancel()
            self._metrics.finished.labels(self._reason).inc()
        self._open.clear()

    def _put(self, index: int, event: Event) -> None:
        """Take an event in, on the engine's thread."""
        self._inbox.append((index, event))
        if not self._awake:
            self._awake = True
            try:
                self._loop.call_soon_threadsafe(self._wake.set)
            except RuntimeError:
                pass  # the loop is closed: the server has stopped, nobody waits

    def _note(self, index: int, event: Event) -> None:
        choice, now_s = self._open[index], time.perf_counter()
        if isinstance(event, Token):
            if not choice.tokens:
                choice.first_s = now_s
                self._metrics.first_token_s.observe(now_s - self._started_s)
            choice.tokens, choice.last_s = choice.tokens + 1, now_s
            return
        del self._open[index]
        self._metrics.finished.labels(event.reason).inc()
        if choice.tokens > 1:
            span_s = choice.last_s - choice.first_s
            self._metrics.per_token_s.observe(span_s / (choice.tokens - 1))
        if event.reason == "error":
            raise ApiError(500, f"the engine failed: {event.error}", "engine_error")
        if event.reason == "cancelled":
            raise ApiError(503, "the server stopped before the answer was done", "stopped")

    def _fail(self, failure: Exception, reason: str) -> None:
        if self._failure is None:
            self._failure, self._reason = failure, reason
        if self._guarded is not None:
            self._guarded.cancel()
        self._wake.set()

    def _expire(self, limit_s: float) -> None:
        message = f"no whole answer within {limit_s:g} s; ask for less or raise --request-timeout-s"
        self._fail(ApiError(504, message, "request_timeout"), "timeout")

    async def _watch_client(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._fail(Disconnected(), "disconnected")
