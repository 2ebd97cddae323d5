"""low_rank_experts against a loop over tokens and their experts, each with its dense weight B A."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lillama_kernels import ExpertFactors, ProjectionFactors, low_rank_experts
from lillama_kernels.testing import (
    check_op,
    expert_factors,
    low_rank_experts_inputs,
    poison_empty,
    values_and_grads,
)
from torch import Tensor

from tests.ops.precision import full, some

DTYPES = [
    pytest.param(torch.float64, id="fp64"),
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16"),
]
HIDDEN, INTERMEDIATE = 24, 40
# four experts: ragged, dense (0) among factorised, all dense, and all of one rank
RAGGED = {"gate": (5, 1, 8, 3), "up": (2, 7, 7, 1), "down": (8, 4, 1, 6)}
MIXED = {"gate": (5, 0, 8, 0), "up": (0, 7, 0, 1), "down": (8, 4, 1, 6)}
DENSE = {"gate": (0,) * 4, "up": (0,) * 4, "down": (0,) * 4}
EVEN = {"gate": (8,) * 4, "up": (8,) * 4, "down": (16,) * 4}
RANKS = [
    pytest.param(RAGGED, id="ragged"),
    pytest.param(MIXED, id="mixed"),
    pytest.param(DENSE, id="dense"),
    pytest.param(EVEN, id="even"),
]
Ranks = dict[str, tuple[int, ...]]


def make(num_rows: int, top_k: int, ranks: Ranks, dtype: torch.dtype, device: torch.device):
    return low_rank_experts_inputs(
        num_rows, top_k, HIDDEN, INTERMEDIATE, ranks, dtype=dtype, device=device
    )


def op_of(index: Tensor, ranks: Ranks) -> Callable[..., Tensor]:
    def op(hidden: Tensor, topk_weight: Tensor, **factors: Tensor) -> Tensor:
        return low_rank_experts(hidden, index, topk_weight, expert_factors(factors, ranks))

    return op


def oracle_of(index: Tensor, ranks: Ranks) -> Callable[..., Tensor]:
    # fp32 for bf16 inputs, rounded once at the end: a stricter baseline than bf16 throughout, and
    # much faster on a CPU
    def oracle(hidden: Tensor, topk_weight: Tensor, **factors: Tensor) -> Tensor:
        dtype, work = hidden.dtype, torch.promote_types(hidden.dtype, torch.float32)
        hidden, topk_weight = hidden.to(work), topk_weight.to(work)
        factors = {name: tensor.to(work) for name, tensor in factors.items()}
        weights = {}
        for name, each in ranks.items():
            dense = iter(factors[f"{name}_W"]) if 0 in each else iter(())
            for expert, rank in enumerate(each):
                if rank == 0:
                    weights[name, expert] = [next(dense)]
                else:
                    A, B = factors[f"{name}_A"][expert], factors[f"{name}_B"][expert]
                    weights[name, expert] = [A[:rank], B[:, :rank]]

        def project(name: str, expert: int, x: Tensor) -> Tensor:
            for weight in weights[name, expert]:
                x = weight @ x
            return x

        outputs, rows = [], hidden.unbind()
        for token, experts in enumerate(index.tolist()):
            out = rows[token] * 0
            for place, expert in enumerate(experts):
                if expert >= len(ranks["gate"]):
                    continue
                gate = project("gate", expert, rows[token])
                up = project("up", expert, rows[token])
                gated = gate / (1 + torch.exp(-gate)) * up
                out = out + topk_weight[token, place] * project("down", expert, gated)
            outputs.append(out)
        return torch.stack(outputs).to(dtype)

    return oracle


@some("dtype", [torch.float32, torch.bfloat16], [torch.float64])
@pytest.mark.parametrize("ranks", RANKS)
@some("num_rows", [1, 17], [63], lambda m: f"M{m}")
def test_low_rank_experts_values_and_grads(num_rows, ranks, dtype, device):
    inputs, index = make(num_rows, 2, ranks, dtype, device)
    check_op(op_of(index, ranks), oracle_of(index, ranks), inputs)


@pytest.mark.parametrize("num_rows", [100, 257], ids=lambda m: f"M{m}")
def test_low_rank_experts_more_rows(num_rows, device):
    inputs, index = make(num_rows, 2, MIXED, torch.float32, device)
    check_op(op_of(index, MIXED), oracle_of(index, MIXED), inputs)


@pytest.mark.parametrize("top_k", [1, 2, 4], ids=lambda k: f"k{k}")
def test_low_rank_experts_top_k(top_k, device):
    inputs, index = make(17, top_k, RAGGED, torch.float32, device)
    check_op(op_of(index, RAGGED), oracle_of(index, RAGGED), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_experts_noncontiguous(dtype, device):
    inputs, index = make(17, 2, MIXED, dtype, device)
    index = index.T.contiguous().T
    op, oracle = op_of(index, MIXED), oracle_of(index, MIXED)
    check_op(op, oracle, inputs, noncontiguous=True)


@pytest.mark.parametrize(
    "route",
    [
        pytest.param(lambda index: index.clamp(max=1), id="two-empty-experts"),
        pytest.param(lambda index: torch.full_like(index, 2), id="all-to-one"),
        pytest.param(lambda index: (index + 2).clamp(max=4), id="half-out-of-range"),
        pytest.param(lambda index: torch.where(index > 1, 4, index), id="out-of-range"),
    ],
)
@pytest.mark.parametrize("ranks", [RANKS[0], RANKS[1]])
def test_low_rank_experts_routing(ranks, route, device):
    inputs, index = make(33, 2, ranks, torch.float32, device)
    index = route(index)
    check_op(op_of(index, ranks), oracle_of(index, ranks), inputs)


def test_low_rank_experts_index_out_of_range_adds_nothing(device):
    inputs, index = make(33, 2, RAGGED, torch.float32, device)
    op = op_of(torch.full_like(index, 4), RAGGED)
    results = values_and_grads(op, inputs, [torch.ones(33, HIDDEN, device=device)])
    for name, tensor in results.items():
        assert not tensor.any(), name
    index[:, 1] = 4
    alone = {**inputs, "topk_weight": inputs["topk_weight"][:, :1]}
    expected = op_of(index[:, :1], RAGGED)(**alone)
    torch.testing.assert_close(op_of(index, RAGGED)(**inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("top_k", [1, 2], ids=lambda k: f"k{k}")
def test_low_rank_experts_no_tokens(top_k, ranks, device):
    inputs, index = make(0, top_k, ranks, torch.bfloat16, device)
    y = op_of(index, ranks)(**inputs)
    assert (y.shape, y.dtype) == ((0, HIDDEN), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_low_rank_experts_padding_gets_zero_gradient(dtype, device):
    inputs, index = make(33, 2, RAGGED, dtype, device)
    grad = torch.randn(33, HIDDEN, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    grads = values_and_grads(op_of(index, RAGGED), inputs, [grad])
    for name, ranks in RAGGED.items():
        for expert, rank in enumerate(ranks):
            grad_A, grad_B = grads[f"grad {name}_A"][expert], grads[f"grad {name}_B"][expert]
            assert not grad_A[rank:].any() and not grad_B[:, rank:].any(), (name, expert)
            assert grad_A[:rank].any() and grad_B[:, :rank].any(), (name, expert)


def test_low_rank_experts_ignores_the_padding(device):
    inputs, index = make(33, 2, RAGGED, torch.float32, device)
    before = op_of(index, RAGGED)(**inputs)
    for name, ranks in RAGGED.items():
        for expert, rank in enumerate(ranks):
            inputs[f"{name}_A"][expert, rank:] = float("nan")
    assert torch.equal(op_of(index, RAGGED)(**inputs), before)


def test_low_rank_experts_order_of_tokens_does_not_matter(device):
    inputs, index = make(33, 2, MIXED, torch.float64, device)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(2)).to(device)
    shuffled = {n: t[order] if n in ("hidden", "topk_weight") else t for n, t in inputs.items()}
    y = op_of(index, MIXED)(**inputs)
    y_shuffled = op_of(index[order], MIXED)(**shuffled)
    torch.testing.assert_close(y_shuffled, y[order], rtol=1e-12, atol=1e-12)


def test_low_rank_experts_equal_dense_mixtral(device):
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    inputs, index = make(33, 2, MIXED, torch.float64, device)
    factors = expert_factors(inputs, MIXED)
    dense: dict[str, list[Tensor]] = {}
    for name, projection in zip(factors._fields, factors, strict=True):
        eye = torch.eye(INTERMEDIATE if name == "down" else HIDDEN, dtype=torch.float64)
        dense[name] = [product(eye.to(device)).T for product in projection.by_expert()]
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=4)
    config._experts_implementation = "eager"
    experts = MixtralExperts(config).to(device, torch.float64)
    pairs = zip(dense["gate"], dense["up"], strict=True)
    gate_up = torch.stack([torch.cat(pair) for pair in pairs])
    experts.load_state_dict({"gate_up_proj": gate_up, "down_proj": torch.stack(dense["down"])})
    with torch.no_grad():
        expected = experts(inputs["hidden"], index, inputs["topk_weight"])
    actual = op_of(index, MIXED)(**inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# bf16 takes grouped_mm, fp32 and ranks that are no multiple of 8 the loop over all experts
@pytest.mark.parametrize(
    ("ranks", "dtype"),
    [
        pytest.param(EVEN, torch.bfloat16, id="even-bf16"),
        pytest.param(EVEN, torch.float32, id="even-fp32", marks=full),
        pytest.param({**RAGGED, "up": (2, 9, 7, 1)}, torch.bfloat16, id="ragged-bf16", marks=full),
    ],
)
def test_low_rank_experts_compiled_equals_eager(ranks, dtype, device):
    torch.compiler.reset()
    inputs, index = make(17, 2, ranks, dtype, device)
    # two experts, an empty one, and places out of range, whose rows grouped_mm leaves unwritten
    index = torch.where(index == 1, 4, index)
    index[0] = 4
    op = op_of(index, ranks)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    grad = torch.randn(17, HIDDEN, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    with poison_empty():
        results = values_and_grads(compiled, inputs, [grad])
    expected = values_and_grads(op, inputs, [grad])
    eps = torch.finfo(dtype).eps
    for name, tensor in results.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(
            tensor, expected[name], rtol=0, atol=4 * eps * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_low_rank_experts_autocast(device):
    inputs, index = make(17, 2, MIXED, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        y = op_of(index, MIXED)(**inputs)
    expected = op_of(index, MIXED)(**inputs)
    assert y.dtype == torch.float32
    assert 0 < F.mse_loss(y, expected) < 1e-3 * expected.square().mean()


def factors_with(**changes: ProjectionFactors) -> ExpertFactors:
    ok = {
        "gate": ProjectionFactors((2, 3), torch.zeros(2, 3, 8), torch.zeros(2, 12, 3), None),
        "up": ProjectionFactors((0, 3), torch.zeros(2, 3, 8), torch.zeros(2, 12, 3),
                                torch.zeros(1, 12, 8)),
        "down": ProjectionFactors((0, 0), None, None, torch.zeros(2, 8, 12)),
    }  # fmt: skip
    return ExpertFactors(**(ok | changes))


def z(*shape: int) -> Tensor:
    return torch.zeros(shape)


PF = ProjectionFactors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up": PF((0,), None, None, z(1, 12, 8))}, r"up\.ranks must hold 2 numbers >= 0"),
        ({"gate": PF((-1, 3), z(2, 3, 8), z(2, 12, 3), None)}, r"numbers >= 0, got \[-1, 3\]"),
        ({"gate": PF((0, 3), z(2, 3, 8), z(2, 12, 3), None)}, r"gate\.W must hold the 1 .*None"),
        ({"gate": PF((2, 3), z(2, 3, 8), z(2, 12, 3), z(1, 12, 8))}, r"gate\.W must hold the 0"),
        ({"down": PF((0, 0), None, None, z(1, 8, 12))}, r"down\.W must hold the 2 .*\[1, 8, 12\]"),
        ({"down": PF((0, 0), None, None, z(2, 12, 8))}, r"down\.W must be .*N, K = 8, 12"),
        ({"gate": PF((2, 3), None, None, None)}, r"gate\.A must be \[E, R, K\]"),
        ({"gate": PF((2, 3), z(2, 3, 8), z(2, 12, 4), None)}, r"gate\.A must be .* with one R"),
        ({"gate": PF((2, 3), z(3, 8), z(12, 3), None)}, r"gate\.A must be \[E, R, K\]"),
        ({"gate": PF((2, 4), z(2, 3, 8), z(2, 12, 3), None)}, r"2 experts of rank >= 4"),
        ({"gate": PF((2, 3), z(3, 3, 8), z(3, 12, 3), None)}, r"must hold 2 experts"),
        ({"gate": PF((2, 3), z(2, 3, 9), z(2, 12, 3), None)}, r"gate\.A must have K = 8"),
        ({"gate": PF((2, 3), z(2, 3, 8), z(2, 13, 3), None)}, r"up\.W must be .*N, K = 13, 8"),
    ],
    ids=[
        "num-experts", "negative-rank", "no-W", "needless-W", "W-experts", "W-transposed",
        "no-factors", "A-B-rank", "A-2d", "rank-too-large", "A-experts", "in_features",
        "gate-up-differ",
    ],
)  # fmt: skip
def test_low_rank_experts_rejects_factors(changes, message):
    index = torch.zeros(5, 2, dtype=torch.int64)
    assert low_rank_experts(z(5, 8), index, z(5, 2), factors_with()).shape == (5, 8)
    with pytest.raises(ValueError, match=message):
        low_rank_experts(z(5, 8), index, z(5, 2), factors_with(**changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": (1, 5, 8)}, r"hidden must be \[M, H\], got \[1, 5, 8\]"),
        ({"hidden": (5, 9)}, r"gate\.A must have K = 9"),
        ({"topk_index": (4, 2)}, r"topk_index must be \[M, k\] with M = 5, got \[4, 2\]"),
        ({"topk_index": (5,)}, r"topk_index must be \[M, k\]"),
        ({"topk_weight": (5, 1)}, r"topk_weight must have topk_index's shape \[5, 2\]"),
    ],
    ids=["hidden-3d", "hidden-size", "index-rows", "index-1d", "weight"],
)
def test_low_rank_experts_rejects_shapes(change, message):
    shapes = {"hidden": (5, 8), "topk_index": (5, 2), "topk_weight": (5, 2)} | change
    hidden, index, weight = (torch.zeros(shape) for shape in shapes.values())
    with pytest.raises(ValueError, match=message):
        low_rank_experts(hidden, index.long(), weight, factors_with())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk_index": torch.full((5, 2), 3)}, r"in 0\.\.1, or 2 for no expert; got 3"),
        ({"topk_index": torch.full((5, 2), -1)}, r"in 0\.\.1, or 2 for no expert; got -1"),
        ({"topk_index": z(5, 2)}, r"topk_index must be int64 or int32, got torch\.float32"),
        ({"hidden": z(5, 8).double()}, r"gate\.A must have the dtype of hidden, torch\.float64"),
        ({"topk_weight": z(5, 2).to("meta")}, r"topk_weight must be on the device of hidden, cpu"),
        ({"hidden": z(5, 8).to("meta")}, r"topk_index must be on the device of hidden, meta"),
    ],
    ids=["index-large", "index-negative", "index-float", "dtype", "weight-device", "device"],
)
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_low_rank_experts_rejects_values(change, message, impl):
    given = {
        "hidden": z(5, 8),
        "topk_index": torch.zeros(5, 2, dtype=torch.int64),
        "topk_weight": z(5, 2),
    }
    with pytest.raises(ValueError, match=message):
        low_rank_experts(**given | change, factors=factors_with(), impl=impl)
