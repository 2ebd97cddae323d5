"""Preset best: the blocks, then the whole model, as one run."""

import json

import pytest
from safetensors.torch import load_file

import lillama
from lillama.compress import pipeline as module
from lillama.compress.session import own_text
from lillama.data.sequences import held_out_blocks
from lillama.errors import InputError, RunError

OPTIONS = {"reduction": 0.25, "tokens": 1500, "seq_len": 32, "device": "cpu"}


def tensors(folder) -> dict:
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found |= load_file(shard)
    return found


def assert_same(one, other) -> None:
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys() and left
    for name, value in left.items():
        assert value.equal(right[name]), name


@pytest.fixture
def run(mamba, text_file, tmp_path):
    def call(name="out", **more):
        given = {"text": text_file, "preset": "best", **OPTIONS, **more}
        return lillama.compress(mamba, tmp_path / name, **given)

    return call


def test_best_is_default_then_finetune(run, mamba, text_file, tmp_path):
    report = run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    # ranks and blocks are of what the model writes, the whole model is also of the text given
    own, tokens = tmp_path / "own.jsonl", OPTIONS["tokens"]
    held_out = held_out_blocks(tokens, 32) + 2
    lillama.sample(mamba, own, tokens=tokens + 32 * held_out, seq_len=32, seed=1, device="cpu")
    run("blocks", preset="default", text=own)
    given = {"tokens": OPTIONS["tokens"], "seq_len": 32, "device": "cpu", "epochs": 2}
    given["own_tokens"] = OPTIONS["tokens"]
    found = lillama.finetune(
        tmp_path / "blocks", tmp_path / "then", base=mamba, text=text_file, **given
    )
    assert_same(tmp_path / "out", tmp_path / "then")
    assert report["finetune"]["kl_after"] == found["kl_after"] <= found["kl_before"]
    assert found["tokens"] == 2 * 32 * -(-tokens // 32)
    read = lambda name: json.loads((tmp_path / "out" / name).read_text("utf-8"))  # noqa: E731
    assert read("recipe.json")["options"]["preset"] == "best"
    assert (
        read("recipe.json")["options"]["text"] == [str(text_file)] == read("finetune.json")["text"]
    )
    assert read("report.json")["finetune"]["steps"] == found["steps"]
    assert report["seconds"] >= report["finetune"]["seconds"] > 0


def test_best_without_text_learns_from_two_that_the_model_wrote(run, mamba, tmp_path, monkeypatch):
    written = []
    sample = own_text.sample

    def noting(model, file, **options):
        written.append((file.name, options["seed"]))
        return sample(model, file, **options)

    monkeypatch.setattr(own_text, "sample", noting)
    report = run(text=())
    assert written == [("out.sample.jsonl", 0), ("out.own.jsonl", 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert report["finetune"]["tokens"] == 2 * 32 * -(-OPTIONS["tokens"] // 32)


def test_a_killed_end_goes_on_from_the_finished_blocks(run, tmp_path, monkeypatch):
    run("whole")

    def killed(*_):
        raise RunError("the run was stopped")

    with monkeypatch.context() as patch:
        patch.setattr(module, "finetune_blocks", killed)
        with pytest.raises(RunError, match=r"finished in .*out\.blocks: the same command goes on"):
            run()
    assert not (tmp_path / "out").exists() and (tmp_path / "out.blocks").is_dir()
    with pytest.raises(InputError, match=r"out\.own\.jsonl is not of this command; delete it"):
        run(seed=1)
    with pytest.raises(InputError, match=r"out\.blocks is of another command \(options\.reduction"):
        run(reduction=0.2)
    with monkeypatch.context() as patch:
        patch.setattr(module.Run, "run", lambda self: pytest.fail("compressed again"))
        run()
    assert_same(tmp_path / "out", tmp_path / "whole")
    assert not (tmp_path / "out.blocks").exists()


def test_out_is_looked_at_before_the_work(run, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(InputError, match="exists; choose another OUT or pass --overwrite"):
        run()
    with pytest.raises(InputError, match="is not a model compressed by lillama"):
        run(overwrite=True)
    with pytest.raises(InputError, match="create it first"):
        run("missing/out")
    (tmp_path / "short.txt").write_text("too little")
    monkeypatch.setattr(own_text, "sample", lambda *_, **__: pytest.fail("written"))
    with pytest.raises(InputError, match="the text is too short"):
        run("new", text=tmp_path / "short.txt")
    monkeypatch.undo()
    (tmp_path / "other.blocks").mkdir()
    with pytest.raises(InputError, match=r"other\.blocks is in the way"):
        run("other")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_a_compressed_out_is_replaced(run, tmp_path):
    run(preset="fast")
    before = tensors(tmp_path / "out")
    run(overwrite=True)
    after = tensors(tmp_path / "out")
    assert any(not value.equal(after.get(name)) for name, value in before.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_several_processes_are_refused(run, monkeypatch):
    two = type("Two", (), {"world_size": 2, "close": print})
    monkeypatch.setattr(module, "Processes", two)
    with pytest.raises(InputError, match="one process, got 2; use preset default"):
        run()


def test_without_training_best_is_fast(run, tmp_path):
    run(train=False)
    run("fast", preset="fast", tokens=OPTIONS["tokens"])
    assert_same(tmp_path / "out", tmp_path / "fast")
