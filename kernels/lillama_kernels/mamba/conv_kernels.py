# Triton's functions are not what they look like to a type checker:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false
"""Triton kernels of causal_conv1d: forward, backward and the step for decoding; their launchers.

Times run from -(W - 1): what is before 0 is in `past` [B, D, >= W - 1], its last W - 1 columns.
Tensors may have any strides. The gradients of the weight and the bias are sums over batch and time:
every program writes its part [programs, D, W + 1], and the parts are added up in order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lillama_kernels.launch import current_device_of
from lillama_kernels.mamba.scan_kernels import _per_channel, _store_tile, _tile
from lillama_kernels.mamba.sequence import sequence_like
from lillama_kernels.tiles import CONV_STEP_TILE, CONV_TILE

__all__ = ["causal_conv1d_bwd", "causal_conv1d_fwd", "causal_conv1d_step"]


@triton.jit
def _inputs(
    x_ptr, past_ptr, b, offs_d, time, mask_d, T, past_size,
    x_b, x_d, x_t, past_b, past_d, past_t, HAS_PAST: tl.constexpr,
):  # fmt: skip
    """x [BLOCK_D, BLOCK_T] at times that may be before 0; zeros where there is nothing."""
    mask = mask_d[:, None] & ((time >= 0) & (time < T))[None, :]
    x = _tile(x_ptr, b, offs_d, time, x_b, x_d, x_t, mask)
    if HAS_PAST:
        mask = mask_d[:, None] & ((time < 0) & (time >= -past_size))[None, :]
        x += _tile(past_ptr, b, offs_d, past_size + time, past_b, past_d, past_t, mask)
    return x


@triton.jit
def _before_activation(
    x_ptr, past_ptr, weight_ptr, bias_ptr, b, offs_d, offs_t, mask_d, T, past_size,
    x_b, x_d, x_t, past_b, past_d, past_t,
    W: tl.constexpr, HAS_PAST: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """sum_w weight[d, w] x[d, t - W + 1 + w] + bias[d]."""
    y = tl.zeros((BLOCK_D, BLOCK_T), dtype=tl.float32)
    for w in tl.static_range(W):
        x = _inputs(
            x_ptr, past_ptr, b, offs_d, offs_t - (W - 1) + w, mask_d, T, past_size,
            x_b, x_d, x_t, past_b, past_d, past_t, HAS_PAST,
        )  # fmt: skip
        weight = tl.load(weight_ptr + offs_d * W + w, mask=mask_d, other=0.0)
        y += x * weight.to(tl.float32)[:, None]
    return y + _per_channel(bias_ptr, offs_d, mask_d, HAS_BIAS)[:, None]


@triton.jit(do_not_specialize=["T", "past_size"])
def _causal_conv1d_fwd_kernel(
    x_ptr, past_ptr, weight_ptr, bias_ptr, y_ptr, T, D, past_size,
    x_b, x_d, x_t, past_b, past_d, past_t, y_b, y_d, y_t,
    W: tl.constexpr, HAS_PAST: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_d = offs_d < D
    y = _before_activation(
        x_ptr, past_ptr, weight_ptr, bias_ptr, batch, offs_d, offs_t, mask_d, T, past_size,
        x_b, x_d, x_t, past_b, past_d, past_t, W, HAS_PAST, HAS_BIAS, BLOCK_D, BLOCK_T,
    )  # fmt: skip
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    mask = mask_d[:, None] & (offs_t < T)[None, :]
    _store_tile(y_ptr, y, batch, offs_d, offs_t, y_b, y_d, y_t, mask)


@triton.jit(do_not_specialize=["T", "past_size"])
def _causal_conv1d_bwd_kernel(
    x_ptr, past_ptr, weight_ptr, bias_ptr, dy_ptr, dx_ptr, dpast_ptr, part_ptr, T, D, past_size,
    x_b, x_d, x_t, past_b, past_d, past_t, dy_b, dy_d, dy_t, dx_b, dx_d, dx_t,
    W: tl.constexpr, HAS_PAST: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """dx[t] = sum_w weight[w] dpre[t + W - 1 - w], for times from -(W - 1), where it goes to dpast
    [B, D, W - 1]; part [programs, D, W + 1]: sum_t dpre[t] x[t - W + 1 + w], then sum_t dpre[t]."""
    batch = tl.program_id(2).to(tl.int64)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T) - (W - 1)
    mask_d = offs_d < D
    part = part_ptr + (batch * tl.num_programs(1) + tl.program_id(1)) * D * (W + 1)
    part += offs_d.to(tl.int64) * (W + 1)
    dx = tl.zeros((BLOCK_D, BLOCK_T), dtype=tl.float32)
    for shift in tl.static_range(W):
        time = offs_t + shift
        mask = mask_d[:, None] & ((time >= 0) & (time < T))[None, :]
        dpre = _tile(dy_ptr, batch, offs_d, time, dy_b, dy_d, dy_t, mask)
        if SILU:
            pre = _before_activation(
                x_ptr, past_ptr, weight_ptr, bias_ptr, batch, offs_d, time, mask_d, T, past_size,
                x_b, x_d, x_t, past_b, past_d, past_t, W, HAS_PAST, HAS_BIAS, BLOCK_D, BLOCK_T,
            )  # fmt: skip
            gate = 1.0 / (1.0 + tl.exp(-pre))
            dpre *= gate * (1.0 + pre * (1.0 - gate))
        weight = tl.load(weight_ptr + offs_d * W + (W - 1 - shift), mask=mask_d, other=0.0)
        dx += dpre * weight.to(tl.float32)[:, None]
        if shift == 0:
            for w in tl.static_range(W):
                x = _inputs(
                    x_ptr, past_ptr, batch, offs_d, time - (W - 1) + w, mask_d, T, past_size,
                    x_b, x_d, x_t, past_b, past_d, past_t, HAS_PAST,
                )  # fmt: skip
                tl.store(part + w, tl.sum(dpre * x, axis=1), mask=mask_d)
            tl.store(part + W, tl.sum(dpre, axis=1), mask=mask_d)
    mask = mask_d[:, None] & ((offs_t >= 0) & (offs_t < T))[None, :]
    _store_tile(dx_ptr, dx, batch, offs_d, offs_t, dx_b, dx_d, dx_t, mask)
    if HAS_PAST:
        mask = mask_d[:, None] & (offs_t < 0)[None, :]
        _store_tile(
            dpast_ptr, dx, batch, offs_d, offs_t + (W - 1), D * (W - 1), W - 1, 1, mask
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "L"])
def _causal_conv1d_step_kernel(
    x_ptr, state_ptr, weight_ptr, bias_ptr, y_ptr, T, D, L, x_b, x_d, x_t,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """y [B, D, T] of T new steps, one after the other; state [B, D, L] moves along."""
    batch = tl.program_id(1).to(tl.int64)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_l = tl.arange(0, BLOCK_L)
    mask_d = offs_d < D
    row = (batch * D + offs_d)[:, None]
    state_at = state_ptr + row * L + offs_l[None, :]
    in_state = mask_d[:, None] & (offs_l < L)[None, :]
    # the weight of each place of the state; the newest input has the last
    place = offs_l - (L - W)
    used = mask_d[:, None] & ((place >= 0) & (place < W))[None, :]
    weight = tl.load(weight_ptr + offs_d[:, None] * W + place[None, :], mask=used, other=0.0)
    before = tl.load(weight_ptr + offs_d * W, mask=mask_d, other=0.0).to(tl.float32)
    for t in tl.range(0, T):
        # where the state is only W - 1 long, its first place leaves it before it is used
        oldest = tl.load(state_ptr + (batch * D + offs_d) * L, mask=mask_d, other=0.0)
        moved = tl.load(
            state_at + 1, mask=mask_d[:, None] & (offs_l + 1 < L)[None, :], other=0.0
        ).to(tl.float32)
        x = tl.load(x_ptr + batch * x_b + offs_d.to(tl.int64) * x_d + t * x_t, mask=mask_d,
                    other=0.0).to(tl.float32)  # fmt: skip
        moved = tl.where((offs_l == L - 1)[None, :], x[:, None], moved)
        y = tl.sum(moved * weight.to(tl.float32), axis=1)
        y += tl.where(L < W, before, 0.0) * oldest.to(tl.float32)
        # every thread has read the state before any writes to it
        tl.debug_barrier()
        tl.store(state_at, moved.to(state_ptr.dtype.element_ty), mask=in_state)
        tl.debug_barrier()
        y += _per_channel(bias_ptr, offs_d, mask_d, HAS_BIAS)
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        y_at = y_ptr + (batch * D + offs_d) * T + t
        tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=mask_d)


_fwd_kernel: Any = _causal_conv1d_fwd_kernel  # jitted functions mean nothing to a type checker
_bwd_kernel: Any = _causal_conv1d_bwd_kernel
_step_kernel: Any = _causal_conv1d_step_kernel


def _given(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None) -> tuple:
    """The kernels' first arguments, others in the place of absent ones."""
    bias = weight if bias is None else bias
    return x, x if past is None else past, weight.contiguous(), bias.contiguous()


def causal_conv1d_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, past: Tensor | None
) -> Tensor:
    """y [B, D, T], channels or steps side by side as in x; B, D and T are not 0."""
    batch, channels, steps = x.shape
    tile = CONV_TILE
    given = _given(x, weight, bias, past)
    y = sequence_like(x)
    grid = (
        triton.cdiv(channels, tile.blocks["BLOCK_D"]),
        triton.cdiv(steps, tile.blocks["BLOCK_T"]),
        batch,
    )
    with current_device_of(x):
        _fwd_kernel[grid](
            *given, y, steps, channels, weight.shape[1] - 1,
            *x.stride(), *given[1].stride(), *y.stride(), W=weight.shape[1],
            HAS_PAST=past is not None, HAS_BIAS=bias is not None, SILU=silu,
            **tile.blocks, **tile.options,
        )  # fmt: skip
    return y


def causal_conv1d_bwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, past: Tensor | None, dy: Tensor
) -> list[Tensor]:
    """dx, dweight, dbias and dpast; the last two empty where absent."""
    batch, channels, steps = x.shape
    width = weight.shape[1]
    tile = CONV_TILE
    given = _given(x, weight, bias, past)
    blocks_t = triton.cdiv(steps + width - 1, tile.blocks["BLOCK_T"])
    dx = sequence_like(x)
    dpast = x.new_empty(0) if past is None else past.new_empty((batch, channels, width - 1))
    part = x.new_empty((batch * blocks_t, channels, width + 1), dtype=torch.float32)
    grid = (triton.cdiv(channels, tile.blocks["BLOCK_D"]), blocks_t, batch)
    with current_device_of(x):
        _bwd_kernel[grid](
            *given, dy, dx, dx if past is None else dpast, part, steps, channels, width - 1,
            *x.stride(), *given[1].stride(), *dy.stride(), *dx.stride(), W=width,
            HAS_PAST=past is not None, HAS_BIAS=bias is not None, SILU=silu,
            **tile.blocks, **tile.options,
        )  # fmt: skip
    sums = part.sum(0)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dweight.copy_(sums[:, :width])
    dbias = x.new_empty(0) if bias is None else torch.empty_like(bias).copy_(sums[:, width])
    return [dx, dweight, dbias, dpast]


def causal_conv1d_step(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> Tensor:
    """y [B, D, T]; state [B, D, L >= W - 1], contiguous, moves along."""
    batch, channels, steps = x.shape
    y = x.new_empty(x.shape)
    _, _, weight, filled = _given(x, weight, bias, None)
    length = state.shape[2]
    tile = CONV_STEP_TILE
    with current_device_of(x):
        _step_kernel[(triton.cdiv(channels, tile.blocks["BLOCK_D"]), batch)](
            x, state, weight, filled, y, steps, channels, length, *x.stride(),
            W=weight.shape[1], HAS_BIAS=bias is not None, SILU=silu,
            BLOCK_L=max(1, triton.next_power_of_2(length)), **tile.blocks, **tile.options,
        )  # fmt: skip
    return y
