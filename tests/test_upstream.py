"""import-upstream: what the paper's code wrote, in our format; what does not fit is refused in one
line and leaves nothing."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lillama
from lillama import cli
from lillama.errors import InputError

EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}"
# two ranks in block 0, where some matrices of some experts have none; block 1 is not distilled
MIXTRAL = {EXPERT.format(0, e, w): 16 if w == "w1" else 8 for e in (0, 1, 3) for w in ("w1", "w2")}
MIXTRAL |= {"model.layers.0.self_attn.q_proj": 8}
LLAMA = {f"model.layers.{i}.mlp.{n}_proj": 8 + 4 * i for i in (0, 1) for n in ("gate", "up")}
QWEN2 = {"model.layers.1.self_attn.q_proj": 8}  # q, k and v have biases in this family
RANKS = {"mixtral": MIXTRAL, "llama": LLAMA, "qwen2": QWEN2}
IDS = torch.arange(24).view(2, 12) * 11 % 300


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def distilled(base: Path, ranks: dict[str, int]) -> dict[str, Tensor]:
    """What upstream's model holds after distillation, by its names: factors where there are ranks,
    every other tensor of such a block changed a little, no bias beside factors."""
    generator = torch.Generator().manual_seed(5)
    blocks = {".".join(name.split(".")[:3]) + "." for name in ranks}
    found = {}
    for name, tensor in sorted(tensors_of(base).items()):
        matrix, _, kind = name.rpartition(".")
        if matrix in ranks and kind == "weight":
            N, K = tensor.shape
            A = torch.randn(ranks[matrix], K, generator=generator) / K**0.5
            B = torch.randn(N, ranks[matrix], generator=generator) / ranks[matrix] ** 0.5
            found |= {f"{matrix}.0.weight": A.bfloat16(), f"{matrix}.1.weight": B.bfloat16()}
        elif matrix not in ranks:
            inside = any(name.startswith(block) for block in blocks)
            found[name] = (tensor * 1.25).bfloat16() if inside else tensor
    return found


def write_blocks(folder: Path, base: Path, ranks: dict[str, int]) -> None:
    """The layout of its distillation: rank_config.json, one .pt a block in checkpoints/, and
    what lies beside them."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "rank_config.json").write_text(json.dumps(ranks))
    (folder / "model.layers.0.with_student_activations.losses").write_text("120\t0.71")
    state = distilled(base, ranks)
    for block in {".".join(name.split(".")[:3]) for name in ranks}:
        own = {
            n.removeprefix(f"{block}."): t for n, t in state.items() if n.startswith(f"{block}.")
        }
        torch.save(own, folder / "checkpoints" / f"{block}.pt")


def write_whole(folder: Path, base: Path, ranks: dict[str, int]) -> None:
    """The layout of its save_lr_llm: a checkpoint whose config.json has `ranks`."""
    folder.mkdir()
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "ranks": ranks}))
    state = {name: tensor.contiguous() for name, tensor in distilled(base, ranks).items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


LAYOUTS = {"blocks": write_blocks, "whole": write_whole}


def multiplied_out(base: Path, ranks: dict[str, int]) -> torch.nn.Module:
    """The dense model that computes what upstream's does: products in fp32, biases beside factors
    gone."""
    state = distilled(base, ranks)
    for name in ranks:
        A, B = (state.pop(f"{name}.{part}.weight").float() for part in (0, 1))
        state[f"{name}.weight"] = B @ A
    for name, tensor in tensors_of(base).items():
        if name.endswith(".bias") and name not in state:
            state[name] = torch.zeros_like(tensor)
    folder = base.parent / "multiplied"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text((base / "config.json").read_text())
    state = {name: tensor.float().contiguous() for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def bases(make_checkpoint) -> dict[str, Path]:
    return {kind: make_checkpoint(kind, tie_word_embeddings=False) for kind in RANKS}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", RANKS)
@torch.no_grad()
def test_import_upstream_computes_what_the_multiplied_out_model_does(
    kind: str, layout: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base, ranks, out = bases[kind], RANKS[kind], tmp_path / "out"
    LAYOUTS[layout](tmp_path / "upstream", base, ranks)
    report = lillama.import_upstream(tmp_path / "upstream", out, base=base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "upstream"]
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    wanted = multiplied_out(base, ranks)(IDS).logits
    assert float((model(IDS).logits - wanted).norm() / wanted.norm()) < 1e-5
    # not by accident: the base itself is far away
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert float((dense(IDS).logits - wanted).norm() / wanted.norm()) > 1e-2
    # in memory experts are padded to one rank, on disk they are not
    stored = sum(tensor.numel() for tensor in tensors_of(out).values()) - 1
    assert report["params_after"] == stored
    assert report["params_before"] == sum(p.numel() for p in dense.parameters())
    assert report["zero_biases"] == (kind == "qwen2")
    found = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (found["ranks"], found["gauge"], found["recipe"]) == (ranks, "plain", "upstream")


def test_import_upstream_writes_names_and_dtypes_as_compress_does(bases, tmp_path):
    write_blocks(tmp_path / "upstream", bases["mixtral"], MIXTRAL)
    lillama.import_upstream(tmp_path / "upstream", tmp_path / "out", base=bases["mixtral"])
    found, state = tensors_of(tmp_path / "out"), distilled(bases["mixtral"], MIXTRAL)
    first = EXPERT.format(0, 0, "w1")
    assert torch.equal(found[f"{first}.lr_A"], state[f"{first}.0.weight"])
    assert torch.equal(found[f"{first}.lr_B"], state[f"{first}.1.weight"])
    assert found[f"{first}.lr_A"].dtype == torch.bfloat16
    # w3 beside factorised w1 and w2, expert 2 beside the others
    names = (EXPERT.format(0, 0, "w3"), EXPERT.format(0, 2, "w1"))
    for name in names:
        assert torch.equal(found[f"{name}.lr_W"], state[f"{name}.weight"])
        assert f"{name}.weight" not in found
    assert f"{EXPERT.format(1, 0, 'w1')}.weight" in found
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert set(recipe["sha256"]) == {"rank_config.json", "checkpoints/model.layers.0.pt"}
    assert (tmp_path / "out" / "tokenizer.json").is_file()


# What is refused

Damage = Callable[[Path], object]
BLOCK = "checkpoints/model.layers.0.pt"
FACTOR = "mlp.gate_proj.0.weight"


def edited(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        state = torch.load(folder / BLOCK, weights_only=True)
        change(state)
        torch.save(state, folder / BLOCK)

    return damage


class Runs:
    """A pickle that makes a folder when it is loaded."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


def replaced_by(value: object) -> Damage:
    return lambda folder: torch.save(value, folder / BLOCK)


def ranks_as(**changes: object) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "rank_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def set_nan(state: dict[str, Any]) -> None:
    state["input_layernorm.weight"][3] = float("nan")


def surplus_block(folder: Path) -> None:
    (folder / BLOCK).with_name("model.layers.7.pt").write_bytes((folder / BLOCK).read_bytes())


REFUSED: dict[str, tuple[Damage, str]] = {
    "missing factor": (
        edited(lambda state: state.pop(FACTOR)),
        "missing: model.layers.0.mlp.gate_proj.0.weight",
    ),
    "missing norm": (
        edited(lambda state: state.pop("input_layernorm.weight")),
        "missing: model.layers.0.input_layernorm.weight",
    ),
    "surplus": (
        edited(lambda state: state.update({"mlp.extra": torch.zeros(2)})),
        "surplus: model.layers.0.mlp.extra",
    ),
    "shape": (
        edited(lambda state: state.update({FACTOR: torch.zeros(9, 32)})),
        "mis-shaped: model.layers.0.mlp.gate_proj.0.weight [9, 32] instead of [8, 32]",
    ),
    "integers": (
        edited(lambda state: state.update({FACTOR: torch.zeros(8, 32, dtype=torch.int8)})),
        "not floating-point: model.layers.0.mlp.gate_proj.0.weight",
    ),
    "nan": (
        edited(set_nan),
        "model.layers.0.input_layernorm.weight holds NaN or infinity; its block",
    ),
    "pickle": (
        replaced_by({"a": Runs()}),
        "model.layers.0.pt is damaged or needs pickle, which can run code and is not used",
    ),
    "no state": (replaced_by([torch.zeros(1)]), "it is no state_dict"),
    "truncated": (
        lambda folder: (folder / BLOCK).write_bytes((folder / BLOCK).read_bytes()[:900]),
        "model.layers.0.pt is damaged or needs pickle",
    ),
    "no file": (
        lambda folder: (folder / BLOCK).unlink(),
        "checkpoints lacks model.layers.0.pt, whose matrices rank_config.json names",
    ),
    "surplus file": (surplus_block, "has model.layers.7.pt, of which rank_config.json names no"),
    "no ranks": (
        lambda folder: (folder / "rank_config.json").unlink(),
        "holds no rank_config.json and no config.json with ranks; give the folder that",
    ),
    "broken ranks": (
        lambda folder: (folder / "rank_config.json").write_text("{"),
        "rank_config.json cannot be read as JSON",
    ),
    "unknown matrix": (
        ranks_as(**{"model.layers.0.mlp.w9": 8}),
        "do not fit --base BASE: model.layers.0.mlp.w9, which is no matrix of this model",
    ),
    "head": (ranks_as(lm_head=8), "do not fit --base BASE: lm_head is in no block"),
    "rank too large": (
        ranks_as(**{"model.layers.0.mlp.gate_proj": 33}),
        "model.layers.0.mlp.gate_proj [64, 32] cannot have rank 33",
    ),
    "rank that is no number": (
        ranks_as(**{"model.layers.0.mlp.gate_proj": "8"}),
        "rank_config.json: the rank of model.layers.0.mlp.gate_proj must be a positive integer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_import_upstream_refuses_in_one_line(case, bases, tmp_path, monkeypatch, capfd):
    damage, message = REFUSED[case]
    base, folder = bases["llama"], tmp_path / "upstream"
    write_blocks(folder, base, LLAMA)
    damage(folder)
    monkeypatch.chdir(tmp_path)
    arguments = ["import-upstream", folder, tmp_path / "out", "--base", base]
    monkeypatch.setattr(sys, "argv", ["lillama", *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main()
    stdout, stderr = capfd.readouterr()
    assert (caught.value.code, stdout, len(stderr.splitlines())) == (2, "", 1), stderr
    assert message.replace("BASE", str(base)) in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["upstream"], "nothing is left, none ran"


def test_import_upstream_refuses_a_base_that_is_compressed_or_of_another_size(
    bases, make_checkpoint, tmp_path
):
    write_blocks(tmp_path / "upstream", bases["llama"], LLAMA)
    out = tmp_path / "out"
    lillama.import_upstream(tmp_path / "upstream", out, base=bases["llama"])
    with pytest.raises(InputError, match="out is compressed itself; give the dense model"):
        lillama.import_upstream(tmp_path / "upstream", tmp_path / "new", base=out)
    with pytest.raises(InputError, match="out exists; choose another OUT"):
        lillama.import_upstream(tmp_path / "upstream", out, base=bases["llama"])
    wider = make_checkpoint("llama", intermediate_size=80)
    with pytest.raises(InputError, match=r"mis-shaped: .*1\.weight \[64, 8\] instead of \[80, 8\]"):
        lillama.import_upstream(tmp_path / "upstream", tmp_path / "new", base=wider)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "upstream"]


def test_cli_import_upstream_prints_the_report(bases, tmp_path, monkeypatch, capfd):
    write_blocks(tmp_path / "upstream", bases["llama"], LLAMA)
    arguments = ["import-upstream", tmp_path / "upstream", tmp_path / "out", "--json"]
    arguments += ["--base", bases["llama"]]
    monkeypatch.setattr(sys, "argv", ["lillama", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    document = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert caught.value.code == 0 and document["matrices"] == len(LLAMA)
    assert document == json.loads((tmp_path / "out" / "report.json").read_text())
