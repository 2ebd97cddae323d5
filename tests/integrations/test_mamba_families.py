"""fast_mamba against transformers' own path in every family that it knows: prefill, decode,
gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

import lillama.integrations.mamba as integration
from lillama.integrations.mamba import fast_mamba

SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
MAMBA_1 = SMALL | {"state_size": 4, "time_step_rank": 3}
MODELS = {
    "mamba": (MambaForCausalLM, MambaConfig, MAMBA_1),
    "falcon_mamba": (FalconMambaForCausalLM, FalconMambaConfig, MAMBA_1),
    "jamba": (
        JambaForCausalLM,
        JambaConfig,
        SMALL
        | {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
        | {"num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 4, "mamba_dt_rank": 3}
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    ),
    "mamba2": (
        Mamba2ForCausalLM,
        Mamba2Config,
        SMALL | {"state_size": 8, "head_dim": 8, "num_heads": 4, "n_groups": 2, "chunk_size": 4},
    ),
}
OURS = ("causal_conv1d", "causal_conv1d_update", "selective_scan", "selective_state_update")


@pytest.fixture(autouse=True)
def _fast_mamba():
    """These tests switch themselves."""


@pytest.fixture(params=list(MODELS))
def model(request, device) -> PreTrainedModel:
    model_class, config_class, values = MODELS[request.param]
    torch.manual_seed(0)
    return model_class(config_class(**values)).to(device).eval()


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Names of our functions that ran."""
    seen: list[str] = []
    for name in OURS:
        ours = getattr(integration, name)
        monkeypatch.setattr(
            integration, name, lambda *a, n=name, f=ours, **k: seen.append(n) or f(*a, **k)
        )
    return seen


def expected(model: PreTrainedModel) -> set[str]:
    return set(OURS[:2] if model.config.model_type == "mamba2" else OURS)


def tokens(device: torch.device) -> tuple[Tensor, Tensor]:
    """Two rows of 9 tokens, the second padded on the left."""
    ids = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(3)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


def test_fast_mamba_families_gradients(model, device):
    ids, mask = tokens(device)
    results = []
    for fast in (False, True):
        model.zero_grad()
        with fast_mamba() if fast else torch.enable_grad():
            logits = model(ids, attention_mask=mask).logits
            (logits * torch.arange(60, device=device)).sum().backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append({"logits": logits.detach(), **found})
    wanted, actual = results
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        error = float((actual[name] - tensor).abs().max() / tensor.abs().max().clamp_min(1e-12))
        assert error < 1e-4, f"{name}: {error:.1e}"


def test_fast_mamba_families_generate(model, device, calls):
    ids, mask = tokens(device)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True, "disable_compile": True}
    wanted = model.generate(ids, attention_mask=mask, **options)
    assert calls == []
    with fast_mamba():
        actual = model.generate(ids, attention_mask=mask, **options)
    assert set(calls) == expected(model)
    assert torch.equal(actual.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(wanted.logits))


def test_fast_mamba_families_are_put_back(model, device, calls):
    ids, _ = tokens(device)
    with pytest.raises(KeyboardInterrupt), fast_mamba():
        raise KeyboardInterrupt
    model(ids)
    assert calls == []
