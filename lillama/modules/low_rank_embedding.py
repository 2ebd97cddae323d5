"""nn.Embedding with its table [V, H] as low-rank factors."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lillama.modules.factorized import Factorized

__all__ = ["FactorizedEmbedding", "LowRankEmbedding", "PivotLowRankEmbedding"]


class FactorizedEmbedding(Factorized):
    """The part of both gauges: the factors and the sizes. Raises ValueError as `Factorized`."""

    is_embedding = True

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = num_embeddings, embedding_dim
        super().__init__(shape, rank, "num_embeddings, embedding_dim", device, dtype)
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx = padding_idx

    @property
    def weight(self) -> Tensor:
        """Shape and dtype only, see `shape_only`."""
        return self.shape_only(self.B.dtype)

    def extra_repr(self) -> str:
        return (
            f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, "
            f"rank={self.rank}"
        )


class LowRankEmbedding(FactorizedEmbedding):
    """y = B[ids] A with A [R, H], B [V, R]."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] integers -> [..., H]."""
        return F.embedding(ids, self.B) @ self.A


class PivotLowRankEmbedding(FactorizedEmbedding):
    """y = [z, z C^T][permutation] with z = B[ids], B [V, R] being R columns of the table as they
    are, C [H - R, R]."""

    gauge = "pivot"

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] integers -> [..., H]."""
        z = F.embedding(ids, self.B)
        return torch.cat([z, F.linear(z, self.C)], dim=-1).index_select(-1, self.permutation)
