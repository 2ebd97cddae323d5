"""The engine as a whole: starting and stopping, what it refuses and counts, and memory that does
not grow."""

import gc
import threading
import time
import tracemalloc

import pytest

from lillama.errors import InputError, RunError
from lillama.serve.engine import LocalEngine
from lillama.serve.engine.requests import Busy, Event, Finished, SamplingParams
from tests.serve.heard import WAIT_S, Heard, greedy, wait_for


def test_engine_stop_drains_then_cancels_then_refuses(mamba, device):
    engine = LocalEngine(mamba, device=str(device), max_batch=2)
    short, endless, queued = Heard(), Heard(), Heard()
    engine.submit([5], greedy(3), short)
    engine.submit([6], greedy(1_000_000), endless)
    engine.start()
    wait_for(lambda: endless.ids)
    engine.submit([7], greedy(1_000_000), queued)
    engine.stop(drain_s=0.3)
    assert short.finished().reason == "length"
    assert endless.finished().reason == queued.finished().reason == "cancelled"
    assert len(queued.ids) > 10, "what was accepted goes on while it drains"
    with pytest.raises(Busy, match="stopping"):
        engine.submit([5], greedy(1), Heard())
    engine.stop()
    with pytest.raises(RunError, match="started before"):
        engine.start()


def test_engine_stop_ends_early_when_nothing_is_left(mamba, device):
    engine = LocalEngine(mamba, device=str(device))
    engine.start()
    heard = Heard()
    engine.submit([5], greedy(3), heard)
    start = time.monotonic()
    engine.stop(drain_s=WAIT_S)
    assert time.monotonic() - start < WAIT_S / 2 and heard.finished().reason == "length"


def test_engine_that_never_started_cancels_what_waits(mamba, device):
    engine = LocalEngine(mamba, device=str(device), max_queue=2)
    heard = [Heard(), Heard()]
    for one in heard:
        engine.submit([5], greedy(1), one)
    with pytest.raises(Busy, match="2 requests wait"):
        engine.submit([5], greedy(1), Heard())
    assert engine.stats()["waiting"] == 2
    engine.stop()
    assert [one.finished().reason for one in heard] == ["cancelled"] * 2


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 1, "the prompt is empty"),
        ([1, 300], 1, "token 300 is not in the model's vocabulary of 300"),
        ([-1], 1, "token -1 is not"),
        ([1] * 60, 5, r"prompt \(60 tokens\) and max_new_tokens \(5\) exceed the 64"),
    ],
)
def test_engine_refuses_requests_it_cannot_serve(prompt, count, message, mamba, device):
    with pytest.raises(InputError, match=message):
        LocalEngine(mamba, device=str(device), max_length=64).submit(
            prompt, SamplingParams(max_new_tokens=count), Heard()
        )


@pytest.mark.parametrize("name", ["max_batch", "max_queue", "max_length"])
def test_engine_refuses_limits_below_one(name, mamba):
    with pytest.raises(InputError, match=f"{name} is 0"):
        LocalEngine(mamba, **{name: 0})


def test_engine_counts(mamba, device):
    engine = LocalEngine(mamba, device=str(device), max_batch=2)
    engine.start()
    heard = [Heard() for _ in range(4)]
    for one in heard:
        engine.submit([5, 6, 7], greedy(5), one)
    for one in heard:
        one.finished()
    engine.stop()
    stats = dict(engine.stats())
    assert 8 <= stats.pop("steps") <= 16  # the first token comes of the prompt
    assert stats == {
        "running": 0, "waiting": 0, "max_batch": 2, "prompt_tokens": 12, "generated_tokens": 20,
        "requests": 4, "errors": 0,
    }  # fmt: skip


@pytest.mark.full
def test_engine_memory_does_not_grow(mamba, device):
    """Thousands of requests of every kind leave nothing behind."""
    engine = LocalEngine(mamba, device=str(device), max_batch=8, max_queue=10_000)
    engine.start()

    def serve(count: int) -> None:
        ended = threading.Semaphore(0)

        def listener(event: Event) -> None:
            if isinstance(event, Finished):
                ended.release()

        for index in range(count):
            params = SamplingParams(
                max_new_tokens=1 + index % 3,
                temperature=float(index % 2),
                logprobs=None if index % 5 else 2,
                repetition_penalty=1.0 if index % 7 else 1.2,
                stop=("zz",) if index % 3 else (),
            )
            request = engine.submit([1 + index % 200], params, listener)
            if index % 11 == 0:
                request.cancel()
        for _ in range(count):
            assert ended.acquire(timeout=WAIT_S)

    def size() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    serve(300)
    tracemalloc.start()
    serve(300)
    before, objects = size(), len(gc.get_objects())
    serve(2000)
    grown, more = size() - before, len(gc.get_objects()) - objects
    tracemalloc.stop()
    engine.stop()
    assert grown < 100_000, f"{grown} bytes for 2000 requests"
    assert more < 500, f"{more} objects for 2000 requests"
