"""The predicted memory: what it counts, and what the large case that it is for must come to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lillama
from benchmarks.synthetic import SHAPES, hub_tensors
from lillama.checkpoint.format import TensorHeader, read_headers
from lillama.compress.plan.memory import peak_memory, resident_bytes
from lillama.compress.plan.plan import make_plan
from lillama.config import PlanConfig
from lillama.data.sequences import held_out_blocks

GIB = 2**30


def predicted(model: Path, **options: Any) -> dict[str, int]:
    values = {"reduction": 0.2, "tokens": 3200, "seq_len": 32, **options}
    config = PlanConfig(model=model, **values)
    return peak_memory(make_plan(config), config, read_headers(model), base_bytes=0)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_peak_is_the_largest_phase(kind, train, request):
    found = predicted(request.getfixturevalue(kind), train=train)
    # the Mamba's head is its embeddings, which stay dense
    trained = {"train", "head"} if kind == "mixtral" else {"train"}
    assert set(found) == {"sensitivity", "embed", "load", "teacher", "factorise", "peak"} | (
        trained if train else {"judge"}
    )
    plain = predicted(request.getfixturevalue(kind), train=train, preset="paper")
    assert set(found) - set(plain) == {"sensitivity"} | (trained - {"train"} if train else set())
    assert found["peak"] == max(value for phase, value in found.items() if phase != "peak")
    assert all(value > 0 for value in found.values())


def test_base_is_added_to_every_phase(mamba):
    config = PlanConfig(model=mamba, reduction=0.2)
    arguments = make_plan(config), config, read_headers(mamba)
    without, with_base = (peak_memory(*arguments, base_bytes=b) for b in (0, 12345))
    assert {phase: value + 12345 for phase, value in without.items()} == with_base


def test_streams_count_up_to_the_budget_and_no_further(mamba):
    """3 of [tokens + held-out, H] in fp32, whole streams only."""
    rows = 100 + held_out_blocks(3200, 32)
    one = rows * 32 * 32 * 4
    found = [
        predicted(mamba, activation_memory=limit)["load"]
        for limit in (0, one - 1, one, 2 * one, 3 * one, 100 * one)
    ]
    assert [value - found[0] for value in found] == [0, 0, one, 2 * one, 3 * one, 3 * one]


def test_held_out_blocks_are_a_fortieth_within_bounds():
    assert [held_out_blocks(tokens, 10) for tokens in (10, 3200, 4005, 8000, 10**6)] == [
        8, 8, 10, 20, 32,
    ]  # fmt: skip


def test_training_takes_more_and_svd_needs_no_moments(mixtral):
    trained, whitened = predicted(mixtral), predicted(mixtral, train=False)
    plain = predicted(mixtral, train=False, preset="paper", strategy="uniform")
    assert trained["train"] > whitened["judge"]
    # per expert 32 x 32 for gate and up together, and 32 x 32 for down
    assert whitened["teacher"] - plain["teacher"] == 4 * 2 * 32 * 32 * 4


def mixtral_8x7b(folder: Path, layers: int) -> tuple[Path, dict[str, TensorHeader]]:
    """config.json alone, and the headers that its shards would have in bf16."""
    config_class, values = SHAPES["mixtral-8x7b"]
    config = config_class(**values, num_hidden_layers=layers)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    headers = {
        name: TensorHeader(folder / "x", "BF16", shape, 2 * torch.Size(shape).numel())
        for name, shape in hub_tensors(config).items()
    }
    return folder, headers


def test_a_block_of_mixtral_8x7b_fits_eight_gib_without_training(tmp_path):
    """The phases that were measured with benchmarks/synthetic.py, see benchmarks/NOTES.md."""
    model, headers = mixtral_8x7b(tmp_path, 4)
    config = PlanConfig(
        model=model, reduction=0.15, strategy="bottom", train=False, tokens=4096, seq_len=512
    )
    found = peak_memory(make_plan(config), config, headers, base_bytes=GIB // 2)
    assert found["peak"] < 7.5 * GIB
    blocks_alone = max(
        size for phase, size in found.items() if phase not in ("sensitivity", "peak")
    )
    assert blocks_alone < 7 * GIB  # all that a preset without gradients needs
    # 1.45e9 numbers in bf16, and gate and up once more while they are stacked
    assert 4.5 * GIB < found["load"] < 5.5 * GIB
    # its size does not matter
    deep, headers = mixtral_8x7b(tmp_path / "deep", 32)
    config = PlanConfig(
        model=deep, reduction=0.018, strategy="bottom", train=False, tokens=4096, seq_len=512
    )
    again = peak_memory(make_plan(config), config, headers, base_bytes=GIB // 2)
    assert again["load"] == found["load"] and again["teacher"] == found["teacher"]


def test_plan_and_report_tell_it(mamba, text_file, tmp_path, device):
    options: dict[str, Any] = {"tokens": 400, "seq_len": 32, "train": False}
    document = lillama.plan(mamba, 0.2, **options)
    assert document["peak_memory_bytes"]["peak"] > resident_bytes() // 2
    report = lillama.compress(
        mamba, tmp_path / "out", reduction=0.2, text=text_file, device=str(device), **options
    )
    assert report["predicted_host_memory_bytes"] > 0
    if device.type == "cpu":
        # the process itself is nearly all of it
        ratio = report["peak_memory_bytes"] / report["predicted_host_memory_bytes"]
        assert 0.85 < ratio < 1.15


def test_plan_of_a_config_alone_says_nothing_of_memory(mamba, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((mamba / "config.json").read_text()))
    )
    assert "peak_memory_bytes" not in lillama.plan(tmp_path, 0.2)
