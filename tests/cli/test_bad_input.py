"""Files and runs that go wrong: one line, the right exit code, no harm done. One case of each kind;
every error is tested where it is raised."""

import errno
import importlib
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lillama.checkpoint import writer as checkpoint_writer
from lillama.cli import app as cli

Fails = Callable[..., str]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()} if folder.is_dir() else {}


@pytest.fixture
def fails(monkeypatch, capfd, mamba, text_file, tmp_path, device) -> Fails:
    """fails(code, model=, text=, options=) runs compress, checks every promise and returns the one
    line it wrote. `kept`: finished shards that the message promises to be there still."""

    def run(
        code: int, *options: object, model: Path = mamba, text: Path = text_file, kept: int = 0
    ) -> str:
        out = tmp_path / "result" / "out"
        out.parent.mkdir(exist_ok=True)
        before = snapshot(model), sorted(out.parent.iterdir())
        command = ["compress", model, out, "--reduction", 0.2, "--text", text, "--tokens", 300]
        # a preset that comes to the blocks at once
        command += ["--seq-len", 32, "--device", device, "--preset", "whitened", *options]
        monkeypatch.setattr(sys, "argv", ["lillama", *map(str, command)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        stdout, stderr = capfd.readouterr()
        assert stdout == ""
        assert len(stderr.splitlines()) == 1, stderr
        assert stderr.startswith("lillama: error: "), stderr
        assert caught.value.code == code, stderr
        assert snapshot(model) == before[0]
        if kept:
            staging = out.with_name("out.unfinished")
            assert sorted(out.parent.iterdir()) == [staging]
            assert len(list(staging.glob("model-*.safetensors"))) == kept
            assert f"; {kept} of 4 shards are finished in {staging}: the same" in stderr
        else:
            assert sorted(out.parent.iterdir()) == before[1]
        return stderr

    return run


# text


def test_cli_missing_text_file(fails, tmp_path):
    assert "nowhere.txt: No such file or directory; check" in fails(
        2, text=tmp_path / "nowhere.txt"
    )


# OUT


def test_cli_out_that_exists_is_kept(fails, tmp_path):
    out = tmp_path / "result" / "out"
    out.mkdir(parents=True)
    (out / "precious.txt").write_text("mine")
    assert "out exists; choose another OUT or pass --overwrite" in fails(2)
    message = fails(2, "--overwrite")
    assert "is not a model compressed by lillama; --overwrite does not replace it" in message
    assert (out / "precious.txt").read_text() == "mine"


def test_cli_out_in_a_folder_that_is_missing(monkeypatch, capfd, mamba, text_file, tmp_path):
    out = tmp_path / "no" / "out"
    command = ["compress", mamba, out, "--reduction", "0.2", "--text", text_file, "--tokens", "99"]
    monkeypatch.setattr(sys, "argv", ["lillama", *map(str, command), "--seq-len", "32"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "no does not exist; create it first" in capfd.readouterr().err
    assert not out.parent.exists()


# MODEL


@pytest.fixture
def copy(tmp_path) -> Callable[[Path], Path]:
    """A copy of a checkpoint that a test may damage."""
    return lambda path: Path(shutil.copytree(path, tmp_path / "copy"))


def test_cli_model_that_is_no_folder(fails, tmp_path):
    message = fails(2, model=tmp_path / "nowhere")
    assert "nowhere is not a checkpoint folder; give the path of a local model" in message


def test_cli_model_without_weights(fails, copy, mamba):
    path = copy(mamba)
    (path / "model.safetensors").unlink()
    message = fails(2, model=path)
    assert "holds no model.safetensors and no index of shards" in message


def test_cli_model_with_a_bad_weight_names_the_block(fails, copy, mixtral):
    path = copy(mixtral)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"][5, 5] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    message = fails(1, model=path, kept=1)
    assert "model.layers.1." in message and "NaN or infinity; repair the checkpoint" in message


# the run


def test_cli_disk_without_room_for_the_result(fails, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = fails(1)
    assert "GiB free, the run needs" in message and "free space or choose another" in message


def test_cli_read_only_disk(fails, monkeypatch):
    original = os.mkdir

    def mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
        if str(path).endswith(".unfinished"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        original(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    message = fails(1)
    assert "cannot write" in message and "Read-only file system" in message


def test_cli_disk_that_fills_up_while_writing(fails, monkeypatch):
    original, calls = checkpoint_writer.write_shard, []

    def save(*args: Any) -> str:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args)

    monkeypatch.setattr(checkpoint_writer, "write_shard", save)
    assert "the disk is full while writing" in fails(1, kept=1)
    assert len(calls) == 2


@pytest.mark.parametrize("limit", [500, 6000], ids=["recipe", "shard"])
def test_cli_file_that_the_system_cuts_short(limit, fails, monkeypatch):
    """The kernel itself refuses, below safetensors: an error from the real write, not from us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = checkpoint_writer.CheckpointWriter
    original = writer.__init__

    def start(self, *args: Any, **kwargs: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        original(self, *args, **kwargs)

    monkeypatch.setattr(writer, "__init__", start)
    try:
        message = fails(1, "--no-train")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in message and "out.unfinished" in message


def test_cli_ctrl_c_in_a_step_is_one_line(fails, monkeypatch):
    distill = importlib.import_module("lillama.compress.train.distill")

    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(distill, "distill_loss", interrupt)
    assert fails(1) == "lillama: error: interrupted; nothing was left half-written\n"


def test_cli_sigterm_keeps_what_is_done(fails, monkeypatch):
    """A real signal, behind the first shard."""
    original, calls = checkpoint_writer.write_shard, []

    def save(*args: Any) -> str:
        digest = original(*args)
        calls.append(args)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return digest

    monkeypatch.setattr(checkpoint_writer, "write_shard", save)
    message = fails(1, kept=1)
    assert message.startswith("lillama: error: interrupted; ")
    assert message.endswith("out.unfinished: the same command goes on from there\n")


# the other commands


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("plan", ["--reduction", "0.2"]),
        ("eval", ["--text", "t.txt"]),
        ("generate", ["--prompt", "the"]),
    ],
)
def test_cli_other_commands_refuse_a_missing_model(command, options, monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(sys, "argv", ["lillama", command, str(tmp_path / "nowhere"), *options])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    stdout, stderr = capfd.readouterr()
    assert (caught.value.code, stdout, len(stderr.splitlines())) == (2, "", 1)
    assert "is not a checkpoint folder" in stderr
