"""The parts of an attention model's step beside transformers' modules, and what is refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lillama.errors import InputError
from lillama.models.families import FAMILIES
from lillama.modules import LowRankLinear
from lillama.serve.engine import LocalEngine
from lillama.serve.models.attention import MODEL_TYPES, AttentionRunner, _gated, _moe
from lillama.serve.models.runner import projections
from tests.conftest import config_of
from tests.serve.heard import uneven

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_docs_list_every_family():
    lines = (Path(__file__).parents[3] / "docs" / "serving.md").read_text("utf-8").splitlines()
    start = lines.index("| served | not served |")
    rows = [line.split("|")[1:3] for line in lines[start + 2 : start + 4]]
    served, other = ({name for row in rows for name in row[i].split()} for i in range(2))
    assert served == {f"`{name}`" for name in (*MODEL_TYPES, "mamba")}
    assert other == {f"`{name}`" for name in REFUSED}


# Parts
@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize("ranks", [(0, 0, 0), (3, 5, 4), (0, 5, 4)], ids=str)
@pytest.mark.parametrize("biases", ["all", "some", "none"])
@torch.no_grad()
def test_projections_are_the_layers(biases, ranks, device):
    """In both ways; that of a GPU with tensors on the CPU."""
    torch.manual_seed(0)
    modules = []
    for i, rank in enumerate(ranks):
        bias = biases == "all" or (biases == "some" and i == 1)
        sizes = 12, 6 + 8 * i
        modules.append(LowRankLinear(*sizes, rank, bias) if rank else nn.Linear(*sizes, bias))
        for parameter in modules[-1].parameters():
            parameter.normal_()
    for x in (torch.randn(1, 12), torch.randn(5, 12)):
        wanted = torch.cat([module(x) for module in modules], dim=-1)
        for _ in range(2):  # and the layers stay what they are
            torch.testing.assert_close(projections(modules, device)(x), wanted)
            found = torch.cat([module(x) for module in modules], dim=-1)
            torch.testing.assert_close(found, wanted)


def test_projections_share_the_layers_memory():
    modules = [nn.Linear(12, 6, bias=False), nn.Linear(12, 20, bias=False)]
    projections(modules, CPU)
    first, second = (module.weight.untyped_storage().data_ptr() for module in modules)
    assert first == second


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"mlp_bias": True}),
        ("mixtral", {}),
        ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": []}),
        ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": []}),
        ("olmoe", {"norm_topk_prob": False}),
    ],
)
@torch.no_grad()
def test_mlp_is_transformers(kind, changes, device, make_model):
    mlp = make_model(kind, **changes).model.layers[0].mlp
    torch.manual_seed(0)
    for x in (torch.randn(1, 32), torch.randn(6, 32)):
        wanted = mlp(x[None])[0]
        found = (_moe if hasattr(mlp, "experts") else _gated)(mlp, device)(x)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "qwen3_moe", "olmoe"])
@torch.inference_mode()
def test_steps_in_bf16_are_as_near_as_transformers(kind, make_model):
    """To the same weights in fp32; norms and routers round where transformers rounds."""
    changes = {"sliding_window": None} if kind == "qwen2" else {}
    prompt = torch.tensor([5, 6, 7, 8, 9, 10])
    rounded = uneven(make_model(kind, torch.bfloat16, **changes))
    theirs = rounded(prompt[None]).logits[0, -1].float()
    exact = make_model(kind, **changes)
    for new, old in zip(exact.parameters(), rounded.parameters(), strict=True):
        new.copy_(old)
    truth = exact(prompt[None]).logits[0, -1]
    runner = AttentionRunner(rounded, 1, 64)
    *_, done = runner.prefill(prompt[:-1])
    assert done is not None
    runner.place(0, done.state)
    found = runner.step(prompt[-1:], 6)[0].float()
    allowed = 2 * ((theirs - truth).abs().amax() + 2**-8 * truth.abs().amax())
    assert float((found - truth).abs().amax()) <= float(allowed)


# Refusals
REFUSED = sorted(FAMILIES.keys() - {*MODEL_TYPES, "mamba"})


@pytest.mark.parametrize("kind", REFUSED)
def test_other_families_are_refused_before_weights_are_read(kind, tokenizer, tmp_path):
    config_of(kind, {}).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"does not serve model type '{kind}'; .*: use vLLM"):
        LocalEngine(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'.* llama with 'silu' or 'swish'"),
        ("mistral", {}, "sliding_window of 8"),
        ("mixtral", {"sliding_window": 8}, "sliding_window of 8"),
        ("qwen2", {}, "sliding_window of 8"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window of 8"),
        ("olmoe", {"clip_qkv": 4.0}, "clip_qkv is 4.0"),
        ("llama", {"attention_chunk_size": 8}, "attention_chunk_size is 8"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "of chunked_attention"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type is 'dynamic'",
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    **{"rope_type": "default", "rope_theta": 1e4},
                    "partial_rotary_factor": 0.5,
                }
            },
            "partial_rotary_factor is 0.5",
        ),
    ],
)
def test_what_a_step_does_not_compute_is_refused(kind, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        AttentionRunner.check(config_of(kind, changes), None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        # the window is there, no block uses it
        ("qwen2", {"max_window_layers": 2}),
        ("qwen3", {"use_sliding_window": False, "sliding_window": 8}),
        ("mistral", {"sliding_window": 512}),
        ("llama", {"hidden_act": "swish"}),
    ],
)
def test_what_changes_nothing_is_served(kind, changes):
    assert AttentionRunner.check(config_of(kind, changes), None) == 512
