"""nn.Embedding with its table [V, H] as low-rank factors in the pivot gauge."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lillama.modules.low_rank_embedding import FactorizedEmbedding

__all__ = ["PivotLowRankEmbedding"]


class PivotLowRankEmbedding(FactorizedEmbedding):
    """y = [z, z C^T][order] with z = B[ids]; parameters `lr_B` [V, R], R columns of the table as
    they are, and `lr_C` [H - R, R], buffer `lr_order` [H] int32. A checkpoint holds marks in place
    of the order (`checkpoint/pivots.py`); loading and saving exchange them. Arguments and errors
    are those of `FactorizedEmbedding`.
    """

    lr_order: Tensor

    def __init__(self, *sizes: Any, **options: Any) -> None:
        super().__init__(*sizes, **options)
        rest = self.embedding_dim - self.rank
        self.lr_C = nn.Parameter(self.lr_B.new_empty(rest, self.rank))
        order = torch.arange(self.embedding_dim, dtype=torch.int32, device=self.lr_B.device)
        self.register_buffer("lr_order", order)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] integers -> [..., H]."""
        z = F.embedding(ids, self.lr_B)
        return torch.cat([z, F.linear(z, self.lr_C)], dim=-1).index_select(-1, self.lr_order)
