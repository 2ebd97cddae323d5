"""Launchers of low_rank_experts' backward: products on forward's kernels, and two of its own."""

from collections.abc import Container, Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from lillama_kernels import low_rank_experts_grad_triton
from lillama_kernels.launch_triton import current_device_of
from lillama_kernels.low_rank_experts_launch import (
    SHIFTS,
    Layer,
    Rows,
    Saved,
    combine,
    experts_first,
    experts_second,
    programs_of,
    tile_of,
)

__all__ = ["low_rank_experts_backward"]

kernels: Any = low_rank_experts_grad_triton  # jitted functions mean nothing to a type checker


def _gated_grad(
    layer: Layer, rows: Rows, dz2: Tensor, dout: Tensor, gate: Tensor, up: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """d gate, d up and h [rows, I]; the routing weights' gradient [M * k] where down is dense."""
    size, dense = layer.intermediate_size, layer.dense("down")
    dgate, dup, h = (torch.empty_like(gate) for _ in range(3))
    tile = tile_of(layer, "gated_grad", rows, dense)
    blocks = triton.cdiv(size, tile.blocks["BLOCK_N"])
    dot = gate.new_zeros((blocks, layer.places) if dense else 1, dtype=torch.float32)
    kernels._low_rank_experts_gated_grad_kernel[programs_of(layer, tile, rows.max_tiles * blocks)](
        dz2, dout, layer.get("down_A"), layer.get("down_W"), gate, up, layer.weight, dgate, dup, h,
        dot, layer.index, rows.table, rows.row, layer.ranks, layer.hidden.shape[0],
        dout.shape[1], size, layer.rank("down"), dout.stride(0),
        HAS_DENSE=dense, **layer.options, **tile.blocks, **tile.options,
    )  # fmt: skip
    return dgate, dup, h, dot.sum(0) if dense else None


def _weight_grad(
    layer: Layer,
    rows: Rows,
    name: str,
    left: Tensor,
    right: Tensor,
    starts: tuple[int, int] = (0, 0),
    **gather: bool,
) -> Tensor:
    """Gradient of one factor of every expert; left and right start at the columns `starts`."""
    projection, letter = name.split("_")
    out = torch.empty_like(layer.factors[name])
    _, n, k = out.shape
    tile = tile_of(layer, "weight_grad", rows)
    blocks = triton.cdiv(n, tile.blocks["BLOCK_N"]) * triton.cdiv(k, tile.blocks["BLOCK_K"])
    how = {"GATHER_L": False, "GATHER_R": False, "SCALE_L": False} | gather
    kernels._low_rank_experts_weight_grad_kernel[(blocks, len(layer.ranks))](
        left, right, out, layer.weight, rows.table, rows.row, layer.ranks, n, k,
        left.stride(0), right.stride(0), *starts, TOP_K=layer.index.shape[1],
        SHIFT=SHIFTS[projection], RANK_IS={"A": "N", "B": "K", "W": "none"}[letter],
        **how, **tile.blocks, **tile.options,
    )  # fmt: skip
    return out


def _weight_grads(
    layer: Layer, rows: Rows, needed: Container[str], operands: Mapping[str, tuple[Any, ...]]
) -> dict[str, Tensor]:
    """operands: for each factor, what `_weight_grad` takes, the names of its gathers last."""
    return {
        name: _weight_grad(layer, rows, name, *given, **dict.fromkeys(gather, True))
        for name, (*given, gather) in operands.items()
        if name in layer.factors and name in needed
    }


def _down_backward(
    layer: Layer, rows: Rows, saved: Saved, dout: Tensor, needed: Container[str]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Gradients of the routing weights and of down's factors; d gate and d up."""
    dz2 = torch.empty_like(saved.z2)
    dweight = None
    if "down_B" in layer.factors:
        B = layer.factors["down_B"]
        dweight = experts_first(
            layer, rows, (dout, dout), (B, B), (layer.rank("down"), 0), dz2, other=saved.z2,
            PARTS=1, SHIFT=SHIFTS["down"], GATHER=True, W_ROWS_ARE_N=False,
        )  # fmt: skip
    dgate, dup, h, of_dense = _gated_grad(layer, rows, dz2, dout, saved.gate, saved.up)
    if of_dense is not None:
        dweight = of_dense if dweight is None else dweight + of_dense
    assert dweight is not None
    routed = ("GATHER_L", "SCALE_L")
    operands = {
        "down_A": (dz2, h, ()),
        "down_B": (dout, saved.z2, routed),
        "down_W": (dout, h, routed),
    }
    grads = _weight_grads(layer, rows, needed, operands)
    grads["weight"] = dweight.view(layer.index.shape).to(layer.weight.dtype)
    return grads, dgate, dup


def low_rank_experts_backward(
    layer: Layer, rows: Rows, saved: Saved, dout: Tensor, needed: Container[str]
) -> dict[str, Tensor]:
    """Gradients by name ("hidden", "weight", "gate_A", ...), those needed; dout [M, H]."""
    hidden, widths = layer.hidden, (layer.rank("gate"), layer.rank("up"))
    with current_device_of(hidden):
        grads, dgate, dup = _down_backward(layer, rows, saved, dout, needed)
        dz = torch.empty_like(saved.z)
        if dz.shape[1]:
            experts_first(
                layer, rows, (dgate, dup), layer.gate_and_up("B"), widths, dz,
                PARTS=2, SHIFT=SHIFTS["gate"], GATHER=False, W_ROWS_ARE_N=False,
            )  # fmt: skip
        start = widths[0]
        x = ("GATHER_R",)
        operands = {
            "gate_A": (dz, hidden, x),
            "gate_B": (dgate, saved.z, ()),
            "gate_W": (dgate, hidden, x),
            "up_A": (dz, hidden, (start, 0), x),
            "up_B": (dup, saved.z, (0, start), ()),
            "up_W": (dup, hidden, x),
        }
        grads |= _weight_grads(layer, rows, needed, operands)
        if "hidden" in needed:
            parts = experts_second(
                layer, rows, dz, (dgate, dup), ("gate_A", "up_A"), widths,
                (hidden.shape[1], layer.intermediate_size), SHIFT=SHIFTS["gate"],
                PARTS=2, SCALE=False, W_ROWS_ARE_N=False,
                HAS_DENSE=layer.dense("gate", "up"),
            )  # fmt: skip
            grads["hidden"] = combine(layer, parts)
    return grads
