"""What every rank would have cost and which was chosen: the report's small multiples, a panel a
kind of matrix, a line a block.

The curves are `rank_losses` of report.json, which the search of the ranks measured. Nothing lies
between its points: a median is of losses at one rank, a mark at the losses of the chosen ranks.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from lillama.errors import InputError
from lillama.report.data import Facts, RankedMatrix
from lillama.report.svg import AFTER, BEFORE, INK, WIDTH, Plot, colour_of

__all__ = ["COLUMNS", "NOTE", "Line", "lines_of", "missing", "rows_of", "spectra_plot"]

COLUMNS = (
    *("matrix", "full rank", "chosen rank", "share of full rank", "loss left"),
    *("smallest rank measured", "loss left there", "largest rank measured", "loss left there"),
)
NOTE = (
    "The loss that a matrix leaves out at a rank, in nats a token, by the gradients before "
    "training: of use to compare matrices, too high in absolute terms. Measured up to the largest "
    "rank that saves parameters. Of experts the median, and in the plot the range; their mark is "
    "at the median rank of those that were factorised, a bar through it from the lowest to the "
    "highest. report.json has all points (rank_losses)."
)
MAX_DECADES = 5  # of loss in a plot, below its highest point

Curve = dict[int, float]


@dataclass(frozen=True, slots=True)
class Line:
    """The matrices of one kind in one block: one, or the experts. losses: {rank: loss left of each
    matrix}; chosen: (rank, loss left) of those that were factorised."""

    title: str
    block: int | None
    full: int
    count: int
    losses: dict[int, list[float]]
    chosen: list[tuple[int, float]]

    @property
    def mark(self) -> tuple[float, float] | None:
        """The median of the chosen ranks, and of the losses at them; None where all are dense."""
        if not self.chosen:
            return None
        return median(rank for rank, _ in self.chosen), median(loss for _, loss in self.chosen)


def _curves(facts: Facts) -> dict[str, Curve]:
    """{matrix: {rank: loss left}}; empty where report.json has none.

    Raises:
        InputError: an entry is damaged, or of a matrix that the run did not have.
    """
    found = facts.report.get("rank_losses", {})
    file = facts.out / "report.json"
    if not isinstance(found, dict):
        raise InputError(f"{file}: rank_losses must be an object, got {type(found).__name__}")
    known = {row.matrix.name for row in facts.matrices}
    curves = {}
    for name, losses in found.items():
        if name not in known:
            raise InputError(f"{file}: rank_losses has {name}, no target of recipe.json's run")
        if not isinstance(losses, dict) or not all(
            re.fullmatch("[1-9][0-9]{0,8}", rank)
            and type(loss) in (int, float)
            and math.isfinite(loss)
            for rank, loss in losses.items()
        ):
            raise InputError(f"{file}: rank_losses.{name} must be {{rank: finite number}}")
        if losses:
            curves[name] = {int(rank): loss for rank, loss in losses.items()}
    return curves


def missing(facts: Facts) -> str:
    """The sentence that stands for the section where there are no curves, a blank before it."""
    if lines_of(facts):
        return ""
    if facts.report.get("predicted_loss_increase") is None:
        return " Loss left by rank is not shown: this run measured none."
    return " Loss left by rank is not shown: report.json is of a version that did not keep it."


def _kind(row: RankedMatrix) -> tuple[str, ...]:
    """Its name without the numbers of block and expert."""
    return tuple(part for part in row.matrix.name.split(".") if not part.isdecimal())


def _titles(kinds: Mapping[tuple[str, ...], bool]) -> dict[tuple[str, ...], str]:
    """The shortest endings that differ, of experts at least experts.<matrix>. kinds: {kind: are
    they experts}."""
    titles = {}
    for kind, is_expert in kinds.items():
        size = 2 if is_expert else 1
        while size < len(kind) and any(k[-size:] == kind[-size:] for k in kinds if k != kind):
            size += 1
        titles[kind] = ".".join(kind[-size:])
    return titles


def lines_of(facts: Facts) -> dict[str, list[Line]]:
    """{title of a panel: its lines}, in the order of the matrices."""
    curves = _curves(facts)
    groups: dict[tuple[str, ...], dict[int | None, list[RankedMatrix]]] = {}
    experts: dict[tuple[str, ...], bool] = {}
    for row in facts.matrices:
        if row.matrix.name in curves:
            groups.setdefault(_kind(row), {}).setdefault(row.block, []).append(row)
            experts[_kind(row)] = "." in row.label
    titles = _titles(experts)
    panels: dict[str, list[Line]] = {}
    for kind, blocks in groups.items():
        for block, rows in blocks.items():
            of_rows = [curves[row.matrix.name] for row in rows]
            # each has its own chosen rank besides those that all have
            shared = sorted(set.intersection(*(set(curve) for curve in of_rows)))
            line = Line(
                titles[kind],
                block,
                min(rows[0].matrix.N, rows[0].matrix.K),
                len(rows),
                {rank: [curve[rank] for curve in of_rows] for rank in shared},
                [
                    (row.rank, curve[row.rank])
                    for row, curve in zip(rows, of_rows, strict=True)
                    if row.rank is not None and row.rank in curve
                ],
            )
            if line.losses:
                panels.setdefault(line.title, []).append(line)
    return panels


def _place(line: Line) -> str:
    return line.title if line.block is None else f"block {line.block}: {line.title}"


def rows_of(facts: Facts) -> list[tuple[str, ...]]:
    """Of `COLUMNS`, one a line of the plot."""
    rows = []
    for line in (line for lines in lines_of(facts).values() for line in lines):
        name = _place(line) + (f", {line.count} matrices" if line.count > 1 else "")
        low, high = min(line.losses), max(line.losses)
        cells = ["dense", "-", "-"]
        if line.mark is not None:
            rank, loss = line.mark
            ranks = [rank for rank, _ in line.chosen]
            text = f"{rank:g}"
            if min(ranks) < max(ranks):
                text += f" ({min(ranks)} to {max(ranks)})"
            if len(ranks) < line.count:
                text += f", {line.count - len(ranks)} dense"
            cells = [text, f"{rank / line.full:.1%}", f"{loss:.4g}"]
        ends = [f"{low}", f"{median(line.losses[low]):.4g}"]
        ends += [f"{high}", f"{median(line.losses[high]):.4g}"]
        rows.append((name, f"{line.full}", *cells, *ends))
    return rows


def _draw(axes: Any, line: Line, colour: Any) -> None:
    places = [rank / line.full for rank in line.losses]

    def shown(values: list[float]) -> list[float]:
        """A logarithm has no place for what is not positive."""
        return [value if value > 0 else math.nan for value in values]

    if line.count > 1:
        low, high = ([f(v) for v in line.losses.values()] for f in (min, max))
        axes.fill_between(places, shown(low), shown(high), color=colour, alpha=0.2, linewidth=0)
    middle = shown([median(values) for values in line.losses.values()])
    axes.plot(places, middle, color=colour, linewidth=1.1)
    if line.mark is not None:
        rank, loss = line.mark
        ends = [f(rank for rank, _ in line.chosen) / line.full for f in (min, max)]
        axes.plot(ends, [loss, loss], color=INK, linewidth=0.8, zorder=3)
        ring = {"facecolors": [colour], "edgecolors": INK, "linewidths": 0.9}
        axes.scatter([rank / line.full], [loss], 18, zorder=4, **ring)


def _key(figure: Any, panels: Mapping[str, list[Line]], colours: Mapping[int, Any]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    ends = list(colours)
    ends = ends[:1] if len(ends) < 2 else [ends[0], ends[-1]]
    handles: list[Any] = [Line2D([], [], color=colours[b], label=f"block {b}") for b in ends]
    style = {"marker": "o", "markersize": 4.5, "markeredgecolor": INK}
    handles.append(Line2D([], [], linestyle="", color=BEFORE, label="chosen rank", **style))
    if any(line.count > 1 for lines in panels.values() for line in lines):
        handles.append(Patch(facecolor=BEFORE, alpha=0.4, label="range of experts"))
    figure.legend(
        handles=handles, loc="outside upper left", ncols=len(handles), columnspacing=1.0,
        handlelength=1.2, handletextpad=0.4,
    )  # fmt: skip


def _scale(grid: Any, lines: list[Line]) -> None:
    """One of all panels: loss by its logarithm where there is any."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

    first = grid[0][0]
    first.set_xlim(0, 1.05 * max(max(line.losses) / line.full for line in lines))
    values = [median(found) for line in lines for found in line.losses.values()]
    values = [value for value in values if value > 0]
    if values:
        low = [line.mark[1] for line in lines if line.mark is not None and line.mark[1] > 0]
        floor = min([max(values) / 10**MAX_DECADES, *(value / 2 for value in low)])
        first.set_yscale("log")
        first.set_ylim(max(min(values) / 1.5, floor), 2 * max(values))
        first.yaxis.set_major_locator(LogLocator(numticks=5))
        first.yaxis.set_minor_locator(NullLocator())
        first.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    first.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _description(panels: Mapping[str, list[Line]]) -> str:
    lines = [line for found in panels.values() for line in found]
    said = (
        f"{len(panels)} panels ({', '.join(panels)}), {len(lines)} falling lines: the loss left "
        "by rank as a share of full rank."
    )
    marks = [(line.mark, line) for line in lines if line.mark is not None]
    if marks:
        shares = sorted(((mark[0] / line.full, _place(line)) for mark, line in marks))
        most = max(((mark[1], _place(line)) for mark, line in marks))
        said += (
            f" Chosen ranks lie between {shares[0][0]:.0%} ({shares[0][1]}) and {shares[-1][0]:.0%}"
            f" ({shares[-1][1]}); most loss is left by {most[1]}: {most[0]:.4g} nats a token."
        )
    return said


def spectra_plot(facts: Facts) -> Plot | None:
    from matplotlib.figure import Figure

    panels = lines_of(facts)
    if not panels:
        return None
    lines = [line for found in panels.values() for line in found]
    columns = min(3, len(panels))
    count = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(WIDTH, 0.9 + 1.4 * count))
    grid = figure.subplots(count, columns, sharex=True, sharey=True, squeeze=False)
    blocks = sorted({line.block for line in lines if line.block is not None})
    colours = {
        block: colour_of(0.1 + 0.7 * place / max(1, len(blocks) - 1))
        for place, block in enumerate(blocks)
    }
    for axes, (title, found) in zip(grid.flat, panels.items(), strict=False):
        axes.set_title(title, fontsize=9.0)
        for line in found:
            _draw(axes, line, AFTER if line.block is None else colours[line.block])
        axes.grid(True)
        axes.set_axisbelow(True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    # the last panel of every column has the ticks of the axis they share
    for axes in grid.flat[max(0, len(panels) - columns) : len(panels)]:
        axes.tick_params(labelbottom=True)
    _scale(grid, lines)
    _key(figure, panels, colours)
    figure.supxlabel("rank, share of full rank", fontsize=10.0)
    figure.supylabel("loss left, nats a token", fontsize=10.0)
    return Plot(
        "spectra",
        "Loss left by rank, with the chosen rank of each matrix",
        _description(panels),
        figure,
    )
