"""The sections of the page: a heading, plots, and their figures as tables, all escaped."""

import html
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from lillama.report.data import Facts
from lillama.report.plots import lines_of

__all__ = ["command_of", "escape", "format_number", "sections_of"]

# a longer table is folded up
OPEN_ROWS = 12
SPECTRA_NOTE = (
    "The loss that a matrix leaves out at a rank, in nats a token, by the gradients before "
    "training: of use to compare matrices, too high in absolute terms. Measured up to the largest "
    "rank that saves parameters. Of experts the median, and in the plot the range; their mark is "
    "at the median rank of those that were factorised, a bar through it from the lowest to the "
    "highest. report.json has all points (rank_losses)."
)
LOSS_NOTE = (
    "Each block is judged by itself on held-out calibration tokens: how far its output is from the "
    "original block's (--loss {loss}). The step with the lowest loss is what was written."
)
EXPERTS_NOTE = (
    "A starved expert saw fewer calibration tokens than the model is wide; what is missing of its "
    "statistics comes from a sample of the layer's tokens. More --tokens helps."
)
COST_NOTE = (
    "The peak is the process's up to the end of the block, on a GPU that of its memory. A run that "
    "was interrupted and went on counts the time since then."
)
NO_QUALITY = (
    "<p>Not given. <code>lillama eval OUT --text FILE --against MODEL --json &gt; eval.json</code> "
    "measures it, <code>--eval eval.json</code> then shows it here.</p>"
)
# what these figures are called, and what the base's would be
COMPARED = {
    "retained": ("retained (base perplexity / perplexity)", 1),
    "kl": ("mean KL divergence from the base, nats a token", 0),
    "top1_agreement": ("share of tokens with the same first choice", 1),
}
# what is trained on the base's predictions after the blocks
TRAINED = {
    "head": ("The output head", "held_out_kl_before", "held_out_kl_after"),
    "finetune": ("The whole model", "kl_before", "kl_after"),
}
# its id, its heading, its HTML; and {key of a plot: its HTML}
Section = tuple[str, str, str]
Figures = Mapping[str, str]


def escape(value: object) -> str:
    return html.escape(str(value))


def format_number(value: object) -> str:
    """Return counts whole, measurements with six digits, other things as they are."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def command_of(facts: Facts) -> str:
    """Return the line that makes OUT again: every option that recipe.json recorded."""
    options = facts.recipe["options"]
    given = [(name, options.get(name)) for name in ("revision", "reduction")]
    given += [("text", file) for file in options["text"]]
    names = ("tokens", "seq_len", "preset", "strategy", "gauge", "loss", "seed", "dtype")
    given += [(name.replace("_", "-"), options.get(name)) for name in names]
    if options.get("targets") is not None:
        given.append(("targets", ",".join(map(str, options["targets"]))))
    given.append(("device", facts.recipe.get("device")))
    words = ["lillama", "compress", str(options.get("model")), str(facts.out)]
    words += [w for name, x in given if x is not None for w in (f"--{name}", str(x))]
    words += [f"--{'' if options.get(name) else 'no-'}{name}" for name in ("packing", "train")]
    return shlex.join(words)


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>" if text else ""


def _table(
    caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "numbers"
) -> str:
    """rows: cells in order, the first names the row. kind: "numbers", or "text", never folded."""
    lines = [
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f'<td class="{kind}">{escape(format_number(value))}</td>' for value in rest)
        + "</tr>"
        for first, *rest in rows
    ]
    if not lines:
        return ""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    table = (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>"
        + "\n".join(lines)
        + "</tbody></table></div>"
    )
    if kind == "text" or len(lines) <= OPEN_ROWS:
        return table
    return f"<details><summary>Figures as a table, {len(lines)} rows</summary>{table}</details>"


def _section(key: str, title: str, *parts: str | None) -> Section:
    body = "\n".join(part for part in parts if part)
    opening = f'<section id="{key}" aria-labelledby="{key}-h"><h2 id="{key}-h">{escape(title)}</h2>'
    return key, title, f"{opening}\n{body}\n</section>"


def _size(facts: Facts, figures: Figures) -> Section:
    total = (facts.report["params_before"], facts.report["params_after"])
    rows = [(layer.label, *layer[2:]) for layer in facts.layers] + [("whole model", *total)]
    table = _table("Parameters by layer", ("layer", "before", "after"), rows)
    return _section("size", "Size by layer", figures.get("sizes"), table)


def _ranks(facts: Facts, figures: Figures) -> Section:
    note = (
        f"The break-even rank is the largest that saves parameters (gauge {facts.gauge}); a matrix "
        "that needs more stays dense."
    )
    if outside := [row.label for row in facts.matrices if row.block is None]:
        note += f" Outside the blocks, in the table only: {', '.join(outside)}."
    if "spectra" not in figures:
        note += " Loss left by rank is not shown: this run measured none."
    rows = [
        (
            f"{'outside' if row.block is None else f'block {row.block}'}: {row.label}",
            *(f"{row.matrix.N} x {row.matrix.K}", "dense" if row.rank is None else row.rank),
            *(row.matrix.break_even_rank, row.params_after + row.saved, row.params_after),
        )
        for row in facts.matrices
    ]
    columns = ("matrix", "shape", "rank", "break-even rank", "parameters before")
    table = _table("Rank of each target matrix", (*columns, "parameters after"), rows)
    return _section("ranks", "Ranks", figures.get("ranks"), _paragraph(note), table)


def _spectra(facts: Facts, figures: Figures) -> Section | None:
    rows = []
    for line in (line for lines in lines_of(facts).values() for line in lines):
        name = line.title if line.block is None else f"block {line.block}: {line.title}"
        name += f", {line.size} matrices" if line.size > 1 else ""
        chosen = ("dense", None, None)
        if line.mark is not None:
            (rank, loss), ranks = line.mark, sorted(rank for rank, _ in line.chosen)
            text = f"{rank:g}" + (f" ({ranks[0]} to {ranks[-1]})" if ranks[0] < ranks[-1] else "")
            text += f", {line.size - len(ranks)} dense" if len(ranks) < line.size else ""
            chosen = (text, f"{rank / line.full:.1%}", f"{loss:.4g}")
        low, high = (
            (rank, f"{median(line.losses[rank]):.4g}")
            for rank in (min(line.losses), max(line.losses))
        )
        rows.append((name, line.full, *chosen, *low, *high))
    if not rows:
        return None
    columns = ("matrix", "full rank", "chosen rank", "share of full rank", "loss left")
    columns += ("smallest rank measured", "loss left there")
    columns += ("largest rank measured", "loss left there")
    table = _table("Loss left by rank", columns, rows)
    figure, title = figures.get("spectra"), "Spectra with the chosen cut"
    return _section("spectra", title, figure, _paragraph(SPECTRA_NOTE), table)


def _losses(facts: Facts, figures: Figures) -> Section:
    names = ("index", "held_out_loss_before", "held_out_loss_after", "steps", "best_step")
    columns = ("block", "loss as initialised", "loss as written", "steps", "best step")
    rows = [[row[name] for name in names] for row in facts.blocks]
    curves = [(block, *point) for block, points in (facts.curves or {}).items() for point in points]
    missing = "" if curves else "The events file has no loss curves: nothing was trained."
    if facts.curves is None:
        missing = "Loss curves: give the events file of the run with --events."
    said = [
        f"{subject} was then trained on the base's predictions: the held-out KL divergence went "
        f"from {format_number(found[before])} to {format_number(found[after])} nats a token."
        for part, (subject, before, after) in TRAINED.items()
        if (found := facts.report.get(part)) is not None
    ]
    return _section(
        "loss",
        "Held-out loss by block",
        figures.get("held-out-loss"),
        _paragraph(LOSS_NOTE.format(loss=facts.recipe["options"].get("loss"))),
        _table("Held-out loss by block", columns, rows),
        figures.get("loss-curves"),
        _table("Held-out loss while training", ("block", "step", "held-out loss"), curves),
        *map(_paragraph, (missing, *said)),
    )


def _experts(facts: Facts, figures: Figures) -> Section | None:
    rows = [
        (row["index"], *tokens, ", ".join(map(str, row.get("starved_experts") or ())) or "none")
        for row in facts.blocks
        if (tokens := row.get("expert_tokens"))
    ]
    if not rows:
        return None
    columns = ("block", *(f"expert {x}" for x in range(max(map(len, rows)) - 2)), "starved")
    table = _table("Calibration tokens by expert", columns, rows)
    figure = figures.get("experts")
    return _section("experts", "Expert coverage", figure, _paragraph(EXPERTS_NOTE), table)


def _costs(facts: Facts, figures: Figures) -> Section:
    predicted = facts.report.get("predicted_host_memory_bytes")
    said = "" if predicted is None else f" Predicted were {predicted:,} bytes of host memory."
    parts = [*((row["index"], row) for row in facts.blocks), ("whole run", facts.report)]
    rows = [(name, found["seconds"], found["peak_memory_bytes"]) for name, found in parts]
    table = _table("Time and peak memory", ("block", "seconds", "peak bytes"), rows)
    figure, title = figures.get("time-memory"), "Time and memory by block"
    return _section("cost", title, figure, _paragraph(COST_NOTE + said), table)


def _quality(facts: Facts, figures: Figures) -> Section:
    quality = facts.quality
    if quality is None:
        return _section("quality", "Quality", NO_QUALITY)
    parts = {name: quality.get(name) or {} for name in ("tasks", "generations", "speed")}
    hidden = (*parts, "params", "bytes", "metric", "tokens", "words", "lm_eval")
    text = {name: value for name, value in quality.items() if name not in hidden}
    said = []
    if tokens := quality.get("tokens"):
        metric = quality.get("metric")
        said.append(f"{tokens:,} tokens were predicted, by the definition {metric}.")
    if (retained := quality.get("retained") or 0) > 0:
        predicted = facts.report.get("predicted_loss_increase")
        beside = "" if predicted is None else f" (predicted before training: {predicted:.6g})"
        said.append(f"The loss changed by {-math.log(retained):.6g} nats a token{beside}.")
    elif said:
        said.append("The file has no comparison: run eval with --against MODEL.")
    if warning := parts["generations"].get("warning"):
        said.append(f"Warning: {warning}.")
    columns = ("figure", "compressed", "base")
    speed = "Speed and memory of transformers' generate"
    return _section(
        "quality",
        "Quality against the base" if "base_params" in quality or retained else "Quality",
        _table("Quality on the text that eval was given", columns, _beside_base(text)),
        _tasks(parts["tasks"]),
        _table("What both wrote", columns, _beside_base(parts["generations"])),
        _table(speed, columns, _beside_base(parts["speed"])),
        _paragraph(" ".join(said)),
    )


def _beside_base(found: Mapping[str, Any]) -> list[tuple[object, ...]]:
    """Return a row for every figure, the base's beside it."""
    flat: dict[str, Any] = {}
    for name, value in found.items():
        inner = value if isinstance(value, Mapping) else {"": value}
        flat |= {f"{name} {key}".strip(): one for key, one in inner.items()}
    return [
        (*COMPARED[name][:1], value, COMPARED[name][1])
        if name in COMPARED
        else (name.replace("_", " "), value, flat.get(f"base_{name}"))
        for name, value in flat.items()
        if not name.startswith("base_") and name != "warning"
    ]


def _tasks(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a row for every metric of every task, its standard error behind it."""
    columns = ("task", "compressed", "standard error", "base", "standard error", "recovered, %")
    cells = ("{}", "{}_stderr", "base_{}", "base_{}_stderr", "{}_recovery_percent")
    rows = [
        (f"{task}, {name}", *(found.get(cell.format(name)) for cell in cells))
        for task, found in tasks.items()
        for name in found
        if f"{name}_stderr" in found and not name.startswith("base_")
    ]
    return _table("Tasks of lm-evaluation-harness", columns, rows)


def _again(facts: Facts, figures: Figures) -> Section:
    recipe = facts.recipe
    versions, data = (
        found if isinstance(found := recipe.get(name), dict) else {}
        for name in ("versions", "data_sha256")
    )
    rows = [
        ("base model", recipe["options"].get("model")),
        ("strategy", recipe.get("strategy")),
        ("gauge", facts.gauge),
        *sorted(versions.items()),
        ("device", recipe.get("device")),
        ("sha256 of the base model (samples)", recipe.get("model_sha256")),
        *((f"sha256 of the {name} tokens", value) for name, value in data.items()),
    ]
    return _section(
        "again",
        "Run it again",
        _paragraph("In the folder where it was run first; paths are as they were given there."),
        f"<pre><code>{escape(command_of(facts))}</code></pre>",
        _table("What it ran on", ("what", "value"), rows, "text"),
    )


def sections_of(facts: Facts, figures: Figures) -> list[Section]:
    makers = (_quality, _size, _ranks, _spectra, _losses, _experts, _costs, _again)
    return [section for make in makers if (section := make(facts, figures)) is not None]
