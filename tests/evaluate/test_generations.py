"""eval --generations and --speed: the figures, and the warning."""

import logging
import sys

import pytest
import torch

import lillama
from lillama.errors import InputError
from lillama.evaluate import speed
from lillama.evaluate.generations import check_generations, distinct_ngrams, longest_loop


@pytest.mark.parametrize(
    ("ids", "loop", "distinct"),
    [
        (range(12), 0, 1),
        ([7] * 10, 1, 1 / 8),
        ([*range(6), *[1, 2] * 3], 0.5, 0.8),
        # twice is no loop, the third may be cut only when a whole one went before
        ([1, 2, 3, 4, 1, 2, 3, 4, 9, 8], 0, 0.75),
        ([1, 2, 1, 2, 1, 2, 1, 9], 7 / 8, 3 / 6),
        ([5, 5], 0, 1),
        ([], 0, 1),
    ],
)
def test_repetition_of_known_sequences(ids, loop, distinct):
    assert longest_loop(list(ids)) == pytest.approx(loop)
    assert distinct_ngrams(list(ids), 3) == pytest.approx(distinct)


def always(model, token: int):
    """The model with a head that gives this token whatever came before."""
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias[token] = 50.0
    return model


@pytest.fixture(scope="module")
def token_ids() -> torch.Tensor:
    return torch.randint(1, 300, (1000,), generator=torch.Generator().manual_seed(3))


def test_generations_tell_a_writer_from_a_loop_and_from_silence(
    make_model, tokenizer, token_ids, caplog
):
    base = make_model("mixtral")
    report, said = {}, {}
    for name, token in (("loop", 40), ("silent", tokenizer.eos_token_id)):
        model = always(make_model("mixtral"), token)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            report[name] = check_generations(
                model, base, tokenizer, token_ids, count=4, retained=0.95
            )
        said[name] = [r.message for r in caplog.records if r.name.startswith("lillama")]
    for kind in ("greedy", "sampled"):
        assert report["loop"][kind] == {"empty": 0, "distinct_3": 1 / 62, "loop": 1}
        assert report["silent"][kind] == {"empty": 1, "distinct_3": 1, "loop": 0}
        assert report["loop"][f"base_{kind}"] == report["silent"][f"base_{kind}"]
    assert report["loop"]["base_sampled"]["loop"] < 0.2
    assert report["loop"]["text"]["distinct_3"] > 0.99 and report["loop"]["text"]["loop"] == 0
    for name, words in (("loop", "sampled loop 1.00"), ("silent", "sampled empty 1.00")):
        (line,) = said[name]
        assert line == report[name]["warning"] and "\n" not in line
        assert "perplexity looks fine (95.0% retained)" in line and words in line


def test_generations_without_a_difference_or_with_bad_perplexity_do_not_warn(
    make_model, tokenizer, token_ids
):
    base = make_model("mixtral")
    same = check_generations(base, base, tokenizer, token_ids, count=3, retained=1.0)
    assert same["warning"] is None and same["greedy"] == same["base_greedy"]
    bad = always(make_model("mixtral"), 40)
    known = check_generations(bad, base, tokenizer, token_ids, count=3, retained=0.5)
    assert known["warning"] is None and known["greedy"]["loop"] == 1
    alone = check_generations(bad, None, tokenizer, token_ids, count=1, retained=None)
    assert "warning" not in alone and "base_greedy" not in alone


def test_generations_leave_the_random_numbers_alone(make_model, tokenizer, token_ids):
    model = make_model("mixtral")
    torch.manual_seed(5)
    first = check_generations(model, None, tokenizer, token_ids, count=2, retained=None)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    again = check_generations(model, None, tokenizer, token_ids, count=2, retained=None)
    assert again == first


def test_eval_generations_and_speed_of_both_models(mamba, text_file):
    calls = []
    report = lillama.eval(
        mamba,
        text_file,
        against=mamba,
        seq_len=512,
        generations=2,
        speed=True,
        progress=lambda *call: calls.append(call),
    )
    assert report["generations"]["count"] == 2 and report["generations"]["warning"] is None
    assert {stage for stage, _, _ in calls} == {"eval", "generations", "speed"}
    speed = report["speed"]
    assert (speed["device"], speed["dtype"], speed["prompt_tokens"]) == ("cpu", "float32", 512)
    for prefix in ("", "base_"):
        for phase in ("prefill", "decode"):
            low, mid, high = (
                speed[f"{prefix}{phase}_tokens_per_s{end}"] for end in ("_min", "", "_max")
            )
            assert 0 < low <= mid <= high
        # fp32, and tied embeddings once
        assert speed[f"{prefix}weights_bytes"] == report["params"] * 4
        if sys.platform.startswith("linux"):
            assert speed[f"{prefix}peak_memory_bytes"] >= speed[f"{prefix}weights_bytes"]


def test_speed_of_two_models_takes_turns_and_counts_tokens(make_model, token_ids, monkeypatch):
    model, base = make_model("mixtral"), make_model("mixtral")
    seen = []

    def answer(one, prompt, new_tokens):
        seen.append((one is base, new_tokens))
        # a second for the prompt, a tenth for each further token; the base takes twice as long
        return (1.0 + 0.1 * (new_tokens - 1)) * (2 if one is base else 1)

    monkeypatch.setattr(speed, "_answer", answer)
    report = speed.measure_speed(model, base, token_ids)
    # 512 positions, less what is written
    assert report["prompt_tokens"] == 512 - 33
    assert report["prefill_tokens_per_s"] == pytest.approx(479)
    assert report["base_prefill_tokens_per_s"] == pytest.approx(479 / 2)
    assert report["decode_tokens_per_s"] == pytest.approx(10)
    assert report["base_decode_tokens_per_s"] == pytest.approx(5)
    assert seen[-20:] == [(False, 1), (False, 33), (True, 1), (True, 33)] * 5


def test_generations_refuse_too_little_text_and_too_few_positions(make_model, tokenizer, token_ids):
    with pytest.raises(InputError, match="--generations 11 needs 1056 tokens .* lower it to 10"):
        check_generations(
            make_model("mixtral"), None, tokenizer, token_ids, count=11, retained=None
        )
    short = make_model("mixtral", max_position_embeddings=64)
    with pytest.raises(InputError, match="needs 96 positions, the model has 64"):
        check_generations(short, None, tokenizer, token_ids, count=1, retained=None)
