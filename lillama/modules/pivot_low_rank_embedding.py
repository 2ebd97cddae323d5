"""nn.Embedding with its table [V, H] as low-rank factors in the pivot gauge."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lillama.modules.low_rank_embedding import shape_only

__all__ = ["PivotLowRankEmbedding"]


class PivotLowRankEmbedding(nn.Module):
    """y = [z, z C^T][order] with z = B[ids]; parameters `lr_B` [V, R], R columns of the table as
    they are, and `lr_C` [H - R, R], buffer `lr_order` [H] int32. A checkpoint holds marks in place
    of the order, see lillama/pivots.py; loading and saving exchange them.

    Raises:
        ValueError: rank outside 1..min(num_embeddings, embedding_dim).
    """

    lr_order: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        limit = min(num_embeddings, embedding_dim)
        if not 1 <= rank <= limit:
            raise ValueError(
                f"rank must be in 1..min(num_embeddings, embedding_dim) = {limit}, got {rank}"
            )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.rank, self.padding_idx = rank, padding_idx
        self.lr_B = nn.Parameter(torch.empty(num_embeddings, rank, device=device, dtype=dtype))
        rest = embedding_dim - rank
        self.lr_C = nn.Parameter(torch.empty(rest, rank, device=device, dtype=dtype))
        order = torch.arange(embedding_dim, dtype=torch.int32, device=device)
        self.register_buffer("lr_order", order)

    @property
    def weight(self) -> Tensor:
        """Shape and dtype only, see `shape_only`."""
        return shape_only(self.num_embeddings, self.embedding_dim, self.lr_B.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] integers -> [..., H]."""
        z = F.embedding(ids, self.lr_B)
        return torch.cat([z, F.linear(z, self.lr_C)], dim=-1).index_select(-1, self.lr_order)

    def extra_repr(self) -> str:
        return (
            f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, "
            f"rank={self.rank}"
        )
