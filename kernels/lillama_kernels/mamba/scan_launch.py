"""Launchers of selective_scan's Triton kernels.

Inputs are as selective_scan.py checks them; batch and T are not 0. The states and what is summed
over channels or time is fp32.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lillama_kernels.launch import current_device_of, target_with_tiles
from lillama_kernels.mamba import scan_kernels
from lillama_kernels.mamba.sequence import sequence_like
from lillama_kernels.tiles import SCAN_UPDATE_TILE, scan_tile

__all__ = ["Scan", "selective_scan_backward", "selective_scan_forward", "selective_scan_update"]

kernels: Any = scan_kernels  # jitted functions mean nothing to a type checker


class Scan(NamedTuple):
    """What a scan, or one step of it, computes from."""

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None
    softplus: bool

    def tensors(self, contiguous: bool = True) -> tuple[Tensor, ...]:
        """The kernels' first arguments, x in the place of absent ones; contiguous: B and C too."""
        D, bias = (self.x if t is None else t.contiguous() for t in (self.D, self.bias))
        B, C = (t.contiguous() if contiguous else t for t in (self.B, self.C))
        z = self.x if self.z is None else self.z
        return self.x, self.delta, self.A.contiguous(), B, C, D, z, bias

    @property
    def options(self) -> dict[str, Any]:
        flags = {"HAS_D": self.D is not None, "HAS_Z": self.z is not None}
        flags |= {"HAS_BIAS": self.bias is not None, "SOFTPLUS": self.softplus}
        return {"S": self.A.shape[1], **flags}


def selective_scan_forward(scan: Scan, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """y [B, D, T], and the states at the chunks' borders [B, chunks + 1, D, S] fp32."""
    x, tensors = scan.x, scan.tensors()
    batch, channels, steps = x.shape
    tile = scan_tile(target_with_tiles(x))
    chunks = triton.cdiv(steps, tile.blocks["BLOCK_T"])
    y = sequence_like(x)
    border = x.new_empty((batch, chunks + 1, *scan.A.shape), dtype=torch.float32)
    border[:, 0] = 0.0 if initial_state is None else initial_state
    grid = (triton.cdiv(channels, tile.blocks["BLOCK_D"]), batch)
    with current_device_of(x):
        kernels._selective_scan_forward_kernel[grid](
            *tensors, y, border, steps, channels, chunks, *x.stride(), *scan.delta.stride(),
            *tensors[6].stride(), *y.stride(), **scan.options, **tile.blocks, **tile.options,
        )  # fmt: skip
    return y, border


def selective_scan_backward(
    scan: Scan, border: Tensor, dy: Tensor, dlast: Tensor | None
) -> tuple[Tensor, ...]:
    """dx, ddelta, dA, dB, dC, dD, dz, dbias and the gradient of the first state [B, D, S] fp32;
    those of absent arguments are empty."""
    x, tensors = scan.x, scan.tensors()
    batch, channels, steps = x.shape
    size = scan.A.shape[1]
    tile = scan_tile(target_with_tiles(x))
    blocks = triton.cdiv(channels, tile.blocks["BLOCK_D"])
    dx, ddelta = sequence_like(x), sequence_like(x, scan.delta.dtype)
    dz = x.new_empty(0) if scan.z is None else sequence_like(x)
    floats = {"dtype": torch.float32, "device": x.device}
    dA = torch.zeros((batch, channels, size), **floats)
    parts = torch.empty((2, blocks, batch, size, steps), **floats)
    dD, dbias = (torch.empty((batch, channels), **floats) for _ in range(2))
    dh = torch.zeros_like(dA) if dlast is None else dlast.to(torch.float32, copy=True)
    dh = dh.contiguous()
    if dy.stride() != dx.stride():
        dy = sequence_like(x).copy_(dy)
    with current_device_of(x):
        kernels._selective_scan_backward_kernel[(blocks, batch)](
            *tensors, border, dy, dx, ddelta, dA, parts[0], parts[1], dD,
            dx if scan.z is None else dz, dbias, dh, steps, channels, border.shape[1] - 1,
            *x.stride(), *scan.delta.stride(), *tensors[6].stride(), *dx.stride(),
            **scan.options, **tile.blocks, **tile.options,
        )  # fmt: skip
    dB, dC = (part.sum(0) for part in parts)
    return (
        dx,
        ddelta,
        dA.sum(0).to(scan.A.dtype),
        dB.to(scan.B.dtype),
        dC.to(scan.C.dtype),
        x.new_empty(0) if scan.D is None else dD.sum(0).to(scan.D.dtype),
        dz,
        x.new_empty(0) if scan.bias is None else dbias.sum(0).to(scan.bias.dtype),
        dh,
    )


def selective_scan_update(scan: Scan, state: Tensor) -> Tensor:
    """y [B, D] of one step; state [B, D, S], contiguous, is replaced."""
    x, tensors = scan.x, scan.tensors(contiguous=False)
    batch, channels = x.shape
    tile = SCAN_UPDATE_TILE
    y = x.new_empty((batch, channels))
    grid = (triton.cdiv(channels, tile.blocks["BLOCK_D"]), batch)
    with current_device_of(x):
        kernels._selective_scan_update_kernel[grid](
            state, *tensors, y, channels, *x.stride(), *scan.delta.stride(), *scan.B.stride(),
            *scan.C.stride(), *tensors[6].stride(),
            BLOCK_S=triton.next_power_of_2(scan.A.shape[1]), **scan.options, **tile.blocks,
            **tile.options,
        )  # fmt: skip
    return y
