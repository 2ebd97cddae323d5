"""Launcher of low_rank_experts for a few tokens: four kernels, nothing sorted.

Inputs as in low_rank_experts_launch.py.
"""

from typing import Any

import triton
from torch import Tensor

from lillama_kernels import low_rank_experts_triton
from lillama_kernels.launch import PDL_TARGETS, Tile, experts_decode_tiles
from lillama_kernels.launch_triton import current_device_of
from lillama_kernels.low_rank_experts_launch import SHIFTS, Layer, experts_target

__all__ = ["low_rank_experts_decode"]

kernels: Any = low_rank_experts_triton  # jitted functions mean nothing to a type checker


def _slots(layer: Layer) -> tuple[int, bool]:
    """How many slots there are, and whether each is a (token, place) instead of an expert: the
    experts in use are at most as many as the places that name them."""
    num_experts = len(layer.ranks)
    return min(layer.places, num_experts), layer.places <= num_experts


def _options(layer: Layer, tile: Tile, waits: bool, pdl: bool) -> dict[str, Any]:
    """waits: the kernel starts before the one in front of it has ended."""
    return {
        "BY_PLACE": _slots(layer)[1],
        "BLOCK_T": triton.next_power_of_2(layer.index.shape[1]),
        "USE_PDL": pdl,
        **layer.options,
        **tile.blocks,
        **tile.options,
        **({"launch_pdl": True} if waits else {}),
    }


def _first(
    layer: Layer,
    tile: Tile,
    source: Tensor,
    weights: tuple[Tensor, Tensor],
    widths: tuple[int, int],
    z: Tensor,
    waits: bool,
    pdl: bool,
    **how: Any,
) -> None:
    slots, _ = _slots(layer)
    blocks = [triton.cdiv(width, tile.blocks["BLOCK_N"]) for width in widths]
    blocks_n = sum(blocks) if how["PARTS"] == 2 else blocks[0]
    kernels._low_rank_experts_first_kernel[(slots * blocks_n,)](
        source, source, *weights, z, layer.weight, z, z, layer.index, layer.index, layer.index,
        layer.ranks, layer.hidden.shape[0], slots, weights[0].shape[2], *widths, source.stride(0),
        SCALE=False, W_ROWS_ARE_N=True, DECODE=True, GROUP_M=1, WAIT=waits, **how,
        **_options(layer, tile, waits, pdl),
    )  # fmt: skip


def low_rank_experts_decode(layer: Layer) -> Tensor:
    """out [M, H] for M <= EXPERTS_DECODE_MAX_TOKENS in four launches, three or two where
    projections are dense."""
    hidden, target = layer.hidden, experts_target(layer.hidden)
    tokens, hidden_size = hidden.shape
    tiles = experts_decode_tiles(target, hidden.dtype)
    size, rank = layer.intermediate_size, layer.rank("down")
    slots, _ = _slots(layer)
    stored = slots * tiles["first"].blocks["BLOCK_M"]
    z, h, z2 = (hidden.new_empty((stored, n)) for n in (layer.width(), size, rank))
    out = hidden.new_empty((tokens, hidden_size))
    pdl = target in PDL_TARGETS and hidden.is_cuda
    with current_device_of(hidden):
        if z.shape[1]:
            _first(
                layer, tiles["first"], hidden, layer.gate_and_up("A"),
                (layer.rank("gate"), layer.rank("up")), z, False, pdl,
                PARTS=2, SHIFT=SHIFTS["gate"], GATHER=True,
            )  # fmt: skip
        waits = pdl and z.shape[1] > 0
        blocks = triton.cdiv(size, tiles["gated"].blocks["BLOCK_N"])
        kernels._low_rank_experts_gated_kernel[(slots * blocks,)](
            hidden, z, *map(layer.get, ("gate_B", "up_B", "gate_W", "up_W")), h, h, h,
            layer.index, layer.index, layer.index, layer.ranks, tokens, slots, hidden_size, size,
            layer.rank("gate"), layer.rank("up"), hidden.stride(0), SAVE=False,
            HAS_DENSE=layer.dense("gate", "up"), DECODE=True, GROUP_M=1, WAIT=waits,
            **_options(layer, tiles["gated"], waits, pdl),
        )  # fmt: skip
        if rank:
            A = layer.factors["down_A"]
            _first(layer, tiles["first_down"], h, (A, A), (rank, 0), z2, pdl, pdl,
                   PARTS=1, SHIFT=SHIFTS["down"], GATHER=False)  # fmt: skip
        blocks = triton.cdiv(hidden_size, tiles["decode"].blocks["BLOCK_N"])
        kernels._low_rank_experts_decode_kernel[(blocks,)](
            z2, h, layer.get("down_B"), layer.get("down_W"), layer.weight, out, layer.index,
            layer.ranks, tokens, slots, hidden_size, size, rank, HAS_DENSE=layer.dense("down"),
            **_options(layer, tiles["decode"], pdl, pdl),
        )  # fmt: skip
    return out
