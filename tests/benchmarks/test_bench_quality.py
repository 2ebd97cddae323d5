"""The baseline of whole compressions, and the table of recipes: run once, tiny."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import bench_quality, compress_blocks
from benchmarks.published import PublishedExperts, published_loop
from lillama.compress.plan.plan import make_plan
from lillama.config import PlanConfig
from lillama.evaluate.evaluate import stored_size
from lillama.integrations.loading import load_tokenizer

IDS = torch.randint(1, 300, (24, 32), generator=torch.Generator().manual_seed(1))


def block_error(model, teacher) -> float:
    with torch.no_grad():
        return float((model(IDS).logits - teacher(IDS).logits).abs().mean())


def test_published_loop_trains_the_ranks_of_the_paper(make_checkpoint):
    path = make_checkpoint("mixtral", num_hidden_layers=3)
    plan = make_plan(PlanConfig(model=path, reduction=0.2, preset="paper"))
    teacher = AutoModelForCausalLM.from_pretrained(path)
    ids = IDS.repeat(8, 1)
    untouched, _ = published_loop(path, ids, reduction=0.2, learning_rate=0.0)
    model, seconds = published_loop(path, ids, reduction=0.2, learning_rate=3e-3)
    assert seconds > 0 and sum(p.numel() for p in model.parameters()) == plan.params_after
    replaced = [isinstance(layer.mlp.experts, PublishedExperts) for layer in model.model.layers]
    assert replaced[: plan.blocks[-1] + 1] == [True] * (plan.blocks[-1] + 1)
    assert block_error(model, teacher) < 0.9 * block_error(untouched, teacher)


@pytest.fixture
def arguments(mamba, text_file, tmp_path):
    return [
        "--teacher", mamba, "--text", text_file, "--held-out", text_file, "--tokens", 600,
        "--seq-len", 32, "--reductions", 0.2, "--seeds", 0, 1, "--out", tmp_path / "cells.jsonl",
    ]  # fmt: skip


def run(arguments: list, *more: object) -> int:
    return bench_quality.main([str(argument) for argument in (*arguments, *more)])


def test_quality_fills_a_table_once(arguments, mamba, text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_quality, "BLOCKS", 8)
    assert run(arguments, "--methods", "svd", "fast") == 0
    first = capsys.readouterr().out
    cells = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert [(c["method"], c["seed"]) for c in cells] == [
        ("svd", 0), ("fast", 0), ("svd", 1), ("fast", 1)
    ]  # fmt: skip
    assert all(cell["texts"]["text.txt"]["kl"] > 0 for cell in cells)
    # of one text the same loss in both units: nats a token over the teacher's, bits a byte
    first_cell, second_cell = (cell["texts"]["text.txt"] for cell in cells[:2])
    nats = first_cell["excess"] - second_cell["excess"]
    bits = first_cell["bits_per_byte"] - second_cell["bits_per_byte"]
    ids = load_tokenizer(mamba)(text_file.read_text("utf-8"))["input_ids"]
    per_token = len(text_file.read_bytes()) / len(ids)
    assert bits == pytest.approx(nats / math.log(2) / per_token, abs=3e-5) and bits != 0
    assert first.count("\n| mamba | 20% |") == 2 and "| 2 |" in first
    # all there: nothing runs, the same table
    monkeypatch.setattr(bench_quality, "run_cell", lambda *_: pytest.fail("ran again"))
    assert run(arguments, "--methods", "svd", "fast") == 0
    assert capsys.readouterr().out == first
    with pytest.raises(SystemExit):
        run([*arguments, "--tokens", 700], "--table")
    assert "other tokens or texts" in capsys.readouterr().err


def test_rounding_takes_the_model_that_is_kept(arguments, mamba, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_quality, "BLOCKS", 8)
    monkeypatch.setitem(bench_quality.METHODS, "default", bench_quality.FAST)
    more = ["--models", tmp_path / "models", "--seeds", 0]
    assert run(arguments, "--methods", "default", *more) == 0
    monkeypatch.setattr(bench_quality.lillama, "compress", lambda *_, **__: pytest.fail("again"))
    assert run(arguments, "--methods", "default, int8", "default, int4", *more) == 0
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    whole, int8, int4 = (json.loads(line) for line in lines)
    assert whole["params_after"] == int8["params_after"] == int4["params_after"]
    assert whole["bytes_after"] > 1.5 * int8["bytes_after"] > 2 * int4["bytes_after"]
    error = [cell["texts"]["text.txt"]["kl"] for cell in (whole, int8, int4)]
    assert error[0] < error[2] and error[1] < error[2]
    before = len((tmp_path / "cells.jsonl").read_text().splitlines())
    assert run(arguments, "--methods", "dense", *more, "--reductions", 0.2, 0.4) == 0
    *lines, last = (tmp_path / "cells.jsonl").read_text().splitlines()
    dense = json.loads(last)
    assert len(lines) == before and dense["reduction"] == 0, "once, whatever the reductions"
    assert (dense["params_after"], dense["bytes_after"]) == stored_size(mamba)
    assert dense["texts"]["text.txt"]["excess"] == dense["texts"]["text.txt"]["kl"] == 0
    other = ["--tokens", 700, "--out", tmp_path / "other.jsonl"]
    with pytest.raises(pytest.fail.Exception, match="again"):  # not the model of 600 tokens
        run(arguments, "--methods", "default, int8", *more, *other)


def test_blocks_of_a_large_model_are_timed(tmp_path, capsys):
    out = tmp_path / "folder" / "blocks.json"
    assert compress_blocks.main(["mixtral-mini", "--tokens", "5000", "--json", str(out)]) == 0
    row = json.loads(out.read_text())["rows"][0]
    assert len(row["block_seconds"]) == 2 and min(row["block_seconds"]) > 0
    assert 0 < row["percent_of_ceiling"] < 100 and row["tokens"] >= 5000
    assert row["implied_seconds_for_all_blocks"] == pytest.approx(
        4 * row["block_seconds"][1], abs=0.1
    )
