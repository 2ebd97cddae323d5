"""Mamba-2's head-wise scan over time, and one step of it, in plain PyTorch on every device.

mamba_ssm has a Triton kernel of the scan that others keep; `lillama.integrations.mamba` leaves it
to that package where it is installed.

Letters: B batch, T time steps, nh heads, P channels of a head, G groups, S state size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lillama_kernels.arguments import check_shapes
from lillama_kernels.dispatch import Impl, resolve_impl

__all__ = ["ssd_scan", "ssd_state_update"]

# Time steps that are computed as matrix products; the [B, nh, chunk, chunk] scores of one chunk are
# alive at a time (with gradients: of every chunk, until backward).
CHUNK = 64


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

    Mamba-2's scan (Dao & Gu 2024, arXiv 2405.21060, section 6): products within a chunk of time,
    the state between chunks. dt is first replaced by clamp(softplus(dt + dt_bias), *dt_limit), the
    softplus with dt_softplus only.

    Args:
        x: [B, T, nh, P], floating point.
        dt: [B, T, nh]. A: [nh], negative in a trained model. D, dt_bias: [nh].
        B, C: [B, T, G, S]; nh is a multiple of G, and consecutive heads share a group.
        dt_limit: smallest and largest step, 0 or more.
        initial_state: [B, nh, P, S], zeros when None.
        impl: see `lillama_kernels.dispatch`; there is no Triton kernel.

    Returns:
        y [B, T, nh, P] in x's dtype and the last state [B, nh, P, S] in fp32 (fp64 for fp64
        inputs). Differentiable in every tensor.

    Raises:
        ValueError: a shape or device does not fit (named), T is 0, or dt_limit is not ordered or
            negative.
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
    check_shapes(x, wanted)
    _check_limit(dt_limit)
    resolve_impl("ssd_scan", impl, x)
    work = torch.promote_types(x.dtype, torch.float32)
    step = _steps(dt, dt_bias, dt_softplus, dt_limit, work)
    log_decay = (step.double() * A.double()).transpose(1, 2)  # [B, nh, T]
    inputs = x.to(work)
    u = (inputs * step[..., None]).transpose(1, 2)
    h = x.new_zeros(batch, heads, width, size, dtype=work)
    if initial_state is not None:
        h = initial_state.to(work)
    outputs = []
    for start in range(0, steps, CHUNK):
        part = slice(start, start + CHUNK)
        enter, leave = (_per_head(t[:, part].to(work), heads, 2).transpose(1, 2) for t in (B, C))
        y, h = _chunk(u[:, :, part], log_decay[:, :, part], enter, leave, h)
        outputs.append(y.transpose(1, 2))
    y = torch.cat(outputs, dim=1)
    if D is not None:
        y = y + inputs * D.to(work)[:, None]
    return y.to(x.dtype), h


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
        impl: see `lillama_kernels.dispatch`; both ops answer to the name "ssd_scan".

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
    check_shapes(x, wanted)
    _check_limit(dt_limit)
    resolve_impl("ssd_scan", impl, x)
    work = torch.promote_types(x.dtype, torch.float32)
    step = _steps(dt, dt_bias, dt_softplus, dt_limit, work)
    enter, leave = (_per_head(t.to(work), heads, 1) for t in (B, C))
    inputs = x.to(work)
    h = state.to(work) * (step * A.to(work)).exp()[..., None, None]
    h = h + (step[..., None] * inputs)[..., None] * enter[:, :, None, :]
    y = (h @ leave[..., None])[..., 0]
    if D is not None:
        y = y + inputs * D.to(work)[:, None]
    state.copy_(h)
    return y.to(x.dtype)


def _check_groups(B: Tensor, leading: tuple[int, ...], heads: int, shape: str) -> int:
    """S, after checking B: it says what C and the state must be."""
    if B.ndim != len(leading) + 2 or tuple(B.shape[:-2]) != leading or B.shape[-2] == 0:
        raise ValueError(f"B must be {shape} with {list(leading)} as in x, got {list(B.shape)}")
    if heads % B.shape[-2]:
        raise ValueError(f"B must have G groups that divide nh = {heads}, got G = {B.shape[-2]}")
    return B.shape[-1]


def _check_limit(dt_limit: tuple[float, float]) -> None:
    if len(dt_limit) != 2 or not 0.0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit must be (low, high) with 0 <= low <= high, got {dt_limit}")


def _steps(
    dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float], work: torch.dtype
) -> Tensor:
    dt = dt.to(work)
    if bias is not None:
        dt = dt + bias.to(work)
    return (F.softplus(dt) if softplus else dt).clamp(*limit)


def _per_head(grouped: Tensor, heads: int, dim: int) -> Tensor:
    """B or C of every head from that of its group: consecutive heads share one."""
    return grouped.repeat_interleave(heads // grouped.shape[dim], dim=dim, output_size=heads)


def _chunk(u: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """y [B, nh, t, P] and the state after the chunk, of u [B, nh, t, P], log_decay [B, nh, t]
    fp64, B and C [B, nh, t, S] and the state before it h [B, nh, P, S]."""
    steps, work = u.shape[2], u.dtype
    # Sums from s + 1 to t as differences of sums from the chunk's start. In fp64: where these are
    # large, the difference of two rounded to fp32 would be off by many roundings of the result.
    total = log_decay.cumsum(-1)
    since = total[..., :, None] - total[..., None, :]
    later = torch.ones(steps, steps, dtype=torch.bool, device=u.device).triu(1)
    decay = since.to(work).masked_fill(later, float("-inf")).exp()  # of s = t is 1
    scores = (C @ B.transpose(-1, -2)) * decay
    y = scores @ u + (C @ h.transpose(-1, -2)) * total.to(work).exp()[..., None]
    until_end = (total[..., -1:] - total).to(work).exp()
    entered = (u * until_end[..., None]).transpose(-1, -2) @ B
    return y, h * total[..., -1].to(work).exp()[..., None, None] + entered
