"""Stacked experts, run one by one from weights as they are stored."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lillama.models.families import Family
from lillama.modules.replace import dense_expert

__all__ = ["dense_experts_forward", "expert_forward", "experts_of"]


def experts_of(family: Family, block: nn.Module) -> nn.Module | None:
    """The stacked experts of a block; None where it has none."""
    if family.experts is None:
        return None
    return dict(block.named_modules()).get(family.experts.runtime)


def dense_experts_forward(
    experts: nn.Module,
    hidden: Tensor,
    topk_index: Tensor,
    topk_weight: Tensor,
    see: Callable[[Tensor, int, str, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Compute what a stacked experts module does, one expert after the other.

    Weights may be of a narrower dtype than `hidden` [M, H]: each expert's are widened when it is
    its turn, so that a block needs its stored size and one expert more. `see(rows, expert,
    projection, x, y)` gets the inputs and outputs of every projection and the rows of `hidden` that
    they belong to, for experts without tokens too; with gradients twice for the same, as each
    expert is computed again in the backward pass: its widened weights would otherwise wait for it,
    those of all experts at once.
    """
    run = _computed_again if torch.is_grad_enabled() else expert_forward
    out = torch.zeros_like(hidden)
    for expert in range(experts.get_parameter("down_proj").shape[0]):
        rows, choice = torch.where(topk_index == expert)
        if see is None and rows.numel() == 0:
            continue
        seen = None if see is None else functools.partial(see, rows, expert)
        y = run(experts, expert, hidden[rows], seen)
        weighted = y * topk_weight[rows, choice, None]
        out.index_add_(0, rows, weighted.to(out.dtype))
    return out


def _computed_again(*arguments: Any) -> Tensor:
    y = checkpoint(expert_forward, *arguments, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(y, Tensor)
    return y


def expert_forward(
    experts: Any,
    expert: int,
    x: Tensor,
    see: Callable[[str, Tensor, Tensor], None] | None,
) -> Tensor:
    """One expert's output for its tokens x [n, H]; `see(projection, x, y)` as above."""

    def project(projection: str, inputs: Tensor) -> Tensor:
        weight = dense_expert(experts, projection, expert)
        if not torch.is_autocast_enabled(inputs.device.type):
            weight = weight.to(inputs.dtype)
        outputs = F.linear(inputs, weight)
        if see is not None:
            see(projection, inputs, outputs)
        return outputs

    gated = experts.act_fn(project("gate", x)) * project("up", x)
    return project("down", gated)
