"""PivotLowRankExperts against transformers' own MixtralExperts whose dense weights are multiplied
out."""

import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from lillama.models.families import PROJECTIONS
from lillama.modules.low_rank_experts import LowRankExperts, PivotLowRankExperts
from tests.pivot_orders import choose_pivots

E, H, INNER = 4, 32, 64
# ranks of every kind: different in each expert, 0 = dense, one projection wholly factorised
MIXED = {"gate": (8, 0, 16, 24), "up": (0, 8, 8, 0), "down": (16, 24, 8, 16)}
ALL_DENSE = {"gate": (0,) * 4, "up": (8,) * 4, "down": (16,) * 4}


@torch.no_grad()
def experts_of(
    ranks: dict, device: torch.device, implementation: str = "eager"
) -> PivotLowRankExperts:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=H,
        intermediate_size=INNER,
        num_local_experts=E,
        num_experts_per_tok=2,
        experts_implementation=implementation,
    )
    experts = PivotLowRankExperts(config, E, H, INNER, ranks, device, torch.float32)
    for projection in PROJECTIONS:
        for expert in range(E):
            for key, tensor in experts.stored(projection, expert).items():
                if key != "lr_pivots":
                    tensor.copy_(torch.randn(tensor.shape) * tensor.shape[-1] ** -0.5)
    choose_pivots(experts)
    return experts


@torch.no_grad()
def dense_of(experts: PivotLowRankExperts, device: torch.device) -> MixtralExperts:
    dense = MixtralExperts(experts.config).to(device)
    for expert in range(E):
        weights = []
        for projection in PROJECTIONS:
            part = experts.matrix(projection, expert)
            if "lr_W" not in part:
                A, C, permutation = part["lr_A"], part["lr_C"], part["lr_order"]
                part = {"lr_W": torch.cat([A, C @ A])[permutation.long()]}
            weights.append(part["lr_W"])
        dense.get_parameter("gate_up_proj")[expert] = torch.cat(weights[:2])
        dense.get_parameter("down_proj")[expert] = weights[2]
    return dense


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("ranks", [MIXED, ALL_DENSE], ids=["mixed", "gate-dense"])
def test_forward_and_gradients_are_those_of_dense_weights(ranks, implementation, device):
    experts = experts_of(ranks, device, implementation)
    dense = dense_of(experts, device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(29, H, generator=generator).to(device)
    weight, index = torch.randn(29, E, generator=generator).softmax(-1).topk(2)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    ours, theirs = (
        module(x, index.to(device), weight.to(device))
        for module, x in zip((experts, dense), xs, strict=True)
    )
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn(ours.shape, generator=generator).to(device)
    ours.backward(grad)
    theirs.backward(grad)
    torch.testing.assert_close(xs[0].grad, xs[1].grad)
    assert dense.down_proj.grad is not None
    for expert, rank in enumerate(ranks["down"]):
        wanted = dense.down_proj.grad[expert]
        part = experts.stored("down", expert)
        rows = wanted[experts.matrix("down", expert)["lr_order"].argsort()]
        A, C = part["lr_A"].detach(), part["lr_C"].detach()
        grad_A = experts.get_parameter("down_A").grad[expert, :rank]  # type: ignore[index]
        grad_C = experts.get_parameter("down_C").grad[expert, : H - rank, :rank]  # type: ignore[index]
        torch.testing.assert_close(grad_A, rows[:rank] + C.T @ rows[rank:])
        torch.testing.assert_close(grad_C, rows[rank:] @ A.T)


def test_stored_has_no_padding_and_counts_as_the_plan_does():
    experts = experts_of(MIXED, torch.device("cpu"))
    for projection in PROJECTIONS:
        N, K = experts.projection_shape(projection)
        for expert, R in enumerate(MIXED[projection]):
            shapes = {k: tuple(t.shape) for k, t in experts.stored(projection, expert).items()}
            wanted = {"lr_A": (R, K), "lr_C": (N - R, R), "lr_pivots": (N,)}
            assert shapes == (wanted if R else {"lr_W": (N, K)})


@torch.no_grad()
def test_plain_experts_have_the_same_weights_in_the_other_gauge():
    experts = experts_of(MIXED, torch.device("cpu"))
    plain, dense = experts.plain(), dense_of(experts, torch.device("cpu"))
    assert type(plain) is LowRankExperts and plain.ranks == experts.ranks
    for expert in range(E):
        part = plain.stored("down", expert)
        torch.testing.assert_close(part["lr_B"] @ part["lr_A"], dense.down_proj[expert])
        assert torch.equal(part["lr_A"], experts.stored("down", expert)["lr_A"])
