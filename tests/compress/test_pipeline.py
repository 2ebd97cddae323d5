"""compress from end to end on tiny teachers: what OUT holds, and that transformers loads it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import lillama
from lillama import config
from lillama.compress.measure.svd import plain_svd
from lillama.compress.pipeline import COPIED_FILES
from lillama.compress.plan.allocate import removed
from lillama.compress.plan.targets import find_matrices
from lillama.models.config_json import read_config
from lillama.models.families import family_of
from lillama.models.skeleton import skeleton
from lillama.modules import LowRankExperts, LowRankLinear

KINDS = ["mixtral", "mamba"]
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
REPORT_KEYS = {
    "params_before",
    "params_after",
    "reduction",
    "target_reduction",
    "tokens",
    "seconds",
    "peak_memory_bytes",
    "blocks",
}


@pytest.fixture
def small(text_file: Path, tmp_path: Path, device: torch.device):
    """small(model, name="out", **options) -> (report, OUT), few tokens; "uniform" and "plain"
    unless told."""

    def run(model: Path, name: str = "out", **options: Any) -> tuple[dict, Path]:
        values: dict[str, Any] = {"reduction": 0.2, "text": text_file, "tokens": 400, "seq_len": 32}
        values |= {"strategy": "uniform", "gauge": "plain"}  # which ranks and blocks is known
        out = tmp_path / name
        return lillama.compress(model, out, **{"device": str(device), **values, **options}), out

    return run


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


def layer(name: str) -> int | None:
    found = re.search(r"\.layers\.(\d+)\.", name)
    return None if found is None else int(found[1])


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def ranks_of(out: Path) -> dict[str, int]:
    return json.loads((out / "config.json").read_text())["quantization_config"]["ranks"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_compress_reports_what_it_did(kind, dtype, small, make_checkpoint):
    path = make_checkpoint(kind, dtype, **({"use_bias": True} if kind == "mamba" else {}))
    report, out = small(path)
    plan = lillama.plan(path, 0.2, strategy="uniform", gauge="plain")
    assert report.keys() >= REPORT_KEYS
    for key in ("params_before", "params_after", "bytes_before", "bytes_after", "reduction"):
        assert report[key] == plan[key], key
    assert report["target_reduction"] == 0.2 <= report["reduction"]
    step = max(8 * sum(row["shape"]) for row in plan["matrices"])
    assert report["params_before"] * (report["reduction"] - 0.2) < step
    assert report["tokens"] == 13 * 32
    assert report["seconds"] > 0 and report["peak_memory_bytes"] > 0
    assert [row["index"] for row in report["blocks"]] == [0, 1]
    before, after = (
        sum(row[f"params_{when}"] for row in report["blocks"]) for when in ("before", "after")
    )
    assert before - after == report["params_before"] - report["params_after"]
    assert all(
        row["held_out_loss_after"] <= row["held_out_loss_before"] for row in report["blocks"]
    )
    written = json.loads((out / "report.json").read_text())
    assert written.pop("rank_losses"), "curves for the page are in the file only"
    assert written == json.loads(json.dumps(report))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_compress_out_loads_with_its_own_dtype_bias_and_ties(kind, dtype, small, make_checkpoint):
    path = make_checkpoint(kind, dtype, **({"use_bias": True} if kind == "mamba" else {}))
    report, out = small(path)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert model.dtype == dtype
    modules = [m for m in model.modules() if isinstance(m, LowRankExperts | LowRankLinear)]
    assert len(modules) == (2 if kind == "mixtral" else 4)
    if kind == "mamba":
        assert sum(p.numel() for p in model.parameters()) == report["params_after"]
        assert model.lm_head.weight is model.get_input_embeddings().weight
        teacher = AutoModelForCausalLM.from_pretrained(path)
        for name, module in model.named_modules():
            if isinstance(module, LowRankLinear):
                bias = teacher.get_submodule(name).bias
                torch.testing.assert_close(module.bias, bias, rtol=0.1, atol=0.05)
                assert bool((module.bias != 0).any())
    again = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_compress_without_training_stores_the_truncated_svd(kind, dtype, small, make_checkpoint):
    """Preset paper starts from the plain SVD: its product is known exactly."""
    path = make_checkpoint(kind, dtype)
    _, out = small(path, preset="paper", train=False)
    base, tensors = tensors_of(path), tensors_of(out)
    assert ranks_of(out)
    for name, rank in ranks_of(out).items():
        A, B = tensors[f"{name}.lr_A"], tensors[f"{name}.lr_B"]
        W = base[f"{name}.weight"]
        assert f"{name}.weight" not in tensors or tensors[f"{name}.weight"].shape != W.shape
        assert A.shape == (rank, W.shape[1]) and B.shape == (W.shape[0], rank)
        assert A.dtype == B.dtype == dtype
        best_A, best_B = plain_svd(W, rank)
        error = (B.double() @ A.double() - best_B @ best_A).norm() / W.double().norm()
        assert error < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_compress_trained_products_stay_close_to_the_teacher(kind, small, make_checkpoint):
    path = make_checkpoint(kind)
    _, out = small(path, reduction=0.1)
    base, tensors = tensors_of(path), tensors_of(out)
    for name in ranks_of(out):
        W = base[f"{name}.weight"]
        product = tensors[f"{name}.lr_B"] @ tensors[f"{name}.lr_A"]
        assert (product - W).norm() < 0.8 * W.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_compress_leaves_the_other_layers_byte_identical(dtype, small, make_checkpoint):
    path = make_checkpoint("mixtral", dtype, num_hidden_layers=3)
    report, out = small(path, reduction=0.1, strategy="bottom")
    assert [row["index"] for row in report["blocks"]] == [0]
    base, tensors = tensors_of(path), tensors_of(out)
    others = {name for name in base if layer(name) != 0}
    assert {name for name in tensors if layer(name) != 0} == others
    assert {layer(name) for name in others} == {1, 2, None}
    assert all(same_bytes(tensors[name], base[name]) for name in others)
    ranks = ranks_of(out)
    assert {layer(f"{name}.") for name in ranks} == {0}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", ["default", "fast", "paper"])
def test_compress_presets_use_their_strategy(preset, kind, small, request):
    path = request.getfixturevalue(kind)
    report, out = small(path, preset=preset, reduction=0.1, strategy=None)
    recipe = json.loads((out / "recipe.json").read_text())
    paper = "bottom" if kind == "mixtral" else "uniform"
    assert recipe["strategy"] == (paper if preset == "paper" else "global")
    assert recipe["options"]["preset"] == preset
    if preset == "paper":
        blocks = [0] if kind == "mixtral" else [0, 1]
        assert [row["index"] for row in report["blocks"]] == blocks
        assert report["predicted_loss_increase"] is None
    else:
        assert report["predicted_loss_increase"] > 0
    trained = sum(row["steps"] for row in report["blocks"]) > 0
    assert trained == (preset != "fast")


def test_compress_bottom_with_mixed_ranks_works_end_to_end(small, mixtral, short_text, device):
    """A search that stops in its first sweep: some experts of one layer stay dense."""
    report, out = small(mixtral, reduction=0.03, strategy="bottom")
    ranks = ranks_of(out)
    assert {name.split("experts.")[1]: rank for name, rank in ranks.items()} == {
        "0.w1": 16, "0.w2": 16, "0.w3": 16, "1.w1": 16, "1.w2": 16
    }  # fmt: skip
    base, tensors = tensors_of(mixtral), tensors_of(out)
    prefix = "model.layers.0.block_sparse_moe.experts"
    assert tensors[f"{prefix}.1.w3.lr_W"].shape == (64, 32)
    assert f"{prefix}.1.w1.lr_W" not in tensors
    torch.testing.assert_close(
        tensors[f"{prefix}.3.w2.lr_W"], base[f"{prefix}.3.w2.weight"], rtol=0.2, atol=0.1
    )
    measured = lillama.eval(out, short_text, against=mixtral, seq_len=64, device=str(device))
    assert measured["params"] == report["params_after"]
    assert measured["bytes"] == report["bytes_after"]
    assert 0.9 < measured["retained"] < 1.1 and 0 < measured["kl"] < 0.5
    assert lillama.generate(out, "the cat", max_new_tokens=4, device=str(device))


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("kind", KINDS)
def test_compress_exactly_low_rank_teacher_is_retained_without_training(
    kind, preset, small, make_checkpoint, short_text, device
):
    def low_rank(weight: Tensor) -> None:
        A, B = plain_svd(weight, 8)
        weight.copy_(B @ A)

    def edit(model):
        for name, parameter in model.named_parameters():
            if name.endswith("gate_up_proj"):
                for expert in parameter.data:
                    low_rank(expert[:64])
                    low_rank(expert[64:])
            elif name.endswith("experts.down_proj"):
                for expert in parameter.data:
                    low_rank(expert)
            elif name.endswith(("in_proj.weight", "out_proj.weight")):
                low_rank(parameter.data)

    path = make_checkpoint(kind, edit=edit)
    config = read_config(path)
    model = skeleton(config)
    matrices = find_matrices(model, family_of(config.model_type), None)
    total = sum(p.numel() for p in model.parameters())
    reduction = removed(matrices, {m.name: 8 for m in matrices}) / total
    _, out = small(path, preset=preset, strategy="uniform", reduction=reduction, train=False)
    assert ranks_of(out) == {m.name: 8 for m in matrices}
    measured = lillama.eval(out, short_text, against=path, seq_len=64, device=str(device))
    assert measured["retained"] >= 0.999
    assert measured["kl"] < 1e-4 and measured["top1_agreement"] > 0.999


def test_compress_targets_x_proj(small, make_checkpoint):
    path = make_checkpoint("mamba", hidden_size=64, state_size=16, time_step_rank=16)
    _, out = small(path, targets=("x_proj", "in_proj"), reduction=0.1)
    assert {name.rsplit(".")[-1] for name in ranks_of(out)} == {"x_proj", "in_proj"}
    model = AutoModelForCausalLM.from_pretrained(out)
    mixer = "backbone.layers.0.mixer"
    assert isinstance(model.get_submodule(f"{mixer}.x_proj"), LowRankLinear)
    assert not isinstance(model.get_submodule(f"{mixer}.out_proj"), LowRankLinear)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_compress_dtype_option_decides_what_is_stored(dtype, small, mixtral):
    report, out = small(mixtral, dtype=dtype)
    wanted = getattr(torch, dtype)
    sentinels = {"model.layers.0.mlp.experts.down_proj"}
    stored = tensors_of(out)
    assert {t.dtype for name, t in stored.items() if name not in sentinels} == {wanted}
    assert report["bytes_after"] == report["params_after"] * wanted.itemsize
    assert AutoModelForCausalLM.from_pretrained(out).dtype == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_compress_out_folder_is_complete(kind, small, request, tokenizer):
    path = request.getfixturevalue(kind)
    report, out = small(path, seed=3)
    names = {file.name for file in out.iterdir()}
    assert names >= {"config.json", "recipe.json", "report.json", "README.md"}
    assert names >= {n for n in COPIED_FILES if (path / n).exists()} >= {"tokenizer.json"}
    assert AutoTokenizer.from_pretrained(out).encode("the cat") == tokenizer.encode("the cat")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["gauge"]) == ("lillama", "plain")
    assert config["reduction"] == report["reduction"] and config["recipe"] == "default"
    assert config["base_model"] == str(path)
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["options"]["seed"] == 3 and recipe["options"]["tokens"] == 400
    assert recipe["options"]["preset_values"]["init"] == "fisher"
    card = (out / "README.md").read_text()
    assert ModelCard(card).data.to_dict() == {
        "base_model": path.name,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lillama", "low-rank"],
    }
    assert f"| {report['params_before']:,} | {report['params_after']:,} |" in card
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors_of(out))


def test_compress_without_import_lillama_does_not_load(small, mixtral, monkeypatch):
    """The sentinel: what a user without lillama sees is an error, not random weights."""
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
    )

    _, out = small(mixtral)
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "lillama")
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "lillama")
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(out)


def test_fast_takes_no_more_tokens_than_it_has_a_use_for(small, mamba, caplog, monkeypatch):
    """256 for each of hidden_size, and says what it leaves out of those asked for."""
    monkeypatch.setattr(config, "LEAST_TOKENS", 100)
    most = 256 * read_config(mamba).hidden_size
    capped, out = small(mamba, preset="fast", tokens=most + 1000)
    assert f"preset fast takes {most} of {most + 1000} calibration tokens" in caplog.text
    caplog.clear()
    asked, same = small(mamba, "same", preset="fast", tokens=most)
    assert "calibration tokens" not in caplog.text
    assert capped["tokens"] == asked["tokens"] == most
    assert json.loads((out / "recipe.json").read_text())["options"]["tokens"] == most
    found, wanted = tensors_of(out), tensors_of(same)
    assert found.keys() == wanted.keys() and all(same_bytes(found[n], wanted[n]) for n in found)
