"""Mamba-2's head-wise scan in plain PyTorch: the specification and the CPU path.

Letters: B batch, T time steps, nh heads, P channels of a head, G groups, S state size.

Nothing here checks its arguments; the public function of the same name does that at the border.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ssd_scan", "ssd_state_update"]

# Time steps that are computed as matrix products; the [B, nh, chunk, chunk] scores of one chunk are
# alive at a time (with gradients: of every chunk, until backward).
CHUNK = 64


def _steps(
    dt: Tensor, dt_bias: Tensor | None, softplus: bool, dt_limit: tuple[float, float], work
) -> Tensor:
    dt = dt.to(work)
    if dt_bias is not None:
        dt = dt + dt_bias.to(work)
    if softplus:
        dt = F.softplus(dt)
    return dt.clamp(*dt_limit)


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


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-2's state space duality (Dao & Gu 2024, arXiv 2405.21060, section 6): matrix products
    within a chunk of time, the state between chunks.

    x [B, T, nh, P]; dt [B, T, nh]; A, D, dt_bias [nh]; B, C [B, T, G, S]; initial_state
    [B, nh, P, S]. Returns y [B, T, nh, P] in x's dtype and the last state [B, nh, P, S] in fp32
    (fp64 for fp64 inputs).
    """
    work = torch.promote_types(x.dtype, torch.float32)
    batch, _, heads, width = x.shape
    step = _steps(dt, dt_bias, dt_softplus, dt_limit, work)
    log_decay = (step.double() * A.double()).transpose(1, 2)  # [B, nh, T]
    inputs = x.to(work)
    u = (inputs * step[..., None]).transpose(1, 2)
    h = x.new_zeros(batch, heads, width, B.shape[-1], dtype=work)
    if initial_state is not None:
        h = initial_state.to(work)
    outputs = []
    for start in range(0, x.shape[1], CHUNK):
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
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> Tensor:
    """One step of `ssd_scan`: state [B, nh, P, S], updated in place; x [B, nh, P]; dt [B, nh];
    A, D, dt_bias [nh]; B, C [B, G, S]. Returns y [B, nh, P] in x's dtype, of the unrounded state.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    heads = x.shape[1]
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
