"""--events: what a dashboard would read while the run goes on."""

import json
import time
from pathlib import Path

import pytest

import lillama
from lillama.errors import InputError, RunError


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_events_tell_every_judgement_block_and_the_end(mamba, text_file, tmp_path, device):
    path, started = tmp_path / "events.jsonl", time.time()
    path.write_text('{"event": "older"}\n')
    report = lillama.compress(
        mamba, tmp_path / "out", reduction=0.2, text=text_file, tokens=900, seq_len=32,
        device=str(device), events=path,
    )  # fmt: skip
    older, *found = lines(path)
    assert older == {"event": "older"}, "appended to"
    assert all(started - 1 <= line.pop("time") <= time.time() + 1 for line in found)
    kinds = [line["event"] for line in found]
    # 29 rows are 4 steps, each judged, and the start
    assert kinds == [*(["judged"] * 5 + ["block"]) * 2, "finished"]
    for index, row in enumerate(report["blocks"]):
        judged = [line for line in found if line["event"] == "judged" and line["block"] == index]
        assert [line["step"] for line in judged] == [0, 1, 2, 3, 4]
        losses = [line["held_out_loss"] for line in judged]
        assert losses[0] == row["held_out_loss_before"]
        assert min(losses) == row["held_out_loss_after"] == losses[row["best_step"]]
        assert {"event": "block", **row} in found
        assert row["peak_memory_bytes"] > 0
    assert found[-1]["params_after"] == report["params_after"] and "blocks" not in found[-1]


def test_events_tell_a_failure(mamba, text_file, tmp_path, device):
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "block 1 train":
            raise RunError("the GPU fell off the bus")

    with pytest.raises(RunError) as caught:
        lillama.compress(
            mamba, tmp_path / "out", reduction=0.2, text=text_file, tokens=400, seq_len=32,
            device=str(device), events=tmp_path / "events.jsonl", progress=progress,
        )  # fmt: skip
    last = lines(tmp_path / "events.jsonl")[-1]
    assert last["event"] == "failed" and last["error"] == "the GPU fell off the bus"
    assert str(caught.value).startswith("the GPU fell off the bus; 1 of 4 shards are finished")


def test_events_that_cannot_be_written_are_refused_at_once(mamba, text_file, tmp_path):
    path = tmp_path / "missing" / "events.jsonl"
    with pytest.raises(InputError, match=r"--events .*missing/events.jsonl cannot be written"):
        lillama.compress(mamba, tmp_path / "out", reduction=0.2, text=text_file, events=path)
    assert list(tmp_path.iterdir()) == []
