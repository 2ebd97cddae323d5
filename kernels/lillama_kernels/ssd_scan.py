"""Mamba-2's head-wise scan over time, forward and backward, with carried state, and one step.

Matrix products of PyTorch's in chunks of time, on every device. mamba_ssm has a Triton kernel of it
that others keep; `lillama.integrations.mamba` leaves the scan to it where it is installed.
"""

import math

from torch import Tensor

from lillama_kernels import reference_ssd
from lillama_kernels.impl import Impl, resolve_impl

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
        impl: see `lillama_kernels.impl`; there is no Triton kernel.

    Returns:
        y [B, T, nh, P] in x's dtype and the last state [B, nh, P, S] in fp32 (fp64 for fp64
        inputs). Differentiable in every tensor.

    Raises:
        ValueError: a shape does not fit (named), T is 0, or dt_limit is not ordered or negative.
        NotImplementedError: `impl="triton"`.
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
    resolve_impl("ssd_scan", impl, x)
    return reference_ssd.ssd_scan(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, initial_state)


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
        As `ssd_scan`.
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
    resolve_impl("ssd_scan", impl, x)
    return reference_ssd.ssd_state_update(state, x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit)


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
