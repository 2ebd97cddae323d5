"""nn.Linear with its weight [N, K] as low-rank factors in the pivot gauge; the bias stays."""

import torch
from lillama_kernels import pivot_low_rank_linear
from torch import Tensor, nn

from lillama.modules.low_rank_embedding import shape_only

__all__ = ["PivotLowRankLinear"]


class PivotLowRankLinear(nn.Module):
    """y = [z, z C^T][order] + bias with z = x A^T; parameters `lr_A` [R, K], `lr_C` [N - R, R] and
    `bias` [N] or None, buffer `lr_order` [N] int32. A checkpoint holds marks in place of the order,
    see checkpoint/pivots.py; loading and saving exchange them. is_head: it is a model's head.

    Raises:
        ValueError: rank outside 1..min(in_features, out_features).
    """

    lr_order: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        is_head: bool = False,
    ) -> None:
        super().__init__()
        self.is_head = is_head
        limit = min(in_features, out_features)
        if not 1 <= rank <= limit:
            raise ValueError(
                f"rank must be in 1..min(in_features, out_features) = {limit}, got {rank}"
            )
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.lr_A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        rest = out_features - rank
        self.lr_C = nn.Parameter(torch.empty(rest, rank, device=device, dtype=dtype))
        order = torch.arange(out_features, dtype=torch.int32, device=device)
        self.register_buffer("lr_order", order)
        empty_bias = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.bias = nn.Parameter(empty_bias) if empty_bias is not None else None

    @property
    def weight(self) -> Tensor:
        """The whole weight [N, K], computed and differentiable: Mamba's mixer and its
        initialisation read `.weight`. Of a head shape and dtype only, see `shape_only`."""
        if self.is_head:
            return shape_only(self.out_features, self.in_features, self.lr_A.dtype)
        return torch.cat([self.lr_A, self.lr_C @ self.lr_A])[self.lr_order]

    def forward(self, x: Tensor) -> Tensor:
        return pivot_low_rank_linear(x, self.lr_A, self.lr_C, self.lr_order, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )
