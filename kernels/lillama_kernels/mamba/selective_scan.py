"""Mamba-1's selective scan over time, forward and backward, with carried state."""

from typing import Any

import torch
from torch import Tensor

from lillama_kernels.arguments import check_shapes
from lillama_kernels.dispatch import Impl, runs_triton, target_of
from lillama_kernels.mamba import reference
from lillama_kernels.mamba.sequence import sequence_like
from lillama_kernels.tiles import scan_tile

__all__ = ["selective_scan", "selective_state_update"]


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_(t-1) + delta_t x_t B_t;  y_t = (C_t . h_t + D x_t) silu(z_t).

    Shapes (D channels, S state size; names as in Gu & Dao 2023, arXiv 2312.00752):
        x, delta, z: [B, D, T]. A: [D, S], negative in a trained model. B, C: [B, S, T]. D,
        delta_bias: [D].
        initial_state: [B, D, S], zeros when None. delta_softplus applies softplus to delta +
        delta_bias.
        impl: see `lillama_kernels.dispatch`.

    Returns:
        y [B, D, T] in x's dtype and the last state [B, D, S] in fp32 (fp64 for fp64 inputs).
        Differentiable once in every tensor.

    Raises:
        ValueError: a shape or device does not fit (named) or T is 0.
        TypeError, NotImplementedError: `impl="triton"` cannot take the dtype, or run there.
    """
    if x.ndim != 3 or x.shape[2] == 0:
        raise ValueError(f"x must be [B, D, T] with T >= 1, got {list(x.shape)}")
    batch, channels, steps = x.shape
    size = _state_size(A, channels)
    wanted = {
        "A": (A, (channels, size)),
        "delta": (delta, (batch, channels, steps)),
        "B": (B, (batch, size, steps)),
        "C": (C, (batch, size, steps)),
        "D": (D, (channels,)),
        "z": (z, (batch, channels, steps)),
        "delta_bias": (delta_bias, (channels,)),
        "initial_state": (initial_state, (batch, channels, size)),
    }
    check_shapes(x, wanted)
    given = (x, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state)
    if not runs_triton("selective_scan", impl, x):
        return reference.selective_scan(*given)
    y, border = torch.ops.lillama.selective_scan(*given)
    return y, border[:, -1].clone()


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """One step of `selective_scan` for decoding, without gradients; state is replaced in place.

    Args:
        state: [B, D, S], any floating dtype; computed in fp32 (fp64 for fp64 inputs).
        x, dt, z: [B, D]. A: [D, S]. B, C: [B, S]. D, dt_bias: [D].
        dt_softplus: apply softplus to dt + dt_bias.
        impl: see `lillama_kernels.dispatch`; the switch of selective_scan.

    Returns:
        y [B, D], dtype of x.

    Raises:
        ValueError: a shape or device does not fit (named).
        TypeError, NotImplementedError: `impl="triton"` cannot take the dtype, or run there.
    """
    if x.ndim != 2:
        raise ValueError(f"x must be [B, D], got {list(x.shape)}")
    batch, channels = x.shape
    size = _state_size(A, channels)
    wanted = {
        "A": (A, (channels, size)),
        "state": (state, (batch, channels, size)),
        "dt": (dt, (batch, channels)),
        "B": (B, (batch, size)),
        "C": (C, (batch, size)),
        "D": (D, (channels,)),
        "z": (z, (batch, channels)),
        "dt_bias": (dt_bias, (channels,)),
    }
    check_shapes(x, wanted)
    given = (state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    if not runs_triton("selective_scan", impl, x):
        with torch.no_grad():
            return reference.selective_state_update(*given)
    return torch.ops.lillama.selective_state_update(*given)


def _state_size(A: Tensor, channels: int) -> int:
    if A.ndim != 2 or A.shape[0] != channels:
        raise ValueError(f"A must be [D, S] with D = {channels} as in x, got {list(A.shape)}")
    return A.shape[1]


# Ops that torch.compile, autograd and CUDA graphs see as one. triton is imported when they run.
@torch.library.custom_op(
    "lillama::selective_scan",
    mutates_args=(),
    schema="(Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? bias, bool softplus, Tensor? initial_state) -> (Tensor, Tensor)",
)
def _forward(x, delta, A, B, C, D, z, bias, softplus, initial_state):
    """y [B, D, T], and the states at the borders of chunks [B, chunks + 1, D, S] fp32."""
    from lillama_kernels.mamba.scan_launch import Scan, selective_scan_forward

    if x.numel() == 0:
        return sequence_like(x), _borders(x, A).zero_()
    return selective_scan_forward(Scan(x, delta, A, B, C, D, z, bias, softplus), initial_state)


def _borders(x: Tensor, A: Tensor) -> Tensor:
    target = target_of(x.device)
    assert target is not None
    chunks = -(-x.shape[2] // scan_tile(target).blocks["BLOCK_T"])
    return x.new_empty((x.shape[0], chunks + 1, *A.shape), dtype=torch.float32)


@_forward.register_fake
def _(x, delta, A, B, C, D, z, bias, softplus, initial_state):
    return sequence_like(x), _borders(x, A)


@torch.library.custom_op(
    "lillama::selective_scan_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? bias, bool softplus, Tensor border, Tensor dy, Tensor? dlast) -> Tensor[]",
)
def _backward(x, delta, A, B, C, D, z, bias, softplus, border, dy, dlast):
    """Gradients of x, delta, A, B, C, D, z, bias and the first state; empty where absent."""
    from lillama_kernels.mamba.scan_launch import Scan, selective_scan_backward

    if x.numel() == 0:
        tensors = (x, delta, A, B, C, D, z, bias, border[:, 0])
        return [x.new_empty(0) if t is None else t.new_zeros(t.shape) for t in tensors]
    scan = Scan(x, delta, A, B, C, D, z, bias, softplus)
    return list(selective_scan_backward(scan, border, dy, dlast))


@_backward.register_fake
def _(x, delta, A, B, C, D, z, bias, softplus, border, dy, dlast):
    def grad(tensor: Tensor | None) -> Tensor:
        return x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    ddelta = sequence_like(x, delta.dtype)
    dz = sequence_like(x) if z is not None else x.new_empty(0)
    return [sequence_like(x), ddelta, *map(grad, (A, B, C, D)), dz, grad(bias), grad(border[:, 0])]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.softplus, initial_state = inputs
    ctx.set_materialize_grads(False)
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(*tensors, output[1])


def _autograd_backward(ctx: Any, dy: Tensor | None, dborder: Tensor | None) -> tuple[Any, ...]:
    *tensors, border = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(tensors[0])
    # of the borders only the last leaves the op
    dlast = None if dborder is None else dborder[:, -1]
    *grads, dfirst = torch.ops.lillama.selective_scan_backward(
        *tensors, ctx.softplus, border, dy, dlast
    )
    needs = ctx.needs_input_grad
    grads = [grad if need else None for grad, need in zip(grads, needs, strict=False)]
    return (*grads, None, dfirst.to(ctx.state_dtype) if needs[9] else None)


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


@torch.library.custom_op(
    "lillama::selective_state_update",
    mutates_args=("state",),
    schema="(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
    "Tensor? z, Tensor? bias, bool softplus) -> Tensor",
)
def _update(state, x, dt, A, B, C, D, z, bias, softplus):
    """y [B, D] of one step; state [B, D, S] is replaced."""
    from lillama_kernels.mamba.scan_launch import Scan, selective_scan_update

    if x.numel() == 0:
        return x.new_empty(x.shape)
    inner = state.contiguous()
    y = selective_scan_update(Scan(x, dt, A, B, C, D, z, bias, softplus), inner)
    if inner.data_ptr() != state.data_ptr():
        state.copy_(inner)
    return y


@_update.register_fake
def _(state, x, dt, A, B, C, D, z, bias, softplus):
    return x.new_empty(x.shape)
