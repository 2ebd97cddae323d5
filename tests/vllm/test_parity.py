"""vLLM with the plugin gives the tokens that transformers gives, however the model is split.

fp32, 3 prompts, 16 greedy tokens each; every one must be the same.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import lillama

TP = {"tensor_parallel_size": 2}
EP = {**TP, "enable_expert_parallel": True}
COMPILED = {"enforce_eager": False}


@pytest.mark.parametrize(
    ("kind", "gauge", "options"),
    [
        ("mixtral", "plain", {}),
        ("mixtral+vocabulary", "plain", TP),
        ("mixtral", "plain", EP),
        ("mixtral", "pivot", EP),
        ("mixtral", "pivot", {}),
        ("mixtral+vocabulary", "plain", COMPILED),
        ("llama", "plain", {}),
        ("llama", "plain", TP),
        ("llama", "pivot", TP),
        ("mamba", "pivot", {}),
        ("mamba+vocabulary", "plain", {}),
        ("mamba+vocabulary", "pivot", TP),
        ("mamba+vocabulary", "pivot", {}),
        ("gpt_neox+vocabulary", "plain", {}),
        ("gpt_neox+vocabulary", "pivot", TP),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "one-process",
)
def test_vllm_gives_the_tokens_of_transformers(
    kind, gauge, options, make_served, transformers_tokens, run_vllm
):
    served, dense = make_served(kind, gauge)
    wanted = transformers_tokens(dense)
    assert len({token for tokens in wanted for token in tokens}) > 10, "says nothing"
    found, output = run_vllm(served, **options)
    assert found is not None, output[-6000:]
    assert found == wanted
    expanded = kind.startswith("mixtral") and gauge == "pivot"
    assert ("are held as plain factors in vLLM" in output) == expanded


def test_transformers_with_lillama_gives_them_too(make_served, transformers_tokens):
    for kind, gauge in (
        ("mixtral", "plain"),
        ("mixtral", "pivot"),
        ("mamba", "plain"),
        ("mamba", "pivot"),
        ("mixtral+vocabulary", "plain"),
        ("mamba+vocabulary", "pivot"),
        ("gpt_neox+vocabulary", "pivot"),
    ):
        served, dense = make_served(kind, gauge)
        assert transformers_tokens(served) == transformers_tokens(dense)


def test_vllm_takes_the_sentinel_as_save_pretrained_writes_it(
    make_served, transformers_tokens, run_vllm
):
    served, dense = make_served("mixtral", as_saved=True)
    found, output = run_vllm(served)
    assert found == transformers_tokens(dense), output[-6000:]


@torch.no_grad()
def far_from_uniform(model: torch.nn.Module) -> None:
    """So that rounding does not change the largest logit."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.2)


def test_vllm_serves_what_compress_and_save_pretrained_write(
    make_checkpoint, text_file, tmp_path, transformers_tokens, run_vllm
):
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4}
    base = make_checkpoint("mixtral", edit=far_from_uniform, **sizes)
    targets = ("w1", "embed_tokens", "lm_head")
    reduction = 0.9 * lillama.plan(base, 0.01, targets=targets)["max_reduction"]
    options = {"targets": targets, "tokens": 300, "seq_len": 32, "preset": "fast", "device": "cpu"}
    lillama.compress(base, tmp_path / "out", reduction=reduction, text=text_file, **options)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ranks = config["quantization_config"]["ranks"]
    assert {"lm_head", "model.embed_tokens"} < ranks.keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    wanted = transformers_tokens(tmp_path / "out")
    assert len({token for tokens in wanted for token in tokens}) > 10, "says nothing"
    for folder in ("out", "again"):
        found, output = run_vllm(tmp_path / folder)
        assert found == wanted, output[-6000:]
