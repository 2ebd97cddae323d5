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
from lillama.serve.models.runner import Function, lay_out

__all__ = ["Experts", "expand_pivots", "experts_cpu"]

logger = logging.getLogger(__name__)
_say_once = cache(logger.info)  # however many blocks there are

# x [b, H], index [b, k] int64, weights [b, k] -> [b, H]
Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


def experts_cpu(experts: Any) -> Experts:
    """Return what a module of gated experts with silu computes, dense or factorised."""
    each = _low_rank(experts) if isinstance(experts, LowRankExperts) else _dense(experts)

    def one(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        parts = [
            each[expert](x) * weight
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
            out.index_add_(0, rows, each[expert](x[rows]) * weights[rows, ks, None])
        return out

    return lambda x, index, weights: (one if len(x) == 1 else several)(x, index, weights)


def _low_rank(experts: LowRankExperts) -> list[Function]:
    for parameter in experts.parameters():
        lay_out(parameter)

    def one(gate: Function, up: Function, down: Function, x: Tensor) -> Tensor:
        return down(F.silu(gate(x)) * up(x))

    factors = (matrix.by_expert() for matrix in experts.factors())
    return [partial(one, *matrices) for matrices in zip(*factors, strict=True)]


def _dense(experts: Any) -> list[Function]:
    def one(gate_up: Tensor, down: Tensor, x: Tensor) -> Tensor:
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down)

    weights = zip(experts.gate_up_proj.data, experts.down_proj.data, strict=True)
    return [partial(one, *matrices) for matrices in weights]


def expand_pivots(mlp: Any) -> nn.Module:
    """Return the module of experts; one in the pivot gauge is exchanged for one with plain factors.
    On a GPU its operation has no Triton kernel and cannot be captured in a CUDA graph; on a CPU
    putting outputs in their order costs a tenth of a small Mixtral's step."""
    if isinstance(mlp.experts, PivotLowRankExperts):
        _say_once(
            "experts in the pivot gauge are held as plain factors: R^2 numbers more for each "
            "matrix of rank R than the checkpoint has"
        )
        mlp.experts = mlp.experts.plain()
    return mlp.experts
