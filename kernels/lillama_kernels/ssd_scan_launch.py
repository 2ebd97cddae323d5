"""Launchers of ssd_scan's Triton kernels, and the list of what is compiled for each GPU.

Inputs are as `ssd_scan.py` checks them. x, B, C and the gradient of y are copied where their last
dimension is not dense, as are the small tensors and the initial state where they are not contiguous.
"""

import dataclasses
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
    ssd_steps_tile,
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


def _steps(
    dt: Tensor, A: Tensor, bias: Tensor | None, softplus: bool, low: float, high: float, tile: Tile
) -> Tensor:
    """dt as it is used and its sums with A, [B, nh, chunks, 3, BLOCK_T] fp32."""
    (batch, steps, heads), block = dt.shape, tile.blocks["BLOCK_T"]
    chunks, options = triton.cdiv(steps, block), ssd_steps_tile().options
    out = dt.new_empty((batch, heads, chunks, 3, block), dtype=torch.float32)
    kernels.ssd_steps_kernel[(batch * heads * chunks,)](
        dt, A.contiguous(), _or(bias, dt), out, steps, heads, chunks, *dt.stride(), low, high,
        BLOCK_T=block, SOFTPLUS=softplus, HAS_BIAS=bias is not None, **options,
    )  # fmt: skip
    return out


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
    [B, nh, chunks, S, P], else empty. States are fp32."""
    (batch, steps, heads, width), size = x.shape, B.shape[3]
    tile = _tile(x, size, False)
    chunks = triton.cdiv(steps, tile.blocks["BLOCK_T"])
    border = x.new_empty(
        (batch, heads, chunks, size, width) if save else (0,), dtype=torch.float32
    )
    y, last = x.new_empty(x.shape), x.new_empty((batch, heads, width, size), dtype=torch.float32)
    x, B, C = map(_dense, (x, B, C))
    programs = triton.cdiv(width, tile.blocks["BLOCK_P"]) * heads * batch
    if programs == 0:
        return y, last, border
    with current_device_of(x):
        given = _steps(dt, A, bias, softplus, low, high, tile)
        kernels.ssd_scan_fwd_kernel[(programs,)](
            x, given, B, C, _or(D, x), _or(first, x), y, last, border if save else last,
            steps, heads, heads // B.shape[2], *x.stride()[:3], *B.stride()[:3], *C.stride()[:3],
            P=width, S=size, HAS_D=D is not None, HAS_FIRST=first is not None, SAVE=save,
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
    slices, block = triton.cdiv(width, tile.blocks["BLOCK_P"]), tile.blocks["BLOCK_T"]
    dx, per_group, chunks = x.new_empty(x.shape), heads // groups, border.shape[2]
    grad, x, B, C = map(_dense, (grad, x, B, C))

    def partial(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    ddt, dA = partial(batch, heads, steps), partial(batch, heads, chunks)
    parts, whole = partial(slices, *dA.shape, 4, block), partial(slices, *dA.shape)
    dB, dC = (partial(slices, batch, steps, heads, size) for _ in range(2))
    dD = partial(0) if D is None else partial(slices, batch, heads)
    dfirst = partial(batch, heads, width, size)
    if dx.numel():
        with current_device_of(x):
            given = _steps(dt, A, bias, softplus, low, high, tile)
            kernels.ssd_scan_bwd_kernel[(slices * heads * batch,)](
                grad, _or(grad_last, x), x, given, B, C, _or(D, x), border,
                dx, parts, whole, dB, dC, dD, dfirst, steps, batch, heads, per_group,
                *grad.stride()[:3], *x.stride()[:3], *B.stride()[:3], *C.stride()[:3],
                P=width, S=size, HAS_D=D is not None, HAS_LAST=grad_last is not None,
                **tile.blocks, **tile.options,
            )  # fmt: skip
            kernels.ssd_steps_bwd_kernel[(dA.numel(),)](
                dt, A.contiguous(), _or(bias, dt), given, parts, whole, ddt, dA,
                dA.numel(), steps, heads, chunks, *dt.stride(), low, high,
                BLOCK_T=block, SLICES=slices, SOFTPLUS=softplus, HAS_BIAS=bias is not None,
                **ssd_steps_tile().options,
            )  # fmt: skip
    of_groups = (slices, batch, steps, groups, per_group, size)
    dB, dC = (t.view(of_groups).sum((0, 4)) for t in (dB, dC))
    return [
        dx, ddt.transpose(1, 2).to(dt.dtype), dA.sum((0, 2)).to(A.dtype),
        dB.to(B.dtype), dC.to(C.dtype), dD if D is None else dD.sum((0, 1)).to(D.dtype),
        partial(0) if bias is None else ddt.sum((0, 2)).to(bias.dtype), dfirst,
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
                heads, heads // groups, *state.stride(), *x.stride()[:2],
                *dt.stride(), *B.stride()[:2], *C.stride()[:2], low, high,
                SOFTPLUS=softplus, HAS_D=D is not None, HAS_BIAS=bias is not None, P=width, S=size,
                **tile.blocks, **tile.options,
            )  # fmt: skip
    return y


# What the compile gate compiles: each kernel as the launchers above call it, A, D, the bias and
# the states fp32 as in a trained model, all else in dtype
SAME_POINTERS = ("x_ptr", "dt_ptr", "b_ptr", "c_ptr", "y_ptr", "grad_ptr", "dx_ptr")


def _variant(
    name: str, kernel: Any, dtype: torch.dtype, tile: Tile, size: int, **flags: bool
) -> Variant:
    names = [p.name for p in kernel.params]
    everything = {n: True for n in names if n.startswith("HAS_") or n in ("SOFTPLUS", "SAVE")}
    constants: dict[str, Any] = everything | flags | dict(tile.blocks) | {"P": 64, "S": size, "SLICES": 2}
    constants = {key: value for key, value in constants.items() if key in names}
    signature: dict[str, Any] = {}
    for parameter in kernel.params:
        key = parameter.name
        if key in constants:
            continue
        if key.endswith("_ptr"):
            signature[key] = f"*{DTYPES[dtype] if key in SAME_POINTERS else 'fp32'}:16"
        elif key in ("low", "high"):
            signature[key] = "fp32"
        elif key[:2] in ("x_", "b_", "c_", "gr") and key[-2] == "s":
            signature[key] = "i32:16"
        elif key == "h_ss":
            constants[key] = 1
        else:
            signature[key] = "i32"
    matrix = "any" if dtype != torch.float32 and name[:3] in ("fwd", "bwd") else "none"
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
                found.append(_variant(f"{name} S{size}", kernel, dtype, tile, size))
    for name, kernel in (("fwd", forward), ("bwd", backward)):
        tile = ssd_tile(target, torch.float16, 64, 128, name == "bwd")
        found.append(_variant(f"{name} S128", kernel, torch.float16, tile, 128))
    steps = dataclasses.replace(ssd_steps_tile(), blocks={"BLOCK_T": 64})
    for name, kernel in (
        ("steps", kernels.ssd_steps_kernel), ("steps_bwd", kernels.ssd_steps_bwd_kernel)
    ):
        found.append(_variant(name, kernel, torch.bfloat16, steps, 128))
    for dtype in DTYPES:
        tile = ssd_update_tile(128)
        found.append(
            _variant("update S128", kernels.ssd_state_update_kernel, dtype, tile, 128)
        )
    return found
