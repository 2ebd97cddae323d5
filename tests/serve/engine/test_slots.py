"""The step of all slots: batch sizes, what is read back, and when it is captured and replayed. The
graphs here are fakes: there is no GPU."""

import contextlib
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lillama.serve.engine.requests import SamplingParams
from lillama.serve.engine.slots import Chosen, Decoder, buckets_of
from lillama.serve.models.runner import Prefilled

VOCAB = 50


class CountingRunner:
    """Logits that depend on the slot's own past only, which is a sum of ids."""

    vocab_size, max_length, device = VOCAB, 1000, torch.device("cpu")

    def __init__(self, slots: int) -> None:
        self.sums = torch.zeros(slots, dtype=torch.int64)
        self.batches: list[int] = []

    def place(self, slot: int, state: Any) -> None:
        self.sums[slot] = state

    def move(self, source: int, target: int) -> None:
        self.sums[target] = self.sums[source].clone()

    def shape_of(self, live: int) -> int:
        return 0

    def advance(self, live: int) -> None:
        pass

    def step(self, ids: Tensor, shape: int) -> Tensor:
        self.batches.append(len(ids))
        sums = self.sums[: len(ids)]
        sums += ids + 1
        return torch.sin(sums[:, None] * (torch.arange(VOCAB) + 1.0))


class FakeGraph:
    """Replays by running the step and writing where the captured one left its results."""

    decoder: Any = None
    captures = 0

    def replay(self) -> None:
        for size, captured in self.decoder._graphs.items():
            if captured is not None and captured[0] is self:
                for old, new in zip(captured[1], self.decoder._step(*size), strict=True):
                    if old is not None:
                        old.copy_(new)


@contextlib.contextmanager
def fake_capture(graph: FakeGraph, **options: Any) -> Iterator[None]:
    """As a capture, it computes nothing: all state is as before."""
    FakeGraph.captures += 1
    decoder = FakeGraph.decoder
    rows = decoder._rows
    state = [decoder.runner.sums, decoder._ids, rows.numbers, rows.counters, rows.seen]
    saved = [tensor.clone() for tensor in state]
    yield
    for tensor, old in zip(state, saved, strict=True):
        tensor.copy_(old)


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "graph", fake_capture)
    monkeypatch.setattr(FakeGraph, "captures", 0)


def run(capture: bool, plan: list[int]) -> list[list[Chosen]]:
    """Steps with so many live requests each; slots are filled as they are needed."""
    runner: Any = CountingRunner(8)
    decoder = Decoder(runner, 8, capture=capture)
    FakeGraph.decoder = decoder
    params = [
        SamplingParams(temperature=float(i % 2), repetition_penalty=1.0 + (i == 2))
        for i in range(8)
    ]
    found = []
    begun = 0
    for live in plan:
        while begun < live:
            logits = torch.arange(VOCAB).float()[None].roll(begun)
            prompt = torch.tensor([begun])
            decoder.begin(begun, prompt, Prefilled(logits, begun), params[begun], begun)
            begun += 1
        begun = live
        found.append(decoder.step(params[:live]))
    return found


PLAN = [1, 1, 1, 3, 3, 4, 3, 8, 8, 7, 5, 1, 1, 2, 3]


def test_decoder_replays_what_it_would_compute(fakes):
    eager = run(False, PLAN)
    assert FakeGraph.captures == 0
    assert run(True, PLAN) == eager
    # sizes met twice: (1, greedy), (4, with a penalty) and (8, with a penalty)
    assert FakeGraph.captures == 3
    assert [len(chosen) for chosen in eager] == PLAN


def test_decoder_that_cannot_capture_says_so_and_goes_on(fakes, monkeypatch, caplog):
    @contextlib.contextmanager
    def refused(graph: Any, **options: Any) -> Iterator[None]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refused)
    with caplog.at_level(logging.WARNING, "lillama.serve.engine.slots"):
        assert run(True, PLAN) == run(False, PLAN)
    (record,) = caplog.records
    assert record.getMessage().endswith("slower: operation not permitted when stream is capturing")


def test_decoder_steps_at_fixed_batch_sizes():
    runner: Any = CountingRunner(6)
    decoder = Decoder(runner, 6)
    for live in range(1, 7):
        decoder.step([SamplingParams()] * live)
    assert runner.batches == [1, 2, 4, 4, 6, 6]


def test_decoder_captures_a_few_kinds_of_steps(fakes):
    """Whatever requests ask for, so that graphs do not fill the memory."""
    decoder = Decoder(CountingRunner(1), 1, capture=True)  # type: ignore[arg-type]
    FakeGraph.decoder = decoder
    for bits in itertools.product((False, True), repeat=4):
        penalty, draw, filters, logprobs = bits
        params = SamplingParams(
            repetition_penalty=1.0 + penalty,
            temperature=float(draw),
            min_p=0.1 * filters,
            logprobs=1 if logprobs else None,
        )
        for _ in range(3):
            (chosen,) = decoder.step([params])
            assert (chosen.logprob is not None) == logprobs
    assert FakeGraph.captures == 5


@pytest.mark.parametrize(
    ("slots", "sizes"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])],
)
def test_buckets_double_up_to_the_slots(slots, sizes):
    assert buckets_of(slots) == sizes


def test_decoder_reads_logprobs_of_those_who_asked():
    decoder = Decoder(CountingRunner(2), 2)  # type: ignore[arg-type]
    first, second = decoder.step([SamplingParams(logprobs=2), SamplingParams()])
    assert len(first.top) == 2 and first.logprob == first.top[0][1] <= 0
    assert first.top[0][0] == first.token_id
    assert second.logprob is None and second.top == ()
