"""Experts for the few rows of a step on a CPU, where cutting out every expert's weights at every
call would take most of the time. Letters: b rows, H hidden_size, E experts, k of them a token."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lillama.modules.low_rank_experts import LowRankExperts
from lillama.serve.runner import lay_out

__all__ = ["Experts", "experts_cpu"]

# x [b, H], index [b, k] int64, weights [b, k] -> [b, H]
Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


def experts_cpu(experts: Any) -> Experts:
    """What a module of gated experts with silu computes, dense (transformers') or factorised."""
    inner, downs = _gated(experts)

    def one(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        parts = [
            _products(inner(x, expert), downs[expert]) * weight
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
            y = _products(inner(x[rows], expert), downs[expert])
            out.index_add_(0, rows, y * weights[rows, ks, None])
        return out

    return lambda x, index, weights: (one if len(x) == 1 else several)(x, index, weights)


def _gated(
    experts: Any,
) -> tuple[Callable[[Tensor, int], Tensor], list[tuple[Tensor, ...]]]:
    """silu(gate(x)) * up(x) of one expert, and the weights of every expert's down."""
    if isinstance(experts, LowRankExperts):
        for parameter in experts.parameters():
            lay_out(parameter)
        gates, ups, downs = (factors.by_expert() for factors in experts.factors())

        def low_rank(x: Tensor, expert: int) -> Tensor:
            return F.silu(_products(x, gates[expert])) * _products(x, ups[expert])

        return low_rank, downs
    both = experts.gate_up_proj.data.unbind(0)

    def dense(x: Tensor, expert: int) -> Tensor:
        gate, up = F.linear(x, both[expert]).chunk(2, dim=-1)
        return F.silu(gate) * up

    return dense, [(weight,) for weight in experts.down_proj.data]


def _products(x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    for weight in weights:
        x = F.linear(x, weight)
    return x
