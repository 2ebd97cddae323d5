"""Launcher of low_rank_experts for a few tokens: four kernels, nothing sorted.

Inputs as in launch.py.
"""

from typing import Any

import triton
from torch import Tensor

from lillama_kernels.launch import current_device_of, dependent_launch
from lillama_kernels.low_rank_experts import kernels as triton_kernels
from lillama_kernels.low_rank_experts.launch import SHIFTS, Layer
from lillama_kernels.tiles import Tile, experts_decode_tiles

__all__ = ["low_rank_experts_decode"]

kernels: Any = triton_kernels  # jitted functions mean nothing to a type checker


def _options(layer: Layer, tile: Tile, waits: bool) -> dict[str, Any]:
    """waits: the kernel starts before the one in front of it has ended, where the target can.

    A slot is a (token, place) where these are fewer than the experts, else an expert.
    """
    pdl = dependent_launch(layer.target)
    return {
        "BY_PLACE": layer.places <= len(layer.ranks),
        "BLOCK_T": triton.next_power_of_2(layer.index.shape[1]),
        "USE_PDL": bool(pdl),
        **layer.options,
        **tile.blocks,
        **tile.options,
        **(pdl if waits else {}),
    }


def low_rank_experts_decode(layer: Layer) -> Tensor:
    """out [M, H] for M <= EXPERTS_DECODE_MAX_TOKENS in four launches, three or two where
    projections are dense."""
    hidden, index = layer.hidden, layer.index
    tokens, hidden_size = hidden.shape
    tiles = experts_decode_tiles(layer.target, hidden.dtype)
    pdl = bool(dependent_launch(layer.target))
    size, rank = layer.intermediate_size, layer.rank("down")
    widths = layer.rank("gate"), layer.rank("up")
    # the experts in use are at most as many as the places that name them
    slots = min(layer.places, len(layer.ranks))
    stored = slots * tiles["first"].blocks["BLOCK_M"]
    z, h, z2 = (hidden.new_empty((stored, n)) for n in (sum(widths), size, rank))
    out = hidden.new_empty((tokens, hidden_size))

    def first(name: str, source: Tensor, weights, widths, z: Tensor, waits: bool, **how) -> None:
        tile = tiles[name]
        blocks = sum(triton.cdiv(width, tile.blocks["BLOCK_N"]) for width in widths)
        kernels._low_rank_experts_first_kernel[(slots * blocks,)](
            source, source, *weights, z, layer.weight, z, z, index, index, index, layer.ranks,
            tokens, slots, weights[0].shape[2], *widths, source.stride(0), SCALE=False,
            W_ROWS_ARE_N=True, DECODE=True, GROUP_M=1, WAIT=waits and pdl, **how,
            **_options(layer, tile, waits),
        )  # fmt: skip

    with current_device_of(hidden):
        has_z = z.shape[1] > 0
        if has_z:
            first("first", hidden, layer.gate_and_up("A"), widths, z, False,
                  PARTS=2, SHIFT=SHIFTS["gate"], GATHER=True)  # fmt: skip
        blocks = triton.cdiv(size, tiles["gated"].blocks["BLOCK_N"])
        kernels._low_rank_experts_gated_kernel[(slots * blocks,)](
            hidden, z, *layer.get("gate_B", "up_B", "gate_W", "up_W"), h, h, h, index, index, index,
            layer.ranks, tokens, slots, hidden_size, size, *widths, hidden.stride(0),
            SAVE=False, HAS_DENSE=layer.dense("gate", "up"), DECODE=True, GROUP_M=1,
            WAIT=has_z and pdl, **_options(layer, tiles["gated"], has_z),
        )  # fmt: skip
        if rank:
            A = layer.factors["down_A"]
            first("first_down", h, (A, A), (rank, 0), z2, True,
                  PARTS=1, SHIFT=SHIFTS["down"], GATHER=False)  # fmt: skip
        blocks = triton.cdiv(hidden_size, tiles["decode"].blocks["BLOCK_N"])
        kernels._low_rank_experts_decode_kernel[(blocks,)](
            z2, h, *layer.get("down_B", "down_W"), layer.weight, out, index, layer.ranks, tokens,
            slots, hidden_size, size, rank, HAS_DENSE=layer.dense("down"),
            **_options(layer, tiles["decode"], True),
        )  # fmt: skip
    return out
