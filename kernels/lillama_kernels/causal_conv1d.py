"""Depthwise causal convolution over time, as in every Mamba block."""

from torch import Tensor

from lillama_kernels import reference_mamba
from lillama_kernels.impl import Impl, resolve_impl

__all__ = ["causal_conv1d"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """y[b, d, t] = activation(sum_w weight[d, w] x[b, d, t - W + 1 + w] + bias[d]).

    Args:
        x: [B, D, T], floating point.
        weight: [D, W]. bias: [D] or None.
        activation: None, "silu" or its other name "swish".
        initial_state: [B, D, W-1], the inputs just before x; zeros when None.
        impl: see `lillama_kernels.impl`.

    Returns:
        [B, D, T], dtype of x. Differentiable in every tensor.

    Raises:
        ValueError: a shape does not fit (named) or the activation is unknown.
        NotImplementedError: `impl="triton"`, which does not exist yet.
    """
    if x.ndim != 3:
        raise ValueError(f"x must be [B, D, T], got {list(x.shape)}")
    batch, channels, _ = x.shape
    if weight.ndim != 2 or weight.shape[0] != channels:
        raise ValueError(f"weight must be [D, W] with D = {channels}, got {list(weight.shape)}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be [{channels}], got {list(bias.shape)}")
    past = (batch, channels, weight.shape[1] - 1)
    if initial_state is not None and initial_state.shape != past:
        raise ValueError(f"initial_state must be {list(past)}, got {list(initial_state.shape)}")
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation must be None, 'silu' or 'swish', got {activation!r}")
    resolve_impl("causal_conv1d", impl, x)
    return reference_mamba.causal_conv1d(x, weight, bias, activation is not None, initial_state)
