"""The predicted disk: each part by its definition, the large case that it is for, and real runs."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lillama
import lillama.checkpoint.writer as checkpoint_writer
from benchmarks.synthetic import SHAPES, hub_tensors
from lillama.checkpoint.format import TensorHeader, read_headers
from lillama.compress.plan.disk import peak_disk
from lillama.compress.plan.plan import make_plan
from lillama.config import PlanConfig
from lillama.errors import RunError

GIB = 2**30
PARTS = {"result", "gradients", "steps", "activations", "peak"}


def predicted(model: Path, options: dict[str, Any] | None = None, **how: Any) -> dict[str, int]:
    values = {"reduction": 0.2, "tokens": 3200, "seq_len": 32, **(options or {})}
    config = PlanConfig(model=model, **values)
    return peak_disk(make_plan(config), config, read_headers(model), **how)


def large(folder: Path, shape: str, **options: Any) -> dict[str, int]:
    """Of a model whose weights are not there, in bf16."""
    config_class, values = SHAPES[shape]
    config = config_class(**values, num_hidden_layers=32)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    headers = {
        name: TensorHeader(folder / "x", "BF16", shape, 2 * torch.Size(shape).numel())
        for name, shape in hub_tensors(config).items()
    }
    plan_options = PlanConfig(model=folder, reduction=0.2, **options)
    return peak_disk(make_plan(plan_options), plan_options, headers)


def test_gradients_of_mixtral_8x7b_are_48_gib(tmp_path):
    found = large(tmp_path, "mixtral-8x7b", preset="fast")
    # 32 blocks of 8 experts with 3 squares of 4096 in fp32
    experts = 32 * 8 * 3 * 4096**2 * 4
    assert experts == 48 * GIB <= found["gradients"] < 48.6 * GIB
    assert found["result"] == pytest.approx(0.8 * 2 * 46.7e9, rel=0.01)
    # gradients go as shards come: they do not add up
    assert max(found["gradients"], found["result"]) < found["peak"] < 1.3 * found["result"]
    without = large(tmp_path / "w", "mixtral-8x7b", preset="whitened")
    assert without["gradients"] == 0
    assert without["result"] == pytest.approx(found["result"], rel=1e-4)


@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_parts_are_what_is_written(kind, request):
    model = request.getfixturevalue(kind)
    found = predicted(model)
    assert set(found) == PARTS and found["activations"] == 0
    plan = make_plan(PlanConfig(model=model, reduction=0.2))
    assert found["result"] == pytest.approx(plan.bytes_after, rel=1e-3)
    inside = [m for m in plan.matrices if m.block in (0, 1)]
    outside = [m for m in plan.matrices if m not in inside]
    squares = [sum(min(m.N, m.K) ** 2 * 4 for m in part) for part in (inside, outside)]
    assert found["gradients"] == squares[0] + 2 * squares[1]
    assert predicted(model, {"train": False})["steps"] == 0 < found["steps"]
    assert predicted(model, {"preset": "whitened"})["gradients"] == 0
    half = predicted(model, dtype=torch.bfloat16)["result"]
    assert half == pytest.approx(found["result"] / 2, rel=0.02)
    assert predicted(model, {"preset": "best"})["result"] == 2 * found["result"]
    # each process has a block in work
    assert predicted(model, world_size=3)["steps"] == 3 * found["steps"]


def test_activations_are_what_memory_does_not_hold(mamba):
    train, held_out = 100 * 32 * 32 * 4, 8 * 32 * 32 * 4
    every = 3 * (train + held_out)

    def beyond(memory: int, **how: Any) -> int:
        options = {"activation_memory": memory, "preset": "whitened"}
        return predicted(mamba, options, **how)["activations"]

    assert [beyond(n) for n in (0, held_out, train, every, every - 1)] == [
        every, every - held_out, every - train, 0, held_out,
    ]  # fmt: skip
    assert beyond(0, value_bytes=2) == every // 2
    assert beyond(0, world_size=2) == 2 * every
    # gradients are measured with the states before both blocks, behind them, and a gradient
    measured = predicted(mamba, {"activation_memory": 0, "tokens": 32 * 1000})
    rows = 4 * 32 * 32 * 4
    assert measured["activations"] >= rows


def test_what_is_done_needs_nothing_more(mixtral):
    fresh, half, end = (predicted(mixtral, done=done) for done in (None, {0}, {0, 1}))
    assert fresh["gradients"] > half["gradients"] > end["gradients"] > 0
    assert fresh["steps"] >= half["steps"] > end["steps"] == 0
    assert fresh["result"] == half["result"] == end["result"]


@pytest.mark.parametrize("memory", [0, 2**30], ids=["streams-on-disk", "in-memory"])
@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_a_run_takes_what_was_predicted(kind, memory, request, text_file, tmp_path, monkeypatch):
    """Every saved step, gradient and shard, at the moment it is whole."""
    model, out = request.getfixturevalue(kind), tmp_path / "out"
    options = {"tokens": 1600, "seq_len": 32, "preset": "default", "activation_memory": memory}
    taken, kinds = [], set()
    original = checkpoint_writer.write_shard

    def write_shard(file: Path, entries: Any) -> str:
        digest = original(file, entries)
        files = [path for path in file.parent.iterdir() if path.suffix == ".safetensors"]
        taken.append(sum(path.stat().st_size for path in files))
        kinds.add(file.name.partition("-")[0])
        return digest

    monkeypatch.setattr(checkpoint_writer, "write_shard", write_shard)
    lillama.compress(
        model, out, reduction=0.2, text=text_file, device="cpu", checkpoint_seconds=0, **options
    )
    assert kinds == {"model", "step", "gradients"}
    # activations have files without a name: they are not counted here
    config = PlanConfig(model=model, reduction=0.2, **{**options, "activation_memory": 2**30})
    ranks = json.loads((out / "config.json").read_text())["quantization_config"]["ranks"]
    plan = dataclasses.replace(make_plan(config), ranks=ranks, ranks_are_final=True)
    peak = peak_disk(plan, config, read_headers(model))["peak"]
    assert max(taken) == pytest.approx(peak, rel=0.05)
    assert (predicted(model, options)["activations"] > 0) == (memory == 0)
    assert not list(out.glob("gradients-*"))


@pytest.mark.parametrize("is_resumed", [False, True])
def test_gradients_go_with_their_blocks_shard(mixtral, text_file, tmp_path, is_resumed):
    given = {"reduction": 0.2, "text": text_file, "preset": "default", "device": "cpu"}
    given |= {"tokens": 600, "seq_len": 32}
    seen: dict[str, set[str]] = {}

    def watch(stage: str, done: int, total: int) -> None:
        files = (tmp_path / "out.unfinished").glob("gradients-*")
        seen[stage] = {file.name.partition("-")[2].partition(".")[0] for file in files}

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "block 1 teacher":
            raise RunError("stopped")

    if is_resumed:
        with pytest.raises(RunError, match="stopped"):
            lillama.compress(mixtral, tmp_path / "out", progress=stop, **given)
        # as a kill between the journal's line and the removal leaves it
        shutil.copyfile(
            tmp_path / "out.unfinished" / "gradients-block-1.safetensors",
            tmp_path / "out.unfinished" / "gradients-block-0.safetensors",
        )
    lillama.compress(mixtral, tmp_path / "out", progress=watch, **given)
    assert seen["block 0 teacher"] == (
        {"block-1", "head"} if is_resumed else {"block-0", "block-1", "head"}
    )
    assert seen["block 1 train"] == {"block-1", "head"}


def test_too_small_a_disk_is_told_before_anything_is_measured(
    mixtral, text_file, tmp_path, monkeypatch, caplog
):
    plan = lillama.plan(mixtral, 0.2, preset="fast", tokens=600, seq_len=32)
    found = plan["peak_disk_bytes"]
    assert set(found) == PARTS
    given = {"reduction": 0.2, "text": text_file, "preset": "fast", "device": "cpu"}
    given |= {"tokens": 600, "seq_len": 32}
    # room for the result, and not for what lies beside it
    free = (found["result"] + found["peak"]) // 2
    assert found["result"] < free < found["peak"]
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    caplog.set_level(logging.INFO, "lillama")
    for more in ({}, {"text": ()}):  # the text that the model writes would come first
        with pytest.raises(
            RunError,
            match=r"has 0\.00 GiB free, the run needs 0\.00 GiB more \(0\.00 GiB at its peak; at "
            r"their largest: result 0\.00 GiB, gradients 0\.00 GiB, saved states of training .* "
            r"GiB, activations beyond --activation-memory .* GiB\); free space or choose another",
        ):
            lillama.compress(
                mixtral,
                tmp_path / "out",
                progress=lambda *_: pytest.fail("worked"),
                **{**given, **more},
            )
    assert "the run needs of the disk 0.00 GiB at its peak" in caplog.text
    assert list(tmp_path.iterdir()) == []
    usage = usage._replace(free=found["peak"] + 1000)
    lillama.compress(mixtral, tmp_path / "out", **given)
