"""compress killed anywhere, and taken up again: the end is the uninterrupted run's, bit for bit."""

import importlib
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lillama
from lillama.checkpoint import writer as checkpoint_writer
from lillama.checkpoint.headers import read_headers
from lillama.checkpoint.journal import Journal
from lillama.checkpoint.shard_file import Entry
from lillama.errors import InputError, RunError
from tests.forked import Forked

OPTIONS: dict[str, Any] = {
    "reduction": 0.2, "tokens": 900, "seq_len": 32, "checkpoint_seconds": 0, "strategy": "uniform"
}  # fmt: skip
FILE_EVENTS = {"open", "os.mkdir", "os.remove", "os.rename", "os.truncate"}


@pytest.fixture
def small(text_file: Path, device: torch.device):
    """small(model, out, **options) -> report, with few tokens, a checkpoint after every step."""

    def run(model: Path, out: Path, **options: Any) -> dict:
        values = {**OPTIONS, "text": text_file, "device": str(device), **options}
        return lillama.compress(model, out, **values)

    return run


def content(out: Path) -> dict[str, bytes]:
    """Everything that may not depend on how often a run was interrupted."""
    names = ("report.json", "README.md")
    kept = {file.name: file.read_bytes() for file in out.iterdir() if file.name not in names}
    blocks = json.loads((out / "report.json").read_text())["blocks"]
    for row in blocks:
        del row["seconds"], row["peak_memory_bytes"]
    return {**kept, "blocks": json.dumps(blocks).encode()}


def moments_of(work: Callable[[Callable[..., None]], None], folder: Path, kill_at: int) -> int:
    """Run work(progress) in a forked process that SIGKILLs itself at its `kill_at`-th moment;
    returns how many moments it had. A moment is a batch through a block, an operation on a file of
    `folder`, or a tensor of a file that is being written."""
    moments = folder.with_name(f"{folder.name}.moments")
    log = os.open(moments, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    count = 0

    def step(*args: object) -> None:
        nonlocal count
        count += 1
        os.write(log, b".")
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, args: tuple) -> None:
        if event in FILE_EVENTS and str(args[0]).startswith(str(folder)):
            step()

    write_shard = checkpoint_writer.write_shard

    def slow_write(file: Path, entries: list[Entry]) -> str:
        def slow(entry: Entry) -> Entry:
            return entry._replace(make=lambda: (step(), entry.make())[1])

        return write_shard(file, [slow(entry) for entry in entries])

    def watched() -> None:
        checkpoint_writer.write_shard = slow_write
        sys.addaudithook(watch)
        work(step)

    ended = Forked(watched, folder.with_name("said")).wait()
    os.close(log)
    found = moments.stat().st_size
    assert ended.code == (-signal.SIGKILL if kill_at <= found else 0), ended.stderr
    return found


@pytest.mark.parametrize("kills", [4, pytest.param(16, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_killed_at_random_moments_the_same_command_ends_bit_for_bit_the_same(
    kind, kills, small, make_checkpoint, tmp_path, device
):
    if device.type == "cuda":
        pytest.skip("a process with CUDA cannot be forked")
    model = make_checkpoint(kind, num_hidden_layers=3)
    small(model, tmp_path / "whole")
    wanted = content(tmp_path / "whole")

    def run(out: Path) -> Callable[[Callable[..., None]], None]:
        return lambda progress: small(model, out, progress=progress) and None

    folder = tmp_path / "count"
    folder.mkdir()
    total = moments_of(run(folder / "out"), folder, kill_at=10**9)
    assert total > 300
    picks = random.Random(f"{kind}{kills}").sample(range(1, total + 1), kills)
    taken_up = 0
    for number, kill_at in enumerate(picks):
        folder = tmp_path / f"killed{number}"
        folder.mkdir()
        assert moments_of(run(folder / "out"), folder, kill_at) == kill_at
        if not (folder / "out").exists():
            # once more, a little further on
            staging = folder / "out.unfinished"
            taken_up += bool(staging.is_dir() and Journal(staging).records)
            moments_of(run(folder / "out"), folder, 40)
        if not (folder / "out").exists():
            small(model, folder / "out")
        assert content(folder / "out") == wanted, f"killed at moment {kill_at} of {total}"
        assert [path.name for path in folder.iterdir()] == ["out"]
    assert taken_up >= kills // 2


def stop_at(stage: str, call: int = 1) -> Callable[[str, int, int], None]:
    """A progress that raises SIGINT, as Ctrl-C does, at the `call`-th tick of a stage."""
    seen = 0

    def progress(current: str, done: int, total: int) -> None:
        nonlocal seen
        seen += current == stage
        if current == stage and seen == call:
            signal.raise_signal(signal.SIGINT)

    return progress


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_the_step_saves_and_says_how_to_go_on(small, mamba, tmp_path, number):
    out, whole = tmp_path / "out", tmp_path / "whole"
    small(mamba, whole)
    steps: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        steps.append(stage)
        if steps.count("block 1 train") == 2:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with pytest.raises(
        RunError, match=r"interrupted; 1 of 4 shards are finished in .*the same command goes on"
    ):
        small(mamba, out, progress=progress, checkpoint_seconds=1000)
    assert signal.getsignal(number) is before
    assert steps.count("block 1 train") == 2, "the step was finished, no other begun"
    record = Journal(tmp_path / "out.unfinished").last(kind="step", shard="block-1")
    assert record is not None and record["step"] == 2
    small(mamba, out)
    assert content(out) == content(whole)


@pytest.mark.parametrize(
    "stage", ["block 0 sensitivity", "block 0 teacher", "block 1 teacher", "block 0 student"]
)
def test_signal_between_the_steps_keeps_the_finished_blocks(stage, small, mamba, tmp_path):
    with pytest.raises(RunError, match="interrupted"):
        small(mamba, tmp_path / "out", progress=stop_at(stage))
    staging = tmp_path / "out.unfinished"
    assert staging.exists() == (stage != "block 0 sensitivity")  # nothing was finished
    small(mamba, tmp_path / "out")
    small(mamba, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal: a shell starts what runs in the background with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_second_signal_ends_at_once(small, mamba, tmp_path, interruptible):
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "block 1 train":
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        small(mamba, tmp_path / "out", progress=progress)
    assert (tmp_path / "out.unfinished").is_dir()


def test_resumed_run_does_not_train_finished_blocks_again(small, mamba, tmp_path):
    with pytest.raises(RunError):
        small(mamba, tmp_path / "out", progress=stop_at("block 1 train", 3))
    stages: list[str] = []
    calls: list[tuple[int, int]] = []

    def progress(stage: str, done: int, total: int) -> None:
        stages.append(stage)
        calls.append((done, total))

    small(mamba, tmp_path / "out", progress=progress)
    assert "block 0 train" not in stages and "block 1 train" in stages
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] <= calls[-1][1] and len({total for _, total in calls}) == 1


CHANGES = {
    "option": ({"seed": 3}, r"options.seed was 0, is 3"),
    "tokens": ({"tokens": 1200}, r"options.tokens was 900, is 1200"),
    "recipe": ({"preset": "paper"}, r"options.preset was \"default\", is \"paper\""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_command_is_refused_and_says_what_changed(change, small, mamba, tmp_path):
    options, message = CHANGES[change]
    with pytest.raises(RunError):
        small(mamba, tmp_path / "out", progress=stop_at("block 1 train"))
    before = {p.name: p.read_bytes() for p in (tmp_path / "out.unfinished").iterdir()}
    with pytest.raises(InputError, match=f"unfinished run of another command.*{message}"):
        small(mamba, tmp_path / "out", **options)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out.unfinished").iterdir()} == before


@pytest.mark.parametrize("what", ["text", "model", "version", "format"])
def test_changed_surroundings_are_refused(what, small, mamba, tmp_path, text_file, monkeypatch):
    model, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(mamba, model)
    shutil.copy(text_file, text)
    with pytest.raises(RunError):
        small(model, tmp_path / "out", text=text, progress=stop_at("block 1 train"))
    if what == "text":
        text.write_text(text.read_text().replace("cat", "dog"))
    elif what == "model":  # one number, the header as before
        file = model / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-100] ^= 1
        file.write_bytes(data)
    elif what == "version":
        monkeypatch.setattr(
            importlib.import_module("lillama.checkpoint.card"), "__version__", "9.9"
        )
    else:
        monkeypatch.setattr(importlib.import_module("lillama.checkpoint.card"), "FORMAT_VERSION", 4)
    wanted = {"text": "data_sha256", "model": "model_sha256", "version": "versions.lillama"}
    wanted["format"] = "format_version was 3, is 4"
    with pytest.raises(InputError, match=wanted[what]):
        small(model, tmp_path / "out", text=text)


@pytest.mark.parametrize("kind", ["model-", "step-"])
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damaged_work_is_refused_and_not_touched(kind, damage, small, mamba, tmp_path):
    with pytest.raises(RunError):
        small(mamba, tmp_path / "out", progress=stop_at("block 1 train", 2))
    file = next((tmp_path / "out.unfinished").glob(f"{kind}*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    before = {p.name: p.read_bytes() for p in (tmp_path / "out.unfinished").iterdir()}
    with pytest.raises(InputError, match=f"{file.name} of the unfinished run does not have its"):
        small(mamba, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out.unfinished").iterdir()} == before


def test_shard_of_the_model_that_vanishes_is_named_and_the_work_kept(
    small, mamba, tmp_path, tokenizer
):
    model, moved = tmp_path / "model", tmp_path / "moved"
    AutoModelForCausalLM.from_pretrained(mamba).save_pretrained(model, max_shard_size="40KB")
    tokenizer.save_pretrained(model)
    headers = read_headers(model)
    shard = headers["backbone.layers.1.mixer.out_proj.weight"].file
    assert shard != headers["backbone.layers.0.mixer.out_proj.weight"].file

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "block 0 train" and not moved.exists():
            shard.rename(moved)

    # a preset that has not opened all shards before the first block is done
    with pytest.raises(RunError, match=rf"{shard.name}.*1 of 4 shards are finished"):
        small(model, tmp_path / "out", progress=progress, preset="whitened")
    moved.rename(shard)
    small(model, tmp_path / "out", preset="whitened")
    small(model, tmp_path / "whole", preset="whitened")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
