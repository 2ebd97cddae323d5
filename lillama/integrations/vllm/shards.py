"""The share of a factorised layer that one process of a tensor-parallel group holds.

W = B A [N, K] with A [R, K] and B [N, R], where in the pivot gauge
B = cat([identity, C])[permutation]. Column-parallel layers split N, row-parallel ones K, over tp
processes:

    column  A whole, B [N/tp, R]    nothing to communicate
    row     A [R, K/tp], B whole    the R inner products are summed, not the N outputs

Splitting R instead would need another exchange of R values a token for every layer; what it saves
is reading the whole factor, which is the smaller one wherever a rank is worth having. Where the
factors that a process holds are no smaller than its part of W, it holds that part of W.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from lillama.checkpoint.names import factor_shapes
from lillama.checkpoint.pivots import is_permutation

__all__ = ["Part", "is_loaded", "local_rows", "multiplied_out", "unset"]

# in a pivot mask before loading: neither of the two (lillama/checkpoint/pivots.py)
UNSET = 255


@dataclass(frozen=True)
class Part:
    """One matrix of the checkpoint inside a layer of vLLM's, which may hold several (q, k, v).

    name: of the matrix in the checkpoint. rank: R, 0 for a dense one. sizes: its local outputs; of
    a matrix that is one on disk and several to vLLM (Mamba's in_proj), each of them. gauge: of the
    checkpoint. is_embedding: it is the table of the token embeddings.
    """

    name: str
    rank: int
    sizes: tuple[int, ...]
    gauge: str = "plain"
    is_embedding: bool = False

    @property
    def rows(self) -> int:
        """Outputs held here."""
        return sum(self.sizes)

    def is_worth_factors(self, in_features: int) -> bool:
        """Whether its factors hold fewer numbers than its part [rows, in_features] of W."""
        return self.rank * (in_features + self.rows) < in_features * self.rows

    def shapes(self, N: int, K: int) -> dict[str, tuple[int, ...]]:
        """{end of the name: shape} of what the checkpoint has of it."""
        if not self.rank:
            return {"weight": (N, K)}
        return factor_shapes((N, K), self.rank, self.gauge, self.is_embedding)


def local_rows(
    sizes: tuple[int, ...], tp_rank: int, tp_size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the indices of the rows of a whole matrix that process `tp_rank` holds, each of
    `sizes` local outputs being cut out of its own segment of tp_size times as many."""
    starts = [tp_size * sum(sizes[:i]) + tp_rank * size for i, size in enumerate(sizes)]
    parts = [
        torch.arange(start, start + size, device=device)
        for start, size in zip(starts, sizes, strict=True)
    ]
    return torch.cat(parts)


def multiplied_out(A: Tensor, B: Tensor) -> Tensor:
    """Return B A by fp32 products, rounded once to the dtype of A."""
    return (B.float() @ A.float()).to(A.dtype)


def unset(shape: tuple[int, ...], dtype: torch.dtype) -> Parameter:
    """Return a parameter filled with what no checkpoint holds."""
    value = torch.full(shape, torch.nan if dtype.is_floating_point else UNSET, dtype=dtype)
    return Parameter(value, requires_grad=False)


def is_loaded(tensor: Tensor) -> bool:
    """Return whether a tensor that was `unset` came: whether it is finite, or, of integers, the
    permutation that a mask stands for."""
    if tensor.is_floating_point():
        return bool(torch.isfinite(tensor).all())
    return is_permutation(tensor)
