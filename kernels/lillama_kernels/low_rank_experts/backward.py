"""Launchers of low_rank_experts' backward: products on forward's kernels, and two of its own."""

from collections.abc import Container
from typing import Any

import torch
import triton
from torch import Tensor

from lillama_kernels.launch import current_device_of
from lillama_kernels.low_rank_experts import backward_kernels
from lillama_kernels.low_rank_experts.launch import (
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

kernels: Any = backward_kernels  # jitted functions mean nothing to a type checker


def _gated_grad(
    layer: Layer, rows: Rows, dz2: Tensor, dout: Tensor, saved: Saved
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """d gate, d up and h [rows, I]; the routing weights' gradient [M * k] where down is dense."""
    size, dense = layer.intermediate_size, layer.dense("down")
    dgate, dup, h = (torch.empty_like(saved.gate) for _ in range(3))
    tile = tile_of(layer, "gated_grad", rows, dense)
    blocks = triton.cdiv(size, tile.blocks["BLOCK_N"])
    dot = h.new_zeros((blocks, layer.places) if dense else 1, dtype=torch.float32)
    kernels._low_rank_experts_gated_grad_kernel[programs_of(layer, tile, rows.max_tiles * blocks)](
        dz2, dout, *layer.get("down_A", "down_W"), saved.gate, saved.up, layer.weight, dgate, dup,
        h, dot, layer.index, rows.table, rows.row, layer.ranks, layer.hidden.shape[0],
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
    tokens_left: bool,
    tokens_right: bool,
) -> Tensor:
    """Gradient of one factor of every expert, left^T right summed over its rows.

    tokens_left, tokens_right: that operand's rows are tokens, not stored rows; left's then come
    from the layer's output and are multiplied by the routing weights.
    """
    projection, letter = name.split("_")
    out = torch.empty_like(layer.factors[name])
    _, n, k = out.shape
    tile = tile_of(layer, "weight_grad", rows)
    blocks = triton.cdiv(n, tile.blocks["BLOCK_N"]) * triton.cdiv(k, tile.blocks["BLOCK_K"])
    kernels._low_rank_experts_weight_grad_kernel[(blocks, len(layer.ranks))](
        left, right, out, layer.weight, rows.table, rows.row, layer.ranks, n, k,
        left.stride(0), right.stride(0), TOP_K=layer.index.shape[1],
        SHIFT=SHIFTS[projection], RANK_IS={"A": "N", "B": "K", "W": "none"}[letter],
        TOKENS_L=tokens_left, TOKENS_R=tokens_right,
        **tile.blocks, **tile.options,
    )  # fmt: skip
    return out


def _down_backward(
    layer: Layer, rows: Rows, saved: Saved, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dz2, d gate, d up, h again, and the routing weights' gradient [M * k] fp32."""
    dz2, dweight = torch.empty_like(saved.z2), None
    if "down_B" in layer.factors:
        B = layer.factors["down_B"]
        dweight = experts_first(
            layer, rows, (dout, dout), (B, B), (layer.rank("down"), 0), dz2, other=saved.z2,
            PARTS=1, SHIFT=SHIFTS["down"], GATHER=True, W_ROWS_ARE_N=False,
        )  # fmt: skip
    dgate, dup, h, of_dense = _gated_grad(layer, rows, dz2, dout, saved)
    if of_dense is not None:
        dweight = of_dense if dweight is None else dweight + of_dense
    assert dweight is not None
    return dz2, dgate, dup, h, dweight


def low_rank_experts_backward(
    layer: Layer, rows: Rows, saved: Saved, dout: Tensor, needed: Container[str]
) -> dict[str, Tensor]:
    """Gradients by name ("hidden", "weight", "gate_A", ...), those needed; dout [M, H]."""
    hidden, widths = layer.hidden, (layer.rank("gate"), layer.rank("up"))
    with current_device_of(hidden):
        dz2, dgate, dup, h, dweight = _down_backward(layer, rows, saved, dout)
        dz = torch.empty_like(saved.z)
        if dz.shape[1]:
            experts_first(
                layer, rows, (dgate, dup), layer.gate_and_up("B"), widths, dz,
                PARTS=2, SHIFT=SHIFTS["gate"], GATHER=False, W_ROWS_ARE_N=False,
            )  # fmt: skip
        # of each factor the two operands, and which of them have tokens as rows
        operands = {
            "gate_A": (dz, hidden, False, True),
            "gate_B": (dgate, saved.z, False, False),
            "gate_W": (dgate, hidden, False, True),
            "up_A": (dz[:, widths[0] :], hidden, False, True),
            "up_B": (dup, saved.z[:, widths[0] :], False, False),
            "up_W": (dup, hidden, False, True),
            "down_A": (dz2, h, False, False),
            "down_B": (dout, saved.z2, True, False),
            "down_W": (dout, h, True, False),
        }
        grads = {
            name: _weight_grad(layer, rows, name, *given)
            for name, given in operands.items()
            if name in layer.factors and name in needed
        }
        grads["weight"] = dweight.view(layer.index.shape).to(layer.weight.dtype)
        if "hidden" in needed:
            parts = experts_second(
                layer, rows, dz, (dgate, dup), ("gate_A", "up_A"), widths,
                (hidden.shape[1], layer.intermediate_size), SHIFT=SHIFTS["gate"], PARTS=2,
                SCALE=False, W_ROWS_ARE_N=False, HAS_DENSE=layer.dense("gate", "up"),
            )  # fmt: skip
            grads["hidden"] = combine(layer, parts)
    return grads
