"""Launchers of low_rank_experts' Triton kernels for many rows: forward, and what backward shares.

Inputs are as autograd.py hands them over: a `Layer` with M > 0 tokens whose tensors are contiguous,
but for hidden's row stride, and of one dtype and device (the routing weights may have another
dtype); H, I and every rank are multiples of 8.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lillama_kernels.launch import current_device_of, target_with_tiles
from lillama_kernels.low_rank_experts import kernels as triton_kernels
from lillama_kernels.low_rank_experts import route_kernels
from lillama_kernels.tiles import (
    COMBINE_TILE,
    SHARED_BYTES,
    ExpertsKernel,
    Tile,
    experts_block_m,
    experts_table_size,
    experts_tile,
    route_tile,
)

__all__ = [
    "Layer",
    "Rows",
    "Saved",
    "combine",
    "experts_first",
    "experts_second",
    "low_rank_experts_forward",
    "pack_ranks",
    "programs_of",
    "rows_of",
    "tile_of",
]

# jitted functions mean nothing to a type checker
kernels: Any = triton_kernels
routing: Any = route_kernels

# Where the rank of a projection begins in the number of pack_ranks
SHIFTS = {"gate": 1, "up": 17, "down": 33}


def _fields(ranks: tuple[int, ...]) -> list[int]:
    """16 bits for each expert: its rank, or 8 d + 1 where it is the d-th dense one."""
    dense = iter(range(len(ranks)))
    return [rank or next(dense) << 3 | 1 for rank in ranks]


@functools.lru_cache(maxsize=4096)
def pack_ranks(
    gate: tuple[int, ...], up: tuple[int, ...], down: tuple[int, ...]
) -> tuple[int, ...]:
    """One 64-bit number an expert with its three ranks, which are multiples of 8.

    Odd and beyond 2^62 whatever the ranks, so that Triton, which compiles anew for an integer that
    is 1, a multiple of 16 or of another width, compiles once.
    """
    return tuple(
        1 << 62 | 1 | g << SHIFTS["gate"] | u << SHIFTS["up"] | d << SHIFTS["down"]
        for g, u, d in zip(*map(_fields, (gate, up, down)), strict=True)
    )


@dataclass(frozen=True, slots=True)
class Layer:
    """What one call computes with. factors: {"gate_A": [E, R, K], "gate_B": [E, N, R], "gate_W":
    [.., N, K], ...}, without those that do not exist."""

    hidden: Tensor
    index: Tensor
    weight: Tensor
    factors: dict[str, Tensor]
    ranks: tuple[int, ...]

    @property
    def intermediate_size(self) -> int:
        return self.factors["gate_B" if "gate_B" in self.factors else "gate_W"].shape[1]

    @property
    def places(self) -> int:
        return self.index.numel()

    @property
    def target(self) -> str:
        return target_with_tiles(self.hidden)

    def rank(self, projection: str) -> int:
        """The largest rank of a projection, 0 when all of it is dense: the width of its part of
        z."""
        B = self.factors.get(f"{projection}_B")
        return 0 if B is None else B.shape[2]

    def get(self, *names: str) -> tuple[Tensor, ...]:
        """Factors, or something that is never read in the place of those that do not exist."""
        return tuple(self.factors.get(name, self.hidden) for name in names)

    def gate_and_up(self, letter: str) -> tuple[Tensor, Tensor]:
        """Both factors of a letter; where one projection is dense, the other's in its place."""
        gate, up = (self.factors.get(f"{name}_{letter}") for name in ("gate", "up"))
        first, second = (up if gate is None else gate), (gate if up is None else up)
        assert first is not None and second is not None
        return first, second

    def dense(self, *projections: str) -> bool:
        """Whether some expert keeps one of these projections dense."""
        return any(f"{name}_W" in self.factors for name in projections)

    @property
    def options(self) -> dict[str, Any]:
        return {"NUM_EXPERTS": len(self.ranks), "TOP_K": self.index.shape[1]}


class Rows(NamedTuple):
    """The routing on the GPU: see route_kernels.py."""

    table: Tensor
    row: Tensor
    block_m: int
    max_tiles: int


class Saved(NamedTuple):
    """What forward leaves for backward."""

    z: Tensor
    z2: Tensor
    gate: Tensor
    up: Tensor


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def programs_of(layer: Layer, tile: Tile, most: int) -> tuple[int]:
    """Grid of a persistent kernel: as many programs as can be resident, at most one a tile."""
    if not layer.hidden.is_cuda:
        return (min(most, 4),)  # the interpreter runs them one after the other
    size = sum(tile.blocks[name] for name in ("BLOCK_M", "BLOCK_N")) * tile.blocks["BLOCK_K"]
    shared = size * tile.num_stages * layer.hidden.element_size()
    resident = max(1, min(SHARED_BYTES[layer.target] // shared, 32 // tile.num_warps))
    index = layer.hidden.device.index
    assert index is not None
    return (min(most, resident * _multiprocessors(index)),)


def rows_of(layer: Layer, table: Tensor, row: Tensor) -> Rows:
    """The routing that `_route` has left in table and row."""
    num_experts = len(layer.ranks)
    block_m = experts_block_m(layer.hidden.dtype, layer.places, num_experts)
    # every expert may end with a tile that is not full
    return Rows(table, row, block_m, triton.cdiv(layer.places, block_m) + num_experts)


def _route(layer: Layer) -> Rows:
    """Sort the (token, place) pairs by expert, in one launch or two."""
    places, num_experts = layer.places, len(layer.ranks)
    tile = route_tile(num_experts)
    blocks = triton.cdiv(places, tile.blocks["BLOCK_P"])
    new = functools.partial(torch.empty, dtype=torch.int32, device=layer.hidden.device)
    rows = rows_of(layer, new(experts_table_size(places, num_experts)), new(places))
    count = new(blocks * tile.blocks["BLOCK_E"] if blocks > 1 else 1)
    how = {"NUM_EXPERTS": num_experts, **tile.blocks, **tile.options}
    if blocks > 1:
        routing._low_rank_experts_count_kernel[(blocks,)](layer.index, count, places, **how)
    routing._low_rank_experts_place_kernel[(blocks,)](
        layer.index, count, rows.table, rows.row, places, blocks, rows.max_tiles,
        TILE_M=rows.block_m, ONE_BLOCK=blocks == 1, **how,
    )  # fmt: skip
    return rows


def combine(layer: Layer, parts: Tensor) -> Tensor:
    """out [M, N]: the k parts [M * k, N] of every token added up in order."""
    tokens, features = layer.hidden.shape[0], parts.shape[1]
    out = parts.new_empty((tokens, features))
    grid = (tokens, triton.cdiv(features, COMBINE_TILE.blocks["BLOCK_N"]))
    routing._low_rank_experts_combine_kernel[grid](
        parts, layer.index, out, tokens, features, **layer.options, **COMBINE_TILE.blocks,
        **COMBINE_TILE.options,
    )  # fmt: skip
    return out


def tile_of(layer: Layer, kernel: ExpertsKernel, rows: Rows, dense: bool = False) -> Tile:
    return experts_tile(layer.target, layer.hidden.dtype, kernel, rows.block_m, dense)


def experts_first(
    layer: Layer,
    rows: Rows,
    sources: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    widths: tuple[int, int],
    z: Tensor,
    other: Tensor | None = None,
    **how: Any,
) -> Tensor:
    """z [rows, widths] of one product or two; with `other`, the routing weight times that, and
    returned is dot [M * k] fp32."""
    tile = tile_of(layer, "first" if how["W_ROWS_ARE_N"] else "first_grad", rows)
    blocks = [triton.cdiv(width, tile.blocks["BLOCK_N"]) for width in widths]
    dot = z.new_zeros((blocks[0], layer.places) if other is not None else 1, dtype=torch.float32)
    kernels._low_rank_experts_first_kernel[programs_of(layer, tile, rows.max_tiles * sum(blocks))](
        *sources, *weights, z, layer.weight, z if other is None else other, dot,
        layer.index, rows.table, rows.row, layer.ranks, layer.hidden.shape[0], 0,
        weights[0].shape[2 if how["W_ROWS_ARE_N"] else 1], *widths, sources[0].stride(0),
        SCALE=other is not None, DECODE=False, BY_PLACE=False, BLOCK_T=1, USE_PDL=False,
        WAIT=False, **how, **layer.options, **tile.blocks, **tile.options,
    )  # fmt: skip
    return dot.sum(0) if other is not None else dot


def _gated(layer: Layer, rows: Rows, z: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """h, gate and up; the last two are empty without save."""
    size = layer.intermediate_size
    h = layer.hidden.new_empty((layer.places, size))
    gate, up = (h.new_empty((layer.places if save else 0, size)) for _ in range(2))
    dense = layer.dense("gate", "up")
    tile = tile_of(layer, "gated", rows, dense)
    steps = rows.max_tiles * triton.cdiv(size, tile.blocks["BLOCK_N"])
    kernels._low_rank_experts_gated_kernel[programs_of(layer, tile, steps)](
        layer.hidden, z, *layer.get("gate_B", "up_B", "gate_W", "up_W"),
        h, gate if save else h, up if save else h,
        layer.index, rows.table, rows.row, layer.ranks, layer.hidden.shape[0], 0,
        layer.hidden.shape[1], size, layer.rank("gate"), layer.rank("up"), layer.hidden.stride(0),
        SAVE=save, HAS_DENSE=dense, DECODE=False, BY_PLACE=False, BLOCK_T=1,
        USE_PDL=False, WAIT=False, **layer.options, **tile.blocks, **tile.options,
    )  # fmt: skip
    return h, gate, up


def experts_second(
    layer: Layer,
    rows: Rows,
    z: Tensor,
    dense: tuple[Tensor, Tensor],
    names: tuple[str, str],
    widths: tuple[int, int],
    sizes: tuple[int, int],
    **how: Any,
) -> Tensor:
    """[M * k, N] at each row's place; sizes are N and K of the dense projections."""
    out = layer.hidden.new_empty((layer.places, sizes[0]))
    kernel = "second" if how["W_ROWS_ARE_N"] else "second_grad"
    tile = tile_of(layer, kernel, rows, how["HAS_DENSE"])
    steps = rows.max_tiles * triton.cdiv(sizes[0], tile.blocks["BLOCK_N"])
    kernels._low_rank_experts_second_kernel[programs_of(layer, tile, steps)](
        z, *dense, *layer.get(*names, *(f"{name[:-1]}W" for name in names)),
        layer.weight, out, layer.index, rows.table, rows.row, layer.ranks,
        layer.hidden.shape[0], 0, *sizes, *widths, **how, **layer.options, **tile.blocks,
        **tile.options,
    )  # fmt: skip
    return out


def low_rank_experts_forward(layer: Layer, save: bool) -> tuple[Tensor, Saved, Rows]:
    """out [M, H], and with save what backward needs."""
    hidden = layer.hidden
    widths, rank = (layer.rank("gate"), layer.rank("up")), layer.rank("down")
    with current_device_of(hidden):
        rows = _route(layer)
        z, z2 = (hidden.new_empty((layer.places, n)) for n in (sum(widths), rank))
        if z.shape[1]:
            experts_first(
                layer, rows, (hidden, hidden), layer.gate_and_up("A"), widths, z,
                PARTS=2, SHIFT=SHIFTS["gate"], GATHER=True, W_ROWS_ARE_N=True,
            )  # fmt: skip
        h, gate, up = _gated(layer, rows, z, save)
        if rank:
            A = layer.factors["down_A"]
            experts_first(
                layer, rows, (h, h), (A, A), (rank, 0), z2,
                PARTS=1, SHIFT=SHIFTS["down"], GATHER=False, W_ROWS_ARE_N=True,
            )  # fmt: skip
        parts = experts_second(
            layer, rows, z2, (h, h), ("down_B", "down_B"), (rank, 0),
            (hidden.shape[1], layer.intermediate_size), SHIFT=SHIFTS["down"], PARTS=1, SCALE=True,
            W_ROWS_ARE_N=True, HAS_DENSE=layer.dense("down"),
        )  # fmt: skip
        return combine(layer, parts), Saved(z, z2, gate, up), rows
