"""Low-rank kernels: every op as a plain function with a documented contract.

This package imports torch, and triton when a kernel runs; nothing of models, configs or files.
"""

from lillama_kernels.dispatch import kernels_impl
from lillama_kernels.distill_loss import distill_loss, distill_loss_and_grad
from lillama_kernels.low_rank_experts import (
    ExpertFactors,
    PivotExpertFactors,
    PivotProjectionFactors,
    ProjectionFactors,
    low_rank_experts,
    pivot_low_rank_experts,
)
from lillama_kernels.low_rank_linear import (
    low_rank_linear,
    low_rank_linears,
    pivot_low_rank_linear,
)
from lillama_kernels.mamba import (
    MixerWeights,
    causal_conv1d,
    causal_conv1d_update,
    mamba_mixer_step,
    mamba_mixer_step_runs_triton,
    selective_scan,
    selective_state_update,
    ssd_scan,
    ssd_state_update,
)

__all__ = [
    "ExpertFactors",
    "MixerWeights",
    "PivotExpertFactors",
    "PivotProjectionFactors",
    "ProjectionFactors",
    "causal_conv1d",
    "causal_conv1d_update",
    "distill_loss",
    "distill_loss_and_grad",
    "kernels_impl",
    "low_rank_experts",
    "low_rank_linear",
    "low_rank_linears",
    "mamba_mixer_step",
    "mamba_mixer_step_runs_triton",
    "pivot_low_rank_experts",
    "pivot_low_rank_linear",
    "selective_scan",
    "selective_state_update",
    "ssd_scan",
    "ssd_state_update",
]
