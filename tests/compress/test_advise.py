"""The advice: forecasts of what a run would do, and a command that is good to run."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import lillama
from lillama.compress import advise as module
from lillama.config_advice import AdviceConfig
from lillama.errors import InputError

FEW = {"tokens": 512, "seq_len": 32}
TEACHER = Path(__file__).parents[2] / "examples" / "teachers" / "mamba"


@pytest.fixture(scope="module")
def with_text(mixtral, text_file) -> dict[str, Any]:
    return lillama.advise(mixtral, text=text_file, retain=0.9, **FEW)


@pytest.fixture(scope="module")
def without_text(mixtral) -> dict[str, Any]:
    return lillama.advise(mixtral, **FEW)


def rows_of(document: dict[str, Any]) -> dict[float, dict[str, Any]]:
    return {row["reduction"]: row for row in document["forecast"]}


def test_advise_is_json_and_covers_three_reductions(with_text):
    assert json.loads(json.dumps(with_text)) == with_text
    chosen = with_text["recommendation"]["reduction"]
    assert set(rows_of(with_text)) == {0.2, 0.4, 0.6, chosen}


def test_advise_takes_the_largest_step_that_keeps(mixtral, text_file, with_text):
    def kept(document: dict[str, Any], reduction: float) -> float:
        presets = rows_of(document)[reduction]["presets"].values()
        return max(row["retained_worst"] for row in presets)

    retain = (kept(with_text, 0.2) + kept(with_text, 0.4)) / 2
    options = {"text": text_file, "retain": retain, **FEW}
    found = lillama.advise(mixtral, **options)
    chosen = found["recommendation"]["reduction"]
    assert "the largest step" in found["recommendation"]["why"]
    assert 0.2 <= chosen < 0.4 and kept(found, chosen) >= retain
    above = round(chosen + 0.05, 2)
    found = lillama.advise(mixtral, reduction=above, **options)
    assert "nothing is sure" in found["recommendation"]["why"]
    assert kept(found, above) < retain


def test_advise_predicts_more_loss_for_more_reduction(with_text):
    rows = [row for row in with_text["forecast"] if row["reachable"]]
    assert len(rows) >= 2
    for preset in ("fast", "default"):
        found = [row["presets"][preset] for row in rows]
        assert [f["excess"] for f in found] == sorted(f["excess"] for f in found)
        assert all(f["excess_low"] < f["excess"] < f["excess_high"] for f in found)
        assert found[0]["excess"] < found[-1]["excess"]
    bounds = [row["decoding"]["speed_up_bound"] for row in rows]
    assert 1 < bounds[0] < bounds[-1]


def test_advise_expects_what_a_run_expects(mixtral, text_file, with_text, tmp_path):
    """Of another sample of the same text: the run holds some of it back."""
    report = lillama.compress(
        mixtral, tmp_path / "out", reduction=0.2, text=text_file, preset="fast", device="cpu", **FEW
    )
    found = rows_of(with_text)[0.2]["presets"]
    for preset in ("fast", "default"):
        expected = found[preset]["predicted_loss_increase"]
        assert expected == pytest.approx(report["predicted_loss_increase"], rel=0.25)
    assert rows_of(with_text)[0.2]["params_after"] == pytest.approx(
        report["params_after"], rel=0.01
    )


def test_advise_without_text_predicts_no_quality(without_text):
    for row in without_text["forecast"]:
        for found in row.get("presets", {}).values():
            assert "excess" not in found and "retained" not in found
            assert found["seconds"] > 0 and found["peak_memory_bytes"] > 0
    advice = without_text["recommendation"]
    assert "--text FILE" in advice["command"] and "no quality is predicted" in advice["why"]
    assert advice["reduction"] == 0.2


def test_advise_says_what_is_out_of_reach(mamba):
    document = lillama.advise(mamba, **FEW)
    assert document["max_reduction"] < 0.4
    assert rows_of(document)[0.6] == {"reduction": 0.6, "reachable": False}
    with pytest.raises(InputError, match=re.escape("--reduction 0.6 cannot be reached")):
        lillama.advise(mamba, reduction=0.6, **FEW)


def test_advise_flags_random_weights_and_trained_ones_not(without_text, monkeypatch):
    # conftest's matrices are random, all of them
    assert all(row["near_random"] for row in without_text["spectra"])
    names = {row["name"] for row in without_text["not_worth_factoring"]}
    assert names == {row["name"] for row in without_text["spectra"]}
    assert "random spectrum" in without_text["warnings"][0]
    monkeypatch.setattr(module, "sample_matrices", lambda matrices: matrices[-4:])
    trained = lillama.advise(TEACHER, **FEW)
    assert not all(row["near_random"] for row in trained["spectra"])


def test_advise_flags_what_no_rank_saves(make_checkpoint):
    """Matrices of 8 by 16 have no rank of 8 that saves anything."""
    path = make_checkpoint("mixtral", intermediate_size=8)
    document = lillama.advise(path, reduction=0.01, targets=("w1", "lm_head"), **FEW)
    useless = {r["name"] for r in document["not_worth_factoring"] if r["why"] == "no rank saves"}
    assert len(useless) == 8 and all(name.endswith(".w1") for name in useless)


# what is recommended
LOSSES = {0.05: 0.01, 0.1: 0.02, 0.15: 0.03, 0.2: 0.05, 0.25: 0.1, 0.3: 0.2}


@pytest.fixture
def choose(mamba, monkeypatch):
    """choose(hours={preset: h}, **options) -> row, preset, why: with known losses of fast, and
    half as much of default."""

    def run(hours: dict[str, float] | None = None, **options: Any) -> tuple[dict, str, str]:
        config = AdviceConfig(model=mamba, **FEW, **options)
        hours = hours or {"fast": 0.1, "default": 1.0}

        def row(found: Any, reduction: float) -> dict:
            lost = LOSSES[reduction]
            kept = {"fast": 1 - lost, "default": 1 - lost / 2}
            return {
                "reduction": reduction,
                "presets": {
                    p: {"retained_worst": kept[p], "seconds": 3600 * hours[p]} for p in kept
                },
            }

        monkeypatch.setattr(module, "_row", row)
        monkeypatch.setattr(module, "_may_keep", lambda found, step: step <= 0.25)
        monkeypatch.setattr(module._Found, "reachable", lambda self, step: step in LOSSES)
        found = module._Found(config, *[None] * 5, losses={}, tokens=None)  # type: ignore[arg-type]
        return module._choose(found)

    return run


@pytest.mark.parametrize(
    ("options", "reduction", "preset", "why"),
    [
        # the largest step that either keeps, by the cheapest that keeps it
        ({"retain": 0.95}, 0.25, "default", "the largest step"),
        ({"retain": 0.99}, 0.1, "default", "the largest step"),
        ({"retain": 0.8}, 0.25, "fast", "the largest step"),
        ({"retain": 0.999}, 0.05, "default", "nothing is sure"),
        # what was asked for
        ({"retain": 0.95, "reduction": 0.15}, 0.15, "fast", "fast is expected to keep 95%"),
        ({"retain": 0.98, "reduction": 0.15}, 0.15, "default", "default is expected to keep"),
        ({"retain": 0.95, "reduction": 0.3}, 0.3, "default", "nothing is sure"),
        ({"retain": 0.95, "preset": "fast"}, 0.2, "fast", "the largest step"),
        ({"retain": 0.95, "reduction": 0.05, "preset": "default"}, 0.05, "default", "default is"),
    ],
)
def test_advise_chooses(options, reduction, preset, why, choose):
    row, chosen, said = choose(**options)
    assert (row["reduction"], chosen) == (reduction, preset)
    assert why in said


def test_advise_does_not_propose_days_of_training(choose):
    hours = {"fast": 30.0, "default": 300.0}
    assert choose(hours, retain=0.95)[:2] == (choose(hours, retain=0.95, preset="fast")[0], "fast")
    assert choose(hours, retain=0.95, preset="default")[1] == "default"
    assert choose(hours, retain=0.95, max_hours=400.0)[1] == "default"


def test_advised_command_carries_the_options(mixtral):
    document = lillama.advise(
        mixtral, reduction=0.1, preset="fast", gauge="plain", targets=("w1", "w2"), device="cpu",
        activation_memory=2**20, **FEW,
    )  # fmt: skip
    words = shlex.split(document["recommendation"]["command"])
    assert words[:6] == [
        "lillama", "compress", str(mixtral), "mixtral-90percent", "--reduction", "0.1"
    ]  # fmt: skip
    pairs = dict(zip(words[6::2], words[7::2], strict=True))
    assert pairs == {
        "--text": "FILE", "--preset": "fast", "--targets": "w1,w2", "--gauge": "plain",
        "--tokens": "512", "--seq-len": "32", "--activation-memory": str(2**20), "--device": "cpu",
    }  # fmt: skip


def test_advise_takes_no_more_tokens_than_the_text_has(mixtral, text_file, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text(text_file.read_text("utf-8")[:6000], "utf-8")
    document = lillama.advise(mixtral, text=short, reduction=0.2, preset="fast", seq_len=32)
    words = shlex.split(document["recommendation"]["command"])
    tokens = int(words[words.index("--tokens") + 1])
    assert any(f"room for {tokens:,} calibration tokens" in line for line in document["warnings"])
    options = {"reduction": 0.2, "text": short, "preset": "fast", "seq_len": 32, "device": "cpu"}
    report = lillama.compress(mixtral, tmp_path / "out", tokens=tokens, **options)
    assert report["tokens"] >= tokens
    with pytest.raises(InputError, match="the text is too short"):
        lillama.compress(mixtral, tmp_path / "more", tokens=tokens + 400, **options)
    short.write_text("the cat sat on a mat", "utf-8")
    with pytest.raises(InputError, match="the text is too short: .* at least one more"):
        lillama.advise(mixtral, text=short, seq_len=32)


def test_advise_writes_nothing(mamba, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen = []
    lillama.advise(mamba, text=text_file, reduction=0.2, progress=lambda *a: seen.append(a), **FEW)
    assert list(tmp_path.iterdir()) == []
    assert seen[-1][1] == seen[-1][2] and "sensitivity" in seen[-1][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retain": 1.0}, "--retain must lie between 0 and 1"),
        ({"retain": float("nan")}, "--retain must lie between 0 and 1"),
        ({"preset": "paper"}, "--preset with --advise must be one of fast, default, got 'paper'"),
        ({"reduction": 1.5}, "--reduction must lie between 0 and 1"),
        ({"device": "tpu"}, "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ({"max_hours": 0.0}, "max_hours must be a finite number > 0"),
        ({"seq_len": 1}, "--seq-len must be at least 2"),
        ({"text": "nowhere.txt"}, "nowhere.txt"),
        ({"seq_len": 513, "tokens": None}, "--seq-len must be at most 512 for this model"),
    ],
)
def test_advise_refuses(options, message, mixtral, text_file):
    arguments = {"text": text_file, **FEW, **options}
    with pytest.raises(InputError) as caught:
        lillama.advise(mixtral, **arguments)
    assert message in str(caught.value)


def test_advise_needs_weights(mixtral, tmp_path):
    (tmp_path / "config.json").write_bytes((mixtral / "config.json").read_bytes())
    with pytest.raises(InputError, match="no weights|safetensors"):
        lillama.advise(tmp_path, **FEW)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_advise_on_a_gpu(mixtral, text_file):
    document = lillama.advise(mixtral, text=text_file, device="cuda", **FEW)
    assert document["device"]["dtype"] == "bfloat16"
