"""Experts for the few rows of a step. On a CPU cutting out every expert's weights at every call
would take most of the time. Letters: b rows, H hidden_size, E experts, k of them a token."""

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lillama.modules.low_rank_experts import LowRankExperts
from lillama.modules.pivot_low_rank_experts import PivotLowRankExperts
from lillama.serve.models.runner import lay_out

__all__ = ["Experts", "expand_pivots", "experts_cpu"]

logger = logging.getLogger(__name__)

# x [b, H], index [b, k] int64, weights [b, k] -> [b, H]
Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


def experts_cpu(experts: Any) -> Experts:
    """What a module of gated experts with silu computes, dense (transformers') or factorised."""
    inner, downs = _gated(experts)

    def one(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        parts = [
            downs[expert](inner(x, expert)) * weight
            for expert, weight in zip(index[0].tolist(), weights[0].to(x.dtype), strict=True)
        ]
        return sum(parts[1:], parts[0])

    def several(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        places: dict[int, list[tuple[int, int]]] = {}
        for row, chosen in enumerate(index.tolist()):
            for k, expert in enumerate(chosen):
                places.setdefault(expert, []).append((row, k))
        out = torch.zeros_like(x)
        weights = weights.to(x.dtype)
        # in the experts' order, so that a row's sum does not depend on the others
        for expert in sorted(places):
            rows, ks = torch.tensor(places[expert]).unbind(1)
            y = downs[expert](inner(x[rows], expert))
            out.index_add_(0, rows, y * weights[rows, ks, None])
        return out

    return lambda x, index, weights: (one if len(x) == 1 else several)(x, index, weights)


def expand_pivots(mlp: Any) -> nn.Module:
    """The module of experts; one in the pivot gauge is exchanged for one with plain factors. On a
    GPU its operation has no Triton kernel and cannot be captured in a CUDA graph; on a CPU putting
    outputs in their order costs a tenth of a small Mixtral's step."""
    if isinstance(mlp.experts, PivotLowRankExperts):
        _say_expanded()
        mlp.experts = mlp.experts.plain()
    return mlp.experts


@cache
def _say_expanded() -> None:
    """Once a process, however many blocks there are."""
    logger.info(
        "experts in the pivot gauge are held as plain factors: R^2 numbers more for each matrix of "
        "rank R than the checkpoint has"
    )


def _gated(
    experts: Any,
) -> tuple[Callable[[Tensor, int], Tensor], list[Callable[[Tensor], Tensor]]]:
    """silu(gate(x)) * up(x) of one expert, and every expert's down."""
    if isinstance(experts, LowRankExperts):
        for parameter in experts.parameters():
            lay_out(parameter)
        gates, ups, downs = (factors.by_expert() for factors in experts.factors())

        def low_rank(x: Tensor, expert: int) -> Tensor:
            return F.silu(gates[expert](x)) * ups[expert](x)

        return low_rank, downs
    both = experts.gate_up_proj.data.unbind(0)

    def dense(x: Tensor, expert: int) -> Tensor:
        gate, up = F.linear(x, both[expert]).chunk(2, dim=-1)
        return F.silu(gate) * up

    return dense, [partial(F.linear, weight=weight) for weight in experts.down_proj.data]
