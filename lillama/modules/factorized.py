"""A module of one matrix [N, K] as low-rank factors, under the names of a checkpoint."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lillama.checkpoint.names import (
    FACTOR_A,
    FACTOR_B,
    FACTOR_C,
    PERMUTATION,
    PIVOT_MASK,
    factor_shapes,
)

__all__ = ["Factorized"]


class Factorized(nn.Module):
    """The factors of a gauge as parameters: A [R, K] and B [N, R], or with the pivot gauge's C in
    the place of one of them and a permutation as a buffer. A checkpoint holds a mask in place of
    the permutation (`checkpoint/pivots.py`); loading and saving exchange them.

    shape: (N, K). sizes: what an error calls the two.

    Raises:
        ValueError: rank outside 1..min(N, K).
    """

    gauge: ClassVar[str] = "plain"
    is_embedding: ClassVar[bool] = False

    def __init__(
        self,
        shape: tuple[int, int],
        rank: int,
        sizes: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        limit = min(shape)
        if not 1 <= rank <= limit:
            raise ValueError(f"rank must be in 1..min({sizes}) = {limit}, got {rank}")
        self.shape, self.rank = shape, rank
        for key, size in factor_shapes(shape, rank, self.gauge, self.is_embedding).items():
            if key == PIVOT_MASK:
                permutation = torch.arange(*size, dtype=torch.int32, device=device)
                self.register_buffer(PERMUTATION, permutation)
            else:
                factor = torch.empty(size, device=device, dtype=dtype)
                self.register_parameter(key, nn.Parameter(factor))

    @property
    def A(self) -> Tensor:
        return getattr(self, FACTOR_A)

    @property
    def B(self) -> Tensor:
        return getattr(self, FACTOR_B)

    @property
    def C(self) -> Tensor:
        return getattr(self, FACTOR_C)

    @property
    def permutation(self) -> Tensor:
        """The permutation of the outputs [N], of embeddings [K], int32."""
        return getattr(self, PERMUTATION)

    def shape_only(self, dtype: torch.dtype) -> Tensor:
        """Return a weight [N, K] on the meta device: models look at the dtype of the head's and the
        embeddings' `weight` at every step, where computing it would cost more than the step;
        whatever would read its numbers fails."""
        return torch.empty(self.shape, dtype=dtype, device="meta")
