"""Whole tiny models on the Triton kernels give what they give on the reference: logits, gradients
and generated tokens. On the CPU through Triton's interpreter."""

import functools
from typing import Any

import pytest
import torch
from lillama_kernels import kernels_impl
from torch import Tensor
from transformers import (
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lillama.models.families import PROJECTIONS
from lillama.modules import LowRankExperts

MIXTRAL = {
    f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}": rank
    for layer, ranks in enumerate([(8, 16, 24, 8), (0, 8, 0, 16)])
    for expert, rank in enumerate(ranks)
    for matrix in ("w1", "w2", "w3")
    if rank
}
MAMBA = {f"backbone.layers.0.mixer.{name}": 8 for name in ("in_proj", "out_proj")}
# the interpreter runs every step of a scan for every channel in Python
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "time_step_rank": 8, "state_size": 4}
# the experts class of Mixtral under other names and configs
FAMILIES = {
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"moe_intermediate_size": 24}),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"intermediate_size": 24}),
}


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Names of the Triton ops that ran, in order."""
    seen: list[str] = []
    for name in (
        "low_rank_experts", "low_rank_experts_backward", "low_rank_linears",
        "low_rank_linears_backward", "selective_scan", "selective_scan_backward",
        "selective_state_update", "causal_conv1d", "causal_conv1d_backward",
        "causal_conv1d_update", "mamba_mixer_step",
    ):  # fmt: skip
        original = getattr(torch.ops.lillama, name)

        @functools.wraps(original)
        def spy(*args: Any, name: str = name, original: Any = original) -> Any:
            seen.append(name)
            return original(*args)

        monkeypatch.setattr(torch.ops.lillama, name, spy)
    return seen


def results(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Logits of all tokens and the gradient of every parameter."""
    model.zero_grad()
    logits = model(ids).logits
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    logits.backward(grad.to(logits))
    gradients = {
        f"grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }
    return {"logits": logits.detach()} | gradients


def assert_equal_on_triton(model: PreTrainedModel, ids: Tensor) -> None:
    wanted = results(model, ids)
    with kernels_impl("triton"):
        actual = results(model, ids)
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        error = float((actual[name] - tensor).abs().max() / tensor.abs().max().clamp_min(1e-12))
        assert error < 1e-4, f"{name}: {error:.1e}"


def assert_generates_the_same(model: PreTrainedModel, ids: Tensor) -> None:
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with kernels_impl("triton"):
        actual = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(actual, wanted)


def tokens(device: torch.device, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(1, 60, (1, length), generator=generator).to(device)


def test_mixtral_on_triton_equals_the_reference(make_low_rank, calls, device):
    model = make_low_rank("mixtral", MIXTRAL).to(device)
    assert_equal_on_triton(model, tokens(device, 16))
    # once a layer, with one backward each
    assert calls == ["low_rank_experts"] * 2 + ["low_rank_experts_backward"] * 2
    calls.clear()
    assert_generates_the_same(model, tokens(device, 5))
    assert set(calls) == {"low_rank_experts"} and len(calls) == 2 * 3


def test_mamba_on_triton_equals_the_reference(make_low_rank, calls, device):
    model = make_low_rank("mamba", MAMBA, **SMALL).to(device)
    assert_equal_on_triton(model, tokens(device, 9))
    both = ("low_rank_linears", "selective_scan", "causal_conv1d")
    assert set(calls) == {*both, *(f"{name}_backward" for name in both)}
    calls.clear()
    assert_generates_the_same(model, tokens(device, 5))
    # the prompt, then steps that are one operation a layer
    prompt = ["low_rank_linears", "causal_conv1d", "selective_scan", "low_rank_linears"]
    assert calls == prompt + 2 * ["mamba_mixer_step"]


def test_mamba_step_by_step_on_triton(make_low_rank, calls, device):
    """Where the mixer's step does not apply, here to a low-rank x_proj, its parts run."""
    ranks = {**MAMBA, "backbone.layers.0.mixer.x_proj": 8}
    model = make_low_rank("mamba", ranks, **SMALL).to(device)
    assert_generates_the_same(model, tokens(device, 5))
    assert {"selective_state_update", "causal_conv1d_update"} <= set(calls)
    assert not any(name.endswith("backward") for name in calls)


@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        *(("qwen3_moe", "grouped_mm"), ("qwen3_moe", "eager")),
        *(("olmoe", "batched_mm"), ("olmoe", "sonicmoe")),
    ],
)
def test_other_families_experts_run_on_triton(family, implementation, calls, device):
    model_class, config_class, sizes = FAMILIES[family]
    config = config_class(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2, pad_token_id=0,
        bos_token_id=0, eos_token_id=0, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = model_class(config)
    old = model.model.layers[0].mlp.experts
    ranks = {name: (8, 0, 16, 8) for name in PROJECTIONS}
    new = LowRankExperts(old.config, 4, 16, 24, ranks)
    for parameter in new.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    for projection in PROJECTIONS:  # the padding is zero
        for expert, rank in enumerate(ranks[projection]):
            new.get_parameter(f"{projection}_A").data[expert, rank:] = 0.0
            new.get_parameter(f"{projection}_B").data[expert, :, rank:] = 0.0
    model.model.layers[0].mlp.experts = new
    model = model.to(device).eval()
    model.set_experts_implementation(implementation)
    assert_equal_on_triton(model, tokens(device, 9))
    assert set(calls) == {"low_rank_experts", "low_rank_experts_backward"}
