"""Launchers of selective_scan's Triton kernels, and the list of what is compiled for each GPU.

Inputs are as `selective_scan.py` checks them; batch and T are not 0. The states and what is summed
over channels or time is fp32.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from lillama_kernels import selective_scan_triton
from lillama_kernels.compile_gate import Variant
from lillama_kernels.launch import DTYPES, Tile, target_of
from lillama_kernels.launch_mamba import scan_tile, scan_update_tile, sequence_like
from lillama_kernels.launch_triton import current_device_of

__all__ = [
    "selective_scan_backward",
    "selective_scan_forward",
    "selective_scan_update",
    "variants",
]

kernels: Any = selective_scan_triton  # jitted functions mean nothing to a type checker


def _target(x: Tensor) -> str:
    target = target_of(x.device)
    if target is None:
        raise NotImplementedError(f"no Triton tiles for the GPU {x.device}; use the reference")
    return target


def _flags(D: Tensor | None, z: Tensor | None, bias: Tensor | None) -> dict[str, bool]:
    return {"HAS_D": D is not None, "HAS_Z": z is not None, "HAS_BIAS": bias is not None}


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """What stands in for an argument that is not read."""
    return other if tensor is None else tensor.contiguous() if tensor.ndim == 1 else tensor


def selective_scan_forward(
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
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """y [B, D, T], and the states at the chunks' borders [B, chunks + 1, D, S] fp32."""
    batch, channels, steps = x.shape
    size = A.shape[1]
    tile = tile or scan_tile(_target(x))
    chunks = triton.cdiv(steps, tile.blocks["BLOCK_T"])
    y = sequence_like(x)
    border = x.new_empty((batch, chunks + 1, channels, size), dtype=torch.float32)
    if initial_state is None:
        border[:, 0].zero_()
    else:
        border[:, 0].copy_(initial_state)
    gate = _or(z, x)
    grid = (triton.cdiv(channels, tile.blocks["BLOCK_D"]), batch)
    with current_device_of(x):
        kernels._selective_scan_forward_kernel[grid](
            x, delta, A.contiguous(), B.contiguous(), C.contiguous(), _or(D, x), gate,
            _or(bias, x), y, border, steps, channels, chunks, *x.stride(), *delta.stride(),
            *gate.stride(), *y.stride(), S=size, SOFTPLUS=softplus, **_flags(D, z, bias),
            **tile.blocks, **tile.options,
        )  # fmt: skip
    return y, border


def selective_scan_backward(
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
    tile: Tile | None = None,
) -> tuple[Tensor, ...]:
    """dx, ddelta, dA, dB, dC, dD, dz, dbias and the gradient of the first state [B, D, S] fp32;
    those of absent arguments are empty."""
    batch, channels, steps = x.shape
    size = A.shape[1]
    tile = tile or scan_tile(_target(x))
    blocks = triton.cdiv(channels, tile.blocks["BLOCK_D"])
    dx, ddelta = sequence_like(x), sequence_like(x, delta.dtype)
    dz = sequence_like(x) if z is not None else x.new_empty(0)
    floats = {"dtype": torch.float32, "device": x.device}
    dA = torch.zeros((batch, channels, size), **floats)
    parts = torch.empty((2, blocks, batch, size, steps), **floats)
    dD, dbias = (torch.empty((batch, channels), **floats) for _ in range(2))
    dh = torch.zeros_like(dA) if dlast is None else dlast.to(torch.float32, copy=True)
    dh = dh.contiguous()
    gate = _or(z, x)
    if dy.stride() != dx.stride():
        dy = sequence_like(x).copy_(dy)
    with current_device_of(x):
        kernels._selective_scan_backward_kernel[(blocks, batch)](
            x, delta, A.contiguous(), B.contiguous(), C.contiguous(), _or(D, x), gate,
            _or(bias, x), border, dy,
            dx, ddelta, dA, parts[0], parts[1], dD, dz if z is not None else dx, dbias, dh,
            steps, channels, border.shape[1] - 1,
            *x.stride(), *delta.stride(), *gate.stride(), *dx.stride(), S=size,
            SOFTPLUS=softplus, **_flags(D, z, bias), **tile.blocks, **tile.options,
        )  # fmt: skip
    dB, dC = (part.sum(0) for part in parts)
    return (
        dx,
        ddelta,
        dA.sum(0).to(A.dtype),
        dB.to(B.dtype),
        dC.to(C.dtype),
        x.new_empty(0) if D is None else dD.sum(0).to(D.dtype),
        dz,
        x.new_empty(0) if bias is None else dbias.sum(0).to(bias.dtype),
        dh,
    )


def selective_scan_update(
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
    """y [B, D] of one step; state [B, D, S], contiguous, is replaced."""
    batch, channels = x.shape
    size = A.shape[1]
    tile = scan_update_tile()
    y = x.new_empty((batch, channels))
    gate = _or(z, x)
    grid = (triton.cdiv(channels, tile.blocks["BLOCK_D"]), batch)
    with current_device_of(x):
        kernels._selective_scan_update_kernel[grid](
            state, x, dt, A.contiguous(), B, C, _or(D, x), gate, _or(bias, x), y, channels,
            *x.stride(), *dt.stride(), *B.stride(), *C.stride(), *gate.stride(),
            S=size, BLOCK_S=triton.next_power_of_2(size), SOFTPLUS=softplus,
            **_flags(D, z, bias), **tile.blocks, **tile.options,
        )  # fmt: skip
    return y


# What the compile gate compiles: channels or steps side by side, as in transformers and elsewhere
def _variant(name: str, kernel: Any, dtype: torch.dtype, tile: Tile, size: int, near: str,
             **how: Any) -> Variant:  # fmt: skip
    constants: dict[str, Any] = {**tile.blocks, "S": size, "SOFTPLUS": True, "HAS_D": True}
    constants |= {"HAS_Z": True, "HAS_BIAS": True, **how}
    signature: dict[str, Any] = {}
    ours = ("border_ptr", "da_ptr", "db_ptr", "dc_ptr", "dd_ptr", "dbias_ptr", "dh_ptr")
    fp32 = {"a_ptr", "d_ptr", "bias_ptr", "state_ptr", *ours}
    for parameter in kernel.params:
        argument = parameter.name
        if argument in constants:
            continue
        if argument.endswith("_ptr"):
            signature[argument] = "*fp32:16" if argument in fp32 else f"*{DTYPES[dtype]}:16"
        elif argument.endswith(near) and not argument.startswith("dt_"):
            constants[argument] = 1
        else:
            signature[argument] = "i32" if parameter.do_not_specialize else "i32:16"
    label = f"selective_scan {name} {DTYPES[dtype]}"
    return Variant(label, kernel, signature, constants, tile.options, "none")


def variants(target: str) -> list[Variant]:
    """Every tile that the launchers use on this target."""
    found = []
    for dtype in DTYPES:
        for near in ("_d", "_t"):
            for name in ("forward", "backward"):
                kernel = getattr(kernels, f"_selective_scan_{name}_kernel")
                tile = scan_tile(target)
                found.append(_variant(f"{name} near{near}", kernel, dtype, tile, 16, near))
        how = {"BLOCK_S": 16}
        found.append(_variant("update", kernels._selective_scan_update_kernel, dtype,
                              scan_update_tile(), 16, "_d", **how))  # fmt: skip
    return found
