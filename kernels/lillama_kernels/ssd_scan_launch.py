"""Launchers of ssd_scan's Triton kernels, and the list of what is compiled for each GPU.

Inputs are as `ssd_scan.py` checks them. x, B, C and the gradient of y are copied where their last
dimension is not dense, as are the small tensors and the initial state where they are not contiguous.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from lillama_kernels import ssd_scan_triton
from lillama_kernels.compile_gate import Variant
from lillama_kernels.launch import (
    DTYPES,
    SSD_MAX_STATE,
    Tile,
    ssd_tile,
    ssd_update_tile,
    target_of,
)
from lillama_kernels.launch_triton import current_device_of

__all__ = ["ssd_scan_bwd", "ssd_scan_fwd", "ssd_state_update", "variants"]

kernels: Any = ssd_scan_triton  # jitted functions mean nothing to a type checker


def _tile(x: Tensor, size: int, backward: bool) -> Tile:
    target = target_of(x.device)
    if target is None:
        raise NotImplementedError(f"no Triton tiles for the GPU {x.device}; use the reference")
    return ssd_tile(target, x.dtype, x.shape[-1], size, backward)


def _dense(tensor: Tensor) -> Tensor:
    """Its last dimension dense; itself if it is."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Contiguous; what is not given is not read, and another tensor stands in."""
    return other if tensor is None else tensor.contiguous()


def _flags(D: Tensor | None, bias: Tensor | None, softplus: bool) -> dict[str, bool]:
    return {"SOFTPLUS": softplus, "HAS_D": D is not None, "HAS_BIAS": bias is not None}


def ssd_scan_fwd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    first: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, nh, P]; the last state; with save the states that enter each chunk
    [B, chunks, nh, P, S], else empty. States are fp32."""
    (batch, steps, heads, width), size = x.shape, B.shape[3]
    tile = _tile(x, size, False)
    chunks = triton.cdiv(steps, tile.blocks["BLOCK_T"])
    border = x.new_empty(
        (batch, chunks, heads, width, size) if save else (0,), dtype=torch.float32
    )
    y, last = x.new_empty(x.shape), x.new_empty((batch, heads, width, size), dtype=torch.float32)
    x, B, C = map(_dense, (x, B, C))
    programs = triton.cdiv(width, tile.blocks["BLOCK_P"]) * heads * batch
    if programs == 0:
        return y, last, border
    with current_device_of(x):
        kernels.ssd_scan_fwd_kernel[(programs,)](
            x, dt, A.contiguous(), B, C, _or(D, x), _or(bias, x), _or(first, x), y, last,
            border if save else last, steps, heads, heads // B.shape[2], width, size,
            *x.stride()[:3], *dt.stride(), *B.stride()[:3], *C.stride()[:3], low, high,
            HAS_FIRST=first is not None, SAVE=save, **_flags(D, bias, softplus),
            **tile.blocks, **tile.options,
        )  # fmt: skip
    return y, last, border


def ssd_scan_bwd(
    grad: Tensor,
    grad_last: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    border: Tensor,
    softplus: bool,
    low: float,
    high: float,
) -> list[Tensor]:
    """Gradients of x, dt, A, B, C, D, bias (empty where there is none) and of the initial state,
    that one fp32, the others in their tensor's dtype.

    Each program writes what it has of dt, B and C for its own head and slice of P, fp32; PyTorch
    adds the slices and the heads of a group up, in the same order every time.
    """
    (batch, steps, heads, width), (groups, size) = x.shape, B.shape[2:]
    tile = _tile(x, size, True)
    slices = triton.cdiv(width, tile.blocks["BLOCK_P"])
    dx, per_group = x.new_empty(x.shape), heads // groups
    grad, x, B, C = map(_dense, (grad, x, B, C))

    def partial(*shape: int) -> Tensor:
        return x.new_empty((slices, batch, *shape), dtype=torch.float32)

    ddt, dA = partial(steps, heads), partial(heads)
    dB, dC = partial(steps, heads, size), partial(steps, heads, size)
    dD = x.new_empty(0) if D is None else partial(heads)
    dfirst = x.new_empty((batch, heads, width, size), dtype=torch.float32)
    if slices * heads * batch:
        with current_device_of(x):
            kernels.ssd_scan_bwd_kernel[(slices * heads * batch,)](
                grad, _or(grad_last, x), x, dt, A.contiguous(), B, C, _or(D, x), _or(bias, x),
                border, dx, ddt, dA, dB, dC, dD, dfirst,
                steps, batch, heads, per_group, width, size, *grad.stride()[:3], *x.stride()[:3],
                *dt.stride(), *B.stride()[:3], *C.stride()[:3], low, high,
                HAS_LAST=grad_last is not None, **_flags(D, bias, softplus),
                **tile.blocks, **tile.options,
            )  # fmt: skip
    ddt = ddt.sum(0)
    of_groups = (slices, batch, steps, groups, per_group, size)
    dB, dC = (t.view(of_groups).sum((0, 4)) for t in (dB, dC))
    return [
        dx, ddt.to(dt.dtype), dA.sum((0, 1)).to(A.dtype), dB.to(B.dtype), dC.to(C.dtype),
        dD if D is None else dD.sum((0, 1)).to(D.dtype),
        x.new_empty(0) if bias is None else ddt.sum((0, 1)).to(bias.dtype), dfirst,
    ]  # fmt: skip


def ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
) -> Tensor:
    """y [B, nh, P] after one step of state [B, nh, P, S], which may have any strides."""
    (batch, heads, width), (groups, size) = x.shape, B.shape[1:]
    y = x.new_empty(x.shape)
    x, B, C = map(_dense, (x, B, C))
    tile = ssd_update_tile(size)
    programs = triton.cdiv(width, tile.blocks["BLOCK_P"]) * heads * batch
    if programs:
        with current_device_of(x):
            kernels.ssd_state_update_kernel[(programs,)](
                state, x, dt, A.contiguous(), B, C, _or(D, x), _or(bias, x), y,
                heads, heads // groups, width, size, *state.stride(), *x.stride()[:2],
                *dt.stride(), *B.stride()[:2], *C.stride()[:2], low, high,
                **_flags(D, bias, softplus), **tile.blocks, **tile.options,
            )  # fmt: skip
    return y


# What the compile gate compiles: each kernel as the launchers above call it, A, D, the bias and
# the states fp32 as in a trained model, all else in dtype
SAME_POINTERS = ("x_ptr", "dt_ptr", "b_ptr", "c_ptr", "y_ptr", "grad_ptr", "dx_ptr")


def _variant(name: str, kernel: Any, dtype: torch.dtype, tile: Tile, **flags: bool) -> Variant:
    names = [p.name for p in kernel.params]
    everything = {n: True for n in names if n.startswith("HAS_") or n in ("SOFTPLUS", "SAVE")}
    constants: dict[str, Any] = everything | flags | dict(tile.blocks)
    signature: dict[str, Any] = {}
    for parameter in kernel.params:
        key = parameter.name
        if key in constants:
            continue
        if key.endswith("_ptr"):
            signature[key] = f"*{DTYPES[dtype] if key in SAME_POINTERS else 'fp32'}:16"
        elif key in ("low", "high"):
            signature[key] = "fp32"
        elif key in ("P", "S") or (key[:2] in ("x_", "b_", "c_", "gr") and key[-2] == "s"):
            signature[key] = "i32:16"
        elif key == "h_ss":
            constants[key] = 1
        else:
            signature[key] = "i32"
    matrix = "none" if dtype == torch.float32 or name.startswith("update") else "any"
    label = f"ssd_scan {name} {DTYPES[dtype]}"
    return Variant(label, kernel, signature, constants, tile.options, matrix)


def variants(target: str) -> list[Variant]:
    """Every tile that the launchers use, at heads of 64 channels and every size of state."""
    forward, backward = kernels.ssd_scan_fwd_kernel, kernels.ssd_scan_bwd_kernel
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for size in (16, 64, 128, SSD_MAX_STATE):
            for name, kernel in (("fwd", forward), ("bwd", backward)):
                tile = ssd_tile(target, dtype, 64, size, name == "bwd")
                found.append(_variant(f"{name} S{size}", kernel, dtype, tile))
    for name, kernel in (("fwd", forward), ("bwd", backward)):
        tile = ssd_tile(target, torch.float16, 64, 128, name == "bwd")
        found.append(_variant(f"{name} S128", kernel, torch.float16, tile))
    for dtype in DTYPES:
        tile = ssd_update_tile(128)
        found.append(
            _variant("update S128", kernels.ssd_state_update_kernel, dtype, tile)
        )
    return found
