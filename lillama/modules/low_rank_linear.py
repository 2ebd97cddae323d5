"""nn.Linear with its weight [N, K] replaced by B [N, R] @ A [R, K]; the bias stays."""

import torch
from lillama_kernels import low_rank_linear
from torch import Tensor, nn

from lillama.modules.low_rank_embedding import shape_only

__all__ = ["LowRankLinear"]


class LowRankLinear(nn.Module):
    """y = x A^T B^T + bias, parameters `lr_A` [R, K], `lr_B` [N, R] and `bias` [N] or None.
    is_head: it is a model's output head.

    Raises:
        ValueError: rank outside 1..min(in_features, out_features).
    """

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
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.lr_A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.lr_B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        empty_bias = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.bias = nn.Parameter(empty_bias) if empty_bias is not None else None

    @property
    def weight(self) -> Tensor:
        """B @ A [N, K], computed and differentiable: Mamba's mixer and its initialisation read
        `.weight`. Of a head shape and dtype only, see `shape_only`."""
        if self.is_head:
            return shape_only(self.out_features, self.in_features, self.lr_A.dtype)
        return self.lr_B @ self.lr_A

    def forward(self, x: Tensor) -> Tensor:
        return low_rank_linear(x, self.lr_A, self.lr_B, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )
