"""Launchers of low_rank_linear's Triton kernels, and the list of what is compiled for each GPU.

Inputs are as `low_rank_linear.py` hands them over: x [M, K] with M > 0, A [R, K], every B_i
[N_i, R_i], all of one dtype and device and with unit last stride.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from lillama_kernels import low_rank_linear_triton
from lillama_kernels.compile_gate import Variant
from lillama_kernels.launch import (
    DECODE_MAX_ROWS,
    DTYPES,
    MAX_SPLIT,
    PDL_TARGETS,
    Tile,
    decode_split,
    decode_tiles,
    matmul_tile,
    target_of,
)
from lillama_kernels.launch_triton import current_device_of

__all__ = [
    "low_rank_linear_decode",
    "low_rank_linear_first",
    "low_rank_linear_matmul",
    "rows_aligned",
    "target_with_tiles",
    "variant",
    "variants",
]


kernels: Any = low_rank_linear_triton  # jitted functions mean nothing to a type checker


def target_with_tiles(tensor: Tensor) -> str:
    """The target whose tiles run where the tensor is.

    Raises:
        NotImplementedError: there are none for that GPU.
    """
    target = target_of(tensor.device)
    if target is None:
        raise NotImplementedError(f"no Triton tiles for the GPU {tensor.device}; use the reference")
    return target


def rows_aligned(*tensors: Tensor) -> bool:
    """Whether all rows start at multiples of 8 elements, so that they load 16 bytes at a time."""
    return all(t.shape[-1] % 8 == 0 and t.stride(0) % 8 == 0 for t in tensors)


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
    pdl = {"launch_pdl": True} if target in PDL_TARGETS and x.is_cuda else {}
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
    target = target_with_tiles(x)
    rows, rank = x.shape[0], A.shape[0]
    ys = [x.new_empty((rows, B.shape[0])) for B in Bs]
    aligned = rows_aligned(x, A, *Bs, *ys)
    first, second = tiles or decode_tiles(target, x.dtype, rows, aligned)
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
    one of its dimensions; out may be a view with unit last stride. accumulate: added to out."""
    rows, inner = a.shape
    columns = b.shape[0]
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


# What the compile gate compiles: each kernel as the launchers above call it
INTEGER_POINTERS = {"order_ptr": "*i32:16", "places_ptr": "*i32:16"}


def variant(
    op: str,
    name: str,
    kernel: Any,
    dtype: torch.dtype,
    tile: Tile,
    matrix: str,
    pairs: int = 1,
    aligned: bool = True,
    **constants: Any,
) -> Variant:
    """A kernel of op as the launchers call it with one tile.

    matrix: see `compile_gate.Variant`. pairs: how many values a parameter whose name ends in "s"
    takes. aligned: see `rows_aligned`. constants: those that the tile does not hold.
    """
    pointer, number = f"*{DTYPES[dtype]}:16", "i32:16" if aligned else "i32"
    signature: dict[str, Any] = {}
    names = {parameter.name for parameter in kernel.params}
    constants |= {**tile.blocks, **({"ALIGNED": aligned} if "ALIGNED" in names else {})}
    for parameter in kernel.params:
        argument = parameter.name
        if argument in constants:
            continue
        if argument in INTEGER_POINTERS:
            kind = INTEGER_POINTERS[argument]
        elif argument.endswith(("_ptr", "_ptrs")):
            kind = pointer
        else:
            kind = "i32" if parameter.do_not_specialize else number
        signature[argument] = (kind,) * pairs if argument.endswith("s") else kind
    label = f"{op} {name} {DTYPES[dtype]}" + ("" if aligned else " unaligned")
    return Variant(label, kernel, signature, constants, tile.options, matrix)


_variant = functools.partial(variant, "low_rank_linear")


def _decode_variants(target: str, dtype: torch.dtype) -> list[Variant]:
    first_kernel = kernels._low_rank_linear_first_kernel
    second_kernel = kernels._low_rank_linear_second_kernel
    found = []
    matrix = "none" if dtype == torch.float32 else "any"
    pdl = target in PDL_TARGETS
    splits = (1,) if dtype == torch.float32 else (1, 2, MAX_SPLIT)
    for rows in (16, 32, DECODE_MAX_ROWS):
        first, second = decode_tiles(target, dtype, rows)
        for split in splits:
            given = (dtype, first, matrix)
            how: dict[str, Any] = {"SPLIT_K": split, "USE_PDL": pdl}
            name = f"M{rows} split{split}"
            found.append(_variant(f"first {name}", first_kernel, *given, WAIT=pdl, **how))
            # three pairs as in q/k/v
            for pairs in (1, 3) if split == 1 else (1,):
                given = (dtype, second, matrix, pairs)
                label = f"second {name} pairs{pairs}"
                found.append(_variant(label, second_kernel, *given, BIASES=1, **how))
    how = {"SPLIT_K": splits[-1], "USE_PDL": pdl}
    for rows in (16, DECODE_MAX_ROWS):
        first, second = decode_tiles(target, dtype, rows, aligned=False)
        given = (dtype, first, matrix, 1, False)
        found.append(_variant(f"first M{rows}", first_kernel, *given, WAIT=False, **how))
        given = (dtype, second, matrix, 1, False)
        found.append(_variant(f"second M{rows}", second_kernel, *given, BIASES=1, **how))
    return found


def variants(target: str) -> list[Variant]:
    """Every tile that the launchers use on this target, for each dtype."""
    found = []
    for dtype in DTYPES:
        found += _decode_variants(target, dtype)
        plain = dtype == torch.float32
        for name, a_rows, b_rows in (("xw", True, True), ("dx", True, False), ("dw", False, False)):
            for aligned in (True, False):
                found.append(
                    _variant(
                        f"matmul {name}",
                        kernels._low_rank_linear_matmul_kernel,
                        dtype,
                        matmul_tile(target, dtype, aligned),
                        # rows that are not aligned cannot be copied asynchronously
                        "none" if plain else "wide" if aligned else "any",
                        aligned=aligned,
                        A_ROWS_ARE_M=a_rows,
                        B_ROWS_ARE_N=b_rows,
                        HAS_BIAS=name == "xw",
                        ACCUMULATE=False,
                    )
                )
    return found
