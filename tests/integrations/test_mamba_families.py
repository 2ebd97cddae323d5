"""fast_mamba against transformers' own path in every family that it knows: prefill, decode,
gradients."""

import contextlib
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
from transformers.models.mamba2 import modeling_mamba2

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
SIZES = SMALL | {"state_size": 4, "time_step_rank": 3}
MODELS = {
    "mamba": (MambaForCausalLM, MambaConfig, SIZES),
    "falcon_mamba": (FalconMambaForCausalLM, FalconMambaConfig, SIZES),
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
CONVOLUTION = {"causal_conv1d", "causal_conv1d_update"}
MAMBA_1 = CONVOLUTION | {"selective_scan", "selective_state_update"}
MAMBA_2 = CONVOLUTION | {"ssd_scan", "ssd_state_update"}


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
    for name in MAMBA_1 | MAMBA_2:
        ours = getattr(integration, name)
        monkeypatch.setattr(
            integration, name, lambda *a, n=name, f=ours, **k: seen.append(n) or f(*a, **k)
        )
    return seen


def expected(model: PreTrainedModel) -> set[str]:
    return MAMBA_2 if model.config.model_type == "mamba2" else MAMBA_1


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


def test_fast_mamba_families_token_by_token(model, device, calls):
    """A cache that one path filled goes on in the other, whose state it then is."""
    ids, _ = tokens(device)
    name = "past_key_values" if model.config.model_type == "jamba" else "cache_params"
    for fast_prefill, fast_steps in ((True, True), (False, True), (True, False)):
        wanted = model(ids, use_cache=False).logits
        with torch.no_grad(), fast_mamba() if fast_prefill else contextlib.nullcontext():
            out = model(ids[:, :4], use_cache=True)
        found = [out.logits]
        with torch.no_grad(), fast_mamba() if fast_steps else contextlib.nullcontext():
            for t in range(4, ids.shape[1]):
                cache = {name: out[name]}
                out = model(ids[:, t : t + 1], use_cache=True, **cache)
                found.append(out.logits)
        torch.testing.assert_close(torch.cat(found, dim=1), wanted)
    assert set(calls) == expected(model)


def test_fast_mamba_mamba2_prefill_goes_on_from_a_state(device):
    """transformers gives the state of earlier tokens, and limits that are reached."""
    model_class, config_class, values = MODELS["mamba2"]
    torch.manual_seed(0)
    model = model_class(config_class(**values, time_step_limit=(0.01, 0.05))).to(device).eval()
    ids, _ = tokens(device)
    results = []
    for fast in (False, True):
        with torch.no_grad(), fast_mamba() if fast else contextlib.nullcontext():
            cache = model(ids[:, :4], use_cache=True).cache_params
            results.append(model(ids[:, 4:], use_cache=True, cache_params=cache).logits)
    torch.testing.assert_close(results[1], results[0])


def test_fast_mamba_mamba2_refuses_packed_sequences():
    x, dt, A, B = (
        torch.zeros(1, 5, 2, 4),
        torch.zeros(1, 5, 2),
        torch.zeros(2),
        torch.zeros(1, 5, 1, 3),
    )
    with fast_mamba():
        for name in ("seq_idx", "cu_seqlens"):
            with pytest.raises(NotImplementedError, match=name):
                modeling_mamba2.mamba2_chunk_scan(x, dt, A, B, B, 4, **{name: torch.zeros(1, 5)})


def test_fast_mamba_without_a_family(monkeypatch):
    """An older transformers has no such model, or not the function."""
    monkeypatch.setitem(integration.REPLACED, "mamba9", integration.REPLACED["mamba"])
    monkeypatch.delattr(modeling_mamba2, "mamba2_chunk_scan")
    with fast_mamba():
        assert not hasattr(modeling_mamba2, "mamba2_chunk_scan")
    assert not hasattr(modeling_mamba2, "mamba2_chunk_scan")


def test_fast_mamba_families_are_put_back(model, device, calls):
    ids, _ = tokens(device)
    with pytest.raises(KeyboardInterrupt), fast_mamba():
        raise KeyboardInterrupt
    model(ids)
    assert calls == []
