"""The sections of the report's page: a heading, plots, and their figures as tables, all escaped."""

import html
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lillama.report.data import METRIC_NUMBERS, TRAINED, Facts
from lillama.report.spectra import COLUMNS, NOTE, missing, rows_of
from lillama.report.svg import Plot, Stylesheet, as_svg

__all__ = ["Section", "command_of", "escape", "format_number", "sections_of"]

# a longer table is folded up
OPEN_ROWS = 12

# its id, its heading, its HTML
Section = tuple[str, str, str]


def escape(value: object) -> str:
    return html.escape(str(value))


def format_number(value: float | None) -> str:
    """Counts whole, measurements to six digits."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def command_of(facts: Facts) -> str:
    """The line that makes OUT again: every option that recipe.json recorded."""
    options = facts.recipe["options"]
    words = ["lillama", "compress", str(options.get("model")), str(facts.out)]
    if options.get("revision") is not None:
        words += ["--revision", str(options["revision"])]
    words += ["--reduction", str(options.get("reduction"))]
    for file in options["text"]:
        words += ["--text", str(file)]
    for name in ("tokens", "seq_len", "preset", "strategy", "gauge", "loss", "seed", "dtype"):
        if options.get(name) is not None:
            words += ["--" + name.replace("_", "-"), str(options[name])]
    if options.get("targets") is not None:
        words += ["--targets", ",".join(map(str, options["targets"]))]
    for name in ("packing", "train"):
        words.append(f"--{name}" if options.get(name) else f"--no-{name}")
    if facts.recipe.get("device") is not None:
        words += ["--device", str(facts.recipe["device"])]
    return shlex.join(words)


def _table(
    caption: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    folds: bool = True,
    text: bool = False,
) -> str:
    """`rows`: cells in order, the first names the row. `text`: cells are words, not numbers."""
    body = list(rows)
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    kind = ' class="text"' if text else ""
    lines = [
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td{kind}>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in body
    ]
    table = (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>"
        + "\n".join(lines)
        + "</tbody></table></div>"
    )
    if not folds or len(body) <= OPEN_ROWS:
        return table
    return f"<details><summary>Figures as a table, {len(body)} rows</summary>{table}</details>"


def _figure(plot: Plot | None, styles: Stylesheet, note: str = "") -> str:
    if plot is None:
        return ""
    caption = f"{escape(plot.title)}. {escape(note)}".strip()
    return f"<figure>{as_svg(plot, styles)}<figcaption>{caption}</figcaption></figure>"


def _section(key: str, title: str, *parts: str) -> Section:
    body = (
        f'<section id="{key}" aria-labelledby="{key}-h"><h2 id="{key}-h">{escape(title)}</h2>\n'
        + "\n".join(part for part in parts if part)
        + "\n</section>"
    )
    return key, title, body


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _size_section(facts: Facts, plots: Mapping[str, Plot], styles: Stylesheet) -> Section:
    report, layers = facts.report, facts.layers
    rows = [
        (
            x.label,
            *map(format_number, (x.params_before, x.params_after, x.bytes_before, x.bytes_after)),
        )
        for x in layers
    ]
    totals = ("params_before", "params_after", "bytes_before", "bytes_after")
    rows.append(("whole model", *(format_number(report[name]) for name in totals)))
    mean = report["bytes_before"] / report["params_before"]
    return _section(
        "size",
        "Size by layer",
        _figure(plots.get("sizes"), styles),
        _paragraph(
            f"Bytes before are counted at the base's mean of {mean:.4g} bytes a parameter, bytes "
            "after are what the tensors take."
        ),
        _table(
            "Parameters and bytes by layer",
            ("layer", "parameters before", "parameters after", "bytes before", "bytes after"),
            rows,
        ),
    )


def _rank_section(facts: Facts, plots: Mapping[str, Plot], styles: Stylesheet) -> Section:
    rows = []
    for row in facts.matrices:
        place = "outside" if row.block is None else f"block {row.block}"
        rank = "dense" if row.rank is None else format_number(row.rank)
        numbers = (row.matrix.break_even_rank, row.matrix.N * row.matrix.K, row.params_after)
        shape = f"{row.matrix.N} x {row.matrix.K}"
        rows.append((f"{place}: {row.label}", shape, rank, *map(format_number, numbers)))
    outside = [row.label for row in facts.matrices if row.block is None]
    more = f" Outside the blocks, in the table only: {', '.join(outside)}." if outside else ""
    more += missing(facts)
    return _section(
        "ranks",
        "Ranks",
        _figure(plots.get("ranks"), styles),
        _paragraph(
            "The break-even rank is the largest that saves parameters"
            f" (gauge {facts.gauge}); a matrix that needs more stays dense.{more}"
        ),
        _table(
            "Rank of each target matrix",
            ("matrix", "shape", "rank", "break-even rank", "parameters before", "parameters after"),
            rows,
        ),
    )


def _spectra_section(facts: Facts, plots: Mapping[str, Plot], styles: Stylesheet) -> Section | None:
    rows = rows_of(facts)
    if not rows:
        return None
    return _section(
        "spectra",
        "Spectra with the chosen cut",
        _figure(plots.get("spectra"), styles),
        _paragraph(NOTE),
        _table("Loss left by rank", COLUMNS, rows),
    )


def _loss_section(facts: Facts, plots: Mapping[str, Plot], styles: Stylesheet) -> Section:
    names = ("held_out_loss_before", "held_out_loss_after", "steps", "best_step")
    parts = [
        _figure(plots.get("held-out-loss"), styles),
        _paragraph(
            "Each block is judged by itself on held-out calibration tokens: how far its output is "
            f"from the original block's (--loss {facts.recipe['options'].get('loss')}). The step "
            "with the lowest loss is what was written."
        ),
        _table(
            "Held-out loss by block",
            ("block", "loss as initialised", "loss as written", "steps", "best step"),
            [(row["index"], *(format_number(row[name]) for name in names)) for row in facts.blocks],
        ),
    ]
    if facts.curves is None:
        parts.append(_paragraph("Loss curves: give the events file of the run with --events."))
    elif not facts.curves:
        parts.append(_paragraph("The events file has no loss curves: nothing was trained."))
    else:
        parts += [
            _figure(plots.get("loss-curves"), styles),
            _table(
                "Held-out loss while training",
                ("block", "step", "held-out loss"),
                [(block, step, format_number(loss))
                 for block, points in facts.curves.items() for step, loss in points],
            ),
        ]  # fmt: skip
    parts += [_paragraph(text) for text in _trained(facts)]
    return _section("loss", "Held-out loss by block", *parts)


def _trained(facts: Facts) -> list[str]:
    """A sentence each of what was trained on the base's predictions after the blocks."""
    subjects = {"head": "The output head", "finetune": "The whole model"}
    said = []
    for part, (before, after) in TRAINED.items():
        if (found := facts.report.get(part)) is not None:
            numbers = format_number(found[before]), format_number(found[after])
            said.append(
                f"{subjects[part]} was then trained on the base's predictions: the held-out KL "
                f"divergence went from {numbers[0]} to {numbers[1]} nats a token."
            )
    return said


def _expert_section(facts: Facts, plots: Mapping[str, Plot], styles: Stylesheet) -> Section | None:
    rows = [row for row in facts.blocks if row.get("expert_tokens")]
    if not rows:
        return None
    width = max(len(row["expert_tokens"]) for row in rows)
    return _section(
        "experts",
        "Expert coverage",
        _figure(plots.get("experts"), styles),
        _paragraph(
            "A starved expert saw fewer calibration tokens than the model is wide; what is missing "
            "of its statistics comes from a sample of the layer's tokens. More --tokens helps."
        ),
        _table(
            "Calibration tokens by expert",
            ("block", *(f"expert {expert}" for expert in range(width)), "starved"),
            [
                (
                    row["index"],
                    *map(format_number, row["expert_tokens"]),
                    ", ".join(map(str, row.get("starved_experts", []))) or "none",
                )
                for row in rows
            ],
        ),
    )


def _cost_section(facts: Facts, plots: Mapping[str, Plot], styles: Stylesheet) -> Section:
    rows = [
        (row["index"], format_number(row["seconds"]), format_number(row["peak_memory_bytes"]))
        for row in facts.blocks
    ]
    report = facts.report
    rows.append(
        ("whole run", format_number(report["seconds"]), format_number(report["peak_memory_bytes"]))
    )
    predicted = report.get("predicted_host_memory_bytes")
    said = "" if predicted is None else f" Predicted were {predicted:,} bytes of host memory."
    return _section(
        "cost",
        "Time and memory by block",
        _figure(plots.get("time-memory"), styles),
        _paragraph(
            "The peak is the process's up to the end of the block, on a GPU that of its memory. A "
            f"run that was interrupted and went on counts the time since then.{said}"
        ),
        _table("Time and peak memory", ("block", "seconds", "peak bytes"), rows),
    )


def _quality_section(facts: Facts) -> Section:
    quality = facts.quality
    if quality is None:
        text = (
            "Not given. <code>lillama eval OUT --text FILE --against MODEL --json &gt; eval.json"
            "</code> measures it, <code>--eval eval.json</code> then shows it here."
        )
        return _section("quality", "Quality", f"<p>{text}</p>")
    rows: list[tuple[str, str, str]] = []
    said: list[str] = []
    if "metric" in quality:
        rows, said = _text_figures(facts, quality)
    if said and "retained" not in quality:
        said.append("The file has no comparison: run eval with --against MODEL.")
    caption = "Quality on the text that eval was given"
    against = "base_params" in quality or "retained" in quality
    parts = [
        _table(caption, ("figure", "compressed", "base"), rows) if rows else "",
        _task_table(quality["tasks"]) if quality.get("tasks") else "",
        _pair_table("What both wrote", quality.get("generations", {})),
        _pair_table("Speed and memory of transformers' generate", quality.get("speed", {})),
        _paragraph(" ".join(said)) if said else "",
    ]
    title = "Quality against the base" if against else "Quality"
    return _section("quality", title, *(part for part in parts if part))


def _text_figures(
    facts: Facts, quality: Mapping[str, Any]
) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Rows of the table, and sentences below it."""
    names = METRIC_NUMBERS[quality["metric"]]
    rows = [
        (
            name.replace("_", " "),
            format_number(quality[name]),
            format_number(quality.get(f"base_{name}")),
        )
        for name in names
    ]
    said = [f"{quality['tokens']:,} tokens were predicted, by the definition {quality['metric']}."]
    if "retained" in quality:
        rows += [
            ("retained (base perplexity / perplexity)", format_number(quality["retained"]), "1"),
            ("mean KL divergence from the base, nats a token", format_number(quality["kl"]), "0"),
            (
                "share of tokens with the same first choice",
                format_number(quality["top1_agreement"]),
                "1",
            ),
        ]
        increase = -math.log(quality["retained"]) if quality["retained"] > 0 else math.inf
        predicted = facts.report.get("predicted_loss_increase")
        against = "" if predicted is None else f" (predicted before training: {predicted:.6g})"
        said.append(f"The loss changed by {increase:.6g} nats a token{against}.")
    warning = quality.get("generations", {}).get("warning")
    if warning:
        said.append(f"Warning: {warning}.")
    return rows, said


def _cell(value: object) -> str:
    return format_number(value) if isinstance(value, int | float | None) else str(value)


def _task_table(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for every metric of every task, its standard error behind it."""
    rows = []
    for task, found in tasks.items():
        for name in found:
            if f"{name}_stderr" not in found or name.startswith("base_"):
                continue
            cells = (name, f"{name}_stderr", f"base_{name}", f"base_{name}_stderr")
            cells = (*cells, f"{name}_recovery_percent")
            rows.append((f"{task}, {name}", *(_cell(found.get(cell)) for cell in cells)))
    columns = ("task", "compressed", "standard error", "base", "standard error", "recovered, %")
    return _table("Tasks of lm-evaluation-harness", columns, rows) if rows else ""


def _pair_table(caption: str, found: Mapping[str, Any]) -> str:
    """A row for every figure, the base's beside it."""
    flat: dict[str, Any] = {}
    for name, value in found.items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        flat |= {f"{name} {key}".strip(): one for key, one in inner}
    rows = [
        (name.replace("_", " "), _cell(value), _cell(flat.get(f"base_{name}")))
        for name, value in flat.items()
        if not name.startswith("base_") and name != "warning"
    ]
    return _table(caption, ("figure", "compressed", "base"), rows) if rows else ""


def _again_section(facts: Facts) -> Section:
    recipe = facts.recipe
    versions = recipe.get("versions")
    rows = [
        ("base model", facts.base),
        ("strategy", recipe.get("strategy")),
        ("gauge", facts.gauge),
    ]
    rows += sorted(versions.items()) if isinstance(versions, dict) else []
    rows.append(("device", recipe.get("device")))
    rows.append(("sha256 of the base model (samples)", recipe.get("model_sha256")))
    data = recipe.get("data_sha256")
    if isinstance(data, dict):
        rows += [(f"sha256 of the {name} tokens", value) for name, value in data.items()]
    return _section(
        "again",
        "Run it again",
        _paragraph("In the folder where it was run first; paths are as they were given there."),
        f"<pre><code>{escape(command_of(facts))}</code></pre>",
        _table("What it ran on", ("what", "value"), rows, folds=False, text=True),
    )


def sections_of(facts: Facts, plots: Mapping[str, Plot], styles: Stylesheet) -> list[Section]:
    found = (
        _quality_section(facts),
        _size_section(facts, plots, styles),
        _rank_section(facts, plots, styles),
        _spectra_section(facts, plots, styles),
        _loss_section(facts, plots, styles),
        _expert_section(facts, plots, styles),
        _cost_section(facts, plots, styles),
        _again_section(facts),
    )
    return [section for section in found if section is not None]
