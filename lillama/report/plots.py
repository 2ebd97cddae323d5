"""The report's plots, as matplotlib figures that show on white and on black: bars, lines and cells
are of a middling lightness."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from lillama.report.data import Facts, RankedMatrix
from lillama.report.svg import INK, Plot, plot_style

__all__ = ["Line", "lines_of", "plots_of"]

WIDTH = 5.4  # inches; 389 units of SVG, near a phone's width, so that letters keep their size there
BEFORE, AFTER = "#8b8f98", "#3f83f0"
MAX_CELL_TEXTS = 12  # columns
MAX_NAMED_CURVES = 14
MAX_DECADES = 5  # of loss in a plot, below its highest point


def _figure(height: float, rows: int = 1, columns: int = 1, **more: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.subplots(rows, columns, **more)


def _colour(value: float) -> Any:
    """Return 0 to 1 as a colour (RGBA)."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.15 + 0.8 * min(1.0, value))


def _shades(blocks: Iterable[int]) -> dict[int, Any]:
    """Return {block: its colour}, the last ones lighter."""
    places = {block: place for place, block in enumerate(sorted(blocks))}
    most = max(1, len(places) - 1)
    return {block: _colour(0.1 + 0.7 * place / most) for block, place in places.items()}


def _some(labels: Sequence[object], most: int, shift: float = 0) -> tuple[list[float], list[str]]:
    """Return places and labels of ticks: every second or so where they would meet each other."""
    step = max(1, math.ceil(len(labels) / most))
    return [x + shift for x in range(0, len(labels), step)], [str(x) for x in labels[::step]]


def _by_layer(axes: Any, labels: Sequence[object], y_label: str, x_label: str = "block") -> None:
    axes.grid(True, axis="y")
    axes.set_xticks(*_some(labels, 14))
    axes.set(xlabel=x_label, ylabel=y_label)


def _legend_above(axes: Any, **more: Any) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.25, **more)


def _log_if_wide(axes: Any, values: Sequence[float], times: float) -> None:
    if min(values) > 0 and max(values) > times * min(values):
        axes.set_yscale("log")


def _sizes(facts: Facts) -> Any:
    figure, axes = _figure(2.6)
    for name, shift, colour in (("before", -0.2, BEFORE), ("after", 0.2, AFTER)):
        millions = [getattr(layer, f"params_{name}") / 1e6 for layer in facts.layers]
        places = [place + shift for place in range(len(millions))]
        axes.bar(places, millions, 0.4, color=colour, label=name)
    _by_layer(axes, [layer.short for layer in facts.layers], "million parameters", "layer")
    _legend_above(axes, ncols=2)
    return figure


def _heat_map(
    columns: Sequence[str],
    rows: Sequence[object],
    x_label: str,
    cells: Iterable[tuple[int, int, float | None, str]],
    key: Sequence[tuple[float | None, str]],
) -> Any:
    """cells: (x, y, value from 0 to 1, text), empty where the value is None. key: what values
    mean."""
    from matplotlib.patches import Patch, Rectangle

    figure, axes = _figure(min(9.0, 1.1 + 0.24 * len(rows)))
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0), xlabel=x_label, ylabel="block")
    turned = {"rotation": 90, "fontsize": 7.0} if sum(map(len, columns)) > 45 else {}
    axes.set_xticks(*_some(columns, 32, 0.5), **turned)
    axes.set_yticks(*_some(rows, 32, 0.5))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    edge = {"edgecolor": BEFORE, "linewidth": 0.5}
    for x, y, value, text in cells:
        face = "none" if value is None else _colour(value)
        axes.add_patch(Rectangle((x + 0.04, y + 0.06), 0.92, 0.88, facecolor=face, **edge))
        if value is not None and len(columns) <= MAX_CELL_TEXTS:
            # relative luminance (WCAG 2); above this black has more contrast than white
            parts = zip((0.2126, 0.7152, 0.0722), _colour(value), strict=False)
            ink = "#101010" if sum(w * c**2.2 for w, c in parts) > 0.18 else "#ffffff"
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", color=ink, fontsize=8.0)
    handles = [
        Patch(facecolor="none", edgecolor=BEFORE, label=label)
        if value is None
        else Patch(facecolor=_colour(value), label=label)
        for value, label in key
    ]
    tight = {"columnspacing": 1.0, "handlelength": 1.1, "handletextpad": 0.4}
    _legend_above(axes, handles=handles, ncols=len(handles), **tight)
    return figure


def _ranks(facts: Facts) -> Any:
    inside = [row for row in facts.matrices if row.block is not None]
    columns = list(dict.fromkeys(row.label for row in inside))
    blocks = list(dict.fromkeys(row.block for row in inside))
    cells = [
        (
            *(columns.index(row.label), blocks.index(row.block)),
            None if row.rank is None else row.rank / max(1, row.matrix.break_even_rank),
            str(row.rank),
        )
        for row in inside
    ]
    key = [(0.25, "25%"), (0.5, "50%"), (0.75, "75%"), (1.0, "100%"), (None, "dense")]
    is_moe = any("." in column for column in columns)
    x_label = "expert.matrix" if is_moe else "matrix"
    return _heat_map(columns, blocks, x_label, cells, key) if inside else None


def _experts(facts: Facts) -> Any:
    rows = [row for row in facts.blocks if row.get("expert_tokens")]
    cells = []
    for y, row in enumerate(rows):
        twice_even = 2 * sum(row["expert_tokens"]) / len(row["expert_tokens"])
        for x, tokens in enumerate(row["expert_tokens"]):
            mark = "!" if x in (row.get("starved_experts") or ()) else ""
            cells.append((x, y, tokens / (twice_even or 1), f"{tokens:,}{mark}"))
    experts = [str(x) for x in range(max((x for x, *_ in cells), default=-1) + 1)]
    key = [(0.0, "none"), (0.5, "an even share"), (1.0, "twice that or more")]
    blocks = [row["index"] for row in rows]
    return _heat_map(experts, blocks, "expert", cells, key) if rows else None


def _losses(facts: Facts) -> Any:
    if not facts.blocks:
        return None
    figure, axes = _figure(2.5)
    before, after = (
        [row[f"held_out_loss_{x}"] for row in facts.blocks] for x in ("before", "after")
    )
    places, size = range(len(before)), max(10, min(36, 700 / len(before)))
    axes.vlines(places, before, after, color=BEFORE, linewidth=1.2, zorder=1)
    ring = {"facecolors": "none", "edgecolors": BEFORE, "linewidths": 1.5}
    axes.scatter(places, before, 2.2 * size, label="as initialised", **ring)
    axes.scatter(places, after, size, color=AFTER, label="as written", zorder=3)
    _log_if_wide(axes, [*before, *after], 30)
    _by_layer(axes, [row["index"] for row in facts.blocks], "held-out loss")
    _legend_above(axes, ncols=2)
    return figure


def _curves(facts: Facts) -> Any:
    if not facts.curves:
        return None
    figure, axes = _figure(2.9)
    colours = _shades(facts.curves)
    for block, points in facts.curves.items():
        style = {"color": colours[block], "marker": "o", "markersize": 2.5, "linewidth": 1.2}
        axes.plot(*zip(*points, strict=True), **style, label=str(block))
    _log_if_wide(axes, [loss for points in facts.curves.values() for _, loss in points], 10)
    if len(facts.curves) <= MAX_NAMED_CURVES:
        axes.legend(title="block", loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(True, axis="y")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="training step", ylabel="held-out loss")
    return figure


def _costs(facts: Facts) -> Any:
    if not facts.blocks:
        return None
    figure, (time, memory) = _figure(3.4, rows=2)
    labels = [row["index"] for row in facts.blocks]
    time.bar(range(len(labels)), [row["seconds"] for row in facts.blocks], 0.6, color=AFTER)
    peaks_gib = [row["peak_memory_bytes"] / 2**30 for row in facts.blocks]
    memory.bar(range(len(labels)), peaks_gib, 0.6, color=BEFORE)
    _by_layer(time, labels, "seconds", "")
    _by_layer(memory, labels, "peak GiB")
    return figure


# What every rank would have cost and which was chosen
class Line(NamedTuple):
    """The matrices of one kind in one block: one, or the experts. losses: {rank: loss left of each
    matrix}, as the search of the ranks measured it, at ranks that all have; chosen: (rank, loss
    left) of those that were factorised. Nothing lies between these points."""

    title: str
    block: int | None
    full: int
    size: int
    losses: dict[int, list[float]]
    chosen: list[tuple[int, float]]

    @property
    def mark(self) -> tuple[float, float] | None:
        """The median of the chosen ranks, and of the losses at them; None where all are dense."""
        if not self.chosen:
            return None
        return median(rank for rank, _ in self.chosen), median(loss for _, loss in self.chosen)


def lines_of(facts: Facts) -> dict[str, list[Line]]:
    """Return {title of a panel: its lines}, in the order of the matrices."""
    groups: dict[tuple[str, int | None], list[RankedMatrix]] = {}
    for row in facts.matrices:
        if row.losses:
            _, is_expert, kind = row.label.partition(".")
            title = f"experts.{kind}" if is_expert else row.label
            groups.setdefault((title, row.block), []).append(row)
    panels: dict[str, list[Line]] = {}
    for (title, block), rows in groups.items():
        # each has its own chosen rank besides those that all have
        shared = sorted(set.intersection(*(set(row.losses) for row in rows)))
        losses = {rank: [row.losses[rank] for row in rows] for rank in shared}
        chosen = [(x, row.losses[x]) for row in rows if (x := row.rank or 0) in row.losses]
        full = min(rows[0].matrix.N, rows[0].matrix.K)
        if losses:
            line = Line(title, block, full, len(rows), losses, chosen)
            panels.setdefault(title, []).append(line)
    return panels


def _draw(axes: Any, line: Line, colour: Any) -> None:
    # a logarithm has no place for what is not positive
    low, middle, high = (
        [value if (value := f(found)) > 0 else math.nan for found in line.losses.values()]
        for f in (min, median, max)
    )
    places = [rank / line.full for rank in line.losses]
    if line.size > 1:
        axes.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(places, middle, color=colour, linewidth=1.1)
    if line.mark is not None:
        rank, loss = line.mark
        ends = [f(line.chosen)[0] / line.full for f in (min, max)]
        axes.plot(ends, [loss, loss], color=INK, linewidth=0.8, zorder=3)
        ring = {"facecolors": [colour], "edgecolors": INK, "linewidths": 0.9}
        axes.scatter([rank / line.full], [loss], 18, zorder=4, **ring)


def _spectra_key(figure: Any, lines: Sequence[Line], colours: Mapping[int, Any]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    ends = sorted({*list(colours)[:1], *list(colours)[-1:]})
    handles: list[Any] = [Line2D([], [], color=colours[x], label=f"block {x}") for x in ends]
    style = {"marker": "o", "markersize": 4.5, "markeredgecolor": INK}
    handles.append(Line2D([], [], linestyle="", color=BEFORE, label="chosen rank", **style))
    if any(line.size > 1 for line in lines):
        handles.append(Patch(facecolor=BEFORE, alpha=0.4, label="range of experts"))
    tight = {"columnspacing": 1.0, "handlelength": 1.2, "handletextpad": 0.4}
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), **tight)


def _scale(axes: Any, lines: Sequence[Line]) -> None:
    """One of all panels: loss by its logarithm where there is any."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

    axes.set_xlim(0, 1.05 * max(max(line.losses) / line.full for line in lines))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    values = [x for line in lines for found in line.losses.values() if (x := median(found)) > 0]
    if values:
        marks = [line.mark[1] / 2 for line in lines if line.mark is not None and line.mark[1] > 0]
        floor = min([max(values) / 10**MAX_DECADES, *marks])
        axes.set(yscale="log", ylim=(max(min(values) / 1.5, floor), 2 * max(values)))
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _spectra(facts: Facts) -> Any:
    """Small multiples: a panel a kind of matrix, a line a block."""
    panels = lines_of(facts)
    if not panels:
        return None
    lines = [line for found in panels.values() for line in found]
    columns = min(3, len(panels))
    count = math.ceil(len(panels) / columns)
    shared = {"sharex": True, "sharey": True, "squeeze": False}
    figure, grid = _figure(0.9 + 1.4 * count, count, columns, **shared)
    colours = _shades({line.block for line in lines if line.block is not None})
    for axes, (title, found) in zip(grid.flat, panels.items(), strict=False):
        axes.set_title(title, fontsize=9.0)
        axes.grid(True)
        for line in found:
            _draw(axes, line, AFTER if line.block is None else colours[line.block])
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    # the last panel of every column has the ticks of the axis they share
    for axes in grid.flat[max(0, len(panels) - columns) : len(panels)]:
        axes.tick_params(labelbottom=True)
    _scale(grid[0][0], lines)
    _spectra_key(figure, lines, colours)
    figure.supxlabel("rank, share of full rank", fontsize=10.0)
    figure.supylabel("loss left, nats a token", fontsize=10.0)
    return figure


PLOTS = {
    "sizes": ("Parameters by layer, before and after", _sizes),
    "ranks": ("Rank of each matrix, as a share of its break-even rank", _ranks),
    "spectra": ("Loss left by rank, with the chosen rank of each matrix", _spectra),
    "held-out-loss": ("Held-out loss of each block, as initialised and as written", _losses),
    "loss-curves": ("Held-out loss while each block trains", _curves),
    "experts": ("Calibration tokens that reached each expert", _experts),
    "time-memory": ("Time and peak memory of each block", _costs),
}


def plots_of(facts: Facts) -> list[Plot]:
    """Return the plots of what there is to plot."""
    with plot_style():
        made = [Plot(key, title, draw(facts)) for key, (title, draw) in PLOTS.items()]
    return [plot for plot in made if plot.figure is not None]
