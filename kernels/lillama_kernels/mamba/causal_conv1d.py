"""Depthwise causal convolution over time, as in every Mamba block."""

from typing import Any

import torch
from torch import Tensor

from lillama_kernels.arguments import check_like, check_shapes
from lillama_kernels.dispatch import Impl, runs_triton
from lillama_kernels.mamba import reference
from lillama_kernels.mamba.sequence import sequence_like

__all__ = ["causal_conv1d", "causal_conv1d_update"]


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
        impl: see `lillama_kernels.dispatch`.

    Returns:
        [B, D, T], dtype of x. Differentiable in every tensor.

    Raises:
        ValueError: a shape or device does not fit (named) or the activation is unknown.
        TypeError, NotImplementedError: `impl="triton"` cannot take the dtype, or run there.
    """
    _check(x, weight, bias, activation)
    past = (*x.shape[:2], weight.shape[1] - 1)
    check_shapes(x, {"initial_state": (initial_state, past)})
    silu = activation is not None
    if not runs_triton("causal_conv1d", impl, x):
        return reference.causal_conv1d(x, weight, bias, silu, initial_state)
    return torch.ops.lillama.causal_conv1d(x, weight, bias, silu, initial_state)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """`causal_conv1d` of the next steps while decoding, without gradients; conv_state is replaced
    in place.

    Args:
        x: [B, D, T], usually one step.
        conv_state: [B, D, L] with L >= W-1, the last L inputs, of any floating dtype.
        weight: [D, W]. bias: [D] or None.
        activation: None, "silu" or its other name "swish".
        impl: see `lillama_kernels.dispatch`; the switch of causal_conv1d.

    Returns:
        [B, D, T], dtype of x.

    Raises:
        As `causal_conv1d`.
    """
    _check(x, weight, bias, activation)
    batch, channels, _ = x.shape
    least = weight.shape[1] - 1
    if conv_state.ndim != 3 or conv_state.shape[:2] != x.shape[:2] or conv_state.shape[2] < least:
        raise ValueError(
            f"conv_state must be [{batch}, {channels}, L] with L >= {least}, "
            f"got {list(conv_state.shape)}"
        )
    check_like("conv_state", conv_state, x, "x", dtype=False)
    silu = activation is not None
    if not runs_triton("causal_conv1d", impl, x):
        with torch.no_grad():
            return reference.causal_conv1d_update(x, conv_state, weight, bias, silu)
    return torch.ops.lillama.causal_conv1d_update(x, conv_state, weight, bias, silu)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must be [B, D, T], got {list(x.shape)}")
    channels = x.shape[1]
    if weight.ndim != 2 or weight.shape[0] != channels:
        raise ValueError(f"weight must be [D, W] with D = {channels}, got {list(weight.shape)}")
    check_shapes(x, {"weight": (weight, tuple(weight.shape)), "bias": (bias, (channels,))})
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation must be None, 'silu' or 'swish', got {activation!r}")


# Ops that torch.compile, autograd and CUDA graphs see as one. triton is imported when they run.
@torch.library.custom_op("lillama::causal_conv1d", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_state: Tensor | None
) -> Tensor:
    from lillama_kernels.mamba.conv_kernels import causal_conv1d_fwd

    if x.numel() == 0:
        return sequence_like(x)
    return causal_conv1d_fwd(x, weight, bias, silu, initial_state)


@_forward.register_fake
def _(x, weight, bias, silu, initial_state):
    return sequence_like(x)


@torch.library.custom_op(
    "lillama::causal_conv1d_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state, Tensor dy) "
    "-> Tensor[]",
)
def _backward(x, weight, bias, silu, initial_state, dy):
    """Gradients of x, weight, bias and initial_state; empty where absent."""
    from lillama_kernels.mamba.conv_kernels import causal_conv1d_bwd

    if x.numel() == 0:
        given = (x, weight, bias, initial_state)
        return [x.new_empty(0) if t is None else t.new_zeros(t.shape) for t in given]
    return causal_conv1d_bwd(x, weight, bias, silu, initial_state, dy)


@_backward.register_fake
def _(x, weight, bias, silu, initial_state, dy):
    others = (weight, bias, initial_state)
    others = [x.new_empty(0) if t is None else t.new_empty(t.shape) for t in others]
    return [sequence_like(x), *others]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.silu, initial_state = inputs
    ctx.save_for_backward(x, weight, bias, initial_state)


def _autograd_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, bias, initial_state = ctx.saved_tensors
    grads = torch.ops.lillama.causal_conv1d_backward(x, weight, bias, ctx.silu, initial_state, dy)
    dx, dweight, dbias, dstate = grads
    needs = ctx.needs_input_grad
    found = (dx, dweight, dbias, None, dstate)
    return tuple(grad if need else None for grad, need in zip(found, needs, strict=True))


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


@torch.library.custom_op("lillama::causal_conv1d_update", mutates_args=("conv_state",))
def _update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> Tensor:
    """y [B, D, T]; conv_state [B, D, L] is replaced."""
    from lillama_kernels.mamba.conv_kernels import causal_conv1d_step

    if x.numel() == 0:
        return x.new_empty(x.shape)
    state = conv_state.contiguous()
    y = causal_conv1d_step(x, state, weight, bias, silu)
    if state.data_ptr() != conv_state.data_ptr():
        conv_state.copy_(state)
    return y


@_update.register_fake
def _(x, conv_state, weight, bias, silu):
    return x.new_empty(x.shape)
