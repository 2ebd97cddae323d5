"""Committed tile tables per (op, target, dtype), and what a launch needs to know about its device.

No autotuning in the library: a table is filled offline, reviewed, and says where its numbers come
from. **No entry was measured on a GPU yet**; they follow from bytes, registers and shared memory,
and the compile gate (`compile_gate.py`) holds every one of them to the limits below.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

__all__ = [
    "COMBINE_TILE",
    "CONV_STEP_TILE",
    "CONV_TILE",
    "DECODE_MAX_ROWS",
    "EXPERTS_DECODE_MAX_TOKENS",
    "MAX_SPLIT",
    "MIXER_MAX_ROWS",
    "MIXER_SCAN_TILE",
    "NUM_PROGRAMS",
    "PDL_TARGETS",
    "SCAN_UPDATE_TILE",
    "SHARED_BYTES",
    "ExpertsKernel",
    "Tile",
    "decode_split",
    "decode_tiles",
    "experts_block_m",
    "experts_decode_tiles",
    "experts_table_size",
    "experts_tile",
    "loss_tile",
    "matmul_tile",
    "pivot_second_tile",
    "route_tile",
    "scan_tile",
]

# Shared memory that one program may use, bytes (CUDA C++ Programming Guide 13.0, table 30; CDNA3
# ISA: 64 KiB of LDS)
SHARED_BYTES = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448}
SHARED_BYTES |= {"gfx942": 65_536}
# Multiprocessors of the largest common card; a split must not depend on the card at hand, or the
# same inputs would round differently on an H100 with 114 of them than on one with 132
NUM_PROGRAMS = {"sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_100": 148, "gfx942": 304}
# Where a kernel may start before the one in front of it has ended (programmatic dependent launch)
PDL_TARGETS = ("sm_90", "sm_100")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """blocks: the BLOCK_* (and other) compile-time sizes of a kernel."""

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int | bool]:
        """What the compiler is told besides the sizes."""
        # fp fusion is Triton's default of today; 3.9 warns when it is not named
        how = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return how | {"enable_fp_fusion": True}


def _tile(num_warps: int, num_stages: int, **blocks: int) -> Tile:
    return Tile(blocks=blocks, num_warps=num_warps, num_stages=num_stages)


# low_rank_linear

# Rows up to which both stages go through the decode kernels, and impl="auto" runs them instead of
# PyTorch's two products: from counting bytes and launches, until a measurement replaces it
DECODE_MAX_ROWS = 64
MAX_SPLIT = 4


def decode_tiles(
    target: str, dtype: torch.dtype, rows: int, aligned: bool = True
) -> tuple[Tile, Tile]:
    """Tiles of the first (BLOCK_M, BLOCK_R, BLOCK_K) and the second kernel (BLOCK_M, BLOCK_N,
    BLOCK_R) for 1 to DECODE_MAX_ROWS rows.

    aligned: rows of a multiple of 8 elements. Others load element by element, which takes more
    registers.
    """
    block_m = next(size for size in (16, 32, DECODE_MAX_ROWS) if rows <= size)
    # small shared memory takes fewer tiles in flight
    stages = {"sm_89": 3, "gfx942": 1}.get(target, 4)
    if dtype == torch.float32 or not aligned:  # small tiles, or registers spill
        block_k, block_n, block_r = 64, 32, 32 if aligned else 16
    else:
        block_k, block_n = 256 if block_m == 16 else 128, 64
        block_r = 128 if block_m == 16 and target != "sm_89" else 64
    return (
        # narrow blocks of ranks: 1024 of them give 64 programs without splitting K
        _tile(4, stages, BLOCK_M=block_m, BLOCK_R=16, BLOCK_K=block_k),
        _tile(4, stages, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=block_r),
    )


def decode_split(target: str, dtype: torch.dtype, rank: int, in_features: int, tile: Tile) -> int:
    """Parts of K for the first kernel: enough programs for half of the multiprocessors, each with
    two blocks of K or more. Powers of 2, so that few kernels are compiled. 1 for fp32, where the
    second kernel would pay for each part with as many products outside the tensor cores."""
    if dtype == torch.float32:
        return 1
    programs = -(-rank // tile.blocks["BLOCK_R"])
    split = 1
    while (
        split < MAX_SPLIT
        and 2 * programs * split < NUM_PROGRAMS[target]
        and 4 * split * tile.blocks["BLOCK_K"] <= in_features
    ):
        split *= 2
    return split


def matmul_tile(
    target: str, dtype: torch.dtype, aligned: bool = True, accumulate: bool = False
) -> Tile:
    """Tile of the plain product (BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M).

    accumulate: what is added to takes registers beside the sum.
    """
    if dtype == torch.float32 or not aligned:
        stages = 1 if target == "gfx942" else 3
        return _tile(4, stages, BLOCK_M=64, BLOCK_N=32, BLOCK_K=16, GROUP_M=8)
    if target in ("sm_90", "sm_100"):
        wide = 128 if accumulate else 256
        return _tile(8, 4, BLOCK_M=128, BLOCK_N=wide, BLOCK_K=64, GROUP_M=8)
    stages = 2 if target == "gfx942" else 3
    return _tile(8, stages, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, GROUP_M=8)


# pivot_low_rank_linear


def pivot_second_tile(
    target: str, dtype: torch.dtype, rows: int, split: int, aligned: bool = True
) -> Tile:
    """Tile of the second kernel (BLOCK_M, BLOCK_N, BLOCK_R) for 1 to DECODE_MAX_ROWS rows; the
    first has `decode_tiles`'.

    Half as many outputs as low_rank_linear's, and twice as many ranks: of a tile's rows of C those
    are missing whose outputs are pivots, seven in ten where N = 2560 and R = 1776, so that longer
    rows and more programs keep as many bytes on the way. Where K is split, z's parts take the
    registers of longer rows.
    """
    _, second = decode_tiles(target, dtype, rows, aligned)
    n, r = second.blocks["BLOCK_N"], second.blocks["BLOCK_R"]
    blocks = dict(second.blocks) | {"BLOCK_N": n // 2, "BLOCK_R": 2 * r if split == 1 else r}
    return dataclasses.replace(second, blocks=blocks)


# distill_loss


def loss_tile(features: int, aligned: bool = True) -> Tile:
    """Tile of the loss (BLOCK_M tokens, BLOCK_H features), one for all targets and dtypes.

    All features of a token where they fit: 16 to 32 of each tensor in a thread's registers, several
    tokens together where they are few. Beyond 16384, or 4096 where rows load element by element,
    the kernel loops over blocks of 4096.
    """
    if features > (16_384 if aligned else 4096):
        return _tile(8, 2, BLOCK_M=1, BLOCK_H=4096)
    block_h = max(16, 1 << (features - 1).bit_length())
    block_m = max(1, 2048 // block_h)
    num_warps = min(16, max(4, block_m * block_h // 512))
    return _tile(num_warps, 2, BLOCK_M=block_m, BLOCK_H=block_h)


# low_rank_experts

# Tokens up to which a layer without gradients runs the four kernels that sort nothing
EXPERTS_DECODE_MAX_TOKENS = 16
# Features of a token whose parts are added up
COMBINE_TILE = _tile(4, 1, BLOCK_N=1024)
ExpertsKernel = Literal[
    "first", "gated", "second", "first_grad", "gated_grad", "second_grad", "weight_grad"
]


def experts_block_m(dtype: torch.dtype, rows: int, num_experts: int) -> int:
    """Rows of a tile: those of an average expert, at most 128, 32 for fp32, whose products run
    outside the tensor cores and spill registers in larger tiles."""
    each = -(-rows // num_experts)
    sizes = (16, 32) if dtype == torch.float32 else (16, 32, 64, 128)
    return next((size for size in sizes if each <= size), sizes[-1])


def experts_table_size(places: int, num_experts: int) -> int:
    """Numbers in the table of the routing, whatever BLOCK_M: see route_kernels.py."""
    return num_experts + 2 + 2 * (-(-places // 16) + num_experts)


def route_tile(num_experts: int) -> Tile:
    """BLOCK_P (token, place) pairs and BLOCK_E experts that the routing counts at a time, one for
    all targets: 4096 of both together."""
    block_e = max(2, 1 << (num_experts - 1).bit_length())
    return _tile(8, 2, BLOCK_P=max(64, 4096 // block_e), BLOCK_E=block_e)


def experts_decode_tiles(target: str, dtype: torch.dtype) -> dict[str, Tile]:
    """Tiles (BLOCK_M, BLOCK_N, BLOCK_K) of "first" (gate and up), "gated", "first_down" and
    "decode" for up to EXPERTS_DECODE_MAX_TOKENS tokens.

    Narrow blocks of N: two experts of rank 1024 give "first_down", which reads 14336 columns, 128
    programs.
    """
    stages = {"sm_89": 3, "gfx942": 1}.get(target, 4)
    if dtype == torch.float32:
        sizes = {"first": (16, 32), "first_down": (16, 32), "decode": (32, 16)}
        sizes["gated"] = (16, 32 if target == "sm_89" else 64)
    elif target in ("sm_89", "gfx942"):
        sizes = dict.fromkeys(("first", "first_down", "gated", "decode"), (16, 128))
    else:
        sizes = {"first": (16, 256), "first_down": (16, 256)}
        sizes |= {"gated": (32, 128), "decode": (16, 128)}
    return {
        name: _tile(4, stages, BLOCK_M=EXPERTS_DECODE_MAX_TOKENS, BLOCK_N=n, BLOCK_K=k)
        for name, (n, k) in sizes.items()
    }


def experts_tile(
    target: str, dtype: torch.dtype, kernel: ExpertsKernel, block_m: int, dense: bool = False
) -> Tile:
    """Tile (BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M) of a product over many rows, BLOCK_M as given;
    that of "weight_grad", which sums over BLOCK_P rows, is BLOCK_N, BLOCK_K, GROUP_N.

    dense: some experts keep the projection dense, which takes more registers."""
    wide = target in ("sm_90", "sm_100")
    stages = 2 if target == "gfx942" else 3
    if kernel == "weight_grad":
        n, k, p, warps = (64, 32, 16, 4) if dtype == torch.float32 else (128, 64, 32, 4)
        if wide and dtype != torch.float32:
            n, k, p, warps = 128, 256, 64, 8
        return _tile(warps, stages, BLOCK_N=n, BLOCK_K=k, BLOCK_P=p, GROUP_N=8)
    wide_k = 64 if wide else 32
    if dtype == torch.float32:
        n, k, warps = 32, 32, 4
    elif kernel == "gated_grad":  # three operands in the epilogue
        n, k, warps = (64, wide_k, 8) if block_m == 128 else (32, wide_k, 4)
        n = 32 if target == "gfx942" or dense else n
    elif block_m < 128:
        gated = kernel == "gated"
        # with 4 warps dense ones spill 8 bytes on sm_90 and 56 on sm_100
        more = block_m == 64 and (gated or dense) or block_m == 32 and gated and dense
        n, k, warps = 64 if gated else 128, 64, 8 if more else 4
    elif kernel in ("gated", "first_grad", "second_grad"):  # two accumulators or two products
        n, k, warps = 128 if wide else 64, wide_k, 8
        if target == "sm_100" and kernel == "first_grad":
            stages = 4  # 3 spill 8 bytes with Triton 3.6
    else:
        n, k, warps = 256 if wide else 128, wide_k, 8
    if target == "gfx942" and dtype == torch.float32:
        stages = 1
    if target in ("gfx942", "sm_89"):
        k = min(k, 32)
    return _tile(warps, stages, BLOCK_M=block_m, BLOCK_N=n, BLOCK_K=k, GROUP_M=8)


# selective_scan, causal_conv1d, mamba_mixer_step

# Sequences of a step: the convolution spills registers in the tiles of more
MIXER_MAX_ROWS = 16


def scan_tile(target: str) -> Tile:
    """BLOCK_D channels and BLOCK_T steps of a chunk, for all dtypes.

    16 channels are a 32-byte sector of 16-bit numbers where channels are neighbours, and make 320
    programs of Mamba-2.8B's 5120. Forward and backward share it: backward starts from the states
    that forward left at the chunks' borders, and spills registers in longer chunks on gfx942.
    """
    steps, warps = (16, 4) if target == "gfx942" else (64, 8)
    return _tile(warps, 1, BLOCK_D=16, BLOCK_T=steps)


# Channels of a single step of the scan
SCAN_UPDATE_TILE = _tile(2, 1, BLOCK_D=32)
# Channels and steps of the convolution; either may be what lies side by side in memory
CONV_TILE = _tile(4, 1, BLOCK_D=32, BLOCK_T=16)
CONV_STEP_TILE = _tile(4, 1, BLOCK_D=64)
# Channels of a mixer's step, each with a row of dt_proj in registers
MIXER_SCAN_TILE = _tile(4, 1, BLOCK_D=16)
