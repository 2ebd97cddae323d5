"""nn.Linear with its weight [N, K] as low-rank factors; the bias stays."""

import torch
from lillama_kernels import low_rank_linear, pivot_low_rank_linear
from torch import Tensor, nn

from lillama.modules.factorized import Factorized

__all__ = ["FactorizedLinear", "LowRankLinear", "PivotLowRankLinear"]


class FactorizedLinear(Factorized):
    """The part of both gauges: the factors and `bias` [N] or None. is_head: it is a model's output
    head. Raises ValueError as `Factorized`."""

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
        shape = out_features, in_features
        super().__init__(shape, rank, "in_features, out_features", device, dtype)
        self.in_features, self.out_features, self.is_head = in_features, out_features, is_head
        empty_bias = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.bias = nn.Parameter(empty_bias) if empty_bias is not None else None

    @property
    def weight(self) -> Tensor:
        """The whole weight [N, K], computed and differentiable: Mamba's mixer and its
        initialisation read `.weight`. Of a head shape and dtype only, see `shape_only`."""
        return self.shape_only(self.A.dtype) if self.is_head else self.product()

    def product(self) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


class LowRankLinear(FactorizedLinear):
    """y = x A^T B^T + bias with A [R, K], B [N, R]."""

    def product(self) -> Tensor:
        return self.B @ self.A

    def forward(self, x: Tensor) -> Tensor:
        return low_rank_linear(x, self.A, self.B, self.bias)


class PivotLowRankLinear(FactorizedLinear):
    """y = [z, z C^T][permutation] + bias with z = x A^T, A [R, K], C [N - R, R]."""

    gauge = "pivot"

    def product(self) -> Tensor:
        return torch.cat([self.A, self.C @ self.A])[self.permutation]

    def forward(self, x: Tensor) -> Tensor:
        return pivot_low_rank_linear(x, self.A, self.C, self.permutation, self.bias)
