"""Shapes of bench_pivot_low_rank_linear: Mamba-2.8B's projections, and a tiny one for a CPU."""

import dataclasses

from benchmarks.shapes import LAYERS, LINEARS, LinearShape

__all__ = ["PIVOTS"]


def _pivot(layer: str, kept: float, rows: int) -> LinearShape:
    """The largest rank, of a multiple of 8, that keeps at most this share of the layer's numbers in
    the pivot gauge."""
    k, n, _ = LAYERS[layer]
    rank = max(r for r in range(8, min(k, n), 8) if r * (k + n - r) <= kept * k * n)
    return LinearShape(
        name=f"{layer}-R{rank}-M{rows}",
        rows=rows,
        in_features=k,
        out_features=n,
        rank=rank,
        compiled=kept == 0.8 and rows != 64,
    )


PIVOTS = [
    *(dataclasses.replace(shape, rank=64) for shape in LINEARS if not shape.needs_gpu),
    *(
        _pivot(f"mamba-2.8b-{layer}", kept, rows)
        for kept, some in ((0.8, (1, 4, 16, 64, 4096)), (0.6, (1, 16, 4096)))
        for layer in ("in_proj", "out_proj")
        for rows in some
    ),
]
