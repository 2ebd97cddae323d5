"""Measure tiles for the decode kernels, and their rivals, on the GPU at hand.

    PYTHONPATH=.:kernels python -m benchmarks.tune_low_rank_linear [--rows 1 16] [--quick]

For each shape: the first stage's tiles with the committed second stage, then the second's with the
best first, all replayed from CUDA graphs on rotated inputs, every candidate checked against the
reference before it is timed. Prints the best of each and the committed one; what it finds is
entered in kernels/lillama_kernels/tiles.py by hand, with an entry in NOTES.md. One JSON document
at the end, for a file.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lillama_kernels import reference
from lillama_kernels.dispatch import target_of
from lillama_kernels.low_rank_linear.launch import (
    low_rank_linear_decode,
    low_rank_linear_matmul,
)
from lillama_kernels.testing import check_values, low_rank_linear_inputs
from lillama_kernels.tiles import (
    Tile,
    decode_split,
    decode_tiles,
    matmul_tile,
)
from torch import Tensor

from benchmarks.timing import captured, cuda_clock, interleaved, num_input_sets, quantiles

# K, N, rank: Mixtral's w1, Mamba's in_proj (Phi's fc1) and out_proj, Phi's attention
SHAPES = [(4096, 14336, 1024), (4096, 14336, 2048), (2560, 10240, 1024), (5120, 2560, 1024),
          (2560, 2560, 512)]  # fmt: skip
# K and N of the two products of Mixtral's w1 and Mamba's in_proj at rank 1024
PRODUCTS = [(4096, 1024), (1024, 14336), (2560, 1024), (1024, 10240)]
Run = Callable[..., Tensor]


def first_tiles(block_m: int, quick: bool) -> Iterator[Tile]:
    sizes = itertools.product((16, 32), (128, 256, 512), (4, 8), (3, 4, 6))
    for block_r, block_k, num_warps, num_stages in sizes:
        if quick and (num_warps, num_stages) != (4, 4):
            continue
        blocks = {"BLOCK_M": block_m, "BLOCK_R": block_r, "BLOCK_K": block_k}
        yield Tile(blocks=blocks, num_warps=num_warps, num_stages=num_stages)


def second_tiles(block_m: int, quick: bool) -> Iterator[Tile]:
    sizes = itertools.product((32, 64, 128), (64, 128, 256), (4, 8), (3, 4, 6))
    for block_n, block_r, num_warps, num_stages in sizes:
        if quick and (num_warps, num_stages) != (4, 4):
            continue
        blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_R": block_r}
        yield Tile(blocks=blocks, num_warps=num_warps, num_stages=num_stages)


class Bench:
    """One shape and number of rows: times a function on rotated inputs from a graph."""

    def __init__(self, k: int, n: int, r: int, rows: int, device: torch.device) -> None:
        count = num_input_sets(2 * r * (k + n), device)
        given: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        self.sets = [low_rank_linear_inputs([rows], k, n, r, **given, seed=i) for i in range(count)]

    @torch.no_grad()
    def microseconds(self, run: Run) -> float:
        """Median of a call; infinite where the tile does not fit the GPU."""
        try:
            check_values(run, reference.low_rank_linear, self.sets[0])
            replay = captured(lambda: [run(**given) for given in self.sets])
        except Exception as error:
            if "out of resource" not in str(error) and "OutOfResources" not in type(error).__name__:
                raise
            return float("inf")
        seconds = interleaved({"it": replay}, 20, 3, cuda_clock)["it"]
        return quantiles(seconds)["median_us"] / len(self.sets)


def tune(bench: Bench, rows: int, shape: tuple[int, int, int], quick: bool) -> dict[str, Any]:
    """Microseconds of the committed tiles, the best ones and the rivals of one shape."""
    k, _, rank = shape
    dtype = torch.bfloat16
    target = target_of(torch.device("cuda"))
    assert target is not None
    first, second = decode_tiles(target, dtype, rows)
    block_m = first.blocks["BLOCK_M"]
    split = decode_split(target, dtype, rank, k, first)

    def decode(first: Tile, second: Tile, split: int) -> Run:
        def run(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
            return low_rank_linear_decode(x, A, [B], [bias], (first, second), split)[0]

        return run

    found: dict[str, Any] = {"shape": shape, "rows": rows}
    found["cublas_us"] = bench.microseconds(reference.low_rank_linear)
    found["committed_us"] = bench.microseconds(decode(first, second, split))
    tries = [(tile, s) for tile in first_tiles(block_m, quick) for s in (1, 2, 4)]
    timed = [(bench.microseconds(decode(t, second, s)), i) for i, (t, s) in enumerate(tries)]
    first, split = tries[min(timed)[1]]
    seconds = list(second_tiles(block_m, quick))
    timed = [(bench.microseconds(decode(first, t, split)), i) for i, t in enumerate(seconds)]
    second, found["best_us"] = seconds[min(timed)[1]], min(timed)[0]
    found["best"] = [dataclasses.asdict(first), dataclasses.asdict(second), {"split": split}]
    return found


def product_tiles(quick: bool) -> Iterator[Tile]:
    for m, n, k, w, s in itertools.product((64, 128), (128, 256), (32, 64), (4, 8), (3, 4)):
        if not quick or (w, s) == (8, 3):
            blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}
            yield Tile(blocks=blocks, num_warps=w, num_stages=s)


def tune_product(k: int, n: int, device: torch.device, quick: bool) -> dict[str, Any]:
    """The plain product's tiles beside cuBLAS, at 4096 rows."""
    given: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    a, b = (torch.randn(size, k, **given) for size in (4096, n))
    target = target_of(device)
    assert target is not None

    def microseconds(run: Callable[[], Tensor]) -> float:
        try:
            times = interleaved({"it": captured(run)}, 20, 3, cuda_clock)["it"]
        except Exception as error:
            if "OutOfResources" not in type(error).__name__:
                raise
            return float("inf")
        return quantiles(times)["median_us"]

    tiles = [matmul_tile(target, torch.bfloat16), *product_tiles(quick)]
    timed = [
        microseconds(functools.partial(low_rank_linear_matmul, a, b, tile=tile)) for tile in tiles
    ]
    best = min(range(len(tiles)), key=timed.__getitem__)
    return {
        "m_k_n": (4096, k, n),
        "cublas_us": microseconds(lambda: a @ b.T),
        "committed_us": timed[0],
        "best_us": timed[best],
        "best": dataclasses.asdict(tiles[best]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--quick", action="store_true", help="4 warps and 4 stages only")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune_low_rank_linear: needs a CUDA device, found none", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    decode = []
    for shape in SHAPES:
        for rows in arguments.rows:
            bench = Bench(*shape, rows, device)
            decode.append(tune(bench, rows, shape, arguments.quick))
            print(json.dumps(decode[-1]), flush=True)
    products = []
    for k, n in PRODUCTS:
        products.append(tune_product(k, n, device, arguments.quick))
        print(json.dumps(products[-1]), flush=True)
    print(
        json.dumps({"device": torch.cuda.get_device_name(), "decode": decode, "products": products})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
