"""export of models whose embeddings and output head are factorised too."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lillama
from lillama import export
from lillama.checkpoint.pivots import order_of
from lillama.errors import InputError

module = importlib.import_module("lillama.checkpoint.export")
EXPERTS = "model.layers.{}.block_sparse_moe.experts.{}.{}"
LAYERS = {
    # layer 1 stays dense, so does w3 of expert 1
    "mixtral": {EXPERTS.format(0, e, w): 4 + 4 * e for e, w in ((0, "w1"), (1, "w2"), (2, "w3"))},
    "mamba": {"backbone.layers.0.mixer.in_proj": 12, "backbone.layers.1.mixer.out_proj": 8},
}
VOCABULARY = {
    "mixtral": {"model.embed_tokens": 12, "lm_head": 8},
    "mamba": {"backbone.embeddings": 12, "lm_head": 8},
}
UNTIED = {"tie_word_embeddings": False}
IDS = torch.arange(24).view(2, 12) * 11 % 300


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def logits_of(folder: Path) -> Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[f"{name}_keys"] for name in ("missing", "unexpected", "mismatched"))
    with torch.no_grad():
        return model.eval()(IDS).logits


def table_of(tensors: dict[str, Tensor], name: str) -> Tensor:
    """W of the embeddings or the head in fp64, from the definition of each gauge."""
    keys = [n.rpartition(".")[2] for n in tensors if n.startswith(f"{name}.lr_")]
    found = {key: tensors[f"{name}.{key}"].double() for key in keys}
    if "lr_C" not in found:
        return found["lr_B"] @ found["lr_A"]
    order = order_of(found["lr_pivots"], found["lr_C"].shape[1]).long()
    if name == "lm_head":
        return torch.cat([found["lr_A"], found["lr_C"] @ found["lr_A"]])[order]
    return torch.cat([found["lr_B"], found["lr_B"] @ found["lr_C"].mT], -1)[:, order]


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


@pytest.fixture(scope="module")
def make_source(make_low_rank, tokenizer, tmp_path_factory):
    """make_source(kind, ranks, dtype, gauge) -> folder of a compressed model without tied
    weights."""

    def make(
        kind: str, ranks: dict[str, int], dtype: torch.dtype = torch.float32, gauge: str = "plain"
    ) -> Path:
        path = tmp_path_factory.mktemp("sources") / kind
        make_low_rank(kind, ranks, dtype, gauge, **UNTIED).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return make


@pytest.mark.parametrize("gauge", ["plain", "pivot"])
@pytest.mark.parametrize("layers", [True, False], ids=["with-layers", "alone"])
@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_export_dense_of_a_factorised_vocabulary(
    kind, layers, gauge, make_source, make_model, tmp_path
):
    ranks = VOCABULARY[kind] | (LAYERS[kind] if layers else {})
    source = make_source(kind, ranks, gauge=gauge)
    report = export(source, tmp_path / "new")
    old, new = tensors_of(source), tensors_of(tmp_path / "new")
    for name in VOCABULARY[kind]:
        product = table_of(old, name)
        torch.testing.assert_close(new[f"{name}.weight"].double(), product, rtol=1e-4, atol=1e-5)
    make_model(kind, **UNTIED).save_pretrained(tmp_path / "base")
    wanted = tensors_of(tmp_path / "base")
    assert {n: t.shape for n, t in new.items()} == {n: t.shape for n, t in wanted.items()}
    assert report["bytes_after"] == sum(t.nbytes for t in wanted.values())
    assert report["params"] == sum(t.numel() for t in wanted.values())
    assert report["matrices"] == len(ranks)
    assert_close(logits_of(tmp_path / "new"), logits_of(source))


@pytest.mark.parametrize("layers", [True, False], ids=["with-layers", "alone"])
@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_export_changes_the_gauge_of_everything(
    dtype, kind, layers, make_source, tmp_path, monkeypatch
):
    """There and back."""
    needed = []
    monkeypatch.setattr(module, "check_space", lambda out, num_bytes: needed.append(num_bytes))
    ranks = VOCABULARY[kind] | (LAYERS[kind] if layers else {})
    source = make_source(kind, ranks, dtype)
    pivot, plain = tmp_path / "pivot", tmp_path / "plain"
    reports = [export(source, pivot, format="pivot"), export(pivot, plain, format="plain")]
    assert needed == [report["bytes_after"] for report in reports]
    assert [report["matrices"] for report in reports] == [len(ranks)] * 2
    wanted, found, again = (tensors_of(folder) for folder in (source, pivot, plain))
    assert again.keys() == wanted.keys()
    for name in ranks:
        # of the embeddings it is A that the identity is a part of
        gone, kept = "AB" if "embed" in name else "BA"
        assert f"{name}.lr_C" in found and f"{name}.lr_{gone}" not in found
        assert f"{name}.lr_B" in again and f"{name}.lr_C" not in again
        assert torch.equal(again[f"{name}.lr_{kept}"], found[f"{name}.lr_{kept}"])
    for name in VOCABULARY[kind]:
        tables = [table_of(tensors, name) for tensors in (wanted, found, again)]
        assert torch.equal(tables[1], tables[2])
        error = float((tables[1] - tables[0]).norm() / tables[0].norm())
        assert error < (1e-6 if dtype == torch.float32 else 0.01)
    # parameters are counted without the sentinel and without marks
    others = ("lr_pivots", f"{min(VOCABULARY[kind].keys() - {'lm_head'})}.weight", "down_proj")
    for report, tensors in zip(reports, (found, again), strict=True):
        assert report["params"] == sum(
            tensor.numel() for name, tensor in tensors.items() if not name.endswith(others)
        )
    assert_close(logits_of(plain), logits_of(pivot))
    if dtype == torch.float32:
        assert_close(logits_of(pivot), logits_of(source))


@pytest.mark.parametrize("name", VOCABULARY["mamba"])
def test_export_refuses_damaged_marks(name, make_source, tmp_path):
    source = make_source("mamba", VOCABULARY["mamba"], gauge="pivot")
    tensors = load_file(source / "model.safetensors")
    tensors[f"{name}.lr_pivots"].zero_()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for format in ("dense", "plain"):
        with pytest.raises(InputError, match=f"{name}.lr_pivots must be 1 for"):
            export(source, tmp_path / "new", format=format)
    with pytest.raises(InputError, match=f"{name}.lr_pivots must be 1 for"):
        AutoModelForCausalLM.from_pretrained(source)
    tensors.pop(f"{name}.lr_C")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"missing factors: {name}.lr_C"):
        AutoModelForCausalLM.from_pretrained(source)


def test_export_dense_of_what_compress_writes(make_checkpoint, text_file, tmp_path):
    """Its sentinel is named after the embeddings."""
    base, out = make_checkpoint("mamba", **UNTIED), tmp_path / "out"
    targets = ("embeddings", "lm_head", "in_proj")
    reduction = 0.95 * lillama.plan(base, 0.01, targets=targets)["max_reduction"]
    lillama.compress(
        base, out, reduction=reduction, text=text_file, tokens=300, seq_len=32, device="cpu",
        targets=targets, preset="fast", gauge="pivot",
    )  # fmt: skip
    values = json.loads((out / "config.json").read_text())["quantization_config"]
    assert VOCABULARY["mamba"].keys() < values["ranks"].keys() and values["gauge"] == "pivot"
    for format in ("dense", "plain"):
        export(out, tmp_path / format, format=format)
        assert_close(logits_of(tmp_path / format), logits_of(out))
