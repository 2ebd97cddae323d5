"""Every command that writes OUT claims it first, touches nothing of another run, and loses no model
however it is killed."""

import importlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import lillama
from lillama.errors import InputError, RunError
from tests.forked import Forked

finetune = importlib.import_module("lillama.compress.train.finetune")
pipeline = importlib.import_module("lillama.compress.pipeline")
GIVEN = {"tokens": 300, "seq_len": 32, "device": "cpu"}
SAMPLE = {"tokens": 40, "seq_len": 16, "batch_size": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def small(mamba, text_file, tmp_path_factory) -> Path:
    """The Mamba, compressed without training."""
    out = tmp_path_factory.mktemp("small") / "small"
    lillama.compress(mamba, out, reduction=0.2, text=text_file, preset="fast", train=False, **GIVEN)
    return out


def snapshot(folder: Path) -> dict[str, bytes]:
    """All but the lock, into which a process writes its number."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"folder"
        for path in sorted(folder.rglob("*"))
        if path.name != ".lock"
    }


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def interrupted_compress(mamba: Path, out: Path, text: Path) -> None:
    """A shard is finished in `OUT.unfinished`."""

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "block 1 train":
            raise RunError("stopped")

    with pytest.raises(RunError, match="stopped; 1 of 4 shards are finished"):
        lillama.compress(
            mamba, out, reduction=0.2, text=text, preset="whitened", progress=stop, **GIVEN
        )


def test_finetune_refuses_the_unfinished_run_of_compress_before_any_work(
    small, mamba, text_file, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    interrupted_compress(mamba, out, text_file)
    before = snapshot(tmp_path)
    for name in ("_blocks", "load_model"):
        monkeypatch.setattr(finetune, name, lambda *_: pytest.fail("worked first"))
    with pytest.raises(
        InputError,
        match=r"out\.unfinished is the unfinished run of another command \(command was "
        r'"compress", is "finetune"\); run that one again, delete the folder or choose another',
    ):
        lillama.finetune(small, out, base=mamba, text=text_file, **GIVEN)
    with pytest.raises(InputError, match=r"out\.unfinished is .* another command .*\"export\""):
        lillama.export(small, out)
    with pytest.raises(InputError, match=r"out\.unfinished is .* another command .*\"sample\""):
        lillama.sample(mamba, out, **SAMPLE)
    assert snapshot(tmp_path) == before


def test_finetune_leaves_nothing_of_what_failed(small, mamba, text_file, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        assert names(tmp_path) == {"out.unfinished"}, "claimed before the training"
        raise RunError("stopped")

    monkeypatch.setattr(finetune, "_train", fail)
    with pytest.raises(RunError, match="stopped"):
        lillama.finetune(small, tmp_path / "out", base=mamba, text=text_file, **GIVEN)
    assert names(tmp_path) == set()


def killed_at_rename(number: int, place: str, work: Callable[[], object], folder: Path) -> bool:
    """Run `work` in a process that is killed before or after its rename `number`; whether it came
    to that."""
    count, rename = 0, os.rename

    def counted(*args: object, **kwargs: object) -> None:
        nonlocal count
        count += 1
        if count == number and place == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*args, **kwargs)  # pyright: ignore[reportArgumentType]
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched() -> None:
        os.rename = counted
        work()

    return Forked(watched, folder).wait().code == -signal.SIGKILL


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("next_command", ["generate", "finetune", "compress", "export"])
def test_a_killed_finetune_loses_no_model(
    small, mamba, text_file, tmp_path, tmp_path_factory, monkeypatch, number, place, next_command
):
    """However far it came with replacing OUT, the next command on OUT finds a whole model."""
    out = tmp_path / "out"
    lillama.export(small, out, format="plain")
    kept = json.loads((out / "config.json").read_text())["quantization_config"]
    given = {"base": mamba, "text": text_file, "overwrite": True, **GIVEN}
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "_train", lambda *_: {"steps": 0})
        said = tmp_path_factory.mktemp("said")
        assert killed_at_rename(number, place, lambda: lillama.finetune(small, out, **given), said)
    if next_command == "generate":
        assert lillama.generate(out, "the cat", max_new_tokens=1, device="cpu") is not None
    elif next_command == "finetune":
        lillama.finetune(small, out, **given)
        assert names(tmp_path) == {"out"}
    elif next_command == "compress":  # which is refused: OUT is there
        with pytest.raises(InputError, match="out exists; choose another OUT"):
            lillama.compress(mamba, out, reduction=0.2, text=text_file, **GIVEN)
    else:
        lillama.export(out, tmp_path / "dense")
    found = json.loads((out / "config.json").read_text())["quantization_config"]
    assert found["ranks"] == kept["ranks"]
    assert not {name for name in names(out) if name.startswith(".")}


def test_compress_claims_out_before_it_reads_the_text(mamba, text_file, tmp_path, monkeypatch):
    given = {"reduction": 0.2, "text": text_file, "preset": "fast", **GIVEN}
    calls = []

    def calibration(*_: object) -> None:
        calls.append(names(tmp_path))
        with pytest.raises(InputError, match=rf"another run \(process {os.getpid()}\) is writing"):
            lillama.compress(mamba, tmp_path / "out", **given)
        raise RunError("stopped")

    monkeypatch.setattr(pipeline, "_calibration", calibration)
    with pytest.raises(RunError, match="stopped"):
        lillama.compress(mamba, tmp_path / "out", **given)
    assert calls == [{"out.unfinished"}] and names(tmp_path) == set()


def test_preset_best_claims_out_before_its_blocks(mamba, text_file, tmp_path, monkeypatch):
    given = {"reduction": 0.2, "text": text_file, "preset": "best", **GIVEN}

    def blocks(session, *_: object) -> None:
        assert session.config.out.name == "out.blocks" and "out.unfinished" in names(tmp_path)
        raise RunError("stopped")

    monkeypatch.setattr(pipeline, "_compress", blocks)
    with pytest.raises(RunError, match="stopped"):
        lillama.compress(mamba, tmp_path / "out", **given)
    assert names(tmp_path) == {"out.own.jsonl"}


def test_two_samples_into_one_file(mamba, tmp_path):
    seen = []

    def progress(*_: object) -> None:
        if not seen:
            seen.append(names(tmp_path))
            with pytest.raises(InputError, match=rf"another run \(process {os.getpid()}\)"):
                lillama.sample(mamba, tmp_path / "own.jsonl", **SAMPLE)

    lillama.sample(mamba, tmp_path / "own.jsonl", progress=progress, **SAMPLE)
    assert seen == [{"own.jsonl.unfinished"}] and names(tmp_path) == {"own.jsonl"}


def test_sample_does_not_touch_what_is_no_sample(mamba, tmp_path):
    for name in ("own.jsonl.part", "own.jsonl.unfinished"):
        (tmp_path / name).write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=r"own\.jsonl\.unfinished is in the way"):
        lillama.sample(mamba, tmp_path / "own.jsonl", **SAMPLE)
    (tmp_path / "own.jsonl.unfinished").unlink()
    lillama.sample(mamba, tmp_path / "own.jsonl", **SAMPLE)
    assert (tmp_path / "own.jsonl.part").read_text() == "mine" and len(before) == 2


def test_two_reports_at_once(small, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs lillama[report]")
    module = importlib.import_module("lillama.report.page")
    (tmp_path / "own").mkdir()
    for file in small.iterdir():
        os.link(file, tmp_path / "own" / file.name)
    (tmp_path / "own" / ".report.html.part").write_text("mine")
    plots_of, calls = module.plots_of, []

    def plots(facts):
        if not calls:
            calls.append(facts)
            with pytest.raises(InputError, match=r"another run .* is writing .*report\.html"):
                lillama.report(tmp_path / "own")
        return plots_of(facts)

    monkeypatch.setattr(module, "plots_of", plots)
    lillama.report(tmp_path / "own")
    assert names(tmp_path / "own") - names(small) == {"report.html", ".report.html.part"}
