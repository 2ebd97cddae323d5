"""LowRankExperts against transformers' own MixtralExperts whose dense weights are B A."""

import dataclasses

import pytest
import torch
from lillama_kernels.testing import assert_close_to_truth
from torch import Tensor
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from lillama.models.families import PROJECTIONS
from lillama.modules import LowRankExperts

E, H, INNER = 4, 32, 64
# ranks of every kind: different in each expert, 0 = dense, one projection wholly factorised
MIXED = {"gate": (8, 0, 16, 24), "up": (0, 8, 8, 0), "down": (16, 24, 8, 16)}
FACTORISED = {"gate": (8, 16, 24, 8), "up": (16, 8, 8, 24), "down": (24, 8, 16, 8)}
RANKS = [pytest.param(MIXED, id="mixed"), pytest.param(FACTORISED, id="factorised")]
IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


def config(implementation: str = "eager") -> MixtralConfig:
    return MixtralConfig(
        hidden_size=H,
        intermediate_size=INNER,
        num_local_experts=E,
        num_experts_per_tok=2,
        experts_implementation=implementation,
    )


@torch.no_grad()
def experts_of(
    ranks: dict, device: torch.device, dtype: torch.dtype, implementation: str = "eager"
) -> LowRankExperts:
    torch.manual_seed(0)
    experts = LowRankExperts(config(implementation), E, H, INNER, ranks, device, dtype)
    for projection in PROJECTIONS:
        for expert in range(E):
            for tensor in experts.stored(projection, expert).values():
                tensor.copy_(torch.randn(tensor.shape) * tensor.shape[-1] ** -0.5)
    return experts


def dense_weight(experts: LowRankExperts, projection: str, expert: int) -> Tensor:
    stored = experts.stored(projection, expert)
    return stored["lr_W"] if "lr_W" in stored else stored["lr_B"] @ stored["lr_A"]


@torch.no_grad()
def fill_dense(dense: MixtralExperts, experts: LowRankExperts) -> MixtralExperts:
    for e in range(E):
        gate, up, down = (dense_weight(experts, p, e) for p in PROJECTIONS)
        dense.get_parameter("gate_up_proj")[e] = torch.cat([gate, up])
        dense.get_parameter("down_proj")[e] = down
    return dense


def routed(rows: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(rows, H, generator=g)
    weight, index = torch.randn(rows, E, generator=g).softmax(-1).topk(2)
    return x.to(device, dtype), index.to(device), weight.to(device, dtype)


# The module
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("ranks", RANKS)
def test_forward_equals_mixtral_experts_with_dense_weights(device, ranks, implementation):
    experts = experts_of(ranks, device, torch.float32, implementation)
    assert experts.config._experts_implementation == implementation
    dense = MixtralExperts(config(implementation)).to(device)
    fill_dense(dense, experts)
    args = routed(29, device, torch.float32)
    exact = experts_of(ranks, device, torch.float32).double()
    truth_model = fill_dense(MixtralExperts(config()).to(device, torch.float64), exact)
    with torch.no_grad():
        truth = truth_model(args[0].double(), args[1], args[2].double())
        assert_close_to_truth(experts(*args), truth, dense(*args))


@pytest.mark.parametrize("ranks", RANKS)
def test_forward_bf16_is_as_close_as_the_dense_module(device, ranks):
    experts = experts_of(ranks, device, torch.bfloat16)
    args = routed(29, device, torch.bfloat16)
    doubled = experts_of(ranks, device, torch.bfloat16).double()
    dense = fill_dense(MixtralExperts(config()).to(device, torch.float64), doubled)
    with torch.no_grad():
        truth = dense(args[0].double(), args[1], args[2].double())
        # the dense module rounds each product once more, in its own place: a fair baseline
        baseline = fill_dense(MixtralExperts(config()).to(device, torch.bfloat16), experts)(*args)
        assert_close_to_truth(experts(*args), truth, baseline)


def test_backward_gives_gradients_of_the_dense_module(device):
    experts = experts_of(MIXED, device, torch.float32)
    dense = fill_dense(MixtralExperts(config()).to(device), experts)
    x, index, weight = routed(29, device, torch.float32)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(device)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    experts(x_ours, index, weight).backward(grad)
    dense(x_theirs, index, weight).backward(grad)
    torch.testing.assert_close(x_ours.grad, x_theirs.grad)
    gradient = {"down": dense.down_proj.grad}
    gradient["gate"], gradient["up"] = dense.gate_up_proj.grad.chunk(2, dim=1)
    for projection in PROJECTIONS:
        for e, rank in enumerate(MIXED[projection]):
            wanted = gradient[projection][e]
            if rank == 0:
                position = MIXED[projection][:e].count(0)
                ours = getattr(experts, f"{projection}_W").grad[position]
                torch.testing.assert_close(ours, wanted)
                continue
            A, B = (experts.stored(projection, e)[key].detach() for key in ("lr_A", "lr_B"))
            grad_A = getattr(experts, f"{projection}_A").grad[e, :rank]
            grad_B = getattr(experts, f"{projection}_B").grad[e, :, :rank]
            torch.testing.assert_close(grad_A, B.T @ wanted)
            torch.testing.assert_close(grad_B, wanted @ A.T)


def test_stored_returns_unpadded_views():
    experts = experts_of(MIXED, torch.device("cpu"), torch.float32)
    for projection in PROJECTIONS:
        N, K = experts.projection_shape(projection)
        assert (N, K) == ((H, INNER) if projection == "down" else (INNER, H))
        for e, rank in enumerate(MIXED[projection]):
            stored = experts.stored(projection, e)
            if rank == 0:
                assert {key: t.shape for key, t in stored.items()} == {"lr_W": (N, K)}
            else:
                assert {key: tuple(t.shape) for key, t in stored.items()} == {
                    "lr_A": (rank, K),
                    "lr_B": (N, rank),
                }
            with torch.no_grad():
                for key, tensor in stored.items():
                    tensor.fill_(float(e + 1))
                    parameter = getattr(experts, f"{projection}_{key[-1]}")
                    assert tensor.untyped_storage().data_ptr() == (
                        parameter.untyped_storage().data_ptr()
                    )
                    assert torch.equal(experts.stored(projection, e)[key], tensor)
    # only the ranks' share was written: padding is still zero
    assert int((experts.gate_A != 0).sum()) == sum(MIXED["gate"]) * H


def padding(experts: LowRankExperts, values: dict[str, Tensor]) -> list[Tensor]:
    parts = []
    for projection in PROJECTIONS:
        for e, rank in enumerate(experts.ranks[projection]):
            parts.append(values[f"{projection}_A"][e, rank:])
            parts.append(values[f"{projection}_B"][e, :, rank:])
    return [part for part in parts if part.numel()]


@pytest.mark.parametrize("ranks", RANKS)
def test_padding_gets_zero_gradient_and_stays_zero_after_adamw(device, ranks):
    experts = experts_of(ranks, device, torch.float32)
    optimizer = torch.optim.AdamW(experts.parameters(), lr=1e-2, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in experts.named_parameters()}
    for _ in range(2):
        experts(*routed(29, device, torch.float32)).square().sum().backward()
        gradients = {name: p.grad for name, p in experts.named_parameters()}
        parts = padding(experts, gradients)
        assert parts and not any(part.any() for part in parts)
        optimizer.step()
    after = dict(experts.named_parameters())
    assert not any(part.any() for part in padding(experts, after))
    for name, tensor in after.items():
        assert not torch.equal(tensor, before[name])


def test_wrong_activation_raises():
    values = config()
    values.hidden_act = "gelu"
    with pytest.raises(ValueError, match="silu, got hidden_act 'gelu'"):
        LowRankExperts(values, E, H, INNER, MIXED)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_wrong_number_of_ranks_raises(projection):
    ranks = {**MIXED, projection: (8, 8, 8)}
    with pytest.raises(ValueError, match=f"{projection} needs 4 ranks, got 3"):
        LowRankExperts(config(), E, H, INNER, ranks)


def test_extra_repr_names_sizes_and_ranks():
    text = repr(LowRankExperts(config(), E, H, INNER, MIXED))
    assert "num_experts=4, hidden_size=32, intermediate_size=64" in text
    assert "gate 0..24, up 0..8, down 8..24" in text


# Inside a model
def model_ranks(num_dense: int) -> dict[str, int]:
    names = [
        f"model.layers.{layer}.block_sparse_moe.experts.{e}.{w}"
        for layer in range(2)
        for e in range(E)
        for w in ("w1", "w2", "w3")
    ]
    return {name: 8 + 8 * (i % 3) for i, name in enumerate(names[num_dense:])}


@pytest.fixture(scope="module")
def pair(make_model, make_low_rank) -> tuple[MixtralForCausalLM, MixtralForCausalLM]:
    """A factorised Mixtral, and the dense one whose weights are B A."""
    model = make_low_rank("mixtral", model_ranks(0))
    dense = make_model("mixtral")
    dense.load_state_dict(model.state_dict(), strict=False)
    for ours, theirs in zip(model.model.layers, dense.model.layers, strict=True):
        assert isinstance(ours.mlp.experts, LowRankExperts)
        fill_dense(theirs.mlp.experts, ours.mlp.experts)
    return model, dense


PROMPTS = [[5, 17, 3, 250, 9], [11, 42, 7], [100, 2, 77, 31, 8, 19]]


def greedy(**changes: object) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0, **changes
    )


def generated(model: MixtralForCausalLM, **changes: object) -> list[list[int]]:
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device=model.device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=greedy(**changes)
        )
        rows.append(out[0, len(prompt) :].tolist())
    return rows


def test_model_runs_our_op_by_default(pair, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "lillama.modules.low_rank_experts.low_rank_experts",
        lambda hidden, *args: seen.append(len(hidden)) or torch.zeros_like(hidden),
    )
    assert pair[0].config._experts_implementation == "grouped_mm"
    pair[0](torch.tensor([PROMPTS[0]], device=pair[0].device))
    assert seen == [5, 5]


def test_generate_equals_dense_model(pair, device):
    model, dense = (m.to(device) for m in pair)
    tokens = generated(model)
    assert tokens == generated(dense)
    assert len({tuple(row) for row in tokens}) == len(PROMPTS)


def test_generate_with_static_cache_equals_default(pair, device):
    model = pair[0].to(device)
    assert generated(model, cache_implementation="static", disable_compile=True) == generated(model)


def test_continuous_batching_equals_generate(pair, device):
    model = pair[0].to(device)
    # transformers 5.17 calls a page a block
    names = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    size = "page_size" if "page_size" in names else "block_size"
    out = model.generate_batch(
        PROMPTS,
        generation_config=greedy(),
        continuous_batching_config=ContinuousBatchingConfig(
            **{size: 16}, num_blocks=16, max_batch_tokens=32
        ),
    )
    tokens = {tuple(o.prompt_ids): o.generated_tokens for o in out.values()}
    assert [tokens[tuple(prompt)] for prompt in PROMPTS] == generated(model)


def test_compile_fullgraph_equals_eager(pair, device):
    model = pair[0].to(device)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.tensor([PROMPTS[2]], device=device)
    with torch.no_grad():
        logits = compiled(ids, use_cache=False).logits
        wanted = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits, wanted)


def test_generate_compiled_equals_eager(pair, device):
    model = pair[0].to(device)
    torch.compiler.reset()
    options = CompileConfig(backend="eager", mode=None, fullgraph=True)
    options._compile_all_devices = True
    ids = torch.tensor([PROMPTS[1]], device=device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=greedy(cache_implementation="static"),
        max_new_tokens=3,
        compile_config=options,
    )
    assert hasattr(model, "_compiled_call")
    assert out[0, ids.shape[1] :].tolist() == generated(model)[1][:3]
