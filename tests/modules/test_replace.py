"""replace_modules: by hub name, with and without the base model's prefix, and nothing else."""

import pytest
import torch
from torch import nn

from lillama.models.families import FAMILIES
from lillama.modules import LowRankExperts, LowRankLinear, replace_modules
from lillama.modules.low_rank_embedding import LowRankEmbedding, PivotLowRankEmbedding
from lillama.modules.low_rank_linear import PivotLowRankLinear
from lillama.modules.replace import dense_expert, group_ranks

EXPERTS = "layers.0.block_sparse_moe.experts"
MIXTRAL_RANKS = {f"{EXPERTS}.0.w1": 8, f"{EXPERTS}.0.w3": 16, f"{EXPERTS}.3.w2": 24}
MAMBA_RANKS = {"layers.0.mixer.in_proj": 8, "layers.1.mixer.out_proj": 16}
RANKS = {"mixtral": MIXTRAL_RANKS, "mamba": MAMBA_RANKS}
PREFIX = {"mixtral": "model", "mamba": "backbone"}


def with_prefix(kind: str) -> dict[str, int]:
    return {f"{PREFIX[kind]}.{name}": rank for name, rank in RANKS[kind].items()}


@pytest.mark.parametrize("names_have_prefix", [True, False], ids=["prefixed", "bare"])
@pytest.mark.parametrize("root", ["causal-lm", "base"])
@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_replace_modules_with_and_without_base_prefix(make_model, kind, root, names_have_prefix):
    model = make_model(kind, use_bias=True) if kind == "mamba" else make_model(kind)
    prefix = PREFIX[kind]
    top = model if root == "causal-lm" else model.base_model
    ranks = with_prefix(kind) if names_have_prefix else RANKS[kind]
    replaced = replace_modules(top, model.config, ranks, base_prefix=prefix)

    start = f"{prefix}." if root == "causal-lm" else ""
    if kind == "mixtral":
        experts = top.get_submodule(f"{start}layers.0.mlp.experts")
        assert isinstance(experts, LowRankExperts)
        assert experts.ranks == {"gate": (8, 0, 0, 0), "up": (16, 0, 0, 0), "down": (0, 0, 0, 24)}
        assert set(replaced) == {f"{start}layers.0.mlp.experts"}
    else:
        first = top.get_submodule(f"{start}layers.0.mixer.in_proj")
        second = top.get_submodule(f"{start}layers.1.mixer.out_proj")
        assert isinstance(first, LowRankLinear) and isinstance(second, LowRankLinear)
        assert (first.rank, second.rank) == (8, 16)
        assert first.bias is not None and second.bias is not None
        assert set(replaced) == {
            f"{start}layers.0.mixer.in_proj",
            f"{start}layers.1.mixer.out_proj",
        }
    assert not any(isinstance(old, LowRankLinear | LowRankExperts) for old in replaced.values())


@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_replace_modules_leaves_all_else_untouched(make_model, kind):
    model = make_model(kind)
    before = dict(model.named_modules())
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    replaced = replace_modules(model, model.config, with_prefix(kind), base_prefix=PREFIX[kind])
    after = dict(model.named_modules())
    inside = tuple(f"{path}." for path in replaced)
    for name, module in before.items():
        if name in replaced:
            assert after[name] is not module and replaced[name] is module
        elif not name.startswith(inside):
            assert after[name] is module
    new_tensors = {name for name in model.state_dict() if name.startswith(inside)}
    for name, tensor in model.state_dict().items():
        if name not in new_tensors:
            assert torch.equal(tensor, values[name])
    assert {
        n for n in values if not n.startswith(inside)
    } == model.state_dict().keys() - new_tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_replace_modules_follows_dtype_and_device(make_model, device, kind, dtype):
    for wanted in (None, "meta"):
        model = make_model(kind, dtype).to(device)
        replaced = replace_modules(
            model, model.config, with_prefix(kind), base_prefix=PREFIX[kind], device=wanted
        )
        for path in replaced:
            for parameter in model.get_submodule(path).parameters():
                assert parameter.dtype == dtype
                assert parameter.device.type == (wanted or device.type)


def test_replace_modules_factors_of_experts_start_at_zero(make_model):
    model = make_model("mixtral")
    replace_modules(model, model.config, with_prefix("mixtral"), base_prefix="model")
    for parameter in model.model.layers[0].mlp.experts.parameters():
        assert not parameter.any()


BAD_NAMES = [
    pytest.param("mixtral", "model.layers.0.mlp.nothing", "is not a linear layer", id="unknown"),
    pytest.param("mixtral", "model.norm", "is not a linear layer", id="norm"),
    pytest.param("mixtral", f"model.{EXPERTS}", "is not a linear layer", id="whole-experts"),
    pytest.param("mixtral", f"model.{EXPERTS}.4.w1", "names expert 4", id="expert-4-of-4"),
    pytest.param(
        "mixtral",
        "model.layers.9.block_sparse_moe.experts.0.w1",
        "is not a stacked experts module",
        id="layer-9",
    ),
    pytest.param("mamba", "backbone.layers.0.mixer.conv1d", "is not a linear layer", id="conv"),
    pytest.param("mamba", "backbone.layers.7.mixer.in_proj", "is not a linear", id="layer-7"),
]


@pytest.mark.parametrize(("kind", "name", "message"), BAD_NAMES)
def test_replace_modules_unusable_name_raises_naming_it(make_model, kind, name, message):
    model = make_model(kind)
    named = name.replace("block_sparse_moe", "mlp").removesuffix(".0.w1")
    with pytest.raises(ValueError, match=message) as caught:
        replace_modules(model, model.config, {name: 8}, base_prefix=PREFIX[kind])
    assert name in str(caught.value) or named in str(caught.value)


@pytest.mark.parametrize("pivot", [False, True], ids=["plain", "pivot"])
def test_replace_modules_of_the_vocabulary(make_model, pivot):
    model = make_model("mixtral")
    ranks = {"model.embed_tokens": 8, "lm_head": 12, "model.layers.0.self_attn.q_proj": 4}
    replace_modules(model, model.config, ranks, base_prefix="model", pivot=pivot)
    linear = PivotLowRankLinear if pivot else LowRankLinear
    embeddings, head = model.model.embed_tokens, model.lm_head
    assert type(embeddings) is (PivotLowRankEmbedding if pivot else LowRankEmbedding)
    query = model.model.layers[0].self_attn.q_proj
    assert type(head) is type(query) is linear
    assert (embeddings.rank, head.rank, query.rank) == (8, 12, 4)
    # models read their dtype at every step: only what else is asked for its weight computes it
    for module, shape in ((embeddings, (300, 32)), (head, (300, 32)), (query, (32, 32))):
        assert module.weight.shape == shape and module.weight.dtype == torch.float32
        assert module.weight.is_meta == (module is not query)


def test_replace_modules_rank_too_large_raises(make_model):
    model = make_model("mamba")
    with pytest.raises(ValueError, match="got 33"):
        replace_modules(
            model, model.config, {"backbone.layers.0.mixer.in_proj": 33}, base_prefix="backbone"
        )


def test_group_ranks_splits_linears_and_experts():
    ranks = {**MIXTRAL_RANKS, "layers.0.self_attn.q_proj": 4}
    linears, experts = group_ranks(FAMILIES["mixtral"], ranks, 4)
    assert linears == {"layers.0.self_attn.q_proj": 4}
    assert experts == {
        "layers.0.mlp.experts": {"gate": [8, 0, 0, 0], "up": [16, 0, 0, 0], "down": [0, 0, 0, 24]}
    }


def test_dense_expert_is_the_weight_of_that_projection(make_model):
    experts = make_model("mixtral").model.layers[0].mlp.experts
    x = torch.randn(5, 32)
    index = torch.full((5, 1), 2)
    gate, up, down = (dense_expert(experts, p, 2) for p in ("gate", "up", "down"))
    wanted = nn.functional.silu(x @ gate.T) * (x @ up.T) @ down.T
    torch.testing.assert_close(experts(x, index, torch.ones(5, 1)), wanted)
