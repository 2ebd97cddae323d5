"""CheckpointWriter taking up an unfinished run: what it trusts, and what it refuses."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lillama.checkpoint.headers import read_headers
from lillama.checkpoint.shard_file import entries_of
from lillama.checkpoint.writer import CheckpointWriter
from lillama.errors import InputError

RECIPE = {"command": "compress", "options": {"seed": 0}}
CONFIG = {"model_type": "mixtral", "quantization_config": {"quant_method": "lillama"}}
REPORT = {"params_before": 10, "params_after": 8}
SHARDS = [
    {"a": torch.arange(6.0)},
    {"b": torch.ones(4, dtype=torch.bfloat16)},
    {"c": torch.ones(1)},
]
PIECES = ["block-0", "block-1", "rest", "mark"]


def write(out: Path, recipe: dict = RECIPE, *, overwrite: bool = False, fill: float = 0.0) -> None:
    """One complete run that takes up what is there; `fill` marks whose weights they are."""
    with CheckpointWriter(out, recipe, PIECES, overwrite=overwrite) as writer:
        shards = [*SHARDS, {"mark": torch.full((2,), fill)}]
        for piece, shard in zip(PIECES, shards, strict=True):
            if writer.done(piece) is None:
                writer.add_shard(piece, entries_of(shard))
        writer.finish(CONFIG, report=REPORT, model_card="# card\n")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"folder"
        for path in sorted(folder.rglob("*"))
    }


def mark(out: Path) -> float:
    """Check that OUT is complete (every shard the index names, headers fit) and say whose it is."""
    names = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(read_headers(out)) == set(names)
    return float(load_file(out / names["mark"])["mark"][0])


def leave_unfinished(out: Path, recipe: dict) -> None:
    writer = CheckpointWriter(out, recipe, PIECES)
    writer.add_shard(PIECES[0], entries_of(SHARDS[0]))
    del writer


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_shard_of_an_unfinished_run_is_refused(tmp_path, damage):
    leave_unfinished(tmp_path / "out", RECIPE)
    shard = next((tmp_path / "out.unfinished").glob("model-*.safetensors"))
    content = bytearray(shard.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        shard.write_bytes(content)
    elif damage == "truncate":
        shard.write_bytes(content[:-1])
    else:
        shard.unlink()
    before = snapshot(tmp_path)
    message = "is missing" if damage == "remove" else "does not have its checksum"
    with pytest.raises(InputError, match=f"{shard.name} of the unfinished run {message}.*delete"):
        CheckpointWriter(tmp_path / "out", RECIPE, PIECES)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("position", [0, 9, 40, -2])
def test_damaged_journal_of_an_unfinished_run_is_refused(tmp_path, position):
    leave_unfinished(tmp_path / "out", RECIPE)
    journal = tmp_path / "out.unfinished" / "journal-0.jsonl"
    content = bytearray(journal.read_bytes())
    content[position] ^= 1
    journal.write_bytes(content)
    with pytest.raises(InputError, match=r"journal-0.jsonl is damaged at line 1; .*delete"):
        CheckpointWriter(tmp_path / "out", RECIPE, PIECES)
    assert journal.read_bytes() == content


def test_half_line_of_a_killed_run_is_work_not_done(tmp_path):
    """Truncated anywhere inside its line: the piece is made again."""
    leave_unfinished(tmp_path / "out", RECIPE)
    journal = tmp_path / "out.unfinished" / "journal-0.jsonl"
    journal.write_bytes(journal.read_bytes()[:-5])
    with CheckpointWriter(tmp_path / "out", RECIPE, PIECES) as writer:
        assert writer.done(PIECES[0]) is None
        assert not list(writer.staging.glob("*.safetensors"))
    write(tmp_path / "out", fill=4)
    assert mark(tmp_path / "out") == 4


def test_two_runs_on_one_out_are_refused(tmp_path):
    out = tmp_path / "out"
    with CheckpointWriter(out, RECIPE, PIECES) as writer:
        writer.add_shard(PIECES[0], entries_of(SHARDS[0]))
        before = snapshot(tmp_path)
        for recipe in (RECIPE, {"other": 1}):
            with pytest.raises(InputError, match=rf"another run \(process {os.getpid()}\)"):
                CheckpointWriter(out, recipe, PIECES, overwrite=True)
        assert snapshot(tmp_path) == before
    write(out, fill=1)
    assert mark(out) == 1


def test_steps_are_kept_one_at_a_time_and_go_with_their_shard(tmp_path):
    with CheckpointWriter(tmp_path / "out", RECIPE, PIECES) as writer:
        for step in (3, 7):
            writer.add_step("block-0", step, entries_of({"x": torch.full((2,), float(step))}))
        assert [file.name for file in writer.staging.glob("step-*")] == [
            "step-block-0-7.safetensors"
        ]
    with CheckpointWriter(tmp_path / "out", RECIPE, PIECES) as writer:
        record = writer.step_of("block-0")
        assert record is not None and record["step"] == 7
        assert load_file(writer.staging / record["file"])["x"].tolist() == [7.0, 7.0]
        assert writer.step_of("block-1") is None
        writer.add_shard("block-0", entries_of(SHARDS[0]))
        assert writer.step_of("block-0") is None
        assert not list(writer.staging.glob("step-*"))
