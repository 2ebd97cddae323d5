"""The report as one HTML page: no script, request or `style` attribute; text from files escaped.

Every plot has a title and a description that a screen reader says, and its figures as a table.
"""

import base64
import hashlib
import html
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lillama.report_data import Facts
from lillama.report_plots import Plot, Stylesheet, as_svg
from lillama.version import __version__

__all__ = ["command_of", "page_of"]

# a longer table is folded up
OPEN_ROWS = 12
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")

CSS = """
:root{color-scheme:light dark;--ink:#1a1d23;--soft:#5b616b;--line:#d9dce1;--page:#ffffff;
--panel:#f4f5f7;--link:#1558b0}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#a3aab5;--line:#363b44;--page:#14171c;
--panel:#1d2128;--link:#86b6ff}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:50rem;padding:1rem 1rem 4rem;background:var(--page);color:var(--ink);
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.6rem;line-height:1.25;margin:1rem 0 .25rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.5rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--line)}
p{margin:.5rem 0}
p,li,dd,code{overflow-wrap:anywhere}
a{color:var(--link)}
.soft,figcaption,caption{color:var(--soft)}
nav ul{display:flex;flex-wrap:wrap;gap:.1rem 1rem;list-style:none;margin:1rem 0;padding:0}
nav a{display:inline-block;padding:.3rem 0}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(10.5rem,1fr));gap:.5rem;margin:1rem 0}
dl div{background:var(--panel);border-radius:.5rem;padding:.6rem .75rem}
dt{color:var(--soft);font-size:.85rem}
dd{margin:0;font-size:1.15rem;font-weight:600;font-variant-numeric:tabular-nums}
dd small{display:block;font-size:.8rem;font-weight:400;color:var(--soft)}
figure{margin:1rem 0}
figcaption{font-size:.9rem;margin-top:.25rem}
svg{display:block;width:100%;max-width:38rem;height:auto;margin:0 auto}
summary{cursor:pointer;padding:.5rem 0;color:var(--link)}
.scroll{overflow-x:auto}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums;width:100%}
caption{text-align:left;padding-bottom:.25rem}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}
td.text{text-align:left;white-space:normal;overflow-wrap:anywhere}
pre{background:var(--panel);border-radius:.5rem;padding:.75rem;white-space:pre-wrap;
overflow-wrap:anywhere}
"""


def _e(value: object) -> str:
    return html.escape(str(value))


def _number(value: float | None) -> str:
    """Counts whole, measurements to six digits."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _size(num_bytes: float) -> str:
    power = min(len(UNITS) - 1, int(math.log(max(1, num_bytes), 1024)))
    return f"{num_bytes / 1024**power:,.{0 if power == 0 else 2}f} {UNITS[power]}"


def _seconds(value: float) -> str:
    minutes, seconds = divmod(value, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:.0f} h {minutes:.0f} min"
    return f"{minutes:.0f} min {seconds:.0f} s" if minutes else f"{seconds:.1f} s"


def command_of(facts: Facts) -> str:
    """The line that makes OUT again: every option that recipe.json recorded."""
    options = facts.recipe["options"]
    words = ["lillama", "compress", str(options.get("model")), str(facts.out)]
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
    head = "".join(f'<th scope="col">{_e(column)}</th>' for column in columns)
    kind = ' class="text"' if text else ""
    lines = [
        f'<tr><th scope="row">{_e(row[0])}</th>'
        + "".join(f"<td{kind}>{_e(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in body
    ]
    table = (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_e(caption)}"><table>'
        f"<caption>{_e(caption)}</caption><thead><tr>{head}</tr></thead><tbody>"
        + "\n".join(lines)
        + "</tbody></table></div>"
    )
    if not folds or len(body) <= OPEN_ROWS:
        return table
    return f"<details><summary>Figures as a table, {len(body)} rows</summary>{table}</details>"


def _figure(plot: Plot | None, styles: Stylesheet, note: str = "") -> str:
    if plot is None:
        return ""
    caption = f"{_e(plot.title)}. {_e(note)}".strip()
    return f"<figure>{as_svg(plot, styles)}<figcaption>{caption}</figcaption></figure>"


def _section(key: str, title: str, *parts: str) -> tuple[str, str, str]:
    body = (
        f'<section id="{key}" aria-labelledby="{key}-h"><h2 id="{key}-h">{_e(title)}</h2>\n'
        + "\n".join(part for part in parts if part)
        + "\n</section>"
    )
    return key, title, body


def _paragraph(text: str) -> str:
    return f"<p>{_e(text)}</p>"


def _summary(facts: Facts) -> str:
    report, quality = facts.report, facts.quality
    retained = None if quality is None else quality.get("retained")
    increase = report.get("predicted_loss_increase")
    shares = f"{report['reduction']:.4%} of the model, asked: {report['target_reduction']:.4%}"
    cards = [
        ("Parameters", _number(report["params_after"]), f"of {_number(report['params_before'])}"),
        ("Bytes", _size(report["bytes_after"]), f"of {_size(report['bytes_before'])}"),
        ("Removed", f"{report['reduction']:.1%}", shares),
        (
            "Quality retained",
            "not given" if retained is None else f"{retained:.2%}",
            "--eval FILE" if retained is None else "base perplexity / perplexity",
        ),
        (
            "Predicted loss increase",
            "not measured" if increase is None else f"{increase:.6g}",
            "this preset takes no gradients"
            if increase is None
            else "nats a token, before training, by the gradients",
        ),
        ("Time", _seconds(report["seconds"]), f"{_number(report['seconds'])} seconds"),
        (
            "Peak memory",
            _size(report["peak_memory_bytes"]),
            f"{_number(report['peak_memory_bytes'])} bytes on {report.get('device', 'a device')}",
        ),
        ("Calibration", f"{_number(report['tokens'])}", "training tokens"),
    ]
    items = (
        f"<div><dt>{_e(name)}</dt><dd>{_e(value)} <small>{_e(note)}</small></dd></div>"
        for name, value, note in cards
    )
    return f"<dl>{''.join(items)}</dl>"


def _size_section(facts: Facts, plots: Mapping[str, Plot], styles: Stylesheet) -> Any:
    report, layers = facts.report, facts.layers
    rows = [
        (x.label, *map(_number, (x.params_before, x.params_after, x.bytes_before, x.bytes_after)))
        for x in layers
    ]
    totals = ("params_before", "params_after", "bytes_before", "bytes_after")
    rows.append(("whole model", *(_number(report[name]) for name in totals)))
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
            ("layer", "parameters before", "after", "bytes before", "after"),
            rows,
        ),
    )


def _rank_section(facts: Facts, plots: Mapping[str, Plot], styles: Stylesheet) -> Any:
    rows = []
    for row in facts.matrices:
        place = "outside" if row.block is None else f"block {row.block}"
        rank = "dense" if row.rank is None else _number(row.rank)
        numbers = (row.matrix.break_even_rank, row.matrix.N * row.matrix.K, row.params_after)
        shape = f"{row.matrix.N} x {row.matrix.K}"
        rows.append((f"{place}: {row.label}", shape, rank, *map(_number, numbers)))
    outside = [row.label for row in facts.matrices if row.block is None]
    more = f" Outside the blocks, in the table only: {', '.join(outside)}." if outside else ""
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
            ("matrix", "shape", "rank", "break-even rank", "parameters before", "after"),
            rows,
        ),
    )


def _loss_section(facts: Facts, plots: Mapping[str, Plot], styles: Stylesheet) -> Any:
    names = ("held_out_loss_before", "held_out_loss_after", "steps", "best_step")
    parts = [
        _figure(plots.get("held-out-loss"), styles),
        _paragraph(
            "Each block is judged by itself on held-out calibration tokens: how far its output is "
            "from the original block's. The step with the lowest loss is what was written."
        ),
        _table(
            "Held-out loss by block",
            ("block", "loss as initialised", "as written", "steps", "best step"),
            [(row["index"], *(_number(row[name]) for name in names)) for row in facts.blocks],
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
                [(block, step, _number(loss))
                 for block, points in facts.curves.items() for step, loss in points],
            ),
        ]  # fmt: skip
    return _section("loss", "Held-out loss by block", *parts)


def _expert_section(facts: Facts, plots: Mapping[str, Plot], styles: Stylesheet) -> Any:
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
                    *map(_number, row["expert_tokens"]),
                    ", ".join(map(str, row.get("starved_experts", []))) or "none",
                )
                for row in rows
            ],
        ),
    )


def _cost_section(facts: Facts, plots: Mapping[str, Plot], styles: Stylesheet) -> Any:
    rows = [
        (row["index"], _number(row["seconds"]), _number(row["peak_memory_bytes"]))
        for row in facts.blocks
    ]
    report = facts.report
    rows.append(("whole run", _number(report["seconds"]), _number(report["peak_memory_bytes"])))
    predicted = report.get("predicted_host_memory_bytes")
    said = "" if predicted is None else f" `plan` predicted {predicted:,} bytes of host memory."
    return _section(
        "cost",
        "Time and memory by block",
        _figure(plots.get("time-memory"), styles),
        _paragraph(
            "The peak is the process's up to the end of the block. A run that was interrupted and "
            f"went on counts the time since then.{said}"
        ),
        _table("Time and peak memory", ("block", "seconds", "peak bytes"), rows),
    )


def _quality_section(facts: Facts) -> Any:
    quality = facts.quality
    if quality is None:
        text = "Not given: `lillama eval OUT --text FILE --against MODEL --json > eval.json`, then "
        return _section("quality", "Quality", _paragraph(text + "--eval eval.json."))
    base = "base_perplexity" in quality
    rows = [
        (name.replace("_", " "), _number(quality[name]), _number(quality.get(f"base_{name}")))
        for name in ("perplexity", "bits_per_byte")
    ]
    facts_of = [f"{quality['tokens']:,} tokens were predicted."]
    if base:
        increase = math.log(quality["perplexity"] / quality["base_perplexity"])
        predicted = facts.report.get("predicted_loss_increase")
        against = "" if predicted is None else f" (predicted before training: {predicted:.6g})"
        rows += [
            ("retained (base perplexity / perplexity)", _number(quality["retained"]), "1"),
            ("mean KL divergence from the base, nats a token", _number(quality["kl"]), "0"),
            ("share of tokens with the same first choice", _number(quality["top1_agreement"]), "1"),
        ]
        facts_of.append(f"The loss rose by {increase:.6g} nats a token{against}.")
    else:
        facts_of.append("The file has no comparison: run eval with --against MODEL.")
    return _section(
        "quality",
        "Quality against the base" if base else "Quality",
        _table("Quality on the text that eval was given", ("figure", "compressed", "base"), rows),
        _paragraph(" ".join(facts_of)),
    )


def _again_section(facts: Facts) -> Any:
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
        f"<pre><code>{_e(command_of(facts))}</code></pre>",
        _table("What it ran on", ("what", "value"), rows, folds=False, text=True),
    )


def page_of(facts: Facts, plots: Mapping[str, Plot]) -> str:
    styles = Stylesheet()
    sections = [
        _size_section(facts, plots, styles),
        _rank_section(facts, plots, styles),
        _loss_section(facts, plots, styles),
        _expert_section(facts, plots, styles),
        _cost_section(facts, plots, styles),
        _quality_section(facts),
        _again_section(facts),
    ]
    found = [section for section in sections if section is not None]
    links = "".join(f'<li><a href="#{key}">{_e(title)}</a></li>' for key, title, _ in found)
    css = CSS + styles.css
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    title = f"{facts.out.name}: {facts.report['reduction']:.1%} smaller"
    preset = facts.recipe["options"].get("preset")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{_e(title)}</title>
<style>{css}</style>
</head>
<body>
<header>
<h1>{_e(title)}</h1>
<p class="soft">{_e(facts.base)} compressed by lillama with preset {_e(preset)}; this page was
written by lillama {_e(__version__)}.</p>
</header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>
{_summary(facts)}
{"".join(body for _, _, body in found)}
</main>
</body>
</html>
"""
