"""Mamba-1's selective scan over time, forward and backward, with carried state."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lillama_kernels import reference_mamba
from lillama_kernels.impl import Impl, resolve_impl
from lillama_kernels.launch import DTYPES, dtype_name, target_of
from lillama_kernels.launch_mamba import scan_tile, sequence_like

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
        impl: see `lillama_kernels.impl`.

    Returns:
        y [B, D, T] in x's dtype and the last state [B, D, S] in fp32 (fp64 for fp64 inputs).
        Differentiable once in every tensor.

    Raises:
        ValueError: a shape does not fit (named) or T is 0.
        TypeError: `impl="triton"` and a dtype that its kernels do not take.
        NotImplementedError: `impl="triton"` where it cannot run.
    """
    if x.ndim != 3 or x.shape[2] == 0:
        raise ValueError(f"x must be [B, D, T] with T >= 1, got {list(x.shape)}")
    batch, channels, steps = x.shape
    if A.ndim != 2 or A.shape[0] != channels:
        raise ValueError(f"A must be [D, S] with D = {channels} as in x, got {list(A.shape)}")
    size = A.shape[1]
    wanted = {
        "delta": (delta, (batch, channels, steps)),
        "B": (B, (batch, size, steps)),
        "C": (C, (batch, size, steps)),
        "D": (D, (channels,)),
        "z": (z, (batch, channels, steps)),
        "delta_bias": (delta_bias, (channels,)),
        "initial_state": (initial_state, (batch, channels, size)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    if not _runs_triton(x, impl):
        return reference_mamba.selective_scan(
            x, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state
        )
    _check_devices(x, {"A": A} | {name: tensor for name, (tensor, _) in wanted.items()})
    y, border = torch.ops.lillama.selective_scan(
        x, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state
    )
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
        impl: see `lillama_kernels.impl`; the switch of selective_scan.

    Returns:
        y [B, D], dtype of x.

    Raises:
        ValueError: a shape or device does not fit (named).
        TypeError: `impl="triton"` and a dtype that its kernels do not take.
        NotImplementedError: `impl="triton"` where it cannot run.
    """
    if x.ndim != 2:
        raise ValueError(f"x must be [B, D], got {list(x.shape)}")
    batch, channels = x.shape
    if A.ndim != 2 or A.shape[0] != channels:
        raise ValueError(f"A must be [D, S] with D = {channels} as in x, got {list(A.shape)}")
    size = A.shape[1]
    wanted = {
        "state": (state, (batch, channels, size)),
        "dt": (dt, (batch, channels)),
        "B": (B, (batch, size)),
        "C": (C, (batch, size)),
        "D": (D, (channels,)),
        "z": (z, (batch, channels)),
        "dt_bias": (dt_bias, (channels,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    _check_devices(x, {"A": A} | {name: tensor for name, (tensor, _) in wanted.items()})
    if not _runs_triton(x, impl):
        with torch.no_grad():
            return reference_mamba.selective_state_update(
                state, x, dt, A, B, C, D, z, dt_bias, dt_softplus
            )
    return torch.ops.lillama.selective_state_update(
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus
    )


def _check_devices(x: Tensor, others: Mapping[str, Tensor | None]) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")


def _runs_triton(x: Tensor, impl: Impl) -> bool:
    auto = "triton" if x.dtype in DTYPES and target_of(x.device) else "reference"
    if resolve_impl("selective_scan", impl, x, auto) == "reference":
        return False
    dtype_name(x.dtype)  # refuses what the kernels do not take
    return True


# Ops that torch.compile, autograd and CUDA graphs see as one. triton is imported when they run.
@torch.library.custom_op("lillama::selective_scan", mutates_args=())
def _forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [B, D, T], and the states at the borders of chunks [B, chunks + 1, D, S] fp32."""
    from lillama_kernels.selective_scan_launch import selective_scan_forward

    if x.numel() == 0:
        return sequence_like(x), _borders(x, A).zero_()
    return selective_scan_forward(x, delta, A, B, C, D, z, bias, softplus, initial_state)


def _borders(x: Tensor, A: Tensor) -> Tensor:
    target = target_of(x.device)
    assert target is not None
    chunks = -(-x.shape[2] // scan_tile(target).blocks["BLOCK_T"])
    return x.new_empty((x.shape[0], chunks + 1, *A.shape), dtype=torch.float32)


@_forward.register_fake
def _(x, delta, A, B, C, D, z, bias, softplus, initial_state):
    return sequence_like(x), _borders(x, A)


@torch.library.custom_op("lillama::selective_scan_backward", mutates_args=())
def _backward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    border: Tensor,
    dy: Tensor,
    dlast: Tensor | None,
) -> list[Tensor]:
    """Gradients of x, delta, A, B, C, D, z, bias and the first state; empty where absent."""
    from lillama_kernels.selective_scan_launch import selective_scan_backward

    if x.numel() == 0:
        return [
            tensor.new_zeros(tensor.shape) if tensor is not None else x.new_empty(0)
            for tensor in (x, delta, A, B, C, D, z, bias, border[:, 0])
        ]
    given = (x, delta, A, B, C, D, z, bias, softplus, border, dy, dlast)
    return list(selective_scan_backward(*given))


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
    ctx.given = [tensor is not None for tensor in tensors]
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(*(t for t in tensors if t is not None), output[1])


def _autograd_backward(ctx: Any, dy: Tensor | None, dborder: Tensor | None) -> tuple[Any, ...]:
    *saved, border = ctx.saved_tensors
    remaining = iter(saved)
    tensors = [next(remaining) if given else None for given in ctx.given]
    if dy is None:
        dy = torch.zeros_like(saved[0])
    # of the borders only the last leaves the op
    dlast = None if dborder is None else dborder[:, -1]
    *grads, dfirst = torch.ops.lillama.selective_scan_backward(
        *tensors, ctx.softplus, border, dy, dlast
    )
    needs = ctx.needs_input_grad
    grads = [grad if needs[i] else None for i, grad in enumerate(grads)]
    return (*grads, None, dfirst.to(ctx.state_dtype) if needs[9] else None)


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


@torch.library.custom_op("lillama::selective_state_update", mutates_args=("state",))
def _update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
) -> Tensor:
    """y [B, D] of one step; state [B, D, S] is replaced."""
    from lillama_kernels.selective_scan_launch import selective_scan_update

    if x.numel() == 0:
        return x.new_empty(x.shape)
    inner = state.contiguous()
    y = selective_scan_update(inner, x, dt, A, B, C, D, z, bias, softplus)
    if inner.data_ptr() != state.data_ptr():
        state.copy_(inner)
    return y


@_update.register_fake
def _(state, x, dt, A, B, C, D, z, bias, softplus):
    return x.new_empty(x.shape)
