"""State-space and hybrid families once compressed: on our scan as on transformers' own path, with
targets where a block has them, and with the memory that their training takes. What every family
must do is in test_families.py."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import lillama
import lillama.integrations.mamba as integration
from lillama.compress.plan.plan import make_plan
from lillama.config import PlanConfig
from lillama.integrations.loading import load_model
from lillama.integrations.mamba import fast_mamba
from lillama.models.config_json import read_config
from lillama.models.families import FAMILIES

OUTER = [f"backbone.layers.{n}.mixer.{p}" for n in (0, 1) for p in ("in_proj", "out_proj")]
RANKS = {
    "mamba": dict.fromkeys(OUTER, 8),
    "falcon_mamba": dict.fromkeys([*OUTER, "backbone.layers.1.mixer.x_proj"], 8),
    "mamba2": dict.fromkeys(OUTER, 8),
    "jamba": {
        **{f"model.layers.0.mamba.{p}": 8 for p in ("in_proj", "x_proj", "out_proj")},
        **{f"model.layers.0.feed_forward.experts.{e}.up_proj": 4 + e for e in range(4)},
        **{f"model.layers.1.self_attn.{p}_proj": 6 for p in "qkvo"},
        "model.layers.1.feed_forward.down_proj": 8,
    },
}
NEW = ["falcon_mamba", "jamba", "mamba2"]
GREEDY: dict[str, Any] = {
    **{"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0},
    **{"return_dict_in_generate": True, "output_logits": True, "disable_compile": True},
}
each_new = pytest.mark.parametrize("kind", NEW)


@pytest.fixture(autouse=True)
def _fast_mamba():
    """These tests switch themselves: the fixture of this name for all tests would be in the way."""


def tokens(device: torch.device) -> dict[str, Tensor]:
    """Two rows of 11 tokens, the second padded on the left."""
    ids = torch.randint(1, 300, (2, 11), generator=torch.Generator().manual_seed(3)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def run(model: PreTrainedModel, device: torch.device) -> dict[str, Tensor]:
    """Logits, and the gradient of every parameter for a random gradient of the logits."""
    model.zero_grad()
    logits = model(**tokens(device)).logits
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
    logits.backward(grad.to(device))
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("gauge", ["plain", "pivot"])
@each_new
def test_logits_and_gradients_equal_transformers(kind, gauge, training, make_low_rank, device):
    model = make_low_rank(kind, RANKS[kind], gauge=gauge).to(device).train(training)
    wanted = run(model, device)
    with fast_mamba():
        actual = run(model, device)
    assert actual.keys() == wanted.keys()
    factors = {name for name in wanted if name.rpartition(".")[2].startswith("lr_")}
    # B, or C of the pivot gauge; an expert's are in one stack and never pivot
    assert len(factors) == 2 * sum(".experts." not in name for name in RANKS[kind])
    for name, tensor in wanted.items():
        error = float((actual[name] - tensor).abs().max() / tensor.abs().max().clamp_min(1e-12))
        assert tensor.any() and error < 1e-4, f"{name}: {error:.1e}"


@pytest.mark.parametrize("kind", list(RANKS))
def test_generates_what_transformers_does(kind, make_low_rank, device, tmp_path, monkeypatch):
    """As loaded from a checkpoint: transformers then has its mixers use dt_proj otherwise. The one
    operation that a decode step of Mamba can be knows no norms between x_proj and the scan: no
    other family may take it."""
    make_low_rank(kind, RANKS[kind]).save_pretrained(tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path).to(device).eval()
    assert model.config._is_quantized
    wanted = model.generate(**tokens(device), **GREEDY)
    with fast_mamba():
        actual = model.generate(**tokens(device), **GREEDY)
    assert torch.equal(actual.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(wanted.logits))

    taken = []
    monkeypatch.setattr(
        integration, "mamba_mixer_step_runs_triton", lambda *a: bool(taken.append(1))
    )
    ids = tokens(device)["input_ids"]
    with fast_mamba():
        model.generate(ids, **GREEDY)
    assert bool(taken) == (kind == "mamba")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k == "jamba" else [pytest.mark.full]) for k in NEW]
)
def test_finetune_brings_a_compressed_one_closer(kind, make_checkpoint, text_file, tmp_path):
    base = make_checkpoint(kind)
    options: dict[str, Any] = {"text": text_file, "seq_len": 32, "device": "cpu"}
    lillama.compress(base, tmp_path / "out", reduction=0.3, preset="fast", tokens=600, **options)
    report = lillama.finetune(
        tmp_path / "out", tmp_path / "better", base=base, tokens=8000, learning_rate=3e-4, **options
    )
    assert report["kl_after"] < 0.99 * report["kl_before"] and report["best_step"] > 0


def jamba(make_checkpoint, **changes: Any):
    """Four blocks: experts in 0 and 3, attention in 1 and 3."""
    values = {"num_hidden_layers": 4, "expert_layer_period": 3, "expert_layer_offset": 0}
    return make_checkpoint("jamba", **{**values, **changes})


def test_targets_of_a_hybrid_are_where_the_blocks_have_them(make_checkpoint):
    options: dict[str, Any] = {"model": jamba(make_checkpoint), "reduction": 0.01}

    def names(*targets: str) -> set[str]:
        matrices = make_plan(PlanConfig(**options, targets=targets or None)).matrices
        return {m.name.removeprefix("model.layers.") for m in matrices}

    def mlp(*projections: str) -> set[str]:
        experts = {f"{block}.feed_forward.experts.{e}" for block in (0, 3) for e in range(4)}
        owners = {*experts, "1.feed_forward", "2.feed_forward"}
        return {f"{owner}.{p}" for owner in owners for p in projections}

    projections = ("in_proj", "out_proj", "x_proj")
    mixers = {f"{block}.mamba.{p}" for block in (0, 2) for p in projections}
    vocabulary = {"model.embed_tokens", "lm_head"}
    assert names() == mixers | mlp("gate_proj", "up_proj", "down_proj") | vocabulary
    assert names("x_proj", "k_proj") == {
        *(f"{block}.mamba.x_proj" for block in (0, 2)),
        *(f"{block}.self_attn.k_proj" for block in (1, 3)),
    }
    assert names("up_proj") == mlp("up_proj")


@pytest.mark.parametrize("num_experts", [4, 1])
def test_every_kind_of_block_is_compressed_and_trained(
    num_experts, make_checkpoint, text_file, tmp_path, device
):
    """Mixer or attention, experts or one MLP; with one expert no block has any."""
    base = jamba(make_checkpoint, num_experts=num_experts, num_experts_per_tok=min(2, num_experts))
    family, tokens = FAMILIES["jamba"], 3000
    report = lillama.compress(
        base, tmp_path / "out", reduction=0.2, text=text_file, tokens=tokens, seq_len=32,
        preset="whitened", strategy="uniform", targets=tuple(family.targets), device=str(device),
    )  # fmt: skip
    assert [row["index"] for row in report["blocks"]] == [0, 1, 2, 3]
    routed = [sum(row.get("expert_tokens", [])) for row in report["blocks"]]
    # two experts a token, and those made up for the ones that saw few
    expected = [num_experts > 1, False, False, num_experts > 1]
    assert [count >= 2 * tokens for count in routed] == expected
    assert any(b["held_out_loss_after"] < b["held_out_loss_before"] for b in report["blocks"])
    ranks = read_config(tmp_path / "out").quantization_config["ranks"]
    kinds = ("mamba", "self_attn", "mamba", "self_attn")
    wanted = {f"{n}.{part}" for n, kind in enumerate(kinds) for part in (kind, "feed_forward")}
    assert {".".join(name.split(".")[2:4]) for name in ranks} == wanted
    model = load_model(tmp_path / "out", device)
    before = load_model(base, device)
    with torch.no_grad(), fast_mamba():
        found, wanted = (m(**tokens_of(device)).logits for m in (model, before))
    assert torch.isfinite(found).all() and (found - wanted).abs().max() > 1e-2


def tokens_of(device: torch.device) -> dict[str, Tensor]:
    return {"input_ids": tokens(device)["input_ids"]}


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "mamba2"])
def test_predicted_memory_of_training_is_what_autograd_keeps(kind, make_checkpoint, device):
    """Numbers for one token through one block, on a CPU."""
    if device.type != "cpu":
        pytest.skip("kernels on a GPU keep less")
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "state_size": 16}
    if kind == "mamba2":
        sizes |= {"state_size": 128, "head_dim": 64, "num_heads": 2, "n_groups": 1}
    path = make_checkpoint(kind, **sizes)

    def predicted(seq_len: int) -> int:
        options: dict[str, Any] = {"tokens": 4096, "activation_memory": 0, "seq_len": seq_len}
        return lillama.plan(path, 0.1, **options)["peak_memory_bytes"]["train"]

    rows = 2 * PlanConfig(model=path, reduction=0.1).recipe.batch_size * 64
    numbers = (predicted(128) - predicted(64)) / 4 / rows

    block = load_model(path, device).get_decoder().layers[0]  # type: ignore[union-attr]
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # alive, so that no other is there
        return tensor

    hidden = torch.randn(1, 128, 64, requires_grad=True)
    with fast_mamba(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(hidden)
    found = sum(size for size, _ in kept.values()) / 4 / 128
    assert 0.7 < numbers / found < 1.4
