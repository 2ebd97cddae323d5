"""low_rank_experts beside transformers' dense MixtralExperts with grouped_mm."""

import pytest
import torch
from lillama_kernels import low_rank_experts, reference
from lillama_kernels.testing import expert_factors, low_rank_experts_inputs
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks.rows import Variant, Work, compare, variant
from benchmarks.shapes import EXPERTS, ExpertsShape
from benchmarks.timing import modes_of, step


def dense_experts(shape: ExpertsShape, dtype: torch.dtype, device: torch.device) -> MixtralExperts:
    config = MixtralConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = "grouped_mm"
    with device:
        experts = MixtralExperts(config).to(dtype)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return experts


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("shape", EXPERTS, ids=lambda s: s.name)
def bench_low_rank_experts(benchmark, shape, backward, dtype, device):
    m, h, i, k = shape.rows, shape.hidden_size, shape.intermediate_size, shape.top_k
    ranks = {name: (shape.rank,) * shape.num_experts for name in ("gate", "up", "down")}
    inputs, index = low_rank_experts_inputs(m, k, h, i, ranks, dtype=dtype, device=device)
    experts = dense_experts(shape, dtype, device)

    def op(hidden: Tensor, topk_weight: Tensor, **factors: Tensor) -> Tensor:
        return low_rank_experts(hidden, index, topk_weight, expert_factors(factors, ranks))

    def truth(hidden: Tensor, topk_weight: Tensor, **factors: Tensor) -> Tensor:
        return reference.low_rank_experts(
            hidden, index, topk_weight, expert_factors(factors, ranks)
        )

    def dense(hidden: Tensor, topk_weight: Tensor, **weights: Tensor) -> Tensor:
        return torch.func.functional_call(experts, weights, (hidden, index, topk_weight))

    dense_inputs = {name: inputs[name] for name in ("hidden", "topk_weight")}
    dense_inputs |= dict(experts.named_parameters())
    variants = {
        "ours": variant(op, truth, [inputs], backward),
        "dense": Variant(
            calls=[step(dense, dense_inputs, backward)],
            work=Work(flop=2.0 * m * k * 3 * h * i * (3 if backward else 1)),
        ),
    }
    work = Work(flop=2.0 * m * k * 3 * shape.rank * (h + i) * (3 if backward else 1))
    # the reference counts tokens an expert on the host, which a graph cannot capture
    modes = modes_of(device, graph=False)
    given = {"shape": shape, "dtype": dtype, "device": device, "work": work, "modes": modes}
    compare(benchmark, variants, **given, rounds=10)
