"""Mamba-2's head-wise scan over time, forward and backward, with carried state, and one step."""

import math
from typing import Any

import torch
from torch import Tensor

from lillama_kernels import reference_ssd
from lillama_kernels.impl import Impl, resolve_impl
from lillama_kernels.launch import DTYPES, dtype_name, target_of
from lillama_kernels.launch_mamba import SSD_MAX_STATE, ssd_tile

__all__ = ["ssd_scan", "ssd_state_update"]


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_(t-1) + dt_t x_t (x) B_t;  y_t = h_t C_t + D x_t, head by head.

    Mamba-2's scan (Dao & Gu 2024, arXiv 2405.21060). dt is first replaced by
    clamp(softplus(dt + dt_bias), *dt_limit), the softplus with dt_softplus only.

    Args:
        x: [B, T, nh, P], floating point.
        dt: [B, T, nh]. A: [nh], negative in a trained model. D, dt_bias: [nh].
        B, C: [B, T, G, S]; nh is a multiple of G, and consecutive heads share a group.
        dt_limit: smallest and largest step, 0 or more.
        initial_state: [B, nh, P, S], zeros when None.
        impl: see `lillama_kernels.impl`. Triton takes fp32, fp16 and bf16 and S up to 256; with
            16-bit inputs it rounds both sides of each matrix product to x's dtype (sums are fp32),
            as attention kernels do.

    Returns:
        y [B, T, nh, P] in x's dtype and the last state [B, nh, P, S] in fp32 (fp64 for fp64
        inputs). Differentiable in every tensor; with Triton once.

    Raises:
        ValueError: a shape does not fit (named), T is 0, dt_limit is not ordered or negative, or
            with `impl="triton"` S is over 256 or the tensors lie on several devices.
        TypeError: `impl="triton"` and a dtype that its kernels do not take.
        NotImplementedError: `impl="triton"` where it cannot run.
    """
    if x.ndim != 4 or x.shape[1] == 0:
        raise ValueError(f"x must be [B, T, nh, P] with T >= 1, got {list(x.shape)}")
    batch, steps, heads, width = x.shape
    size = _check_groups(B, (batch, steps), heads, "[B, T, G, S]")
    wanted = {
        "dt": (dt, (batch, steps, heads)),
        "A": (A, (heads,)),
        "C": (C, tuple(B.shape)),
        "D": (D, (heads,)),
        "dt_bias": (dt_bias, (heads,)),
        "initial_state": (initial_state, (batch, heads, width, size)),
    }
    _check_shapes(wanted, dt_limit)
    tensors = (x, dt, A, B, C, D, dt_bias, initial_state)
    if not _runs_triton(impl, size, *tensors):
        return reference_ssd.ssd_scan(
            x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, initial_state
        )
    low, high = map(float, dt_limit)
    y, last, _ = torch.ops.lillama.ssd_scan(*tensors, dt_softplus, low, high)
    return y, last


def ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    impl: Impl = "auto",
) -> Tensor:
    """One step of `ssd_scan`: h = exp(dt A) h + dt x (x) B;  y = h C + D x.

    Args:
        state: [B, nh, P, S], the h before this step; **updated in place**. Any floating dtype; the
            step itself is computed in fp32 (fp64 for fp64 inputs) and y from the unrounded state.
        x: [B, nh, P]. dt: [B, nh]. A, D, dt_bias: [nh]. B, C: [B, G, S].
        dt_limit, dt_softplus: as in `ssd_scan`.
        impl: see `lillama_kernels.impl`; both ops answer to the name "ssd_scan".

    Returns:
        y [B, nh, P] in x's dtype.

    Raises:
        As `ssd_scan`; NotImplementedError also where Triton is asked for gradients, which only the
        reference has.
    """
    if x.ndim != 3:
        raise ValueError(f"x must be [B, nh, P], got {list(x.shape)}")
    batch, heads, width = x.shape
    size = _check_groups(B, (batch,), heads, "[B, G, S]")
    wanted = {
        "state": (state, (batch, heads, width, size)),
        "dt": (dt, (batch, heads)),
        "A": (A, (heads,)),
        "C": (C, tuple(B.shape)),
        "D": (D, (heads,)),
        "dt_bias": (dt_bias, (heads,)),
    }
    _check_shapes(wanted, dt_limit)
    tensors = (state, x, dt, A, B, C, D, dt_bias)
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if not _runs_triton(impl, size, *tensors, auto="reference" if trains else "triton"):
        return reference_ssd.ssd_state_update(*tensors, dt_softplus, dt_limit)
    if trains:
        raise NotImplementedError(
            "ssd_state_update has no gradients in Triton; call it under torch.no_grad(), or pass "
            "impl='reference'"
        )
    low, high = map(float, dt_limit)
    return torch.ops.lillama.ssd_state_update(*tensors, dt_softplus, low, high)


def _check_groups(B: Tensor, leading: tuple[int, ...], heads: int, shape: str) -> int:
    """S, after checking B: it says what C and the state must be."""
    if B.ndim != len(leading) + 2 or tuple(B.shape[:-2]) != leading or B.shape[-2] == 0:
        raise ValueError(f"B must be {shape} with {list(leading)} as in x, got {list(B.shape)}")
    if heads % B.shape[-2]:
        raise ValueError(f"B must have G groups that divide nh = {heads}, got G = {B.shape[-2]}")
    return B.shape[-1]


def _check_shapes(
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]], dt_limit: tuple[float, float]
) -> None:
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    if len(dt_limit) != 2 or not 0.0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit must be (low, high) with 0 <= low <= high, got {dt_limit}")


def _runs_triton(impl: Impl, size: int, *tensors: Tensor | None, auto: Any = "triton") -> bool:
    """By S and the dtypes of all tensors; auto: what "auto" is where Triton can run."""
    given = [t for t in tensors if t is not None]
    first = given[0]
    known = all(t.dtype in DTYPES for t in given) and 1 <= size <= SSD_MAX_STATE
    if not known or target_of(first.device) is None:
        auto = "reference"
    # the interpreter is wrong in bf16, whichever tensor has it
    either = torch.bfloat16 if any(t.dtype == torch.bfloat16 for t in given) else first.dtype
    if resolve_impl("ssd_scan", impl, first, auto, either) == "reference":
        return False
    if not 1 <= size <= SSD_MAX_STATE:
        raise ValueError(f"S must be in 1..{SSD_MAX_STATE} for impl='triton', got {size}")
    for tensor in given:
        dtype_name(tensor.dtype)  # refuses what the kernels do not take
        if tensor.device != first.device:
            raise ValueError(
                f"all tensors must be on one device, got {first.device} and {tensor.device}"
            )
    return True


# Ops that torch.compile, autograd and CUDA graphs see as one. triton is imported when they run.
@torch.library.custom_op("lillama::ssd_scan", mutates_args=())
def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and the states that enter each chunk [B, nh, chunks, S, P], which backward
    starts from."""
    from lillama_kernels.ssd_scan_launch import ssd_scan_fwd

    return ssd_scan_fwd(x, dt, A, B, C, D, dt_bias, initial_state, softplus, low, high)


@_forward.register_fake
def _(x, dt, A, B, C, D, dt_bias, initial_state, softplus, low, high):
    batch, steps, *head = x.shape
    last = x.new_empty((batch, *head, B.shape[3]), dtype=torch.float32)
    tile = ssd_tile("states", target_of(x.device) or "sm_90", x.dtype, head[1], B.shape[3])
    chunks = (steps + tile.blocks["BLOCK_T"] - 1) // tile.blocks["BLOCK_T"]
    return x.new_empty(x.shape), last, x.new_empty((batch, head[0], chunks, B.shape[3], head[1]))


@torch.library.custom_op("lillama::ssd_scan_backward", mutates_args=())
def _backward(
    grad: Tensor,
    grad_last: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    border: Tensor,
    softplus: bool,
    low: float,
    high: float,
) -> list[Tensor]:
    """Gradients of x, dt, A, B, C, D, dt_bias and the initial state (fp32); D and dt_bias empty
    where they are None."""
    from lillama_kernels.ssd_scan_launch import ssd_scan_bwd

    return ssd_scan_bwd(grad, grad_last, x, dt, A, B, C, D, dt_bias, border, softplus, low, high)


@_backward.register_fake
def _(grad, grad_last, x, dt, A, B, C, D, dt_bias, border, softplus, low, high):
    batch, _, heads, width = x.shape
    state = x.new_empty((batch, heads, width, B.shape[3]), dtype=torch.float32)
    given = (x, dt, A, B, C, D, dt_bias)
    return [*(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in given), state]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, initial_state, ctx.softplus, ctx.low, ctx.high = inputs
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[-1])


def _autograd_backward(
    ctx: Any, grad: Tensor | None, grad_last: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    *tensors, border = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(tensors[0])
    grads = torch.ops.lillama.ssd_scan_backward(
        grad, grad_last, *tensors, border, ctx.softplus, ctx.low, ctx.high
    )
    found = [None if t is None else g for t, g in zip(tensors, grads, strict=False)]
    state = None if ctx.state_dtype is None else grads[-1].to(ctx.state_dtype)
    return *found, state, None, None, None


def _second_derivative(ctx: Any, grads: list[Tensor | None]) -> None:
    raise RuntimeError("ssd_scan has no second derivative in Triton; pass impl='reference'")


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
_backward.register_autograd(_second_derivative)


@torch.library.custom_op("lillama::ssd_state_update", mutates_args={"state"})
def _update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
) -> Tensor:
    from lillama_kernels.ssd_scan_launch import ssd_state_update

    return ssd_state_update(state, x, dt, A, B, C, D, dt_bias, softplus, low, high)


@_update.register_fake
def _(state, x, dt, A, B, C, D, dt_bias, softplus, low, high):
    return x.new_empty(x.shape)
