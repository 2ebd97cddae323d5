"""Draw the roofline of one GPU: a point for every row and variant, and the measured ceilings."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Suite
from benchmarks.rows import headline_mode

__all__ = ["draw", "points"]

# Colours that differ for every kind of colour vision (Okabe and Ito), and shapes that differ
# without colour
STYLES = {
    "ours": ("#0072B2", "o"),
    "ours_triton": ("#56B4E9", "d"),
    "ours_autograd": ("#56B4E9", "p"),
    "ours_separate": ("#56B4E9", "h"),
    "cublas": ("#E69F00", "s"),
    "cublas_shared": ("#F0E442", "s"),
    "eager": ("#E69F00", "X"),
    "compiled": ("#009E73", "^"),
    "compiled_and_grad": ("#009E73", "v"),
    "dense": ("#CC79A7", "D"),
}


def points(suites: Sequence[Suite]) -> Iterator[tuple[str, float, float]]:
    """Variant, FLOP per byte and TFLOP/s of everything that both computes and moves."""
    for suite in suites:
        for row in suite.rows.values():
            for variant, found in row["modes"][headline_mode(row)].items():
                intensity = row["intensities"].get(variant, 0.0)
                if intensity > 0 and found["tflop_per_s"] > 0:
                    yield variant, intensity, found["tflop_per_s"]


def _draw_ceilings(axes: Any, suite: Suite, low: float, high: float) -> None:
    row = next(iter(suite.rows.values()))
    limits, dtype = row["ceilings"], row["dtype"]
    bandwidth, peak = limits["copy_gb_per_s"] / 1e3, limits[f"{dtype}_tflop_per_s"]
    ridge = peak / bandwidth
    axes.plot([low, ridge], [low * bandwidth, peak], color="black", linewidth=1.2)
    axes.plot([ridge, high], [peak, peak], color="black", linewidth=1.2)
    middle = (low * ridge) ** 0.5
    axes.annotate(
        f"copy, {bandwidth:.2f} TB/s",
        (middle, middle * bandwidth),
        xytext=(-6, 6),
        textcoords="offset points",
        rotation=45,
        rotation_mode="anchor",
        transform_rotates_text=True,
        ha="center",
    )
    axes.annotate(
        f"{dtype} product, {peak:.0f} TFLOP/s",
        (high, peak),
        xytext=(-4, 5),
        textcoords="offset points",
        ha="right",
    )


def draw(suites: Sequence[Suite], path: Path) -> bool:
    """Write the plot of one GPU's suites as a PNG; False where no row has a place in it."""
    found = list(points(suites))
    if not found:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 7), layout="constrained")
    axes.set(xscale="log", yscale="log")
    intensities = [intensity for _, intensity, _ in found]
    low, high = min(intensities) / 2, max(*intensities, 1e3) * 2
    _draw_ceilings(axes, suites[0], low, high)
    order = [*STYLES, *sorted({variant for variant, _, _ in found} - STYLES.keys())]
    for variant in reversed(order):  # ours on top
        of_variant = [(x, y) for name, x, y in found if name == variant]
        if of_variant:
            colour, marker = STYLES.get(variant, ("#999999", "P"))
            # all variants of a row lie above each other: rivals are outlines, ours is filled
            face, size = (colour, 22) if variant == "ours" else ("none", 60)
            axes.scatter(*zip(*of_variant, strict=True), s=size, facecolors=face, marker=marker,
                         edgecolors=colour, linewidths=1.3, label=variant)  # fmt: skip
    axes.set_xlabel("FLOP per byte that must move", fontsize=12)
    axes.set_ylabel("TFLOP/s", fontsize=12)
    axes.set_title(f"{suites[0].where}: medians, CUDA graphs", fontsize=12)
    axes.grid(True, which="major", linewidth=0.4)
    axes.legend(fontsize=11, reverse=True, loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
