"""Launchers of the Triton kernels of low_rank_linear and its pivot form.

Inputs are as op.py and pivot.py hand them over: x [M, K] with M > 0 and factors of one dtype and
device and with unit last stride.
"""

from collections.abc import Sequence
from typing import Any

import triton
from torch import Tensor

from lillama_kernels.launch import (
    current_device_of,
    dependent_launch,
    rows_aligned,
    target_with_tiles,
)
from lillama_kernels.low_rank_linear import kernels as triton_kernels
from lillama_kernels.tiles import Tile, decode_split, decode_tiles, matmul_tile, pivot_second_tile

__all__ = [
    "low_rank_linear_decode",
    "low_rank_linear_first",
    "low_rank_linear_matmul",
    "pivot_low_rank_linear_decode",
]

kernels: Any = triton_kernels  # jitted functions mean nothing to a type checker


def low_rank_linear_first(
    x: Tensor,
    A: Tensor,
    tile: Tile,
    aligned: bool,
    split: int | None = None,
    waits: bool = False,
) -> tuple[Tensor, int, dict[str, bool]]:
    """Launch the first kernel on the current device, for M <= DECODE_MAX_ROWS.

    Returns:
        z [S, M, R], whose S parts add up to x A^T; S; and the launch options of the second kernel,
        which starts while this one runs where they are not empty.
    """
    target = target_with_tiles(x)
    (rows, in_features), rank = x.shape, A.shape[0]
    split = split or decode_split(target, x.dtype, rank, in_features, tile)
    z = x.new_empty((split, rows, rank))
    pdl = dependent_launch(target)
    kernels._low_rank_linear_first_kernel[(triton.cdiv(rank, tile.blocks["BLOCK_R"]), split)](
        x, A, z, rows, in_features, rank, x.stride(0), A.stride(0),
        SPLIT_K=split, ALIGNED=aligned, USE_PDL=bool(pdl), WAIT=waits, **tile.blocks,
        **tile.options, **(pdl if waits else {}),
    )  # fmt: skip
    return z, split, pdl


def low_rank_linear_decode(
    x: Tensor,
    A: Tensor,
    Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    tiles: tuple[Tile, Tile] | None = None,
    split: int | None = None,
    waits: bool = False,
) -> list[Tensor]:
    """Every y_i [M, N_i] for M <= DECODE_MAX_ROWS by two kernels; A is the pairs' concatenation.

    tiles and split: other than the committed ones, to measure them. waits: x comes from a kernel
    that lets this one start before it ends (programmatic dependent launch).
    """
    rows, rank = x.shape[0], A.shape[0]
    ys = [x.new_empty((rows, B.shape[0])) for B in Bs]
    aligned = rows_aligned(x, A, *Bs, *ys)
    first, second = tiles or decode_tiles(target_with_tiles(x), x.dtype, rows, aligned)
    blocks_n = sum(triton.cdiv(B.shape[0], second.blocks["BLOCK_N"]) for B in Bs)
    with current_device_of(x):
        z, split, pdl = low_rank_linear_first(x, A, first, aligned, split, waits)
        kernels._low_rank_linear_second_kernel[(blocks_n,)](
            z, tuple(Bs), tuple(B if b is None else b for b, B in zip(biases, Bs, strict=True)),
            tuple(ys), rows, rank, tuple(B.shape[0] for B in Bs), tuple(B.shape[1] for B in Bs),
            tuple(B.stride(0) for B in Bs),
            SPLIT_K=split, BIASES=sum(1 << i for i, b in enumerate(biases) if b is not None),
            ALIGNED=aligned, USE_PDL=bool(pdl), **second.blocks, **second.options, **pdl,
        )  # fmt: skip
    return ys


def low_rank_linear_matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
    accumulate: bool = False,
) -> Tensor:
    """a [M, K] times b [N, K]^T (+ bias [N]) -> [M, N], each operand a matrix with unit stride in
    one of its dimensions; out may be a view with unit last stride. accumulate: added to out.

    tile: another than the committed one, to measure it."""
    (rows, inner), columns = a.shape, b.shape[0]
    c = a.new_empty((rows, columns)) if out is None else out
    a_rows, b_rows = a.stride(1) == 1, b.stride(1) == 1
    aligned = rows_aligned(a if a_rows else a.T, b if b_rows else b.T, c)
    tile = tile or matmul_tile(target_with_tiles(a), a.dtype, aligned, accumulate)
    grid = triton.cdiv(rows, tile.blocks["BLOCK_M"]) * triton.cdiv(columns, tile.blocks["BLOCK_N"])
    with current_device_of(a):
        kernels._low_rank_linear_matmul_kernel[(grid,)](
            a, b, b if bias is None else bias, c, rows, columns, inner,
            a.stride(0 if a_rows else 1), b.stride(0 if b_rows else 1), c.stride(0),
            A_ROWS_ARE_M=a_rows, B_ROWS_ARE_N=b_rows, HAS_BIAS=bias is not None,
            ACCUMULATE=accumulate, ALIGNED=aligned, **tile.blocks, **tile.options,
        )  # fmt: skip
    return c


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
