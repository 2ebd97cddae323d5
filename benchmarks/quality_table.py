"""From the cells of bench_quality to its tables and its picture."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["COLUMNS", "draw", "read_cells", "rows", "table"]

COLUMNS = [
    *("teacher", "removed", "method", "excess by text", "retained", "bits per byte by text"),
    *("KL", "parameters", "bytes", "seconds", "seeds"),
]
# Lines of the picture, one a method: colours that differ for every kind of colour vision (Okabe and
# Ito), and shapes that differ without colour
STYLES = {
    "svd": ("#999999", "v"),
    "whitened svd": ("#CC79A7", "^"),
    "paper, rate 1e-3": ("#E69F00", "s"),
    "fast": ("#56B4E9", "D"),
    "default": ("#0072B2", "o"),
    "best": ("#009E73", "P"),
}
# points: nothing is removed, only rounded
ROUNDED = {"dense, int8": "8", "dense, int4": "4"}


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def read_cells(file: Path) -> list[dict[str, Any]]:
    return (
        [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    )


def _mean_excess(cells: Sequence[Mapping[str, Any]]) -> float:
    values = [text["excess"] for cell in cells for text in cell["texts"].values()]
    return sum(values) / len(values)


def _by_row(
    cells: Sequence[dict[str, Any]], order: Sequence[str]
) -> list[tuple[tuple[str, float, str], list[dict[str, Any]]]]:
    """The cells of each teacher, reduction and method: its seeds."""
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["teacher"], cell["reduction"], cell["method"]), []).append(cell)
    return sorted(groups.items(), key=lambda item: (*item[0][:2], order.index(item[0][2])))


def rows(cells: Sequence[dict[str, Any]], order: Sequence[str]) -> list[dict[str, str]]:
    """Means over the seeds; retained is exp(-mean excess over the texts)."""
    found = []
    for (teacher, reduction, method), of_row in _by_row(cells, order):

        def mean(key: str, text: str, of_row: list = of_row) -> float:
            return sum(cell["texts"][text][key] for cell in of_row) / len(of_row)

        texts = list(of_row[0]["texts"])
        seconds = sum(cell["seconds"] for cell in of_row) / len(of_row)
        values = [
            *(teacher, f"{reduction:.0%}", method),
            " / ".join(f"{mean('excess', text):+.4f}" for text in texts),
            f"{math.exp(-_mean_excess(of_row)):.4f}",
            " / ".join(f"{mean('bits_per_byte', text):.4f}" for text in texts),
            f"{sum(mean('kl', text) for text in texts) / len(texts):.4f}",
            *(f"{of_row[0][key]:,}" for key in ("params_after", "bytes_after")),
            *(f"{seconds:.0f}" if seconds else "-", str(len(of_row))),
        ]
        found.append(dict(zip(COLUMNS, values, strict=True)))
    return found


def draw(cells: Sequence[dict[str, Any]], file: Path) -> None:
    """Quality against bytes, a panel a teacher, a line a method of STYLES."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    teachers = sorted({cell["teacher"] for cell in cells})
    figure, panels = pyplot.subplots(
        1, len(teachers), figsize=(6 * len(teachers), 5), squeeze=False, layout="constrained"
    )
    order = list(dict.fromkeys(cell["method"] for cell in cells))
    for axes, teacher in zip(panels[0], teachers, strict=True):
        found = _by_row([cell for cell in cells if cell["teacher"] == teacher], order)
        # (MB, share of the perplexity kept) of every row
        points = {
            (method, reduction): (of_row[0]["bytes_after"] / 1e6, math.exp(-_mean_excess(of_row)))
            for (_, reduction, method), of_row in found
        }
        for method, (colour, marker) in STYLES.items():
            line = sorted(point for (name, _), point in points.items() if name == method)
            if line:
                axes.plot(*zip(*line, strict=True), color=colour, marker=marker, label=method)
        for method, bits in ROUNDED.items():
            if (method, 0.0) in points:
                axes.plot(
                    *points[method, 0.0], color="black", marker=f"${bits}$", markersize=9,
                    linestyle="none", label=method,
                )  # fmt: skip
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(title=teacher, xlabel="MB stored", ylabel="retained: exp(-excess), 1 = all")
        axes.grid(True, linewidth=0.4)
    named: dict[str, Any] = {}
    for axes in panels[0]:
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=len(named))
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
