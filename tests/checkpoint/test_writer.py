"""CheckpointWriter: whatever happens, OUT is the old state or the whole new one."""

import errno
import json
import os
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lillama.checkpoint.writer as checkpoint_writer
from lillama.checkpoint.format import read_headers
from lillama.checkpoint.shard_file import entries_of
from lillama.checkpoint.writer import CheckpointWriter, check_space
from lillama.errors import InputError, RunError

RECIPE = {"command": "compress", "options": {"seed": 0, "targets": ["w1", "w2"], "text": None}}
CONFIG = {"model_type": "mixtral", "quantization_config": {"quant_method": "lillama"}}
REPORT = {"params_before": 10, "params_after": 8}
SHARDS = [
    {"b.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(4, dtype=torch.bfloat16)},
    {"c.lr_A": torch.arange(12.0).view(3, 4).T, "d": torch.tensor([1, 2])},
    {"e": torch.zeros(1)},
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


def left_over(out: Path) -> set[str]:
    return {path.name for path in out.parent.iterdir()} - {out.name}


# A normal run
def test_write_makes_the_whole_checkpoint(tmp_path):
    out, copied = tmp_path / "out", tmp_path / "tokenizer.json"
    copied.write_text("{}")
    with CheckpointWriter(out, RECIPE, PIECES[:3]) as writer:
        for number, piece in enumerate(PIECES[:3]):
            assert writer.done(piece) is None
            writer.add_shard(piece, entries_of(SHARDS[number]), report={"number": number})
            record = writer.done(piece)
            assert record is not None and record["report"] == {"number": number}
        assert not out.exists()
        assert sum(header.num_bytes for header in writer.headers.values()) == 100
        writer.finish(CONFIG, report=REPORT, model_card="# card\n", copies=[copied])
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    wanted = {"README.md", "config.json", "model.safetensors.index.json", "recipe.json"}
    wanted |= {"report.json", "tokenizer.json", *names}
    assert {path.name for path in out.iterdir()} == wanted
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 24 + 8 + 48 + 16 + 4}
    assert list(index["weight_map"]) == ["a.bias", "b.weight", "c.lr_A", "d", "e"]
    for file, shard in zip(names, SHARDS, strict=True):
        loaded = load_file(out / file)
        assert {key for key, name in index["weight_map"].items() if name == file} == set(shard)
        for key, tensor in shard.items():
            assert torch.equal(loaded[key], tensor) and loaded[key].dtype == tensor.dtype
    assert json.loads((out / "config.json").read_text()) == CONFIG
    assert json.loads((out / "report.json").read_text()) == REPORT
    assert json.loads((out / "recipe.json").read_text()) == RECIPE
    assert (out / "README.md").read_text() == "# card\n"
    assert left_over(out) == {"tokenizer.json"}


def test_write_file_modes_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(old)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {0o640}


# What is in the way
def test_existing_out_is_refused(tmp_path):
    out = tmp_path / "out"
    write(out, fill=1)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="exists; choose another OUT or pass --overwrite"):
        CheckpointWriter(out, RECIPE, PIECES)
    assert snapshot(tmp_path) == before


def test_overwrite_replaces_a_lillama_model(tmp_path):
    out = tmp_path / "out"
    write(out, fill=1)
    (out / "mine.txt").write_text("old")
    write(out, {"other": 1}, overwrite=True, fill=2)
    assert mark(out) == 2
    assert not (out / "mine.txt").exists() and not (out / ".replaced").exists()
    assert left_over(out) == set()


def test_overwrite_replaces_an_empty_folder(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", overwrite=True, fill=1)
    assert mark(tmp_path / "out") == 1
    assert left_over(tmp_path / "out") == set()


def foreign(kind: str, out: Path) -> None:
    if kind == "file":
        out.write_text("mine")
        return
    if kind == "symlink":
        target = out.with_name("target")
        write(target)
        out.symlink_to(target)
        return
    if kind == "broken symlink":
        out.symlink_to(out.with_name("nowhere"))
        return
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    configs = {
        "dense model": '{"model_type": "mixtral"}',
        "other quantizer": '{"quantization_config": {"quant_method": "awq"}}',
        "list": "[1]",
        "broken json": "{",
    }
    if kind in configs:
        (out / "config.json").write_text(configs[kind])


@pytest.mark.parametrize(
    "kind",
    ["file", "symlink", "broken symlink", "folder", "dense model", "other quantizer", "list",
     "broken json"],
)  # fmt: skip
def test_overwrite_never_replaces_something_else(tmp_path, kind):
    foreign(kind, tmp_path / "out")
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="is not a model compressed by lillama"):
        CheckpointWriter(tmp_path / "out", RECIPE, PIECES, overwrite=True)
    assert snapshot(tmp_path) == before
    assert (tmp_path / "out").is_symlink() == ("symlink" in kind)


def test_missing_parent_is_refused(tmp_path):
    with pytest.raises(InputError, match="absent does not exist; create it first"):
        CheckpointWriter(tmp_path / "absent" / "out", RECIPE, PIECES)
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("name", [".", "..", "/"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_out_without_a_name_is_refused(tmp_path, monkeypatch, name, overwrite):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is not the name of a new folder"):
        CheckpointWriter(Path(name), RECIPE, PIECES, overwrite=overwrite)
    assert snapshot(tmp_path) == {}


# Unfinished runs
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exception_before_anything_is_finished_leaves_nothing_and_keeps_old_out(tmp_path, error):
    out = tmp_path / "out"
    write(out, fill=1)
    before = snapshot(tmp_path)
    with pytest.raises(error), CheckpointWriter(out, RECIPE, PIECES, overwrite=True):
        assert left_over(out) == {"out.unfinished"}
        raise error
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exception_keeps_what_is_finished_and_the_next_run_takes_it_up(tmp_path, error):
    out = tmp_path / "out"
    write(out, fill=1)
    before = snapshot(out)
    with (
        pytest.raises(error),
        CheckpointWriter(out, RECIPE, PIECES, overwrite=True) as writer,
    ):
        writer.add_shard("mark", entries_of({"mark": torch.full((2,), 5.0)}), report={"loss": 0.5})
        raise error
    assert snapshot(out) == before
    with CheckpointWriter(out, RECIPE, PIECES, overwrite=True) as writer:
        record = writer.done("mark")
        assert record is not None and record["report"] == {"loss": 0.5}
        assert [writer.done(piece) for piece in PIECES[:3]] == [None] * 3
    write(out, overwrite=True, fill=6)
    assert mark(out) == 5 and left_over(out) == set()


def leave_unfinished(out: Path, recipe: dict) -> None:
    writer = CheckpointWriter(out, recipe, PIECES)
    writer.add_shard(PIECES[0], entries_of(SHARDS[0]))
    del writer


def test_unfinished_run_of_the_same_recipe_is_taken_over(tmp_path):
    leave_unfinished(tmp_path / "out", RECIPE)
    assert left_over(tmp_path / "out") == {"out.unfinished"}
    # a tuple is a list once it is JSON
    same = {"options": {**RECIPE["options"], "targets": ("w1", "w2")}, "command": "compress"}
    write(tmp_path / "out", same, fill=3)
    assert mark(tmp_path / "out") == 3
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4
    assert not list((tmp_path / "out").glob("journal*"))
    assert left_over(tmp_path / "out") == set()


def test_unfinished_run_of_another_recipe_is_refused_and_untouched(tmp_path):
    leave_unfinished(tmp_path / "out", RECIPE)
    before = snapshot(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(
            InputError, match=r"run of another command \(seed was null, is 1\); .*choose another"
        ):
            CheckpointWriter(tmp_path / "out", {**RECIPE, "seed": 1}, PIECES, overwrite=overwrite)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("content", [None, "", '{"comm'], ids=["empty", "no-bytes", "half"])
@pytest.mark.parametrize("name", [".claim-half", ".recipe"])
def test_unfinished_run_killed_before_its_recipe_is_taken_over(tmp_path, content, name):
    (tmp_path / "out.unfinished").mkdir()
    if content is not None:
        (tmp_path / "out.unfinished" / ".lock").touch()
        (tmp_path / "out.unfinished" / name).write_text(content)
        if name == ".recipe":
            (tmp_path / "out.unfinished" / ".claim").write_text(json.dumps(RECIPE))
    write(tmp_path / "out", fill=1)
    assert mark(tmp_path / "out") == 1


@pytest.mark.parametrize("kind", ["file", "folder", "symlink", "broken symlink", "broken json"])
def test_foreign_thing_at_the_unfinished_name_is_refused_and_untouched(tmp_path, kind):
    foreign(kind, tmp_path / "out.unfinished")
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="is in the way and is no unfinished run"):
        CheckpointWriter(tmp_path / "out", RECIPE, PIECES)
    assert snapshot(tmp_path) == before
    assert (tmp_path / "out.unfinished").is_symlink() == ("symlink" in kind)


def test_neighbours_of_out_are_not_touched(tmp_path):
    for name in ("out.replaced", "out.old", "out.bak"):
        foreign("folder", tmp_path / name)
    before = snapshot(tmp_path)
    write(tmp_path / "out", fill=1)
    write(tmp_path / "out", overwrite=True, fill=2)
    shutil.rmtree(tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_kill_between_the_renames_next_run_puts_the_old_out_back(tmp_path):
    out = tmp_path / "out"
    write(out, fill=1)
    before = snapshot(out)
    leave_unfinished(tmp_path / "new", RECIPE)
    for recipe, message in ((RECIPE, "exists; choose"), ({"other": 1}, "of another command")):
        staging = out.with_name("out.unfinished")
        if not staging.exists():
            (tmp_path / "new.unfinished").rename(staging)
        out.rename(staging / ".replaced")
        with pytest.raises(InputError, match=message):
            CheckpointWriter(out, recipe, PIECES, overwrite=recipe is not RECIPE)
        assert snapshot(out) == before
    write(out, overwrite=True, fill=2)
    assert mark(out) == 2 and left_over(out) == set()


# The disk
FULL = OSError(errno.ENOSPC, "No space left on device")
DISK_ERRORS = [
    pytest.param("write_shard", FULL, "the disk is full", id="shard"),
    pytest.param("write_shard", OSError(5, "broken"), "cannot write .*broken", id="shard-other"),
    pytest.param(".recipe", FULL, "the disk is full", id="recipe"),
    pytest.param("README.md", FULL, "the disk is full", id="card"),
    pytest.param("model.safetensors.index.json", FULL, "the disk is full", id="index"),
    pytest.param("report.json", FULL, "the disk is full", id="report"),
    pytest.param("config.json", FULL, "the disk is full", id="config"),
    pytest.param("fsync", FULL, "the disk is full", id="fsync"),
    pytest.param("copyfile", PermissionError(13, "denied"), "cannot write .*denied", id="copy"),
]


@pytest.mark.parametrize(("where", "error", "message"), DISK_ERRORS)
def test_disk_error_is_told_and_keeps_what_is_finished(
    tmp_path, monkeypatch, where, error, message
):
    out = tmp_path / "out"
    write(out, fill=1)
    before = snapshot(tmp_path)

    def fail(*args, **kwargs):
        raise error

    original = Path.write_text

    def write_text(path: Path, *args, **kwargs):
        if path.name == where:
            original(path, "half")
            raise error
        return original(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        if where == "write_shard":
            patch.setattr(checkpoint_writer, where, fail)
        elif where in ("fsync", "copyfile"):
            patch.setattr(os if where == "fsync" else shutil, where, fail)
        else:
            patch.setattr(Path, "write_text", write_text)
        with (
            pytest.raises(RunError, match=message) as caught,
            CheckpointWriter(out, RECIPE, PIECES, overwrite=True) as writer,
        ):
            writer.add_shard(PIECES[0], entries_of(SHARDS[0]))
            writer.finish(CONFIG, report=REPORT, model_card="#", copies=[out / "config.json"])
    assert re.search(re.escape(str(tmp_path)), str(caught.value))
    assert "\n" not in str(caught.value)
    assert snapshot(out) == {k.removeprefix("out/"): v for k, v in before.items() if k != "out"}
    early = where in ("write_shard", ".recipe", "fsync")
    assert left_over(out) == (set() if early else {"out.unfinished"})
    write(out, overwrite=True, fill=2)
    assert mark(out) == 2


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken disk"), KeyboardInterrupt()])
def test_failing_final_rename_restores_the_old_out(tmp_path, monkeypatch, error, overwrite):
    out = tmp_path / "out"
    if overwrite:
        write(out, fill=1)
    before = snapshot(out)
    original = Path.rename

    def rename(path: Path, target: Path):
        if path.name == "out.unfinished":
            raise error
        return original(path, target)

    with pytest.raises((RunError, KeyboardInterrupt)), monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        write(out, overwrite=overwrite, fill=2)
    assert (snapshot(out) == before) if overwrite else not out.exists()
    assert left_over(out) == {"out.unfinished"}
    write(out, overwrite=overwrite, fill=3)
    assert mark(out) == 2, "nothing is made again"


def test_check_space_compares_with_the_disk(tmp_path, monkeypatch):
    asked = []

    def disk_usage(path: Path):
        asked.append(path)
        return shutil._ntuple_diskusage(10 * 2**30, 7 * 2**30, 3 * 2**30)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    check_space(tmp_path / "out", 3 * 2**30)
    with pytest.raises(RunError, match=r"3\.00 GiB free, the result needs 3\.50 GiB"):
        check_space(tmp_path / "out", 7 * 2**29)
    assert asked == [tmp_path, tmp_path]
