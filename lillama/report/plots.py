"""The report's plots, as matplotlib figures that show on white and on black: bars, lines and cells
are of a middling lightness."""

import math
from collections.abc import Sequence
from typing import Any

from lillama.report.data import Facts
from lillama.report.spectra import spectra_plot
from lillama.report.svg import AFTER, BEFORE, WIDTH, Plot, colour_of, plot_style

__all__ = ["plots_of"]

MAX_CELL_TEXTS = 12  # columns
MAX_NAMED_CURVES = 14


def _figure(height: float, rows: int = 1) -> tuple[Any, Any]:
    """A figure and its axes, one or a list of them under each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.subplots(rows, 1)


def _index_ticks(axes: Any, labels: Sequence[str]) -> None:
    """Labels below 0, 1, ...; every second or so where they would run into each other."""
    step = max(1, math.ceil(len(labels) / 14))
    axes.set_xticks(range(0, len(labels), step), list(labels)[::step])


def _pair_bars(axes: Any, before: Sequence[float], after: Sequence[float]) -> None:
    places = range(len(before))
    axes.bar([p - 0.2 for p in places], before, 0.4, color=BEFORE, label="before")
    axes.bar([p + 0.2 for p in places], after, 0.4, color=AFTER, label="after")
    axes.grid(True, axis="y")
    axes.set_axisbelow(True)


def _legend_above(axes: Any, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)


def _sizes(facts: Facts) -> Plot:
    figure, axes = _figure(2.6)
    layers = facts.layers
    _pair_bars(
        axes, [x.params_before / 1e6 for x in layers], [x.params_after / 1e6 for x in layers]
    )
    _index_ticks(axes, [layer.short for layer in layers])
    axes.set_xlabel("layer")
    axes.set_ylabel("million parameters")
    _legend_above(axes, 2)
    most = max(layers, key=lambda layer: layer.params_before - layer.params_after)
    return Plot(
        "sizes",
        "Parameters by layer, before and after",
        f"Grouped bars over {len(layers)} layers. The whole model goes from "
        f"{facts.report['params_before']:,} to {facts.report['params_after']:,} parameters; most "
        f"are taken from {most.label}: {most.params_before:,} to {most.params_after:,}.",
        figure,
    )


def _cell(axes: Any, x: int, y: int, colour: Any, text: str) -> None:
    """One cell of a heat map; `colour` None leaves it empty."""
    from matplotlib.patches import Rectangle

    face = "none" if colour is None else colour
    axes.add_patch(
        Rectangle((x + 0.04, y + 0.06), 0.92, 0.88, facecolor=face, edgecolor=BEFORE, linewidth=0.5)
    )
    if text and colour is not None:
        # relative luminance (WCAG 2); above this black has more contrast than white
        weights = (0.2126, 0.7152, 0.0722)
        light = sum(w * c**2.2 for w, c in zip(weights, colour[:3], strict=True)) > 0.18
        ink = "#101010" if light else "#ffffff"
        axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", color=ink, fontsize=8.0)


def _heat_map(columns: Sequence[str], rows: Sequence[str], x_label: str) -> tuple[Any, Any]:
    figure, axes = _figure(min(9.0, 1.1 + 0.24 * len(rows)))
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(rows), 0)
    every = max(1, math.ceil(len(columns) / 32))
    shown = range(0, len(columns), every)
    turned = {"rotation": 90, "fontsize": 7.0} if sum(map(len, columns)) > 45 else {}
    axes.set_xticks([x + 0.5 for x in shown], [columns[x] for x in shown], **turned)
    every = max(1, math.ceil(len(rows) / 32))
    axes.set_yticks([y + 0.5 for y in range(0, len(rows), every)], list(rows)[::every])
    axes.set_xlabel(x_label)
    axes.set_ylabel("block")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure, axes


def _key(axes: Any, entries: Sequence[tuple[float, str]], empty: str | None = None) -> None:
    """Above a heat map, what its colours mean, and `empty` cells."""
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour_of(value), label=label) for value, label in entries]
    if empty is not None:
        handles.append(Patch(facecolor="none", edgecolor=BEFORE, label=empty))
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles),
        columnspacing=1.0, handlelength=1.1, handletextpad=0.4, borderaxespad=0.3,
    )  # fmt: skip


def _ranks(facts: Facts) -> Plot | None:
    inside = [row for row in facts.matrices if row.block is not None]
    if not inside:
        return None
    columns = list(dict.fromkeys(row.label for row in inside))
    blocks = sorted({row.block for row in inside if row.block is not None})
    is_moe = any("." in column for column in columns)
    figure, axes = _heat_map(
        columns, [str(block) for block in blocks], "expert.matrix" if is_moe else "matrix"
    )
    _key(axes, [(0.25, "25%"), (0.5, "50%"), (0.75, "75%"), (1.0, "100%")], "dense")
    dense = 0
    shares: list[tuple[float, str]] = []
    for row in inside:
        assert row.block is not None
        x, y = columns.index(row.label), blocks.index(row.block)
        if row.rank is None:
            dense += 1
            _cell(axes, x, y, None, "")
            continue
        share = row.rank / max(1, row.matrix.break_even_rank)
        shares.append((share, f"{row.label} of block {row.block}"))
        text = str(row.rank) if len(columns) <= MAX_CELL_TEXTS else ""
        _cell(axes, x, y, colour_of(share), text)
    said = f"Heat map of {len(inside)} matrices in {len(blocks)} blocks, {dense} of them dense."
    if shares:
        low, high = min(shares), max(shares)
        said += (
            f" Rank as a share of the break-even rank: lowest {low[0]:.0%} ({low[1]}), highest "
            f"{high[0]:.0%} ({high[1]})."
        )
    return Plot("ranks", "Rank of each matrix, as a share of its break-even rank", said, figure)


def _losses(facts: Facts) -> Plot | None:
    rows = facts.blocks
    if not rows:
        return None
    figure, axes = _figure(2.5)
    before = [row["held_out_loss_before"] for row in rows]
    after = [row["held_out_loss_after"] for row in rows]
    for place, pair in enumerate(zip(before, after, strict=True)):
        axes.plot([place, place], pair, color=BEFORE, linewidth=1.2, zorder=1)
    size = max(10, min(36, 700 / len(rows)))
    ring = {"facecolors": "none", "edgecolors": BEFORE, "linewidths": 1.5}
    axes.scatter(range(len(rows)), before, 2.2 * size, label="as initialised", **ring)
    axes.scatter(range(len(rows)), after, size, color=AFTER, label="as written", zorder=3)
    low, high = min(*before, *after), max(*before, *after)
    if low > 0 and high > 30 * low:
        axes.set_yscale("log")
    axes.grid(True, axis="y")
    _index_ticks(axes, [str(row["index"]) for row in rows])
    axes.set_xlabel("block")
    axes.set_ylabel("held-out loss")
    _legend_above(axes, 2)
    fell = sum(b > a for b, a in zip(before, after, strict=True))
    return Plot(
        "held-out-loss",
        "Held-out loss of each block, as initialised and as written",
        f"Two points a block, {len(rows)} blocks: training lowered the loss of {fell}. As written "
        f"the lowest is {min(after):.6g}, the highest {max(after):.6g}.",
        figure,
    )


def _name_curves(axes: Any, curves: dict[int, list[tuple[int, float]]]) -> None:
    """Each curve's block at its end, moved apart where ends meet."""
    axes.get_ylim()  # settles the scale
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = sorted((to_axes.transform(points[-1])[1], block) for block, points in curves.items())
    places: list[float] = []
    for height, _ in ends:
        places.append(max(height, places[-1] + 0.06) if places else height)
    shift = sum(height - place for (height, _), place in zip(ends, places, strict=True)) / len(ends)
    for (_, block), place in zip(ends, places, strict=True):
        where = {"transform": axes.transAxes, "va": "center", "fontsize": 8.5}
        axes.text(1.01, place + shift, str(block), **where)


def _curves(facts: Facts) -> Plot | None:
    if not facts.curves:
        return None
    figure, axes = _figure(2.9)
    count = len(facts.curves)
    for place, points in enumerate(facts.curves.values()):
        steps, losses = zip(*points, strict=True)
        colour = colour_of(0.1 + 0.7 * place / max(1, count - 1))
        axes.plot(steps, losses, color=colour, marker="o", markersize=2.5, linewidth=1.2)
    values = [loss for points in facts.curves.values() for _, loss in points]
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
    named = count <= MAX_NAMED_CURVES
    if named:
        _name_curves(axes, facts.curves)
    axes.grid(True, axis="y")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("training step" + ("; at the right the block" if named else ""))
    axes.set_ylabel("held-out loss")
    first, last = next(iter(facts.curves)), list(facts.curves)[-1]
    return Plot(
        "loss-curves",
        "Held-out loss while each block trains",
        f"One curve a block, {count} blocks, the last ones lighter. Block {first} goes from "
        f"{facts.curves[first][0][1]:.6g} to {facts.curves[first][-1][1]:.6g}, block {last} from "
        f"{facts.curves[last][0][1]:.6g} to {facts.curves[last][-1][1]:.6g}.",
        figure,
    )


def _experts(facts: Facts) -> Plot | None:
    rows = [row for row in facts.blocks if row.get("expert_tokens")]
    if not rows:
        return None
    experts = max(len(row["expert_tokens"]) for row in rows)
    figure, axes = _heat_map(
        [str(expert) for expert in range(experts)], [str(row["index"]) for row in rows], "expert"
    )
    entries = [(0.0, "none"), (0.5, "an even share"), (1.0, "twice that or more")]
    _key(axes, entries)
    starved = 0
    for y, row in enumerate(rows):
        even = sum(row["expert_tokens"]) / len(row["expert_tokens"])
        for x, tokens in enumerate(row["expert_tokens"]):
            is_starved = x in row.get("starved_experts", [])
            starved += is_starved
            text = f"{tokens:,}" if experts <= MAX_CELL_TEXTS else ""
            value = tokens / (2 * even) if even else 0.0
            _cell(axes, x, y, colour_of(value), f"{text}!" if is_starved else text)
    fewest = min((min(row["expert_tokens"]), row["index"]) for row in rows)
    return Plot(
        "experts",
        "Calibration tokens that reached each expert",
        f"Heat map of {experts} experts in {len(rows)} blocks. {starved} experts are starved "
        f"(marked with an exclamation mark); the fewest tokens are {fewest[0]:,}, in block "
        f"{fewest[1]}.",
        figure,
    )


def _costs(facts: Facts) -> Plot | None:
    rows = facts.blocks
    if not rows:
        return None
    figure, (time, memory) = _figure(3.4, rows=2)
    places = range(len(rows))
    time.bar(places, [row["seconds"] for row in rows], 0.6, color=AFTER)
    time.set_ylabel("seconds")
    memory.bar(places, [row["peak_memory_bytes"] / 2**30 for row in rows], 0.6, color=BEFORE)
    memory.set_ylabel("peak GiB")
    for axes in (time, memory):
        axes.grid(True, axis="y")
        axes.set_axisbelow(True)
        _index_ticks(axes, [str(row["index"]) for row in rows])
    memory.set_xlabel("block")
    slowest = max(rows, key=lambda row: row["seconds"])
    return Plot(
        "time-memory",
        "Time and peak memory of each block",
        f"Two rows of bars over {len(rows)} blocks. The slowest is block {slowest['index']} with "
        f"{slowest['seconds']:,.2f} seconds; the peak is "
        f"{max(row['peak_memory_bytes'] for row in rows) / 2**30:.2f} GiB.",
        figure,
    )


def plots_of(facts: Facts) -> dict[str, Plot]:
    """{key: plot} of what there is to plot."""
    with plot_style():
        draws = (_sizes, _ranks, spectra_plot, _losses, _curves, _experts, _costs)
        made = [draw(facts) for draw in draws]
    return {plot.key: plot for plot in made if plot is not None}
