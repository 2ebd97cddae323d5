"""Whole answers: what is timed of them, that ours are transformers', and the row made of them."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import answers, bench_generate, machine
from benchmarks.answers import Answer, Once, assert_same, ours, theirs
from benchmarks.decode_models import DecodeShape, model_of, prompt_of
from lillama.integrations.mamba import fast_mamba

CPU = torch.device("cpu")
COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {
    "llama": COMMON | HEADS,
    "mamba": COMMON | {"state_size": 4},
    "mixtral": COMMON | HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2},
}
LIMITS = {"copy_gb_per_s": 10.0, "read_gb_per_s": 11.0, "float32_tflop_per_s": 0.01}
NEW = 5


def shape_of(family) -> DecodeShape:
    return DecodeShape(
        name=f"small-{family}",
        needs_gpu=False,
        family=family,
        batch=2,
        prompt=6,
        sizes=tuple(SIZES[family].items()),
        keeps=(("ours", 0.5), ("20", 0.75)),
    )


def tokens_of(rows: list[list[int]]) -> Answer:
    return Answer(rows, [0.1 * (i + 1) for i in range(len(rows[0]))])


@pytest.mark.parametrize("family", SIZES)
def test_ours_answers_as_transformers_with_either_cache(family):
    shape = shape_of(family)
    model = model_of(shape, 0.5, torch.float32, CPU)
    prompts = prompt_of(shape, shape.batch, CPU)
    with fast_mamba():
        static = theirs(model, prompts, NEW, "static", compiled=False)()
        own = theirs(model, prompts, NEW, "own", compiled=False)()
        answer = ours(model, prompts, NEW)
        found, again = answer(), answer()
    assert found.tokens == again.tokens == own.tokens == static.tokens
    assert len({token for row in found.tokens for token in row}) > 2, "says nothing"
    for one in (found, own, static):
        assert [len(row) for row in one.tokens] == [NEW, NEW]
        assert len(one.stamps_s) == NEW and one.stamps_s == sorted(one.stamps_s)
        assert one.stamps_s[0] > 0


def test_other_tokens_are_told_unless_they_are_as_likely():
    shape = shape_of("llama")
    model = model_of(shape, 1, torch.float32, CPU)
    prompts = prompt_of(shape, shape.batch, CPU)
    wanted = theirs(model, prompts, NEW, "own", compiled=False)()
    assert_same(wanted, wanted, model, prompts)
    last = torch.cat([prompts[1], torch.tensor(wanted.tokens[1][:3])])
    logits = model(last[None]).logits[0, -1]
    worst, first = int(logits.argmin()), wanted.tokens[1][3]
    wrong = [wanted.tokens[0], [*wanted.tokens[1][:3], worst, 0]]
    with pytest.raises(AssertionError, match=f"row 1 has token {worst} at place 3"):
        assert_same(tokens_of(wrong), wanted, model, prompts)
    with pytest.raises(AssertionError, match="row 0 has 4 tokens, not 5"):
        short = [row[:4] for row in wanted.tokens]
        assert_same(tokens_of(short), wanted, model, prompts)
    # as good as the first: what follows is another text
    with torch.no_grad():
        model.lm_head.weight[worst] = model.lm_head.weight[first]
    assert_same(tokens_of(wrong), wanted, model, prompts)


def test_a_call_gives_the_time_of_a_later_token_and_keeps_all_of_them():
    built = []

    def build():
        built.append(True)
        return lambda: Answer([[1, 2, 3]], [0.5, 0.7, 1.1])

    once = Once(build, CPU, weights_bytes=7)
    assert not built
    assert [once(), once()] == pytest.approx([0.3, 0.3])
    assert built == [True] and once.stamps_s == [[0.5, 0.7, 1.1]] * 2
    assert once.peaks_bytes == []


@pytest.mark.parametrize("family", SIZES)
def test_a_compressed_model_has_the_share_of_parameters(family):
    sizes = [
        sum(p.numel() for p in model_of(shape_of(family), keep, torch.float32, CPU).parameters())
        for keep in (1, 0.75, 0.5)
    ]
    assert sizes[0] > sizes[1] > sizes[2]


# The row
@pytest.fixture
def benchmark_(monkeypatch) -> SimpleNamespace:
    monkeypatch.setattr(bench_generate, "STEPS", NEW)
    monkeypatch.setattr(machine, "describe", lambda _: {"device": "cpu", "ceilings": LIMITS})
    return SimpleNamespace(extra_info={}, pedantic=lambda *_, **__: None)


@pytest.fixture
def row(monkeypatch, benchmark_):
    """row(**seconds) -> what is stored of a Llama whose variants take so long, and the error."""

    def answering(first: float, later: float, broken: bool = False):
        def answer() -> Answer:
            if broken:
                raise RuntimeError("cannot compile")
            return Answer([[1] * 3] * 2, [first, first + later, first + 2 * later])

        return lambda *_, **__: answer

    def compare_(**given):
        monkeypatch.setattr(bench_generate, "_check", lambda *_: None)
        for name, reading in given.items():
            monkeypatch.setattr(bench_generate, name, answering(*reading))
        error = ""
        try:
            bench_generate.compare_answers(benchmark_, shape_of("llama"), torch.float32, CPU)
        except AssertionError as failure:
            error = str(failure)
        return benchmark_.extra_info, error

    return compare_


def test_a_row_has_every_variant_and_says_what_is_not_there(row):
    found, error = row(ours=(0.1, 0.05), theirs=(0.2, 0.1))
    assert not error
    assert set(found["answers"]) == {
        *("ours", "ours_20", "ours_dense"),
        *("transformers_40", "transformers_20", "transformers_dense"),
    }
    one = found["answers"]["ours"]
    assert one["first_token_ms"] == pytest.approx(100)
    assert one["token_ms"] == pytest.approx(50)
    assert one["tokens_per_s"] == pytest.approx(2 * 3 / 0.2, rel=1e-4)
    assert one["peak_gib"] is None
    work = found["bytes_moved"]
    # at 10 GB/s
    assert one["copy_bandwidth_percent"] == pytest.approx(100 * work / 1e10 / 0.05, rel=1e-3)
    dense = found["answers"]["ours_dense"]
    assert dense["copy_bandwidth_percent"] > one["copy_bandwidth_percent"]
    assert found["speedup"]["wall"]["transformers_40"] == pytest.approx(2)
    assert "not compiled" in found["notes"]["transformers"]


def test_a_rival_that_fails_is_named_and_costs_no_row(row):
    found, error = row(ours=(0.1, 0.05), theirs=(0.2, 0.1, True))
    assert "cannot compile" in error
    assert set(found["answers"]) == {"ours", "ours_20", "ours_dense"}
    assert set(found["failed"]) == {"transformers_40", "transformers_20", "transformers_dense"}


def test_a_row_is_made_of_real_answers(monkeypatch, benchmark_):
    """Nothing replaced but the number of rounds, tokens and the ceilings."""
    monkeypatch.setattr(bench_generate, "ROUNDS", {"cpu": 1})
    bench_generate.compare_answers(benchmark_, shape_of("llama"), torch.float32, CPU)
    assert len(benchmark_.extra_info["answers"]) == 6
    for found in benchmark_.extra_info["answers"].values():
        assert found["token_ms"] > 0 and found["first_token_ms"] > 0
        total_ms = found["first_token_ms"] + (NEW - 1) * found["token_ms"]
        assert found["tokens_per_s"] == pytest.approx(2 * NEW * 1e3 / total_ms, rel=1e-3)


def test_a_wrong_answer_of_ours_is_not_timed(monkeypatch, benchmark_):
    def wrong(model, prompts, new_tokens):
        answer = answers.ours(model, prompts, new_tokens)()
        return lambda: Answer([[t + 1 for t in row] for row in answer.tokens], answer.stamps_s)

    monkeypatch.setattr(bench_generate, "ours", wrong)
    with pytest.raises(AssertionError, match="row 0 has token"):
        bench_generate.compare_answers(benchmark_, shape_of("llama"), torch.float32, CPU)
    assert benchmark_.extra_info == {}
