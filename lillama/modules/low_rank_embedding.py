"""nn.Embedding with its table [V, H] replaced by B [V, R] @ A [R, H], and what stands for the
weight of such a module or of a factorised output head."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FactorizedEmbedding", "LowRankEmbedding", "shape_only"]


def shape_only(V: int, H: int, dtype: torch.dtype) -> Tensor:
    """A weight [V, H] on the meta device, with the factors' dtype: models look at the dtype of the
    head's and the embeddings' `weight` at every step, where computing it would cost more than the
    step; whatever would read its numbers fails."""
    return torch.empty(V, H, dtype=dtype, device="meta")


class FactorizedEmbedding(nn.Module):
    """What both gauges share: the sizes, and `lr_B` [V, R]. The other factor is a subclass's.

    Raises:
        ValueError: rank outside 1..min(num_embeddings, embedding_dim).
    """

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

    @property
    def weight(self) -> Tensor:
        """Shape and dtype only, see `shape_only`."""
        return shape_only(self.num_embeddings, self.embedding_dim, self.lr_B.dtype)

    def extra_repr(self) -> str:
        return (
            f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, "
            f"rank={self.rank}"
        )


class LowRankEmbedding(FactorizedEmbedding):
    """y = B[ids] A, parameters `lr_A` [R, H] and `lr_B` [V, R]. Arguments and errors as
    `FactorizedEmbedding`'s."""

    def __init__(self, *sizes: Any, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.lr_A = nn.Parameter(self.lr_B.new_empty(self.rank, self.embedding_dim))

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] integers -> [..., H]."""
        return F.embedding(ids, self.lr_B) @ self.lr_A
