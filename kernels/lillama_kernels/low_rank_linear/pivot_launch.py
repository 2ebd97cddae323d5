"""Launchers of pivot_low_rank_linear's Triton kernels.

Inputs are as pivot.py hands them over: x [M, K] with M > 0, A [R, K] and C [N - R, R] of one dtype
and device and with unit last stride, order [N] int32 and bias [N] contiguous.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from lillama_kernels.launch import current_device_of, rows_aligned, target_with_tiles
from lillama_kernels.low_rank_linear import pivot_kernels
from lillama_kernels.low_rank_linear.launch import low_rank_linear_first
from lillama_kernels.tiles import (
    decode_split,
    decode_tiles,
    matmul_tile,
    permute_tile,
    pivot_second_tile,
)

__all__ = [
    "pivot_low_rank_linear_decode",
    "pivot_low_rank_linear_fwd",
    "pivot_low_rank_linear_permute",
]

kernels: Any = pivot_kernels  # jitted functions mean nothing to a type checker


def pivot_low_rank_linear_decode(
    x: Tensor, A: Tensor, C: Tensor, order: Tensor, bias: Tensor | None
) -> Tensor:
    """y [M, N] for M <= DECODE_MAX_ROWS by two kernels."""
    target = target_with_tiles(x)
    (rows, in_features), (rank, features) = x.shape, (A.shape[0], len(order))
    y = x.new_empty((rows, features))
    aligned = rows_aligned(x, A, C, y)
    first, _ = decode_tiles(target, x.dtype, rows, aligned)
    split = decode_split(target, x.dtype, rank, in_features, first)
    second = pivot_second_tile(target, x.dtype, rows, split, aligned)
    grid = (triton.cdiv(features, second.blocks["BLOCK_N"]),)
    with current_device_of(x):
        z, _, pdl = low_rank_linear_first(x, A, first, aligned, split)
        kernels._pivot_low_rank_linear_second_kernel[grid](
            z, C, order, y if bias is None else bias, y, rows, features, rank, C.stride(0),
            SPLIT_K=split, HAS_BIAS=bias is not None, ALIGNED=aligned, USE_PDL=bool(pdl),
            **second.blocks, **second.options, **pdl,
        )  # fmt: skip
    return y


def _places(order: Tensor) -> Tensor:
    """The inverse of a permutation [N] int32."""
    places, tile = torch.empty_like(order), permute_tile()
    block = tile.blocks["BLOCK_N"]
    kernels._pivot_low_rank_linear_places_kernel[(triton.cdiv(len(order), block),)](
        order, places, len(order), BLOCK_N=block, **tile.options
    )
    return places


def _product(
    a: Tensor, b: Tensor, places: Tensor, bias: Tensor | None, y: Tensor, z: Tensor | None
) -> None:
    """y[:, places[n]] = (a b^T)[:, n] + bias[places[n]], and z = a b^T, for every row n of b."""
    (rows, inner), columns = a.shape, b.shape[0]
    aligned = rows_aligned(a, b, *(() if z is None else (z,)))
    tile = matmul_tile(target_with_tiles(a), a.dtype, aligned)
    grid = triton.cdiv(rows, tile.blocks["BLOCK_M"]) * triton.cdiv(columns, tile.blocks["BLOCK_N"])
    kernels._pivot_low_rank_linear_product_kernel[(grid,)](
        a, b, places, y if bias is None else bias, y if z is None else z, y, rows, columns, inner,
        a.stride(0), b.stride(0), y.stride(0),
        KEEP_Z=z is not None, HAS_BIAS=bias is not None, ALIGNED=aligned, **tile.blocks,
        **tile.options,
    )  # fmt: skip


def pivot_low_rank_linear_fwd(
    x: Tensor, A: Tensor, C: Tensor, order: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [M, N] and z = x A^T [M, R] for any number of rows."""
    rank = A.shape[0]
    y, z = x.new_empty((x.shape[0], len(order))), x.new_empty((x.shape[0], rank))
    with current_device_of(x):
        places = _places(order)
        _product(x, A, places, bias, y, z)
        if len(C):
            _product(z, C, places[rank:], bias, y, None)
    return y, z


def pivot_low_rank_linear_permute(y: Tensor, order: Tensor) -> Tensor:
    """What became y [M, N] by `order`: column order[n] of the result is column n of y."""
    (rows, features), tile = y.shape, permute_tile()
    found = y.new_empty((rows, features))
    blocks = tile.blocks["BLOCK_M"], tile.blocks["BLOCK_N"]
    grid = (triton.cdiv(rows, blocks[0]), triton.cdiv(features, blocks[1]))
    with current_device_of(y):
        kernels._pivot_low_rank_linear_permute_kernel[grid](
            y, _places(order), found, rows, features, y.stride(0), **tile.blocks, **tile.options
        )
    return found
