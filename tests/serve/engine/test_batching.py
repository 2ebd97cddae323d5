"""The engine: prompts in chunks, seeds, text, and requests that fail, stop and are cancelled."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lillama.serve.engine import LocalEngine
from lillama.serve.engine.requests import Event, Finished, SamplingParams, Token
from lillama.serve.models import runner as runner_module
from tests.serve.heard import Heard, generated, greedy, reference, wait_for


@pytest.fixture(scope="module")
def make_engine(device):
    """make_engine(path, ...) -> a started engine; stopped after the module."""
    engines: dict[Any, LocalEngine] = {}

    def make(path: Path, **options) -> LocalEngine:
        key = (path, *sorted(options.items()))
        if key not in engines:
            engines[key] = LocalEngine(path, device=str(device), **options)
            engines[key].start()
        return engines[key]

    yield make
    for engine in engines.values():
        engine.stop()


@pytest.fixture(scope="module")
def checkpoints(mamba, mixtral) -> dict[str, Path]:
    return {"mamba": mamba, "mixtral": mixtral}


both_kinds = pytest.mark.parametrize("kind", ["mamba", "mixtral"])


@pytest.fixture(scope="module")
def wanted(checkpoints, device):
    """wanted(kind, prompt, n) -> the ids that transformers' generate() adds."""
    models = {kind: reference(path, device) for kind, path in checkpoints.items()}
    return lambda kind, prompt, count: generated(models[kind], prompt, count)


# Tokens; those of every model are in models/test_tokens.py
@both_kinds
def test_engine_prompt_in_chunks_equals_generate(
    kind, checkpoints, make_engine, wanted, monkeypatch
):
    monkeypatch.setattr(runner_module, "PREFILL_CHUNK", 7)
    engine = make_engine(checkpoints[kind])
    for length in (1, 6, 7, 8, 15, 30):
        prompt = [(3 * i) % 250 + 1 for i in range(length)]
        heard = Heard()
        engine.submit(prompt, greedy(5), heard)
        heard.finished()
        assert heard.ids == wanted(kind, prompt, 5), length


def test_engine_seeds_repeat_in_any_batch(mamba, make_engine):
    engine = make_engine(mamba, max_batch=4)
    params = greedy(20, temperature=1.0, top_p=0.98, seed=11)

    def run() -> list[int]:
        heard = Heard()
        engine.submit([5, 6], params, heard)
        heard.finished()
        return heard.ids

    alone, others = run(), [Heard() for _ in range(5)]
    for index, other in enumerate(others):
        engine.submit([index + 1], greedy(10 + 9 * index, temperature=2.0), other)
    assert run() == alone
    assert len({tuple(other.ids[:8]) for other in others if other.finished()}) == 5
    changed = Heard()
    engine.submit([5, 6], greedy(20, temperature=1.0, top_p=0.98, seed=12), changed)
    assert changed.finished() and changed.ids != alone


def test_engine_text_is_the_tokenizers(mamba, make_engine, tokenizer):
    engine = make_engine(mamba)
    heard = Heard()
    engine.submit(tokenizer("the cat")["input_ids"], greedy(40, temperature=1.0, seed=3), heard)
    end = heard.finished()
    assert heard.text == tokenizer.decode(heard.ids, skip_special_tokens=True)
    assert (end.prompt_tokens, end.completion_tokens) == (
        len(tokenizer("the cat")["input_ids"]),
        40,
    )


def test_engine_stops_at_a_string_and_does_not_show_it(mamba, make_engine, tokenizer):
    engine = make_engine(mamba)
    free = Heard()
    engine.submit([5, 6], greedy(30, temperature=1.0, seed=1), free)
    free.finished()
    stop = free.text[8:11]
    heard = Heard()
    engine.submit([5, 6], greedy(30, temperature=1.0, seed=1, stop=(stop,)), heard)
    assert heard.finished().reason == "stop"
    assert heard.text == free.text[: free.text.index(stop)]


def test_engine_ends_at_the_end_token(make_checkpoint, make_engine, tokenizer):
    """The end token is the likeliest from the start."""

    def edit(model):
        weight = model.backbone.embeddings.weight.data
        weight[0] = 0
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(weight))

    path = make_checkpoint("mamba", edit=edit, tie_word_embeddings=False)
    engine = make_engine(path)
    heard, ignored = Heard(), Heard()
    engine.submit([5], SamplingParams(max_new_tokens=4), heard)
    assert heard.finished() == Finished("stop", "", 1, 0) and len(heard.events) == 1
    engine.submit([5], greedy(4), ignored)
    assert ignored.finished().completion_tokens == 4 and ignored.ids == [0] * 4


def test_engine_logprobs_are_the_models(mamba, make_engine, device):
    engine = make_engine(mamba)
    heard = Heard()
    engine.submit([5, 6, 7], greedy(4, logprobs=3, temperature=1.0, top_k=2, seed=2), heard)
    heard.finished()
    model: Any = AutoModelForCausalLM.from_pretrained(mamba).to(device).eval()
    ids = torch.tensor([[5, 6, 7, *heard.ids]], device=device)
    with torch.no_grad():
        truth = model(ids, use_cache=False).logits[0, 2:-1].log_softmax(-1)
    for event, row in zip(heard.events, truth, strict=False):
        assert isinstance(event, Token) and event.logprob is not None
        assert event.logprob == pytest.approx(float(row[event.token_id]), abs=1e-4)
        assert [token for token, _ in event.top_logprobs] == row.topk(3).indices.tolist()


# Requests that end otherwise
def test_engine_cancel_running_and_waiting(mamba, make_engine, wanted):
    engine = make_engine(mamba, max_batch=1)
    running, waiting, last = Heard(), Heard(), Heard()
    first = engine.submit([5], greedy(100_000), running)
    second = engine.submit([6], greedy(5), waiting)
    engine.submit([7, 8, 9, 10, 11], greedy(6), last)
    wait_for(lambda: running.ids)
    second.cancel()
    assert waiting.finished() == Finished("cancelled", "", 1, 0)
    first.cancel()
    assert running.finished().reason == "cancelled"
    assert running.finished().completion_tokens == len(running.ids) > 0
    last.finished()
    assert last.ids == wanted("mamba", [7, 8, 9, 10, 11], 6)
    first.cancel()  # nothing is left of it


def test_engine_listener_that_fails_ends_its_request_alone(mamba, make_engine, wanted):
    engine = make_engine(mamba, max_batch=4)
    heard, bad = Heard(), []

    def listener(event: Event) -> None:
        bad.append(event)
        if len(bad) >= 3:
            raise ValueError("nobody listens")

    engine.submit([5], greedy(50), heard)
    engine.submit([6], greedy(50), listener)
    heard.finished()
    assert heard.ids == wanted("mamba", [5], 50)
    end = bad[-1]
    assert isinstance(end, Finished) and end.reason == "error" and len(bad) == 4
    assert end.error == "ValueError: nobody listens"


def test_engine_failing_step_ends_the_batch_and_not_the_engine(mamba, make_engine, wanted):
    engine = make_engine(mamba, max_batch=2)
    runner: Any = engine._decoder.runner
    step, calls = runner.step, []

    def failing(ids: torch.Tensor, shape: int) -> torch.Tensor:
        calls.append(len(ids))
        if len(calls) == 4:
            raise RuntimeError("no memory\nsecond line")
        return step(ids, shape)

    before = engine.stats()["errors"]
    runner.step = failing
    try:
        heard = [Heard() for _ in range(3)]
        for one in heard:
            engine.submit([5], greedy(9), one)
        ends = [one.finished() for one in heard]
    finally:
        runner.step = step
    assert [end.reason for end in ends] == ["error", "error", "length"]
    assert ends[0].error == "RuntimeError: no memory"
    assert heard[2].ids == wanted("mamba", [5], 9)
    assert engine.stats()["errors"] == before + 2 and engine.stats()["running"] == 0


def test_engine_failing_prompt_ends_its_request_alone(mamba, make_engine, wanted):
    engine = make_engine(mamba, max_batch=2)
    runner: Any = engine._decoder.runner
    prefill = runner.prefill

    def failing(prompt: torch.Tensor):
        if len(prompt) == 2:
            raise MemoryError
        return prefill(prompt)

    runner.prefill = failing
    try:
        heard = [Heard() for _ in range(3)]
        for one, prompt in zip(heard, ([5], [6, 6], [5]), strict=True):
            engine.submit(prompt, greedy(9), one)
        ends = [one.finished() for one in heard]
    finally:
        runner.prefill = prefill
    assert [end.reason for end in ends] == ["length", "error", "length"]
    assert ends[1].error == "MemoryError"
    assert heard[0].ids == heard[2].ids == wanted("mamba", [5], 9)


@both_kinds
def test_engine_broken_logits_end_their_request_alone(kind, checkpoints, make_engine, wanted):
    """And nothing of them reaches the next request in the slot."""
    engine = make_engine(checkpoints[kind], max_batch=2)
    runner: Any = engine._decoder.runner
    heard, broken, after = Heard(), Heard(), Heard()
    engine.submit([5], greedy(200), heard)
    engine.submit([6], greedy(200), broken)
    wait_for(lambda: len(broken.ids) > 2)
    for state in runner._kv if kind == "mixtral" else [runner._ssm[0], runner._ssm[1]]:
        state[1] = torch.nan
    assert broken.finished().error == "the model's logits are not finite"
    engine.submit([7], greedy(20), after)
    assert after.finished().reason == heard.finished().reason == "length"
    assert heard.ids == wanted(kind, [5], 200)
    assert after.ids == wanted(kind, [7], 20)
