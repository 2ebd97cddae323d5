"""What `lillama report` shows of each kind of `lillama eval --json`, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="needs lillama[report]")

from lillama.errors import InputError  # noqa: E402
from tests.report.html_page import Page  # noqa: E402

WORDS = {
    "metric": "words",
    **{"word_perplexity": 31.25, "byte_perplexity": 1.75, "bits_per_byte": 0.8125},
    **{"token_perplexity": 9.5, "tokens": 4321, "words": 1234},
}
AGAINST = {
    **{"base_word_perplexity": 28.5, "base_byte_perplexity": 1.5, "base_bits_per_byte": 0.6875},
    **{"base_token_perplexity": 8.5, "retained": 0.895, "kl": 0.046875, "top1_agreement": 0.765625},
    **{"base_params": 7, "base_bytes": 28},
}
TASKS = {
    "lm_eval": "0.4.13",
    "tasks": {
        "cats": {
            **{"alias": "cats", "acc": 0.4375, "acc_stderr": 0.03125, "version": 1.5, "rows": 20},
            **{"base_acc": 0.5625, "base_acc_stderr": None, "acc_recovery_percent": 77.75},
        }
    },
}
WRITTEN = {
    "generations": {
        **{"count": 32, "greedy": {"empty": 0.0, "loop": 0.34375}, "warning": "<b>it loops"},
        **{"base_greedy": {"empty": 0.0, "loop": 0.15625}},
    },
    "speed": {
        **{"device": "cpu", "decode_tokens_per_s": 612.5, "base_decode_tokens_per_s": 487.5},
        "peak_memory_bytes": None,
    },
}


def page(run, folder: Path, *parts: dict[str, Any], **changes: Any) -> Page:
    """The report with an eval.json of these parts."""
    whole: dict[str, Any] = {"params": run.report["params_after"], "bytes": 5}
    for part in (*parts, changes):
        whole |= part
    file = folder / "eval.json"
    file.write_text(json.dumps(whole), "utf-8")
    return Page(run.write(eval=file))


def test_report_shows_words_tasks_generations_and_speed(plain, tmp_path):
    found = page(plain, tmp_path, WORDS, AGAINST, TASKS, WRITTEN)
    rows = found.tables["Quality on the text that eval was given"]
    assert ["word perplexity", "31.25", "28.5"] in rows
    assert ["token perplexity", "9.5", "8.5"] in rows
    assert ["share of tokens with the same first choice", "0.765625", "1"] in rows
    tasks = found.tables["Tasks of lm-evaluation-harness"]
    assert tasks[1:] == [["cats, acc", "0.4375", "0.03125", "0.5625", "-", "77.75"]]
    wrote = found.tables["What both wrote"]
    assert ["greedy loop", "0.34375", "0.15625"] in wrote and ["count", "32", "-"] in wrote
    speed = found.tables["Speed and memory of transformers' generate"]
    assert ["decode tokens per s", "612.5", "487.5"] in speed
    assert ["peak memory bytes", "-", "-"] in speed
    said = " ".join(found.texts["p"])
    assert "4,321 tokens were predicted, by the definition words." in said
    assert "Warning: <b>it loops." in said and not found.all("b"), "shown, and as text"


def test_report_shows_tasks_alone_and_a_text_without_a_base(plain, tmp_path):
    found = page(plain, tmp_path, TASKS)
    assert "Tasks of lm-evaluation-harness" in found.tables
    assert "Quality on the text that eval was given" not in found.tables
    tokens = {"metric": "blocks", "perplexity": 12.5, "bits_per_byte": 1.25, "tokens": 99}
    alone = page(plain, tmp_path, tokens)
    rows = alone.tables["Quality on the text that eval was given"]
    assert ["perplexity", "12.5", "-"] in rows
    assert "Tasks of lm-evaluation-harness" not in alone.tables
    assert "run eval with --against MODEL" in " ".join(alone.texts["p"])


@pytest.mark.parametrize(
    ("parts", "changes", "message"),
    [
        ((), {}, "has neither a perplexity nor tasks"),
        ((WORDS,), {"tokens": "many"}, "tokens must be a finite number, got 'many'"),
        ((WORDS,), {"retained": float("inf")}, "retained must be a finite number, got inf"),
        ((WORDS,), {"params": 7}, "is about another model: it has 7 parameters"),
        ((), {"tasks": [1]}, "tasks must be an object"),
        ((), {"tasks": {"cats": 3}}, r"tasks.cats must be an object, got 3"),
        ((TASKS,), {"speed": {"rounds": [5]}}, r"speed.rounds must be a finite number, got \[5\]"),
        ((TASKS,), {"generations": {"x": float("nan")}}, "x must be a finite number, got nan"),
    ],
)
def test_report_refuses_a_damaged_quality(parts, changes, message, plain, tmp_path):
    with pytest.raises(InputError, match=message):
        page(plain, tmp_path, *parts, **changes)
