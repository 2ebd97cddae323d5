# Triton's functions are not what they look like to a type checker:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false
"""Triton kernels of mamba_mixer_step, one token through a whole Mamba mixer in six launches.

    1  first stage of in_proj (low_rank_linear's kernel)
    2  _conv   its second stage, and the convolution on the x half as soon as a channel is there
    3  first stage of low_rank_linear again, as x_proj: its parts of K are left to be added up
    4  _scan   these parts, dt_proj, the state's step and the gate
    5, 6  out_proj (low_rank_linear's two kernels)

Every kernel but the first starts while the one in front still runs, and loads weights before it
waits for it (programmatic dependent launch). B sequences, at most BLOCK_M; other letters as in
reference.py.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lillama_kernels.launch import (
    current_device_of,
    dependent_launch,
    multiple_of_8,
    target_with_tiles,
)
from lillama_kernels.low_rank_linear.kernels import _second_tile
from lillama_kernels.low_rank_linear.launch import low_rank_linear_decode, low_rank_linear_first
from lillama_kernels.mamba.reference import MixerWeights
from lillama_kernels.mamba.scan_kernels import LOG2_E, _per_channel, _sigmoid, _softplus
from lillama_kernels.tiles import MIXER_SCAN_TILE, decode_tiles

__all__ = ["mamba_mixer_step_launch"]


@triton.jit
def _convolved(
    x, state_ptr, weight_ptr, bias_ptr, offs_m, offs_d, mask, D,
    L: tl.constexpr, W: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """silu of the convolution's newest value [BLOCK_M, BLOCK_N]; state [B, D, L] moves along."""
    mask_d = offs_d < D
    state = state_ptr + (offs_m.to(tl.int64)[:, None] * D + offs_d[None, :]) * L
    y = x * tl.load(weight_ptr + offs_d * W + (W - 1), mask=mask_d, other=0.0).to(tl.float32)
    for j in tl.static_range(L):
        before = tl.load(state + j, mask=mask, other=0.0)
        if j >= L - (W - 1):
            w = tl.load(weight_ptr + offs_d * W + (j - (L - (W - 1))), mask=mask_d, other=0.0)
            y += before.to(tl.float32) * w.to(tl.float32)[None, :]
        if j > 0:  # what was there has been read
            tl.store(state + (j - 1), before, mask=mask)
    tl.store(state + (L - 1), x.to(state_ptr.dtype.element_ty), mask=mask)
    y += _per_channel(bias_ptr, offs_d, mask_d, HAS_BIAS)[None, :]
    return y * _sigmoid(y)


@triton.jit(do_not_specialize=["M"])
def _mamba_mixer_step_conv_kernel(
    z_ptr, b_ptr, bias_ptr, conv_state_ptr, conv_ptr, conv_bias_ptr, out_ptr, M, D, R,
    L: tl.constexpr, W: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CONV_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr, USE_PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out [2, M, D]: the convolved x half of z B^T, then the z half as it is."""
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    D = multiple_of_8(D, True)
    R = multiple_of_8(R, True)
    blocks = tl.cdiv(D, BLOCK_N)
    half = tl.program_id(0) // blocks
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_d = offs_d < D
    rows = b_ptr + (half * D + offs_d).to(tl.int64)[:, None] * R
    acc = _second_tile(
        z_ptr + offs_m[:, None] * R, rows, mask_m, mask_d, R, M * R,
        BLOCK_M, BLOCK_N, BLOCK_R, SPLIT_K, USE_PDL,
    )  # fmt: skip
    acc += _per_channel(bias_ptr + half * D, offs_d, mask_d, HAS_BIAS)[None, :]
    mask = mask_m[:, None] & mask_d[None, :]
    # rounded as between two layers
    acc = acc.to(out_ptr.dtype.element_ty).to(tl.float32)
    if half == 0:
        acc = _convolved(
            acc, conv_state_ptr, conv_ptr, conv_bias_ptr, offs_m, offs_d, mask, D, L, W,
            HAS_CONV_BIAS,
        )  # fmt: skip
    at = out_ptr + (half * M + offs_m).to(tl.int64)[:, None] * D + offs_d[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_of_parts(part_ptr, row, offs, mask, stride, SPLIT_K: tl.constexpr):
    """A row of x_proj's output, added up and rounded as between two layers."""
    total = tl.zeros(offs.shape, dtype=tl.float32)
    for s in tl.static_range(SPLIT_K):
        # through L2 only: other multiprocessors wrote it in a kernel that may still end
        at = part_ptr + s * stride + row + offs
        total += tl.load(at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    return total.to(part_ptr.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def _mamba_mixer_step_scan_kernel(
    u_ptr, part_ptr, dt_ptr, dt_bias_ptr, a_log_ptr, d_ptr, state_ptr, y_ptr, M, D, P, width,
    S: tl.constexpr, SPLIT_K: tl.constexpr, USE_PDL: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """y [M, D] from u [2, M, D] (x, then the gate) and part [SPLIT_K, M, width], whose columns are
    dt's P, B's S and C's S; state [M, D, S] takes its step."""
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    batch = tl.program_id(1).to(tl.int64)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_p = tl.arange(0, BLOCK_P)
    offs_s = tl.arange(0, BLOCK_S)
    mask_d = offs_d < D
    mask_p = offs_p < P
    mask_s = offs_s < S
    mask = mask_d[:, None] & mask_s[None, :]
    weight = tl.load(
        dt_ptr + offs_d.to(tl.int64)[:, None] * P + offs_p[None, :],
        mask=mask_d[:, None] & mask_p[None, :],
        other=0.0,
    ).to(tl.float32)
    bias = _per_channel(dt_bias_ptr, offs_d, mask_d, True)
    skip = _per_channel(d_ptr, offs_d, mask_d, True)
    a_log = tl.load(a_log_ptr + offs_d[:, None] * S + offs_s[None, :], mask=mask, other=0.0)
    rate = -tl.exp(a_log.to(tl.float32)) * LOG2_E
    if USE_PDL:
        tl.extra.cuda.gdc_wait()
    row = batch * width
    stride = M * width
    low = _sum_of_parts(part_ptr, row, offs_p, mask_p, stride, SPLIT_K)
    B = _sum_of_parts(part_ptr + P, row, offs_s, mask_s, stride, SPLIT_K)
    C = _sum_of_parts(part_ptr + P + S, row, offs_s, mask_s, stride, SPLIT_K)
    # rounded as between two layers
    dt = tl.sum(weight * low[None, :], axis=1).to(y_ptr.dtype.element_ty).to(tl.float32)
    dt = _softplus(dt + bias)
    at = batch * D + offs_d
    x = tl.load(u_ptr + at, mask=mask_d, other=0.0).to(tl.float32)
    gate = tl.load(u_ptr + M.to(tl.int64) * D + at, mask=mask_d, other=0.0).to(tl.float32)
    state = state_ptr + at[:, None] * S + offs_s[None, :]
    h = tl.load(state, mask=mask, other=0.0).to(tl.float32)
    h = tl.exp2(dt[:, None] * rate) * h + (dt * x)[:, None] * B[None, :]
    tl.store(state, h.to(state_ptr.dtype.element_ty), mask=mask)
    y = (tl.sum(h * C[None, :], axis=1) + x * skip) * gate * _sigmoid(gate)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask_d)


_conv_kernel: Any = _mamba_mixer_step_conv_kernel  # jitted functions mean nothing to a type checker
_scan_kernel: Any = _mamba_mixer_step_scan_kernel


def mamba_mixer_step_launch(
    x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: MixerWeights
) -> Tensor:
    """[M, H] of x [M, H], 0 < M <= MIXER_MAX_ROWS; states are contiguous and replaced. All sizes
    but W, L and S are multiples of 8, all weights contiguous."""
    target, w = target_with_tiles(x), weights
    rows, channels, size = x.shape[0], w.conv.shape[0], w.A_log.shape[1]
    pdl = dependent_launch(target)
    first, tile = decode_tiles(target, x.dtype, rows)
    u = x.new_empty((2, rows, channels))
    y = x.new_empty((rows, channels))
    with current_device_of(x):
        z, split, _ = low_rank_linear_first(x, w.in_A, first, True)
        _conv_kernel[(2 * triton.cdiv(channels, tile.blocks["BLOCK_N"]),)](
            z, w.in_B, w.in_B if w.in_bias is None else w.in_bias, conv_state, w.conv,
            w.conv if w.conv_bias is None else w.conv_bias, u, rows, channels, w.in_A.shape[0],
            L=conv_state.shape[2], W=w.conv.shape[1], HAS_BIAS=w.in_bias is not None,
            HAS_CONV_BIAS=w.conv_bias is not None, SPLIT_K=split, USE_PDL=bool(pdl),
            **tile.blocks, **tile.options, **pdl,
        )  # fmt: skip
        part, split, _ = low_rank_linear_first(u[0], w.x_proj, first, True, waits=bool(pdl))
        tile = MIXER_SCAN_TILE
        _scan_kernel[(triton.cdiv(channels, tile.blocks["BLOCK_D"]), rows)](
            u, part, w.dt, w.dt_bias, w.A_log, w.D, ssm_state, y, rows, channels, w.dt.shape[1],
            w.x_proj.shape[0], S=size, SPLIT_K=split, USE_PDL=bool(pdl),
            BLOCK_P=triton.next_power_of_2(w.dt.shape[1]), BLOCK_S=triton.next_power_of_2(size),
            **tile.blocks, **tile.options, **pdl,
        )  # fmt: skip
    return low_rank_linear_decode(y, w.out_A, [w.out_B], [w.out_bias], waits=bool(pdl))[0]
