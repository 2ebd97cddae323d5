"""Committed tiles of what a Mamba block runs; see launch.py, which has those of the rest.

No entry was measured on a GPU yet.
"""

import torch

from lillama_kernels.launch import Tile, decode_tiles

__all__ = [
    "MIXER_MAX_ROWS",
    "conv_step_tile",
    "conv_tile",
    "mixer_conv_tile",
    "mixer_scan_tile",
    "scan_tile",
    "scan_update_tile",
    "sequence_like",
]

# selective_scan and causal_conv1d


def sequence_like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An empty [B, D, T] in which channels are neighbours where they are in x, else steps."""
    batch, channels, steps = x.shape
    if x.stride(1) == 1 and channels > 1:
        return x.new_empty((batch, steps, channels), dtype=dtype).transpose(1, 2)
    return x.new_empty(x.shape, dtype=dtype)


def scan_tile(target: str) -> Tile:
    """BLOCK_D channels and BLOCK_T steps of a chunk, for all dtypes.

    16 channels are a 32-byte sector of 16-bit numbers where channels are neighbours, and make 320
    programs of Mamba-2.8B's 5120. Forward and backward share it: backward starts from the states
    that forward left at the chunks' borders, and spills registers in longer chunks on gfx942.
    """
    steps = 16 if target == "gfx942" else 64
    return Tile(
        blocks={"BLOCK_D": 16, "BLOCK_T": steps}, num_warps=8 if steps == 64 else 4, num_stages=1
    )


def scan_update_tile() -> Tile:
    """BLOCK_D channels of a single step."""
    return Tile(blocks={"BLOCK_D": 32}, num_warps=2, num_stages=1)


def conv_tile() -> Tile:
    """BLOCK_D channels and BLOCK_T steps of causal_conv1d, one for all targets and dtypes; either
    may be the side on which neighbours lie in memory."""
    return Tile(blocks={"BLOCK_D": 32, "BLOCK_T": 16}, num_warps=4, num_stages=1)


def conv_step_tile() -> Tile:
    """BLOCK_D channels of causal_conv1d_update."""
    return Tile(blocks={"BLOCK_D": 64}, num_warps=4, num_stages=1)


# mamba_mixer_step

# Sequences of a step: the convolution spills registers in the tiles of more
MIXER_MAX_ROWS = 16


def mixer_conv_tile(target: str, dtype: torch.dtype) -> Tile:
    """Tile (BLOCK_M, BLOCK_N, BLOCK_R) of in_proj's second stage with the convolution."""
    return decode_tiles(target, dtype, MIXER_MAX_ROWS)[1]


def mixer_scan_tile() -> Tile:
    """BLOCK_D channels of the step's scan, each with a row of dt_proj in registers."""
    return Tile(blocks={"BLOCK_D": 16}, num_warps=4, num_stages=1)
