"""A linear layer as two products, in the plain and in the pivot gauge."""

from lillama_kernels.low_rank_linear.op import low_rank_linear, low_rank_linears
from lillama_kernels.low_rank_linear.pivot import pivot_low_rank_linear

__all__ = ["low_rank_linear", "low_rank_linears", "pivot_low_rank_linear"]
