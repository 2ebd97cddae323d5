"""What the compile gate compiles of low_rank_experts: each kernel as the launchers call it."""

from typing import Any

import torch

from lillama_kernels import (
    low_rank_experts_grad_triton,
    low_rank_experts_route_triton,
    low_rank_experts_triton,
)
from lillama_kernels.compile_gate import Variant
from lillama_kernels.launch import (
    DTYPES,
    PDL_TARGETS,
    Tile,
    experts_decode_tiles,
    experts_tile,
)

__all__ = ["variants"]

# jitted functions mean nothing to a type checker
forward: Any = low_rank_experts_triton
backward: Any = low_rank_experts_grad_triton
routing: Any = low_rank_experts_route_triton

NUM_EXPERTS = 8
KINDS = {
    "index_ptr": "*i64:16", "table_ptr": "*i32:16", "row_ptr": "*i32:16", "count_ptr": "*i32:16",
    "dot_ptr": "*fp32:16", "weight_ptr": "*fp32:16", "ranks": ("i64",) * NUM_EXPERTS,
}  # fmt: skip
LAYER: dict[str, Any] = {"NUM_EXPERTS": NUM_EXPERTS, "TOP_K": 2}
# how the launchers call `first`: for gate and up, their shared factor, down, and backward's two
FIRST: dict[str, dict[str, Any]] = {
    "gate-up": {"PARTS": 2, "SHIFT": 1, "GATHER": True, "SCALE": False, "W_ROWS_ARE_N": True},
    "down": {"PARTS": 1, "SHIFT": 33, "GATHER": False, "SCALE": False, "W_ROWS_ARE_N": True},
    "ddown": {"PARTS": 1, "SHIFT": 33, "GATHER": True, "SCALE": True, "W_ROWS_ARE_N": False},
    "dgate-up": {"PARTS": 2, "SHIFT": 1, "GATHER": False, "SCALE": False, "W_ROWS_ARE_N": False},
}
WEIGHT_GRADS: dict[str, dict[str, Any]] = {
    "A": {"RANK_IS": "N", "GATHER_L": False, "GATHER_R": True, "SCALE_L": False, "SHIFT": 1},
    "B": {"RANK_IS": "K", "GATHER_L": True, "GATHER_R": False, "SCALE_L": True, "SHIFT": 33},
    "W": {"RANK_IS": "none", "GATHER_L": False, "GATHER_R": True, "SCALE_L": False, "SHIFT": 1},
}


def _variant(
    name: str, kernel: Any, dtype: torch.dtype, tile: Tile, matrix: str, **constants: Any
) -> Variant:
    signature: dict[str, Any] = {}
    constants |= tile.blocks
    for parameter in kernel.params:
        argument = parameter.name
        if argument in constants:
            continue
        default = f"*{DTYPES[dtype]}:16" if argument.endswith("_ptr") else "i32:16"
        if parameter.do_not_specialize:
            default = "i32"
        signature[argument] = KINDS.get(argument, default)
    label = f"low_rank_experts {name} {DTYPES[dtype]}"
    return Variant(label, kernel, signature, constants, tile.options, matrix)


def _decode(target: str, dtype: torch.dtype, matrix: str) -> list[Variant]:
    tiles = experts_decode_tiles(target, dtype)
    pdl = target in PDL_TARGETS
    found = []
    for by_place in (False, True):
        how = LAYER | {"BY_PLACE": by_place, "BLOCK_T": 2, "USE_PDL": pdl}
        many = how | {"DECODE": True, "GROUP_M": 1}
        given = (dtype, tiles["first"], matrix)
        kernel, tag = forward._low_rank_experts_first_kernel, "places" if by_place else "experts"
        found.append(_variant(f"first decode gate-up {tag}", kernel, *given, WAIT=False,
                              **many, **FIRST["gate-up"]))  # fmt: skip
        given = (dtype, tiles["first_down"], matrix)
        found.append(_variant(f"first decode down {tag}", kernel, *given, WAIT=pdl,
                              **many, **FIRST["down"]))  # fmt: skip
        for dense in (False, True):
            label = f"{tag}{' dense' if dense else ''}"
            given = (dtype, tiles["gated"], matrix)
            kernel = forward._low_rank_experts_gated_kernel
            found.append(_variant(f"gated decode {label}", kernel, *given, WAIT=pdl, SAVE=False,
                                  HAS_DENSE=dense, **many))  # fmt: skip
            given = (dtype, tiles["decode"], matrix)
            kernel = forward._low_rank_experts_decode_kernel
            found.append(_variant(f"decode {label}", kernel, *given, HAS_DENSE=dense, **how))
    return found


def _many_rows(target: str, dtype: torch.dtype, block_m: int, matrix: str) -> list[Variant]:
    found = []
    alone = LAYER | {"DECODE": False, "BY_PLACE": False, "BLOCK_T": 1, "USE_PDL": False}
    alone["WAIT"] = False
    widest = block_m == (32 if dtype == torch.float32 else 128)
    kernel = forward._low_rank_experts_first_kernel
    for name, how in FIRST.items():
        kind = "first" if how["W_ROWS_ARE_N"] else "first_grad"
        given = (dtype, experts_tile(target, dtype, kind, block_m), matrix)
        if widest or name in ("gate-up", "ddown"):
            found.append(_variant(f"first M{block_m} {name}", kernel, *given, **alone, **how))
    for dense in (False, True) if widest else (False,):
        label = f"M{block_m}{' dense' if dense else ''}"
        given = (dtype, experts_tile(target, dtype, "gated", block_m), matrix)
        kernel = forward._low_rank_experts_gated_kernel
        for save in (False, True) if widest else (True,):
            found.append(_variant(f"gated {label} save{save}", kernel, *given, SAVE=save,
                                  HAS_DENSE=dense, **alone))  # fmt: skip
        kernel = forward._low_rank_experts_second_kernel
        for rows_are_n, parts in ((True, 1), (False, 2)):
            kind = "second" if rows_are_n else "second_grad"
            given = (dtype, experts_tile(target, dtype, kind, block_m), matrix)
            how = LAYER | {"SHIFT": 33 if rows_are_n else 1, "PARTS": parts}
            how |= {"SCALE": rows_are_n, "W_ROWS_ARE_N": rows_are_n, "HAS_DENSE": dense}
            found.append(_variant(f"second {label} parts{parts}", kernel, *given, **how))
        given = (dtype, experts_tile(target, dtype, "gated_grad", block_m, dense), matrix)
        kernel = backward._low_rank_experts_gated_grad_kernel
        found.append(_variant(f"gated_grad {label}", kernel, *given, HAS_DENSE=dense, **LAYER))
    return found


def _routing() -> list[Variant]:
    found = []
    half = torch.bfloat16
    for num_experts, block_p in ((8, 512), (64, 64)):
        how: dict[str, Any] = {"NUM_EXPERTS": num_experts, "BLOCK_P": block_p}
        how["BLOCK_E"] = num_experts
        tile = Tile(blocks={}, num_warps=8, num_stages=2)
        name = f"E{num_experts}"
        found.append(_variant(f"count {name}", routing._low_rank_experts_count_kernel, half, tile,
                              "none", **how))  # fmt: skip
        for one in (True, False):
            found.append(_variant(f"place {name} blocks{int(one)}",
                                  routing._low_rank_experts_place_kernel, half, tile, "none",
                                  TILE_M=128, ONE_BLOCK=one, **how))  # fmt: skip
    for dtype in DTYPES:
        found.append(_variant("combine", routing._low_rank_experts_combine_kernel, dtype, tile,
                              "none", BLOCK_N=1024, **LAYER))  # fmt: skip
    return found


def _with_experts(variant: Variant, number: int) -> Variant:
    """The same tile for more experts, each of which is an argument and 8 of which a token has."""
    constants = variant.constants | {"NUM_EXPERTS": number, "TOP_K": 8}
    if "BLOCK_T" in constants and constants["BLOCK_T"] > 1:
        constants["BLOCK_T"] = 8
    signature = {n: ("i64",) * number if n == "ranks" else k for n, k in variant.signature.items()}
    name = f"{variant.name} E{number}"
    return variant._replace(name=name, constants=constants, signature=signature)


def variants(target: str) -> list[Variant]:
    """Every tile that the launchers use on this target, for each dtype."""
    found = _routing()
    for dtype in DTYPES:
        plain = dtype == torch.float32
        found += _decode(target, dtype, "none" if plain else "any")
        # fp16 and bf16 differ in nothing but the product's type
        sizes = {"fp32": (16, 32), "fp16": (128,), "bf16": (16, 32, 64, 128)}
        for block_m in sizes[DTYPES[dtype]]:
            wide = block_m >= 64 and target in ("sm_90", "sm_100")
            matrix = "none" if plain else "wide" if wide else "any"
            found += _many_rows(target, dtype, block_m, matrix)
        tile = experts_tile(target, dtype, "weight_grad", 128)
        for name, how in WEIGHT_GRADS.items():
            found.append(_variant(f"weight_grad {name}",
                                  backward._low_rank_experts_weight_grad_kernel, dtype, tile,
                                  "none" if plain else "wide", TOP_K=2, **how))  # fmt: skip
    if target == "gfx942":
        # the ranks of 64 experts are more than its scalar registers hold: the compiler keeps some
        # of them in lanes of vector registers, which counts as spilling
        return found
    return found + [
        _with_experts(variant, 64)
        for variant in found
        if variant.name.endswith("bf16") and ("decode" in variant.name or "M128" in variant.name)
    ]
