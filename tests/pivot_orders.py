"""Orders of outputs for tests of the pivot gauge."""

import torch
from torch import Tensor

from lillama.checkpoint.pivots import permutation_of
from lillama.modules.low_rank_experts import PivotLowRankExperts
from lillama.modules.low_rank_linear import PivotLowRankLinear

__all__ = ["choose_pivots", "random_order"]


def random_order(num_outputs: int, rank: int) -> Tensor:
    """[N] int32 of any R outputs, as `to_pivot` makes it; by torch's generator."""
    marks = torch.zeros(num_outputs, dtype=torch.uint8)
    marks[torch.randperm(num_outputs)[:rank]] = 1
    return permutation_of(marks, rank)


@torch.no_grad()
def choose_pivots(module: PivotLowRankLinear | PivotLowRankExperts) -> None:
    """Any outputs of a module, of each expert its own."""
    if isinstance(module, PivotLowRankLinear):
        module.lr_order.copy_(random_order(module.out_features, module.rank))
        return
    for projection, ranks in module.ranks.items():
        for expert, rank in enumerate(ranks):
            if rank:
                order = module.matrix(projection, expert)["lr_order"]
                order.copy_(random_order(len(order), rank))
