"""What one process of a tensor-parallel group holds of a factorised layer. Plain PyTorch.

W = B A [N, K] with A [R, K] and B [N, R], or in the pivot gauge B = cat([identity, C])[order].
Column-parallel layers split N, row-parallel ones K, over tp processes:

    column  A whole, B [N/tp, R]    nothing to communicate
    row     A [R, K/tp], B whole    the R inner products are summed, not the N outputs

Splitting R instead would need another exchange of R values a token for every layer; what it saves
is reading the whole factor, which is the smaller one wherever a rank is worth having. Where the
factors that a process holds are no smaller than its part of W, it holds that part of W.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lillama.checkpoint.pivots import is_permutation

__all__ = ["UNMARKED", "Part", "local_rows", "multiplied_out", "not_loaded", "pivot_rows"]

# a mark before loading: neither of the two (lillama/checkpoint/pivots.py)
UNMARKED = 255


@dataclass(frozen=True)
class Part:
    """One matrix of the checkpoint inside a layer of vLLM's, which may hold several (q, k, v).

    name: of the matrix in the checkpoint. rank: R, 0 for a dense one. sizes: its local outputs; of
    a matrix that is one on disk and several to vLLM (Mamba's in_proj), each of them.
    """

    name: str
    rank: int
    sizes: tuple[int, ...]
    pivot: bool = False

    @property
    def rows(self) -> int:
        """Outputs held here."""
        return sum(self.sizes)

    def is_worth_factors(self, in_features: int) -> bool:
        """Whether its factors hold fewer numbers than its part [rows, in_features] of W."""
        return self.rank * (in_features + self.rows) < in_features * self.rows


def local_rows(
    sizes: tuple[int, ...], tp_rank: int, tp_size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Indices of the rows of a whole matrix that process `tp_rank` holds, each of `sizes` local
    outputs being cut out of its own segment of tp_size times as many."""
    starts = [tp_size * sum(sizes[:i]) + tp_rank * size for i, size in enumerate(sizes)]
    parts = [
        torch.arange(start, start + size, device=device)
        for start, size in zip(starts, sizes, strict=True)
    ]
    return torch.cat(parts)


def pivot_rows(C: Tensor, order: Tensor, rows: Tensor) -> Tensor:
    """The rows `rows` of B = cat([identity, C])[order]; [len(rows), R]."""
    eye = torch.eye(C.shape[1], dtype=C.dtype, device=C.device)
    return torch.cat([eye, C])[order[rows].long()]


def multiplied_out(A: Tensor, B: Tensor) -> Tensor:
    """B A by fp32 products, rounded once to the dtype of A."""
    return (B.float() @ A.float()).to(A.dtype)


def not_loaded(tensors: dict[str, Tensor]) -> list[str]:
    """Names of tensors, filled with NaN before loading, that are not finite after it. An integer
    one is an order of outputs and must be a permutation."""
    bad = []
    for name, tensor in tensors.items():
        is_float = tensor.is_floating_point()
        if not (bool(torch.isfinite(tensor).all()) if is_float else is_permutation(tensor)):
            bad.append(name)
    return bad
