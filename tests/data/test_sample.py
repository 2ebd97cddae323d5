"""Text that a model writes by itself."""

import importlib
import json
import signal

import pytest
import torch

import lillama
from lillama.compress import pipeline
from lillama.compress.session import own_text
from lillama.data.sample import _split, sampled_with
from lillama.errors import InputError, RunError
from lillama.integrations.loading import load_model, load_tokenizer

OPTIONS = {"tokens": 900, "seq_len": 24, "batch_size": 4, "device": "cpu"}


def rows(file) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_sample_writes_rows_that_calibrate(kind, request, tmp_path):
    model, file = request.getfixturevalue(kind), tmp_path / "own.jsonl"
    calls = []
    report = lillama.sample(model, file, progress=lambda *call: calls.append(call), **OPTIONS)
    texts = rows(file)
    tokenizer = load_tokenizer(model)
    counted = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    assert report == {"rows": len(texts), "tokens": counted, "bytes": file.stat().st_size}
    assert counted >= 900 and all(texts) and len(set(texts)) > 1
    assert calls[-1] == ("sample", 900, 900)
    assert sampled_with(file) == {
        "model": str(model), "tokens": 900, "seq_len": 24, "temperature": 1.0, "batch_size": 4,
        "seed": 0,
    }  # fmt: skip
    again, other = tmp_path / "again.jsonl", tmp_path / "other.jsonl"
    lillama.sample(model, again, **OPTIONS)
    lillama.sample(model, other, **OPTIONS, seed=1)
    assert rows(again) == texts != rows(other)


def test_no_batch_repeats_another(mamba, tmp_path):
    out = tmp_path / "text.jsonl"
    options = {"tokens": 600, "seq_len": 33, "batch_size": 2, "device": "cpu"}
    lillama.sample(mamba, out, **options)
    texts = [json.loads(line)["text"] for line in out.read_text("utf-8").splitlines()]
    starts = [text[:12] for text in texts if len(text) > 12]
    assert len(starts) > 8 and len(set(starts)) == len(starts)
    again = tmp_path / "again.jsonl"
    lillama.sample(mamba, again, **options)
    assert [json.loads(line)["text"] for line in again.read_text("utf-8").splitlines()] == texts
    other = tmp_path / "other.jsonl"
    lillama.sample(mamba, other, seed=1, **options)
    assert json.loads(other.read_text("utf-8").splitlines()[1])["text"] not in texts


def test_cold_text_is_what_the_model_holds_likeliest(mamba, tmp_path):
    """At a temperature near 0 every sequence is the greedy one."""
    file = tmp_path / "own.jsonl"
    lillama.sample(mamba, file, **{**OPTIONS, "tokens": 40}, temperature=1e-4)
    model, tokenizer = load_model(mamba, torch.device("cpu")), load_tokenizer(mamba)
    start = tokenizer.bos_token_id
    ids = torch.tensor([[tokenizer.eos_token_id if start is None else start]])
    for _ in range(23):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    first = next(_split(ids[0, 1:].tolist(), tokenizer.eos_token_id))
    expected = tokenizer.decode(first, skip_special_tokens=True).rstrip("\ufffd")
    assert rows(file)[0] == expected


def test_split_leaves_the_ends_out():
    assert list(_split([5, 6, 2, 2, 7], 2)) == [[5, 6], [7]]
    assert list(_split([2], 2)) == [] and list(_split([1, 2], None)) == [[1, 2]]


def test_sample_refuses_in_one_line(mamba, tmp_path, monkeypatch):
    there = tmp_path / "there.jsonl"
    there.write_text("x")
    for file, more, message in (
        (there, {}, "exists; choose another file"),
        (tmp_path / "no" / "own.jsonl", {}, "create it first"),
        (tmp_path / "own.jsonl", {"temperature": 0.0}, "--temperature must be a finite number > 0"),
        (tmp_path / "own.jsonl", {"seq_len": 1}, "--seq-len must be at least 2"),
    ):
        with pytest.raises(InputError, match=message):
            lillama.sample(mamba, file, **{**OPTIONS, **more})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(importlib.import_module("lillama.data.sample"), "_texts", full)
    with pytest.raises(RunError, match="the disk is full while writing .*own.jsonl"):
        lillama.sample(mamba, tmp_path / "own.jsonl", **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["there.jsonl"]


def test_a_model_without_a_word_is_refused(mamba, tmp_path, monkeypatch):
    module = importlib.import_module("lillama.data.sample")
    monkeypatch.setattr(module, "_split", lambda ids, end: iter(()))
    with pytest.raises(RunError, match="wrote 4 sequences without any text; give calibration text"):
        lillama.sample(mamba, tmp_path / "own.jsonl", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_the_text_is_written_leaves_nothing(mamba, tmp_path):
    def progress(stage: str, done: int, total: int) -> None:
        assert stage == "sample", "the sampling went on"
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(RunError, match="interrupted"):
        lillama.compress(
            mamba, tmp_path / "out", reduction=0.2, tokens=600, seq_len=32, device="cpu",
            progress=progress,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_compress_without_text_lets_the_model_write_it(mamba, tmp_path, monkeypatch):
    given = {"reduction": 0.2, "preset": "fast", "tokens": 600, "seq_len": 32, "device": "cpu"}
    out = tmp_path / "out"

    def killed(*_):
        raise RunError("the run was stopped")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_compress", killed)
        with pytest.raises(RunError, match="was stopped"):
            lillama.compress(mamba, out, **given)
    file = tmp_path / "out.sample.jsonl"
    text = file.read_text("utf-8")
    with pytest.raises(InputError, match=r"out\.sample\.jsonl is not of this command"):
        lillama.compress(mamba, out, **given, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(own_text, "sample", lambda *_, **__: pytest.fail("again"))
        report = lillama.compress(mamba, out, **given)
    assert report["tokens"] >= 600 and not file.exists()
    recipe = json.loads((out / "recipe.json").read_text("utf-8"))
    assert recipe["options"]["text"] == []
    # a file of that name that the caller gave is the caller's
    mine = tmp_path / "same.sample.jsonl"
    mine.write_text(text, "utf-8")
    lillama.compress(mamba, tmp_path / "same", **given, text=mine)
    assert mine.read_text("utf-8") == text
    same = json.loads((tmp_path / "same" / "recipe.json").read_text("utf-8"))
    assert same["data_sha256"] == recipe["data_sha256"]
