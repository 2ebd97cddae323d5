"""What a Mamba block needs, in plain PyTorch: the specification, the oracle of the tests, and the
CPU path. Letters as in reference.py.

Nothing here checks its arguments; the public function of the same name does that at the border.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "MixerWeights",
    "causal_conv1d",
    "causal_conv1d_update",
    "mamba_mixer_step",
    "selective_scan",
    "selective_state_update",
]

# Time steps whose [T, B, D, S] tensors are alive at once in the scan. 16 steps of a small Mamba (8
# x 384 x 16 states) are 3 MB per tensor; measured on 2 CPU cores, 16 and 32 beat 2, 4 and 8 by up
# to 1.9x.
SCAN_CHUNK = 16
LOG2_E = math.log2(math.e)


class _Scan(torch.autograd.Function):
    """h_t = exp(dt_t A) h_(t-1) + dt_t u_t B_t;  y_t = h_t . C_t, time first, in chunks of
    SCAN_CHUNK.

    u, dt [T, B, D]; A [D, S]; B, C [T, B, S]; h0 [B, D, S] -> y [T, B, D], last h [B, D, S].
    Autograd over a Python loop costs one full-size zero tensor per time step; this keeps the
    states at chunk borders and recomputes the rest, so both passes touch each element a fixed
    number of times.
    """

    @staticmethod
    def _states(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        # exp2 with log2(e) folded into A: 3x faster than exp on a CPU
        decay = torch.exp2(dt[..., None] * (A * LOG2_E))  # [t, B, D, S]
        states = (dt * u)[..., None] * B[:, :, None, :]
        for step in range(u.shape[0]):
            h = torch.addcmul(states[step], decay[step], h, out=states[step])
        return decay, states

    @staticmethod
    def forward(ctx, u, dt, A, B, C, h0):
        y = torch.empty_like(u)
        borders = []
        h = h0
        for start in range(0, u.shape[0], SCAN_CHUNK):
            part = slice(start, start + SCAN_CHUNK)
            borders.append(h)
            _, states = _Scan._states(u[part], dt[part], A, B[part], h)
            # multiply and sum: 2x faster here than the equal matmul with one column
            torch.sum(states * C[part][:, :, None, :], dim=-1, out=y[part])
            h = states[-1].clone()
        ctx.save_for_backward(u, dt, A, B, C, *borders)
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # type: ignore[override]
        grad_y, grad_last = grads
        u, dt, A, B, C, *borders = ctx.saved_tensors
        grad_u, grad_dt = torch.empty_like(u), torch.empty_like(dt)
        grad_B, grad_C = torch.empty_like(B), torch.empty_like(C)
        grad_A = torch.zeros_like(A)
        carry = grad_last  # gradient of the state that enters the next chunk
        for index in reversed(range(len(borders))):
            part = slice(index * SCAN_CHUNK, (index + 1) * SCAN_CHUNK)
            u_t, dt_t, B_t, C_t, grad_y_t = u[part], dt[part], B[part], C[part], grad_y[part]
            decay, states = _Scan._states(u_t, dt_t, A, B_t, borders[index])
            # sums over D are pairwise, a matmul's are not: up to 6x less error, as fast
            torch.sum(grad_y_t[..., None] * states, dim=2, out=grad_C[part])
            grad_states = grad_y_t[..., None] * C_t[:, :, None, :]
            grad_states[-1] += carry
            for step in reversed(range(u_t.shape[0] - 1)):
                torch.addcmul(
                    grad_states[step], decay[step + 1], grad_states[step + 1], out=grad_states[step]
                )
            carry = decay[0] * grad_states[0]
            # through the input dt*u (x) B
            torch.sum((dt_t * u_t)[..., None] * grad_states, dim=2, out=grad_B[part])
            grad_dtu = (grad_states * B_t[:, :, None, :]).sum(-1)
            torch.mul(grad_dtu, dt_t, out=grad_u[part])
            # through the decay exp(dt A): d/d(dt A) = grad_h * h_(t-1) * decay
            grad_log = decay.mul_(grad_states)
            grad_log[1:] *= states[:-1]
            grad_log[0] *= borders[index]
            torch.add((grad_log * A).sum(-1), grad_dtu * u_t, out=grad_dt[part])
            grad_A += grad_log.mul_(dt_t[..., None]).sum((0, 1))
        return grad_u, grad_dt, grad_A, grad_B, grad_C, carry


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-1 selective scan (Gu & Dao 2023, arXiv 2312.00752, algorithm 2).

    x, delta, z [B, D, T]; A [D, S]; B, C [B, S, T]; D, delta_bias [D]; initial_state [B, D, S].
    Returns y [B, D, T] in x's dtype and the last state [B, D, S] in fp32 (fp64 for fp64 inputs).
    """
    work = torch.promote_types(x.dtype, torch.float32)
    dt = delta.to(work)
    if delta_bias is not None:
        dt = dt + delta_bias.to(work)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    batch, channels, _ = x.shape
    h0 = x.new_zeros(batch, channels, A.shape[1], dtype=work)
    if initial_state is not None:
        h0 = initial_state.to(work)
    time_first = (t.to(work).permute(2, 0, 1).contiguous() for t in (x, dt))
    states_first = (t.to(work).permute(2, 0, 1).contiguous() for t in (B, C))
    y, last = _Scan.apply(*time_first, A.to(work), *states_first, h0)  # type: ignore[misc]
    y = y.permute(1, 2, 0)
    if D is not None:
        y = y + x.to(work) * D.to(work)[:, None]
    if z is not None:
        y = y * F.silu(z.to(work))
    return y.to(x.dtype), last


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    silu: bool = False,
    initial_state: Tensor | None = None,
) -> Tensor:
    """Depthwise causal convolution: y[b, d, t] = sum_w weight[d, w] x[b, d, t - W + 1 + w] +
    bias[d].

    x [B, D, T]; weight [D, W]; bias [D]; initial_state [B, D, W-1], the inputs before x (zeros
    when None).
    """
    width, channels = weight.shape[1], x.shape[1]
    past = x.new_zeros(x.shape[0], channels, width - 1) if initial_state is None else initial_state
    padded = torch.cat([past.to(x.dtype), x], dim=2)
    y = F.conv1d(padded, weight[:, None], bias, groups=channels)
    return F.silu(y) if silu else y


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """causal_conv1d of x [B, D, T] after the inputs in conv_state [B, D, L >= W-1], which then
    holds the last L inputs."""
    past = weight.shape[1] - 1
    state = conv_state[..., conv_state.shape[2] - past :]
    y = causal_conv1d(x, weight, bias, silu, state)
    joined = torch.cat([conv_state, x.to(conv_state.dtype)], dim=2)
    conv_state.copy_(joined[..., joined.shape[2] - conv_state.shape[2] :])
    return y


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """One step of selective_scan: state [B, D, S] is replaced; x, dt, z [B, D]; A [D, S]; B, C
    [B, S]; D, dt_bias [D] -> y [B, D]. Computed in fp32 (fp64 for fp64)."""
    work = torch.promote_types(x.dtype, torch.float32)
    u, step = x.to(work), dt.to(work)
    if dt_bias is not None:
        step = step + dt_bias.to(work)
    if dt_softplus:
        step = F.softplus(step)
    h = torch.exp(step[..., None] * A.to(work)) * state.to(work)
    h = torch.addcmul(h, (step * u)[..., None], B.to(work)[:, None, :])
    state.copy_(h)
    y = (h * C.to(work)[:, None, :]).sum(-1)
    if D is not None:
        y = torch.addcmul(y, u, D.to(work))
    if z is not None:
        y = y * F.silu(z.to(work))
    return y.to(x.dtype)


class MixerWeights(NamedTuple):
    """A Mamba-1 mixer with low-rank projections; H hidden_size, D channels, S state size, W filter
    width, P the rank of dt. in_A [R, H], in_B [2 D, R] (x first, then z), out_A [R, D], out_B
    [H, R], conv [D, W], x_proj [P + 2 S, D], dt [D, P], dt_bias [D], A_log [D, S], D [D]; biases
    may be None."""

    in_A: Tensor
    in_B: Tensor
    in_bias: Tensor | None
    conv: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    out_A: Tensor
    out_B: Tensor
    out_bias: Tensor | None


def mamba_mixer_step(
    x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: MixerWeights
) -> Tensor:
    """One token of every sequence through a mixer: x [B, H], conv_state [B, D, L] and ssm_state
    [B, D, S] are replaced -> [B, H]."""
    w = weights
    u, z = F.linear(F.linear(x, w.in_A), w.in_B, w.in_bias).chunk(2, dim=-1)
    u = causal_conv1d_update(u[..., None], conv_state, w.conv, w.conv_bias, silu=True)[..., 0]
    size = w.A_log.shape[1]
    dt, B, C = F.linear(u, w.x_proj).split([w.dt.shape[1], size, size], dim=-1)
    rate = -torch.exp(w.A_log.to(torch.promote_types(x.dtype, torch.float32)))
    y = selective_state_update(
        ssm_state, u, F.linear(dt, w.dt), rate, B, C, w.D, z, w.dt_bias, dt_softplus=True
    )
    return F.linear(F.linear(y, w.out_A), w.out_B, w.out_bias)
