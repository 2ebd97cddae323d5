"""CheckpointWriter killed before each of its file operations in turn."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lillama.checkpoint.folder as folder_writer
import lillama.checkpoint.writer as checkpoint_writer
from lillama.checkpoint.headers import read_headers
from lillama.checkpoint.shard_file import entries_of
from lillama.checkpoint.writer import CheckpointWriter
from lillama.errors import InputError
from tests.kills import left_by_kills

RECIPE = {"command": "compress"}
CONFIG = {"model_type": "mixtral", "quantization_config": {"quant_method": "lillama"}}
SHARDS = {
    "one": {"a": torch.zeros(8), "b": torch.ones(2, 2)},
    "two": {"c": torch.arange(4.0)},
    "mark": {},
}


def write(out: Path, *, overwrite: bool = False, fill: float = 0.0) -> None:
    """One complete run of three shards; `fill` marks whose weights they are."""
    with CheckpointWriter(out, RECIPE, list(SHARDS), overwrite=overwrite) as writer:
        for piece, shard in {**SHARDS, "mark": {"mark": torch.full((2,), fill)}}.items():
            if writer.done(piece) is None:
                writer.add_step(piece, 1, entries_of({"half": torch.ones(3)}))
                writer.add_shard(piece, entries_of(shard))
        writer.finish(CONFIG, report={}, model_card="# card\n")


def mark(out: Path) -> float:
    """Check that OUT is complete (every shard the index names, headers fit) and say whose it is."""
    names = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(read_headers(out)) == set(names) == {"a", "b", "c", "mark"}
    assert json.loads((out / "config.json").read_text()) == CONFIG
    return float(load_file(out / names["mark"])["mark"][0])


@pytest.mark.parametrize("start", ["nothing", "old", "unfinished"])
def test_kill_at_any_moment_leaves_old_or_new_and_the_next_run_succeeds(
    tmp_path, monkeypatch, start
):
    monkeypatch.setattr(checkpoint_writer, "sync", lambda path: None)
    monkeypatch.setattr(folder_writer, "sync", lambda path: None)
    overwrite, folder = start == "old", tmp_path / "folder"
    out = folder / "out"
    folder.mkdir()
    if overwrite:
        write(out, fill=1)
    if start == "unfinished":
        CheckpointWriter(out, RECIPE, list(SHARDS)).add_shard("one", entries_of(SHARDS["one"]))
    copies = left_by_kills(lambda: write(out, overwrite=overwrite, fill=2), folder, tmp_path / "at")
    assert mark(out) == 2
    finished = {path.name for path in out.iterdir()}
    assert len(copies) > 30
    found = set()
    for copy in copies:
        shutil.rmtree(folder)
        copy.rename(folder)
        state = mark(out) if out.exists() else None
        found.add(state)
        if overwrite and state is None:
            assert mark(out.with_name("out.unfinished") / ".replaced") == 1
        if not overwrite and state is not None:
            with pytest.raises(InputError, match="exists"):
                write(out)
            assert {path.name for path in out.iterdir()} == finished, "what was left is tidied up"
            continue
        write(out, overwrite=overwrite, fill=3)
        # 2 where the killed run had finished that piece
        assert mark(out) in (2, 3)
        assert [path.name for path in folder.iterdir()] == ["out"]
        assert not (out / ".replaced").exists()
    # the exchange of old and new is the only moment without OUT; the journal goes after it
    assert found == ({None, 1, 2} if overwrite else {None, 2})
