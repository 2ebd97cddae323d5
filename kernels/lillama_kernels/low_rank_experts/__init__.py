"""A mixture of experts whose weights are low-rank factors, in the plain and in the pivot gauge."""

from lillama_kernels.low_rank_experts.op import ExpertFactors, ProjectionFactors, low_rank_experts
from lillama_kernels.low_rank_experts.pivot import (
    PivotExpertFactors,
    PivotProjectionFactors,
    pivot_low_rank_experts,
)

__all__ = [
    "ExpertFactors",
    "PivotExpertFactors",
    "PivotProjectionFactors",
    "ProjectionFactors",
    "low_rank_experts",
    "pivot_low_rank_experts",
]
