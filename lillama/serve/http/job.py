"""One HTTP request at the engine: its choices, their events, and what ends it early.

The engine calls from its own thread; the server runs on an event loop. Events cross in a deque, and
the loop is woken once for all that wait there, not once for each: under load a slow step of the
loop makes the next one larger, not the queue of wake-ups longer.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

from lillama.errors import InputError
from lillama.serve.engine.requests import (
    Busy,
    Completion,
    Engine,
    Event,
    Finished,
    SamplingParams,
    Token,
)
from lillama.serve.http.errors import ApiError
from lillama.serve.http.metrics import Metrics

__all__ = ["Disconnected", "EngineStopped", "Job"]


T = TypeVar("T")


class Disconnected(Exception):
    """The client went away; there is nobody to answer."""


class EngineStopped(Exception):
    """The engine takes no requests although nobody told it to stop: its thread has died."""


class Job:
    """Every choice that one HTTP request asks for.

    Args:
        engine: generates.
        metrics: are told of tokens and endings.
        receive: ASGI's, its body consumed: what it says next is that the client left.
        timeout_s: from now to the last event.
    """

    def __init__(self, engine: Engine, metrics: Metrics, receive: Any, timeout_s: float) -> None:
        self._engine = engine
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._inbox: deque[tuple[int, Event]] = deque()
        self._wake = asyncio.Event()
        self._awake = False
        self._failure: Exception | None = None
        self._reason = "cancelled"  # of what close ends
        self._guarded: asyncio.Task[Any] | None = None
        self._open: dict[int, Completion] = {}
        self._started_s = time.perf_counter()
        self._first_s: dict[int, float] = {}
        self._last_s: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        self._timer = self._loop.call_later(timeout_s, self._expire, timeout_s)
        self._watch = self._loop.create_task(self._watch_client(receive))

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """Await what comes before the events; given up when the client leaves or the time is up.

        Raises:
            ApiError: the time is up.
            Disconnected: the client left.
        """
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
        """Queue all of them, or none.

        Raises:
            ApiError: the queue is full (429) or the engine refuses the request (400).
            EngineStopped: the engine takes no requests at all.
        """
        try:
            for index, (prompt_ids, params) in enumerate(requests):
                self._open[index] = self._engine.submit(
                    prompt_ids, params, partial(self._put, index)
                )
        except Busy as error:
            stats = self._engine.stats()
            self.close()
            if not (stats["waiting"] or stats["running"]):  # then it is not the queue
                raise EngineStopped from error
            raise ApiError(
                429, str(error), code="queue_full", headers={"retry-after": "1"}
            ) from error
        except InputError as error:
            self.close()
            raise ApiError(400, str(error), code="invalid_value") from error

    async def events(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """(choice, event) in lists of what has come since the last one, until every choice is done.

        Raises:
            ApiError: the engine failed or stopped, or the time is up.
            Disconnected: the client left.
        """
        while self._open:
            await self._wake.wait()
            self._wake.clear()
            self._awake = False  # before the inbox is read: what comes later wakes again
            if self._failure is not None:
                raise self._failure
            batch = []
            while self._inbox:
                index, event = self._inbox.popleft()
                batch.append((index, event))
                self._note(index, event)
            if batch:
                yield batch

    def close(self) -> None:
        """Cancel what still runs. Can be called again."""
        self._timer.cancel()
        self._watch.cancel()
        for completion in self._open.values():
            completion.cancel()
            self._metrics.finished.labels(self._reason).inc()
        self._open.clear()

    def _put(self, index: int, event: Event) -> None:
        """On the engine's thread."""
        self._inbox.append((index, event))
        if not self._awake:
            self._awake = True
            try:
                self._loop.call_soon_threadsafe(self._wake.set)
            except RuntimeError:
                pass  # the loop is closed: the server has stopped, nobody waits

    def _note(self, index: int, event: Event) -> None:
        now_s = time.perf_counter()
        if isinstance(event, Token):
            if index not in self._first_s:
                self._first_s[index] = now_s
                self._metrics.first_token_s.observe(now_s - self._started_s)
            self._last_s[index] = now_s
            self._counts[index] = self._counts.get(index, 0) + 1
            return
        self._open.pop(index, None)
        self._metrics.finished.labels(event.reason).inc()
        if self._counts.get(index, 0) > 1:
            span_s = self._last_s[index] - self._first_s[index]
            self._metrics.per_token_s.observe(span_s / (self._counts[index] - 1))
        if isinstance(event, Finished) and event.reason == "error":
            raise ApiError(500, f"the engine failed: {event.error}", code="engine_error")
        if isinstance(event, Finished) and event.reason == "cancelled":
            raise ApiError(503, "the server stopped before the answer was done", code="stopped")

    def _fail(self, failure: Exception, reason: str) -> None:
        if self._failure is None:
            self._failure, self._reason = failure, reason
        if self._guarded is not None:
            self._guarded.cancel()
        self._wake.set()

    def _expire(self, timeout_s: float) -> None:
        message = (
            f"no whole answer within {timeout_s:g} s; ask for less or raise --request-timeout-s"
        )
        self._fail(ApiError(504, message, code="request_timeout"), "timeout")

    async def _watch_client(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._fail(Disconnected(), "disconnected")
