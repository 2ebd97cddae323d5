"""Sampling: the same support as transformers' processors, the right frequencies, and draws that
depend on nothing but the request's seed."""

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lillama.serve.engine.requests import SamplingParams
from lillama.serve.engine.sampling import Rows, Steps, sample, steps_of

CPU = torch.device("cpu")
ALL = Steps(penalty=True, draw=True, filters=True, logprobs=True)


def rows_of(params: list[SamplingParams], vocab: int, prompt: list[int] | None = None) -> Rows:
    rows = Rows.empty(len(params), vocab, CPU)
    for slot, one in enumerate(params):
        rows.write(slot, one, torch.tensor(prompt or [0]), one.seed or 0)
    return rows


def theirs(params: SamplingParams, logits: torch.Tensor, prompt: list[int]) -> torch.Tensor:
    """What transformers' processors make of logits [1, V], in generate's order."""
    p = params
    steps = LogitsProcessorList()
    if p.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    steps.append(TemperatureLogitsWarper(p.temperature))
    if p.top_k:
        steps.append(TopKLogitsWarper(p.top_k))
    if p.top_p < 1:
        steps.append(TopPLogitsWarper(p.top_p))
    if p.min_p:
        steps.append(MinPLogitsWarper(p.min_p))
    return steps(torch.tensor([prompt]), logits.clone())


FILTERS = {
    "none": {},
    "top_k": {"top_k": 5},
    "top_k_beyond": {"top_k": 1000},
    "top_p": {"top_p": 0.7},
    "top_p_tiny": {"top_p": 1e-6},
    "min_p": {"min_p": 0.2},
    "penalty": {"repetition_penalty": 1.5},
    "penalty_below_one": {"repetition_penalty": 0.5},
    "all": {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize(
    ("name", "temperature"), [*((name, 1.0) for name in FILTERS), ("all", 0.5), ("top_p", 2.0)]
)
def test_sample_frequencies_are_those_of_transformers(name, temperature):
    """Support equal, and Pearson's statistic within five deviations of its mean."""
    vocab, draws, prompt = 40, 20_000, [3, 4, 4, 7]
    params = SamplingParams(temperature=temperature, **FILTERS[name])
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(5)) * 2
    wanted = theirs(params, logits, prompt).softmax(-1)[0].double()
    rows = Rows.empty(draws, vocab, CPU)
    rows.numbers[:] = torch.tensor(
        [temperature, params.top_p, params.min_p, params.repetition_penalty]
    )
    rows.counters[:, 0] = torch.arange(draws)
    rows.counters[:, 2] = params.top_k
    rows.seen[:, prompt] = True
    ids = sample(logits.expand(draws, vocab), rows, ALL).ids
    found = torch.bincount(ids, minlength=vocab).double()
    assert set(ids.tolist()) <= set(wanted.nonzero()[:, 0].tolist())
    likely = wanted * draws >= 5
    assert bool((found[likely] > 0).all())
    expected, observed = wanted[likely] * draws, found[likely]
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = max(int(likely.sum()) - 1, 1)
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 5


def test_sample_successive_draws_of_one_seed_have_the_right_frequencies():
    """The noise of (seed, step) must not repeat or lean from step to step."""
    draws, vocab = 2000, 4
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    rows = rows_of([SamplingParams(temperature=1.0, seed=77)], vocab)
    ids = torch.cat([sample(logits, rows, Steps(draw=True)).ids for _ in range(draws)])
    expected = logits.softmax(-1)[0] * draws
    statistic = float(((torch.bincount(ids, minlength=vocab) - expected) ** 2 / expected).sum())
    assert statistic < 3 + 5 * math.sqrt(6)
    same = (ids[1:] == ids[:-1]).float().mean()
    assert abs(float(same) - float((logits.softmax(-1) ** 2).sum())) < 0.03
    assert int(rows.counters[0, 1]) == draws


def test_sample_draws_do_not_depend_on_the_batch_or_the_slot():
    vocab, mine = 300, SamplingParams(temperature=1.0, seed=9, top_p=0.95)
    other = SamplingParams(temperature=3.0, seed=10, repetition_penalty=2.0, logprobs=3)
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(1))

    def run(rows: Rows, slot: int, steps: Steps) -> list[int]:
        found = []
        for step in range(6):
            batch = logits.roll(step, dims=1)[: len(rows.numbers)].clone()
            batch[slot] = logits[5].roll(step)
            found.append(int(sample(batch, rows, steps).ids[slot]))
        return found

    alone = run(rows_of([mine], vocab), 0, steps_of([mine]))
    among = run(rows_of([other, other, mine, other], vocab), 2, ALL)
    assert alone == among
    moved = rows_of([other, mine], vocab)
    moved.move(1, 0)
    assert run(moved.part(0, 1), 0, ALL) == alone
    assert len(set(alone)) > 2


def test_sample_greedy_rows_are_argmax_whatever_the_others_do():
    vocab = 50
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(2))
    greedy = SamplingParams(seed=1)
    rows = rows_of([greedy, SamplingParams(temperature=5.0, seed=2), greedy], vocab)
    for _ in range(5):
        ids = sample(logits, rows, ALL).ids
        assert int(ids[0]) == int(logits[0].argmax()) and int(ids[2]) == int(logits[2].argmax())
    assert torch.equal(sample(logits, rows_of([greedy] * 3, vocab), Steps()).ids, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-38, 1e-4])
def test_sample_tiny_temperature_is_greedy_and_finite(temperature):
    logits = torch.tensor([[900.0, 901.0, -1e30, 3.0]])
    rows = rows_of([SamplingParams(temperature=temperature)], 4)
    assert [int(sample(logits, rows, ALL).ids) for _ in range(20)] == [1] * 20


def test_sample_penalty_counts_the_prompt_and_what_was_chosen():
    logits = torch.tensor([[4.0, 3.9, 3.8, -9.0]])
    params = SamplingParams(repetition_penalty=1.5)
    rows = rows_of([params], 4, prompt=[0, 0])
    assert [int(sample(logits, rows, steps_of([params])).ids) for _ in range(3)] == [1, 2, 0]
    rows.write(0, params, torch.tensor([1]), 0)  # the next request in this slot
    assert int(sample(logits, rows, steps_of([params])).ids) == 0


def test_sample_logprobs_are_of_the_raw_distribution():
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(3))
    params = SamplingParams(temperature=2.0, top_k=1, repetition_penalty=2.0, logprobs=4)
    found = sample(logits, rows_of([params] * 2, 30), ALL)
    wanted = logits.log_softmax(-1)
    assert found.logprobs is not None and found.top_ids is not None
    torch.testing.assert_close(found.logprobs, wanted.gather(1, found.ids[:, None])[:, 0])
    torch.testing.assert_close(found.top_logprobs, wanted.topk(20).values)
    assert torch.equal(found.top_ids, wanted.topk(20).indices)


def test_sample_says_which_logits_are_broken():
    logits = torch.randn(3, 8)
    logits[1, 3] = math.nan
    rows = rows_of([SamplingParams(temperature=1.0)] * 3, 8)
    ids = sample(logits, rows, ALL).ids
    assert int(ids[1]) == -1 and int(ids[0]) >= 0 and int(ids[2]) >= 0


def test_sample_small_vocabulary_and_half_precision():
    logits = torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16)
    params = SamplingParams(logprobs=20)
    found = sample(logits, rows_of([params], 2), steps_of([params]))
    assert int(found.ids) == 1
    assert found.top_logprobs is not None and found.top_logprobs.shape == (1, 2)


def test_steps_of_names_only_what_is_needed():
    assert steps_of([SamplingParams(top_k=5)]) == Steps()  # greedy: filters have no effect
    assert steps_of([SamplingParams(), SamplingParams(temperature=1.0)]) == Steps(draw=True)
    assert steps_of([SamplingParams(temperature=1.0, min_p=0.1)]) == Steps(draw=True, filters=True)
    assert steps_of([SamplingParams(repetition_penalty=1.1)]) == Steps(penalty=True)
    assert steps_of([SamplingParams(logprobs=0)]) == Steps(logprobs=True)
