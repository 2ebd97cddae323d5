"""Launchers of ssd_scan's Triton kernels, and the list of what is compiled for each GPU.

Inputs are as `ssd_scan.py` checks them. x, B, C and the gradient of y are copied where their last
dimension is not dense, A, D, dt_bias and the initial state where they are not contiguous.
"""

import dataclasses
import functools
from typing import Any

import torch
import triton
from torch import Tensor

from lillama_kernels import ssd_scan_triton, ssd_steps_triton
from lillama_kernels.compile_gate import Variant
from lillama_kernels.launch import DTYPES, Tile, target_of
from lillama_kernels.launch_mamba import SsdKernel, ssd_steps_tile, ssd_tile
from lillama_kernels.launch_triton import current_device_of

__all__ = ["ssd_scan_bwd", "ssd_scan_fwd", "ssd_state_update", "variants"]

kernels: Any = ssd_scan_triton  # jitted functions mean nothing to a type checker
steps_kernels: Any = ssd_steps_triton


def _tile(kernel: SsdKernel, x: Tensor, size: int) -> Tile:
    target = target_of(x.device)
    if target is None:
        raise NotImplementedError(f"no Triton tiles for the GPU {x.device}; use the reference")
    return ssd_tile(kernel, target, x.dtype, x.shape[-1], size)


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
    steps_kernels.ssd_steps_kernel[(batch * heads * chunks,)](
        dt, A.contiguous(), _or(bias, dt), out, steps, heads, chunks, *dt.stride(), low, high,
        BLOCK_T=block, SOFTPLUS=softplus, HAS_BIAS=bias is not None, **options,
    )  # fmt: skip
    return out


def _states(
    x: Tensor, steps: Tensor, B: Tensor, first: Tensor | None, reverse: bool, tile: Tile
) -> tuple[Tensor, Tensor]:
    """The state before each chunk [B, nh, chunks, S, P] in x's dtype, which is what the products
    take, and the last one [B, nh, P, S] fp32; with reverse their gradients, see the kernel."""
    (batch, length, heads, width), (groups, size) = x.shape, B.shape[2:]
    border = x.new_empty((*steps.shape[:3], size, width))
    last = x.new_empty((batch, heads, width, size), dtype=torch.float32)
    programs = triton.cdiv(width, tile.blocks["BLOCK_P"]) * heads * batch
    programs *= triton.cdiv(size, tile.blocks["BLOCK_S"])
    kernels.ssd_states_kernel[(programs,)](
        x, steps, B, _or(first, x), border, last, length, heads, heads // groups,
        *x.stride()[:3], *B.stride()[:3], P=width, S=size, HAS_FIRST=first is not None,
        REVERSE=reverse, **tile.blocks, **tile.options,
    )  # fmt: skip
    return border, last


def _empty_state(x: Tensor, B: Tensor) -> Tensor:
    batch, _, heads, width = x.shape
    return x.new_zeros((batch, heads, width, B.shape[3]), dtype=torch.float32)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, nh, P]; the last state [B, nh, P, S] fp32; the states that enter each chunk
    [B, nh, chunks, S, P] in x's dtype."""
    (batch, length, heads, width), (groups, size) = x.shape, B.shape[2:]
    tile, states = (_tile(name, x, size) for name in ("output", "states"))
    y = x.new_empty(x.shape)
    chunks = triton.cdiv(length, tile.blocks["BLOCK_T"])
    if y.numel() == 0:
        return y, _empty_state(x, B), x.new_empty((batch, heads, chunks, size, width))
    x, B, C = map(_dense, (x, B, C))
    slices = triton.cdiv(width, tile.blocks["BLOCK_P"])
    with current_device_of(x):
        steps = _steps(dt, A, bias, softplus, low, high, tile)
        border, last = _states(x, steps, B, first, False, states)
        kernels.ssd_output_kernel[(slices * heads * chunks * batch,)](
            x, steps, B, C, _or(D, x), border, y, length, chunks, heads, heads // groups,
            *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], P=width, S=size,
            HAS_D=D is not None, **tile.blocks, **tile.options,
        )  # fmt: skip
    return y, last, border


def _partial(x: Tensor, *shape: int) -> Tensor:
    """fp32; zeros where there are no batches, heads or channels, so that nothing computes it."""
    return (x.new_empty if x.numel() else x.new_zeros)(shape, dtype=torch.float32)


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
    (batch, length, heads, width), (groups, size) = x.shape, B.shape[2:]
    tile, states, factors = (_tile(name, x, size) for name in ("gradient", "states", "factors"))
    slices, block = triton.cdiv(width, tile.blocks["BLOCK_P"]), tile.blocks["BLOCK_T"]
    dx, per_group, chunks = x.new_empty(x.shape), heads // groups, border.shape[2]
    grad, x, B, C = map(_dense, (grad, x, B, C))

    partial = functools.partial(_partial, x)
    ddt, dA = partial(batch, heads, length), partial(batch, heads, chunks)
    sums = torch.float64 if x.dtype == torch.float32 else torch.float32
    parts = x.new_empty((slices, *dA.shape, 4, block), dtype=sums)
    ones = partial(slices, *dA.shape, 2)
    shares = triton.cdiv(width, factors.blocks["BLOCK_P"])
    dB, dC = (partial(shares, batch, length, heads, size) for _ in range(2))
    dfirst = _empty_state(x, B)
    if dx.numel():
        with current_device_of(x):
            steps = _steps(dt, A, bias, softplus, low, high, tile)
            right, dfirst = _states(grad, steps, C, grad_last, True, states)
            strides = [n for t in (grad, x, B, C) for n in t.stride()[:3]]
            kernels.ssd_grad_kernel[(slices * dA.numel(),)](
                grad, x, steps, B, C, _or(D, x), border, right, dx, parts, ones, dA.numel(),
                length, chunks, heads, per_group, *strides, P=width, S=size, HAS_D=D is not None,
                **tile.blocks, **tile.options,
            )  # fmt: skip
            blocks = triton.cdiv(size, factors.blocks["BLOCK_S"])
            kernels.ssd_grad_factors_kernel[(blocks * shares * dA.numel(),)](
                grad, x, steps, B, C, border, right, dB, dC, length, chunks, batch, heads,
                per_group, *strides, P=width, S=size, **factors.blocks, **factors.options,
            )  # fmt: skip
            steps_kernels.ssd_steps_bwd_kernel[(dA.numel(),)](
                dt, A.contiguous(), _or(bias, dt), steps, parts, ones, ddt, dA,
                dA.numel(), length, heads, chunks, *dt.stride(), low, high,
                BLOCK_T=block, SLICES=slices, SOFTPLUS=softplus, HAS_BIAS=bias is not None,
                **ssd_steps_tile().options,
            )  # fmt: skip
    of_groups = (shares, batch, length, groups, per_group, size)
    dB, dC = (t.view(of_groups).sum((0, 4)) for t in (dB, dC))
    return [
        dx, ddt.transpose(1, 2).to(dt.dtype), dA.sum((0, 2)).to(A.dtype),
        dB.to(B.dtype), dC.to(C.dtype),
        partial(0) if D is None else ones[..., 1].sum((0, 1, 3)).to(D.dtype),
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
    tile = ssd_steps_tile(size)
    programs = triton.cdiv(width, tile.blocks["BLOCK_P"]) * heads * batch
    if programs:
        with current_device_of(x):
            steps_kernels.ssd_state_update_kernel[(programs,)](
                state, x, dt, A.contiguous(), B, C, _or(D, x), _or(bias, x), y,
                heads, heads // groups, *state.stride(), *x.stride()[:2],
                *dt.stride(), *B.stride()[:2], *C.stride()[:2], low, high,
                SOFTPLUS=softplus, HAS_D=D is not None, HAS_BIAS=bias is not None, P=width, S=size,
                **tile.blocks, **tile.options,
            )  # fmt: skip
    return y


# What the compile gate compiles: each kernel as the launchers above call it, A, D, the bias and
# the states fp32 as in a trained model, all else in dtype
SAME_POINTERS = ("x_ptr", "dt_ptr", "b_ptr", "c_ptr", "y_ptr", "grad_ptr", "dx_ptr", "border_ptr",
                 "right_ptr")  # fmt: skip


def _variant(
    name: str, kernel: Any, dtype: torch.dtype, tile: Tile, size: int, **flags: bool
) -> Variant:
    names = [p.name for p in kernel.params]
    everything = {n: True for n in names if n.startswith("HAS_") or n in ("SOFTPLUS", "REVERSE")}
    constants: dict[str, Any] = (
        everything | flags | dict(tile.blocks) | {"P": 64, "S": size, "SLICES": 2}
    )
    constants = {key: value for key, value in constants.items() if key in names}
    signature: dict[str, Any] = {}
    for parameter in kernel.params:
        key = parameter.name
        if key in constants:
            continue
        if key.endswith("_ptr"):
            signature[key] = f"*{DTYPES[dtype] if key in SAME_POINTERS else 'fp32'}:16"
            if key == "parts_ptr" and dtype == torch.float32:
                signature[key] = "*fp64:16"
        elif key in ("low", "high"):
            signature[key] = "fp32"
        elif key[:2] in ("x_", "b_", "c_", "gr") and key[-2] == "s":
            signature[key] = "i32:16"
        elif key == "h_ss":
            constants[key] = 1
        else:
            signature[key] = "i32"
    products = dtype != torch.float32 and not name.startswith(("steps", "update"))
    matrix = "any" if products else "none"
    label = f"ssd_scan {name} S{size} {DTYPES[dtype]}"
    return Variant(label, kernel, signature, constants, tile.options, matrix)


def variants(target: str) -> list[Variant]:
    """Every tile that the launchers use, at heads of 64 channels."""
    main: dict[SsdKernel, Any] = {
        "states": kernels.ssd_states_kernel,
        "output": kernels.ssd_output_kernel,
        "gradient": kernels.ssd_grad_kernel,
        "factors": kernels.ssd_grad_factors_kernel,
    }
    shapes = [(d, s) for d in (torch.float32, torch.bfloat16) for s in (16, 128)]
    found = []
    for dtype, size in [*shapes, (torch.float16, 128)]:
        for name, kernel in main.items():
            tile = ssd_tile(name, target, dtype, 64, size)
            found.append(_variant(name, kernel, dtype, tile, size))
    steps = dataclasses.replace(ssd_steps_tile(), blocks={"BLOCK_T": 64})
    found.append(_variant("steps", steps_kernels.ssd_steps_kernel, torch.bfloat16, steps, 64))
    found.append(
        _variant("steps_bwd", steps_kernels.ssd_steps_bwd_kernel, torch.bfloat16, steps, 64)
    )
    update = steps_kernels.ssd_state_update_kernel
    return found + [_variant("update", update, d, ssd_steps_tile(128), 128) for d in DTYPES]
