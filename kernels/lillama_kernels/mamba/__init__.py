"""What a Mamba block runs: the scan over time, the short convolution, and whole decode steps."""

from lillama_kernels.mamba.causal_conv1d import causal_conv1d, causal_conv1d_update
from lillama_kernels.mamba.mixer_step import (
    MixerWeights,
    mamba_mixer_step,
    mamba_mixer_step_runs_triton,
)
from lillama_kernels.mamba.selective_scan import selective_scan, selective_state_update
from lillama_kernels.mamba.ssd_scan import ssd_scan, ssd_state_update

__all__ = [
    "MixerWeights",
    "causal_conv1d",
    "causal_conv1d_update",
    "mamba_mixer_step",
    "mamba_mixer_step_runs_triton",
    "selective_scan",
    "selective_state_update",
    "ssd_scan",
    "ssd_state_update",
]
