"""export: the same model in other files, all of it or nothing."""

import importlib
import json
import os
import shutil
import signal
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lillama
from lillama import export
from lillama.checkpoint.format import read_headers
from lillama.checkpoint.gauge import LARGEST
from lillama.cli import app as cli
from lillama.errors import InputError, RunError
from lillama.integrations.loading import load_tokenizer
from tests.forked import Forked

module = importlib.import_module("lillama.checkpoint.export")
EXPERTS = "model.layers.{}.block_sparse_moe.experts.{}.{}"
# ragged ranks; w3 of expert 1 stays dense, so does all of layer 1 but its w2
MIXTRAL = {
    EXPERTS.format(0, e, w): 4 + 4 * ((e + len(w)) % 3)
    for e in range(4)
    for w in ("w1", "w2", "w3")
    if (e, w) != (1, "w3")
} | {EXPERTS.format(1, e, "w2"): 8 for e in range(4)}
MAMBA = {"backbone.layers.0.mixer.in_proj": 12, "backbone.layers.1.mixer.out_proj": 8}
RANKS = {"mixtral": MIXTRAL, "mamba": MAMBA}
IDS = torch.arange(24).view(2, 12) * 11 % 300


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def logits_of(folder: Path) -> Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    with torch.no_grad():
        return model.eval()(IDS).logits


def assert_close(found: Tensor, wanted: Tensor, relative: float = 1e-5) -> None:
    assert float((found - wanted).norm() / wanted.norm()) < relative


@pytest.fixture(scope="module")
def make_source(make_low_rank, tokenizer, tmp_path_factory):
    """make_source(kind, dtype=..., max_shard_size=...) -> folder of a compressed model."""

    def make(kind: str, dtype=torch.float32, max_shard_size="50GB", **changes) -> Path:
        model = make_low_rank(kind, RANKS[kind], dtype, **changes)
        path = tmp_path_factory.mktemp("sources") / kind
        model.save_pretrained(path, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(path)
        (path / "recipe.json").write_text('{"command": "compress"}\n')
        return path

    return make


@pytest.fixture(scope="module")
def sources(make_source) -> dict[str, Path]:
    return {kind: make_source(kind) for kind in RANKS}


@pytest.fixture(scope="module")
def pivot(mamba, text_file, tmp_path_factory) -> Path:
    """A Mamba that `compress` wrote in the pivot gauge, one shard a block."""
    out = tmp_path_factory.mktemp("pivot") / "out"
    lillama.compress(
        mamba,
        out,
        reduction=0.2,
        text=text_file,
        tokens=300,
        seq_len=32,
        preset="whitened",
        train=False,
        gauge="pivot",
        device="cpu",
    )
    return out


@pytest.mark.parametrize("kind", ["mixtral", "mamba", "pivot"])
def test_export_dense_computes_the_same_without_lillama(kind, sources, request, tmp_path):
    source = request.getfixturevalue("pivot") if kind == "pivot" else sources[kind]
    base = request.getfixturevalue("mamba" if kind == "pivot" else kind)
    new = tmp_path / "new"
    report = export(source, new)
    config = json.loads((new / "config.json").read_text())
    assert "quantization_config" not in config
    found, wanted = read_headers(new), read_headers(base)
    assert {n: h.shape for n, h in found.items()} == {n: h.shape for n, h in wanted.items()}
    assert_close(logits_of(new), logits_of(source))
    dense = AutoModelForCausalLM.from_pretrained(new)
    assert report["params"] == sum(p.numel() for p in dense.parameters())
    assert report["bytes_after"] == sum(h.num_bytes for h in found.values())
    assert report["matrices"] == len(
        json.loads((source / "config.json").read_text())["quantization_config"]["ranks"]
    )


def test_export_dense_products_are_rounded_once(make_source, tmp_path):
    source = make_source("mamba", torch.bfloat16)
    export(source, tmp_path / "new", format="dense")
    old, new = tensors_of(source), tensors_of(tmp_path / "new")
    for name in MAMBA:
        A, B = old[f"{name}.lr_A"], old[f"{name}.lr_B"]
        assert A.dtype == torch.bfloat16
        assert torch.equal(new[f"{name}.weight"], (B.float() @ A.float()).bfloat16())
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_export_reads_factors_that_lie_in_different_shards(make_source, tmp_path):
    source = make_source("mixtral", max_shard_size="4KB")
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    apart = [n for n in MIXTRAL if index[f"{n}.lr_A"] != index[f"{n}.lr_B"]]
    assert apart
    export(source, tmp_path / "new")
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(read_headers(tmp_path / "new"))
    assert index["metadata"]["total_size"] == sum(
        h.num_bytes for h in read_headers(tmp_path / "new").values()
    )
    assert_close(logits_of(tmp_path / "new"), logits_of(source))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_export_changes_the_gauge_there_and_back(kind, dtype, make_source, tmp_path):
    source, ranks = make_source(kind, dtype), RANKS[kind]
    report = export(source, tmp_path / "pivot", format="pivot")
    export(tmp_path / "pivot", tmp_path / "plain", format="plain")
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    wanted = logits_of(source)
    assert_close(logits_of(tmp_path / "pivot"), wanted, rounding)
    # the identity in B makes this exact but for the order of the sums
    assert_close(logits_of(tmp_path / "plain"), logits_of(tmp_path / "pivot"))
    tensors = tensors_of(tmp_path / "pivot")
    for name, rank in ranks.items():
        A, C = tensors[f"{name}.lr_A"], tensors[f"{name}.lr_C"]
        assert A.dtype == C.dtype == dtype and len(A) == rank
        assert float(C.abs().max()) <= 2 * LARGEST
        marks = tensors[f"{name}.lr_pivots"]
        assert marks.dtype == torch.uint8 and int(marks.sum()) == rank
    saved = sum(rank**2 for rank in ranks.values())
    num_outputs = sum(len(tensors[f"{name}.lr_pivots"]) for name in ranks)
    assert report["bytes_before"] - report["bytes_after"] == saved * dtype.itemsize - num_outputs
    values = json.loads((tmp_path / "pivot" / "config.json").read_text())["quantization_config"]
    assert values["gauge"] == "pivot" and values["ranks"] == ranks
    dense = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(source).config)
    params = sum(p.numel() for p in dense.parameters())
    assert values["reduction"] == pytest.approx(1 - report["params"] / params)


def test_export_pivot_to_plain_keeps_the_sentinel_and_says_who_wrote_it(pivot, tmp_path):
    export(pivot, tmp_path / "plain", format="plain")
    for folder in (pivot, tmp_path / "plain"):
        values = json.loads((folder / "config.json").read_text())["quantization_config"]
        # vLLM asks every quantization_config for producer.name
        assert values["producer"] == {"name": "lillama", "version": lillama.__version__}
        # the sentinel went along
        assert read_headers(folder)[values["sentinel"]].shape == (1,)
    assert_close(logits_of(tmp_path / "plain"), logits_of(pivot))
    assert not any(n.endswith((".lr_C", ".lr_pivots")) for n in read_headers(tmp_path / "plain"))


def test_export_keeps_what_lies_beside_the_weights(sources, tmp_path, tokenizer):
    source = sources["mixtral"]
    (source / "generation_config.json").write_text('{"max_length": 33}\n')
    export(source, tmp_path / "new")
    for name in ("recipe.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "new" / name).read_bytes() == (source / name).read_bytes()
    assert load_tokenizer(tmp_path / "new")("the cat").input_ids == tokenizer("the cat").input_ids
    card = (tmp_path / "new" / "README.md").read_text()
    assert "multiplied" in card and "import lillama" not in card
    assert not any(f.name.startswith(".") for f in (tmp_path / "new").iterdir())


def test_export_holds_one_product_at_a_time(sources, tmp_path, monkeypatch):
    made: list[weakref.ref] = []
    product = module._Source.product

    def watched(source, matrix):
        assert [ref for ref in made if ref() is not None] == []
        result = product(source, matrix)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(module._Source, "product", watched)
    export(sources["mixtral"], tmp_path / "new")
    assert len(made) == len(MIXTRAL)


@pytest.mark.parametrize("error", [OSError("gone"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("place", ["write_shard", "sync", "_copies"])
def test_export_leaves_nothing_of_what_failed(place, error, sources, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise error

    if place == "sync":
        monkeypatch.setattr("lillama.folder_writer.sync", fail)
    else:
        monkeypatch.setattr(module, place, fail)
    with pytest.raises((RunError, KeyboardInterrupt)):
        export(sources["mamba"], tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_export_takes_over_what_a_kill_left_and_nothing_else(sources, tmp_path):
    left = tmp_path / "new.unfinished"
    left.mkdir()
    (left / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is in the way and is no unfinished run; move it"):
        export(sources["mamba"], tmp_path / "new")
    (left / ".claim").write_text('{"command": "compress"}')
    with pytest.raises(InputError, match='another command .command was "compress", is "export".;'):
        export(sources["mamba"], tmp_path / "new")
    # now as a killed export leaves it
    (left / ".claim").write_text('{"command": "export"}')
    (left / "notes.txt").rename(left / "model.safetensors")
    export(sources["mamba"], tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert_close(logits_of(tmp_path / "new"), logits_of(sources["mamba"]))


def test_export_killed_leaves_no_new_folder_and_can_be_run_again(sources, tmp_path):
    new = tmp_path / "here" / "new"
    new.parent.mkdir()
    write = module.write_shard

    def killed(*args: Any) -> None:
        write(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        module.write_shard = killed
        export(sources["mamba"], new)

    assert Forked(work, tmp_path / "said").wait().code == -signal.SIGKILL
    assert [path.name for path in new.parent.iterdir()] == ["new.unfinished"]
    assert list(new.with_name("new.unfinished").glob("*.safetensors"))
    export(sources["mamba"], new)
    assert [path.name for path in new.parent.iterdir()] == ["new"]


def broken(source: Path, out: Path, edit) -> Path:
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    edit(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def drop_factor(tensors: dict[str, Tensor]) -> None:
    del tensors["backbone.layers.0.mixer.in_proj.lr_B"]


def not_a_number(tensors: dict[str, Tensor]) -> None:
    tensors["backbone.layers.0.mixer.in_proj.lr_B"][3, 2] = float("nan")


def too_large(tensors: dict[str, Tensor]) -> None:
    for letter in "AB":
        name = f"backbone.layers.0.mixer.in_proj.lr_{letter}"
        tensors[name] = torch.full_like(tensors[name], 1000.0, dtype=torch.float16)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (drop_factor, InputError, "missing factors: backbone.layers.0.mixer.in_proj.lr_B"),
        (not_a_number, RunError, "backbone.layers.0.mixer.in_proj becomes NaN or infinite"),
        (too_large, RunError, "in_proj becomes NaN or infinite in float16"),
    ],
)
def test_export_refuses_a_damaged_checkpoint(edit, error, message, sources, tmp_path):
    source = broken(sources["mamba"], tmp_path / "source", edit)
    with pytest.raises(error, match=message):
        export(source, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_export_refuses_marks_that_do_not_fit_the_rank(pivot, tmp_path):
    shutil.copytree(pivot, tmp_path / "source")
    for file in (tmp_path / "source").glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith(".lr_pivots"):
                tensors[name][0] ^= 1
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="lr_pivots must be 1 for .* outputs and 0 for the others"):
        export(tmp_path / "source", tmp_path / "new")
    assert not (tmp_path / "new.unfinished").exists()


def test_export_refuses_what_it_cannot_do(mamba, sources, pivot, tmp_path):
    new = tmp_path / "new"
    with pytest.raises(InputError, match="is not compressed by lillama; there is nothing"):
        export(mamba, new)
    with pytest.raises(InputError, match="--format must be one of dense, plain, pivot, got 'x'"):
        export(pivot, new, format="x")
    with pytest.raises(InputError, match="is in the pivot gauge already"):
        export(pivot, new, format="pivot")
    with pytest.raises(InputError, match="is in the plain gauge already"):
        export(sources["mixtral"], new, format="plain")
    with pytest.raises(InputError, match="does not exist; create it first"):
        export(pivot, tmp_path / "a" / "b")
    new.mkdir()
    with pytest.raises(InputError, match="new exists; choose another OUT$"):
        export(pivot, new)
    assert list(tmp_path.iterdir()) == [new]


@pytest.mark.parametrize("format", ["dense", "pivot", "plain"])
def test_export_knows_the_space_it_will_need(format, sources, pivot, tmp_path, monkeypatch):
    needed = []
    monkeypatch.setattr(module, "check_space", lambda out, num_bytes: needed.append(num_bytes))
    report = export(
        pivot if format == "plain" else sources["mamba"], tmp_path / "new", format=format
    )
    assert needed == [report["bytes_after"]]


def test_export_without_space_starts_nothing(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("U", (), {"free": 1000})())
    with pytest.raises(RunError, match="free space"):
        export(sources["mamba"], tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_export_command(pivot, tmp_path, monkeypatch, capfd):
    new = tmp_path / "new"
    command = ["lillama", "export", str(pivot), str(new), "--format", "plain", "--json"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    report = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert report["format"] == "plain" and report["bytes_after"] > report["bytes_before"]
    assert (new / "config.json").is_file()
