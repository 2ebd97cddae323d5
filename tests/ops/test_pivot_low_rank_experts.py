"""pivot_low_rank_experts against a loop over tokens and their experts, and every gradient."""

from collections.abc import Callable

import pytest
import torch
from lillama_kernels import (
    PivotExpertFactors,
    PivotProjectionFactors,
    low_rank_experts,
    pivot_low_rank_experts,
)
from lillama_kernels.testing import (
    check_op,
    expert_factors,
    low_rank_experts_inputs,
    poison_empty,
    values_and_grads,
)
from torch import Tensor

from tests.ops.precision import full, some

HIDDEN, INTERMEDIATE = 24, 40
SIZES = {"gate": INTERMEDIATE, "up": INTERMEDIATE, "down": HIDDEN}
# four experts: ragged, dense (0) among factorised, all dense, all of one rank, and a C of no rows
RANKS = {
    "ragged": {"gate": (5, 1, 8, 3), "up": (2, 7, 7, 1), "down": (8, 4, 1, 6)},
    "mixed": {"gate": (5, 0, 8, 0), "up": (0, 7, 0, 1), "down": (8, 4, 1, 6)},
    "dense": {"gate": (0,) * 4, "up": (0,) * 4, "down": (0,) * 4},
    "even": {"gate": (8,) * 4, "up": (8, 16, 8, 8), "down": (16,) * 4},
    "square": {"gate": (8,) * 4, "up": (8,) * 4, "down": (24,) * 4},
}
Ranks = dict[str, tuple[int, ...]]
Orders = dict[str, Tensor]


def made(num_rows: int, ranks: Ranks, dtype: torch.dtype, device: torch.device):
    """Floating tensors (hidden, topk_weight, "gate_A", "gate_C", ...), topk_index, and orders
    [E, N] of each projection."""
    inputs, index = low_rank_experts_inputs(
        num_rows, 2, HIDDEN, INTERMEDIATE, ranks, dtype=dtype, device=device
    )
    orders: Orders = {}
    generator = torch.Generator().manual_seed(3)
    for name, N in SIZES.items():
        if any(ranks[name]):
            rest = N - min(rank for rank in ranks[name] if rank)
            inputs[f"{name}_C"] = inputs.pop(f"{name}_B")[:, :rest].contiguous()
            for expert, rank in enumerate(ranks[name]):
                inputs[f"{name}_C"][expert, N - rank :] = 0.0
            order = [torch.randperm(N, generator=generator) for _ in ranks[name]]
            orders[name] = torch.stack(order).int().to(device)
    return inputs, index, orders


def factors_of(tensors: dict[str, Tensor], orders: Orders, ranks: Ranks) -> PivotExpertFactors:
    return PivotExpertFactors(
        *(
            PivotProjectionFactors(
                ranks[name],
                tensors.get(f"{name}_A"),
                tensors.get(f"{name}_C"),
                orders.get(name),
                tensors.get(f"{name}_W"),
            )
            for name in SIZES
        )
    )


def op_of(index: Tensor, orders: Orders, ranks: Ranks) -> Callable[..., Tensor]:
    def op(hidden: Tensor, topk_weight: Tensor, **tensors: Tensor) -> Tensor:
        return pivot_low_rank_experts(
            hidden, index, topk_weight, factors_of(tensors, orders, ranks)
        )

    return op


def oracle_of(index: Tensor, orders: Orders, ranks: Ranks) -> Callable[..., Tensor]:
    def oracle(hidden: Tensor, topk_weight: Tensor, **tensors: Tensor) -> Tensor:
        # fp32 for bf16 inputs, rounded once at the end
        dtype, work = hidden.dtype, torch.promote_types(hidden.dtype, torch.float32)
        hidden, topk_weight = hidden.to(work), topk_weight.to(work)
        tensors = {name: tensor.to(work) for name, tensor in tensors.items()}

        def project(name: str, expert: int, x: Tensor) -> Tensor:
            rank = ranks[name][expert]
            if rank == 0:
                return tensors[f"{name}_W"][ranks[name][:expert].count(0)] @ x
            z = tensors[f"{name}_A"][expert, :rank] @ x
            columns = [*z, *(tensors[f"{name}_C"][expert, : SIZES[name] - rank, :rank] @ z)]
            return torch.stack([columns[place] for place in orders[name][expert].tolist()])

        outputs = []
        for token, experts in enumerate(index.tolist()):
            x, out = hidden[token], hidden[token] * 0
            for place, expert in enumerate(experts):
                if expert < len(ranks["gate"]):
                    gate = project("gate", expert, x)
                    gated = gate / (1 + torch.exp(-gate)) * project("up", expert, x)
                    out = out + topk_weight[token, place] * project("down", expert, gated)
            outputs.append(out)
        return torch.stack(outputs).to(dtype)

    return oracle


@some("dtype", [torch.float32, torch.bfloat16], [torch.float64])
@some("name", ["mixed", "square"], ["ragged", "dense", "even"])
def test_pivot_experts_values_and_grads(name, dtype, device):
    ranks = RANKS[name]
    inputs, index, orders = made(33, ranks, dtype, device)
    check_op(op_of(index, orders, ranks), oracle_of(index, orders, ranks), inputs)


@pytest.mark.parametrize("num_rows", [1, 100], ids=lambda m: f"M{m}")
def test_pivot_experts_noncontiguous_and_other_numbers_of_rows(num_rows, device):
    ranks = RANKS["mixed"]
    inputs, index, orders = made(num_rows, ranks, torch.float32, device)
    index = index.T.contiguous().T
    op, oracle = op_of(index, orders, ranks), oracle_of(index, orders, ranks)
    check_op(op, oracle, inputs, noncontiguous=True)


@pytest.mark.parametrize(
    "route",
    [
        pytest.param(lambda index: index.clamp(max=1), id="two-empty-experts"),
        pytest.param(lambda index: (index + 2).clamp(max=4), id="half-out-of-range"),
    ],
)
def test_pivot_experts_routing(route, device):
    ranks = RANKS["ragged"]
    inputs, index, orders = made(17, ranks, torch.float32, device)
    index = route(index)
    check_op(op_of(index, orders, ranks), oracle_of(index, orders, ranks), inputs)


def test_pivot_experts_no_tokens(device):
    ranks = RANKS["ragged"]
    inputs, index, orders = made(0, ranks, torch.bfloat16, device)
    y = op_of(index, orders, ranks)(**inputs)
    assert (y.shape, y.dtype) == ((0, HIDDEN), torch.bfloat16)


def test_pivot_experts_are_plain_experts_with_the_identity_in_b(device):
    ranks = RANKS["mixed"]
    inputs, index, orders = made(33, ranks, torch.float64, device)
    plain = {name: tensor for name, tensor in inputs.items() if not name.endswith("_C")}
    for name, N in SIZES.items():
        A, C = inputs[f"{name}_A"], inputs[f"{name}_C"]
        B = A.new_zeros(len(A), N, A.shape[1])
        for expert, rank in enumerate(ranks[name]):
            if rank:
                eye = torch.eye(rank, dtype=A.dtype, device=device)
                rows = torch.cat([eye, C[expert, : N - rank, :rank]])
                B[expert, :, :rank] = rows[orders[name][expert].long()]
        plain[f"{name}_B"] = B
    wanted = low_rank_experts(
        plain["hidden"], index, plain["topk_weight"], expert_factors(plain, ranks)
    )
    found = op_of(index, orders, ranks)(**inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_pivot_experts_padding_is_not_read_and_gets_no_gradient(device):
    ranks = RANKS["ragged"]
    inputs, index, orders = made(33, ranks, torch.float32, device)
    op = op_of(index, orders, ranks)
    before = op(**inputs)
    places: dict[str, Tensor] = {}
    for name, N in SIZES.items():
        for suffix in "AC":
            places[f"{name}_{suffix}"] = torch.ones_like(inputs[f"{name}_{suffix}"]).bool()
        for expert, rank in enumerate(ranks[name]):
            places[f"{name}_A"][expert, :rank] = False
            places[f"{name}_C"][expert, : N - rank, :rank] = False
    grads = values_and_grads(op, inputs, [torch.ones_like(before)])
    for name, padding in places.items():
        assert padding.any() and not grads[f"grad {name}"][padding].any(), name
        assert grads[f"grad {name}"][~padding].any(), name
        inputs[name][padding] = float("nan")
    assert torch.equal(op(**inputs), before)


# bf16 takes grouped_mm, fp32 and ranks that are no multiple of 8 the loop over all experts
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("even", torch.bfloat16, id="even-bf16"),
        pytest.param("even", torch.float32, id="even-fp32", marks=full),
        pytest.param("ragged", torch.bfloat16, id="ragged-bf16", marks=full),
    ],
)
def test_pivot_experts_compiled_equals_eager(name, dtype, device):
    torch.compiler.reset()
    ranks = RANKS[name]
    inputs, index, orders = made(17, ranks, dtype, device)
    # two experts, an empty one, and places out of range, whose rows grouped_mm leaves unwritten
    index = torch.where(index == 1, 4, index)
    index[0] = 4
    op = op_of(index, orders, ranks)
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


def z(*shape: int) -> Tensor:
    return torch.zeros(shape)


PF = PivotProjectionFactors
ORDER = torch.arange(12).repeat(2, 1)
BAD = {
    "ranks": (PF((-1, 3), z(2, 3, 8), z(2, 10, 3), ORDER, None), r"numbers >= 0, got \[-1, 3\]"),
    "no W": (PF((0, 3), z(2, 3, 8), z(2, 9, 3), ORDER, None), r"gate\.W must hold the 1 .*None"),
    "no A": (PF((2, 3), None, z(2, 10, 3), ORDER, None), r"gate\.A must be \[E, R, K\]"),
    "one R": (PF((2, 3), z(2, 3, 8), z(2, 10, 4), ORDER, None), r"gate\.C \[E, Q, R\] with one R"),
    "A": (PF((2, 3), z(2, 2, 8), z(2, 10, 2), ORDER, None), r"gate\.A .* = \[2, 3 or more, 8\]"),
    "C": (PF((2, 3), z(2, 3, 8), z(2, 9, 3), ORDER, None), r"gate\.C .* smallest rank = 10 or"),
    "order": (PF((2, 3), z(2, 3, 8), z(2, 10, 3), ORDER[:1], None), "gate.order must be .E, N"),
    "floating order": (
        PF((2, 3), z(2, 3, 8), z(2, 10, 3), ORDER.float(), None), "gate.order must be int32 or"
    ),
    "dtype": (PF((2, 3), z(2, 3, 8).double(), z(2, 10, 3), ORDER, None), "gate.A must have the dt"),
    "device": (
        PF((2, 3), z(2, 3, 8), z(2, 10, 3), ORDER.to("meta"), None), "gate.order must be on the dev"
    ),
}  # fmt: skip


def given(gate: PivotProjectionFactors | None = None) -> dict:
    gate = gate or PF((2, 3), z(2, 3, 8), z(2, 10, 3), ORDER, None)
    up, down = PF((0, 0), None, None, None, z(2, 12, 8)), PF((0, 0), None, None, None, z(2, 8, 12))
    index = torch.zeros(5, 2, dtype=torch.int64)
    factors = PivotExpertFactors(gate, up, down)
    return {"hidden": z(5, 8), "topk_index": index, "topk_weight": z(5, 2), "factors": factors}


@pytest.mark.parametrize("case", BAD)
def test_pivot_experts_refuse_what_does_not_fit(case):
    assert pivot_low_rank_experts(**given()).shape == (5, 8)
    gate, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        pivot_low_rank_experts(**given(gate))


def test_pivot_experts_refuse_an_expert_that_is_not_there():
    arguments = given() | {"topk_index": torch.full((5, 2), 3)}
    with pytest.raises(ValueError, match="or 2 for no expert; got 3"):
        pivot_low_rank_experts(**arguments)


def test_pivot_experts_have_no_triton_kernel():
    with pytest.raises(NotImplementedError, match="no Triton kernel yet"):
        pivot_low_rank_experts(**given(), impl="triton")
