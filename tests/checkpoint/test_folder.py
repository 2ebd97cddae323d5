"""FolderWriter and whole_file: OUT is claimed first, and is the old or the whole new one."""

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest

from lillama.checkpoint import folder as folder_writer
from lillama.checkpoint.folder import FolderWriter, recover, whole_file
from lillama.errors import InputError, RunError
from tests.forked import Forked
from tests.kills import left_by_kills

CLAIM = {"command": "finetune"}
OLD, NEW = "old", "new"

FILES = {
    "config.json": '{"quantization_config": {"quant_method": "lillama"}}',
    "model.safetensors": "",
}


def make(out: Path, whose: str) -> None:
    """A finished folder whose config.json says that lillama made it."""
    out.mkdir()
    for name, text in FILES.items():
        (out / name).write_text(text)
    (out / "whose").write_text(whose)


def write(out: Path, *, claim: dict = CLAIM, overwrite: bool = True, resumes: bool = False) -> None:
    with FolderWriter(out, claim, overwrite=overwrite, resumes=resumes) as folder:
        for name, text in FILES.items():
            (folder.staging / name).write_text(text)
        (folder.staging / "whose").write_text(NEW)
        folder.finish()


def whose(out: Path) -> str:
    """Whose OUT is, after a check that all of it is there and nothing else."""
    names = {path.name for path in out.iterdir()}
    assert names == {*FILES, "whose"}
    return (out / "whose").read_text()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"folder"
        for path in sorted(folder.rglob("*"))
    }


def left_over(out: Path) -> set[str]:
    return {path.name for path in out.parent.iterdir()} - {out.name}


# Kills
@pytest.mark.parametrize("start", ["nothing", "old", "unfinished"])
def test_a_kill_at_any_moment_loses_nothing(tmp_path, monkeypatch, start):
    monkeypatch.setattr(folder_writer, "sync", lambda path: None)
    out = tmp_path / "folder" / "out"
    out.parent.mkdir()
    if start == "old":
        make(out, OLD)
    if start == "unfinished":
        (out.parent / "out.unfinished").mkdir()
        (out.parent / "out.unfinished" / ".claim").write_text('{"command": "finetune"}')
        (out.parent / "out.unfinished" / "half").write_text("")
    copies = left_by_kills(lambda: write(out), out.parent, tmp_path / "at")
    assert whose(out) == NEW and left_over(out) == set() and len(copies) > 10
    states = set()
    for copy in copies:
        shutil.rmtree(out.parent)
        copy.rename(out.parent)
        is_between = not out.exists() and (out.parent / "out.unfinished" / ".replaced").is_dir()
        # what a command that only reads does first
        recover(out)
        states.add((is_between, whose(out) if out.exists() else None))
        write(out)
        assert whose(out) == NEW and left_over(out) == set()
    wanted = {(False, OLD), (False, NEW), (True, OLD)}
    assert states == (wanted if start == "old" else {(False, None), (False, NEW)})


@pytest.mark.parametrize("start", ["nothing", "old"])
def test_a_kill_at_any_moment_leaves_a_file_old_or_new(tmp_path, monkeypatch, start):
    monkeypatch.setattr(folder_writer, "sync", lambda path: None)
    out = tmp_path / "folder" / "report.html"
    out.parent.mkdir()

    def page() -> None:
        with whole_file(out, "report", overwrite=True) as part:
            part.write_text(NEW)

    if start == "old":
        out.write_text(OLD)
    copies = left_by_kills(page, out.parent, tmp_path / "at")
    states = set()
    for copy in copies:
        shutil.rmtree(out.parent)
        copy.rename(out.parent)
        states.add(out.read_text() if out.exists() else None)
        page()
        assert out.read_text() == NEW and left_over(out) == set()
    assert states == {OLD if start == "old" else None, NEW} and len(copies) > 8


@pytest.mark.parametrize("fails", ["out", "out.unfinished"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()], ids=repr)
def test_an_exchange_that_fails_leaves_the_old_one(tmp_path, monkeypatch, fails, error):
    out = tmp_path / "out"
    make(out, OLD)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == fails and target.name != ".claim":
            raise error
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises((RunError, KeyboardInterrupt)):
            write(out)
    assert whose(out) == OLD and left_over(out) == set()


def test_what_was_replaced_is_never_removed_where_out_is_there_again(tmp_path):
    out, staging = tmp_path / "out", tmp_path / "out.unfinished"
    make(out, OLD)
    staging.mkdir()
    (staging / ".claim").write_text('{"command": "finetune"}')
    out.rename(staging / ".replaced")
    make(out, "mine")
    recover(out)
    with pytest.raises(InputError, match=r"\.replaced is what .*out was before it was replaced"):
        write(out)
    assert whose(out) == "mine" and whose(staging / ".replaced") == OLD


# Claims
@pytest.mark.parametrize("kind", ["folder", "file", "symlink", "broken claim", "claim of a list"])
def test_something_else_at_the_unfinished_name_is_refused_and_untouched(tmp_path, kind):
    staging = tmp_path / "out.unfinished"
    if kind == "file":
        staging.write_text("mine")
    elif kind == "symlink":
        staging.symlink_to(tmp_path / "nowhere")
    else:
        staging.mkdir()
        (staging / "notes").write_text("mine")
        if kind != "folder":
            (staging / ".claim").write_text("{" if kind == "broken claim" else "[]")
    before = snapshot(tmp_path)
    for attempt in (lambda: write(tmp_path / "out"), lambda: sampled(tmp_path / "out")):
        with pytest.raises(InputError, match="unfinished is in the way and is no unfinished run;"):
            attempt()
        after = snapshot(tmp_path)
        after.pop("out.unfinished/.lock", None)
        assert after == before


def sampled(out: Path) -> None:
    with whole_file(out, "sample") as part:
        part.write_text(NEW)


@pytest.mark.parametrize("resumes", [False, True])
def test_another_commands_unfinished_run_is_refused_and_untouched(tmp_path, resumes):
    out = tmp_path / "out"
    claim = {"command": "compress", "options": {"seed": 0}}
    with FolderWriter(out, claim, resumes=True) as folder:
        (folder.staging / "hours of work").write_text("x")
        folder.keeps = True
    before = snapshot(tmp_path)
    refused = r"out\.unfinished is the unfinished run of another command"
    advice = "; run that one again, delete the folder or choose another OUT$"
    with pytest.raises(InputError, match=rf'{refused} .command was "compress", is "x".{advice}'):
        FolderWriter(out, {"command": "x"}, resumes=resumes)
    with pytest.raises(InputError, match=rf"{refused} .options.seed was 0, is 1.{advice}"):
        FolderWriter(out, {**claim, "options": {"seed": 1}}, resumes=resumes)
    assert snapshot(tmp_path) == before
    with FolderWriter(out, claim, resumes=True) as folder:
        assert (folder.staging / "hours of work").read_text() == "x" and folder.keeps
    assert left_over(out) == {"out.unfinished"}


def test_what_cannot_be_taken_up_is_emptied(tmp_path):
    staging = tmp_path / "out.unfinished"
    (staging / "folder").mkdir(parents=True)
    (staging / "half").write_text("x")
    (staging / ".claim").write_text('{"command": "finetune"}')
    with FolderWriter(tmp_path / "out", CLAIM) as folder:
        assert {path.name for path in folder.staging.iterdir()} == {".claim", ".lock"}
    assert list(tmp_path.iterdir()) == []


def test_two_processes_at_one_out(tmp_path):
    out, (reader, writer) = tmp_path / "folder" / "out", os.pipe()
    out.parent.mkdir()

    def hold() -> None:
        with FolderWriter(out, {"command": "compress"}):
            os.write(writer, b"held")
            signal.pause()

    other = Forked(hold, tmp_path / "said")
    assert os.read(reader, 4) == b"held"
    os.close(reader)
    os.close(writer)
    for attempt in (write, sampled):
        with pytest.raises(InputError, match=rf"another run .process {other.pid}. is writing"):
            attempt(out)
    recover(out)
    assert out.with_name("out.unfinished").is_dir()
    other.send(signal.SIGKILL)
    other.wait()
    with pytest.raises(InputError, match="of another command"):
        write(out)
    write(out, claim={"command": "compress"})
    assert whose(out) == NEW and left_over(out) == set()


# The end
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_comes_to_out_meanwhile_is_not_replaced(tmp_path, overwrite):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="exists; choose|is not a model compressed by lillama"):
        with FolderWriter(out, CLAIM, overwrite=overwrite) as folder:
            (folder.staging / "whose").write_text(NEW)
            out.mkdir()
            (out / "mine").write_text("mine")
            folder.finish()
    assert snapshot(tmp_path) == {"out": b"folder", "out/mine": b"mine"}
    file = tmp_path / "file"
    with pytest.raises(InputError, match="exists; choose another file"):
        with whole_file(file, "sample") as part:
            part.write_text(NEW)
            file.write_text("mine")
    assert file.read_text() == "mine" and left_over(file) == {"out"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_fails_leaves_nothing(tmp_path, error):
    make(tmp_path / "out", OLD)
    before = snapshot(tmp_path)
    with pytest.raises(error), FolderWriter(tmp_path / "out", CLAIM, overwrite=True) as folder:
        (folder.staging / "half").write_text("x")
        raise error
    with pytest.raises(error), whole_file(tmp_path / "file", "sample") as part:
        part.write_text("half")
        raise error
    assert snapshot(tmp_path) == before


def test_a_command_without_overwrite_does_not_name_it(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="out exists; choose another OUT$"):
        FolderWriter(tmp_path / "out", CLAIM, overwrite=None)
    with pytest.raises(InputError, match="out exists; choose another OUT or pass --overwrite$"):
        FolderWriter(tmp_path / "out", CLAIM, overwrite=False)


def test_everything_is_flushed_to_the_disk_before_the_exchange(tmp_path, monkeypatch):
    flushed, before = [], []
    rename = Path.rename

    def watch(path: Path, target: Path) -> Path:
        if path.name == "out.unfinished":
            before.extend(flushed)
        return rename(path, target)

    monkeypatch.setattr(folder_writer, "sync", lambda path: flushed.append(path.name))
    monkeypatch.setattr(Path, "rename", watch)
    write(tmp_path / "out")
    assert {*FILES, "whose", "out.unfinished"} <= set(before)
    assert flushed[-1] == tmp_path.name
    flushed.clear()
    sampled(tmp_path / "file")
    assert flushed[-2:] == ["file", tmp_path.name]
