"""One HTML page about a compression, what `lillama report` and `lillama.report` call: no script and
no request; text from files escaped."""

import datetime
import math
import webbrowser
from pathlib import Path
from typing import Any

from lillama.checkpoint.folder import disk_errors, recover, whole_file
from lillama.config import ReportConfig
from lillama.errors import RunError
from lillama.report.data import Facts, read_facts
from lillama.report.plots import plots_of
from lillama.report.sections import escape, format_number, sections_of
from lillama.report.svg import Plot, as_png, as_svg, check_matplotlib
from lillama.version import __version__

__all__ = ["PAGE", "report"]

PAGE = "report.html"
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
svg{display:block;width:100%;max-width:36rem;height:auto;margin:0 auto}
summary{cursor:pointer;padding:.5rem 0;color:var(--link)}
.scroll{overflow-x:auto}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums;width:100%}
caption{text-align:left;padding-bottom:.25rem}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{white-space:normal;overflow-wrap:normal}
thead th{vertical-align:bottom}
th:first-child{text-align:left;padding-left:0}
@media (max-width:30rem){th,td{padding:.3rem .35rem}table{font-size:.8125rem}}
td.text{text-align:left;white-space:normal;overflow-wrap:anywhere}
pre{background:var(--panel);border-radius:.5rem;padding:.75rem;white-space:pre-wrap;
overflow-wrap:anywhere}
svg *{stroke-linejoin:round;stroke-linecap:butt}
"""
# nothing may be fetched or run; matplotlib's plots have `style` attributes
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def _size(num_bytes: float) -> str:
    power = min(len(UNITS) - 1, int(math.log(max(1, num_bytes), 1024)))
    return f"{num_bytes / 1024**power:,.{0 if power == 0 else 2}f} {UNITS[power]}"


def _cards(facts: Facts) -> str:
    """Return the summary: name, value and note of its figures."""
    report = facts.report
    count, seconds, peak = format_number, report["seconds"], report["peak_memory_bytes"]
    retained, increase = (
        (facts.quality or {}).get("retained"),
        report.get("predicted_loss_increase"),
    )
    quality, loss = ("not given", "--eval FILE"), ("not measured", "this preset takes no gradients")
    if retained is not None:
        quality = f"{retained:.2%}", "base perplexity / perplexity"
    if increase is not None:
        loss = f"{increase:.6g}", "nats a token, before training, by the gradients"
    asked = f"{100 * report['target_reduction']:.6g}% were asked for"
    cards = [
        ("Parameters", count(report["params_after"]), f"of {count(report['params_before'])}"),
        ("Bytes", _size(report["bytes_after"]), f"of {_size(report['bytes_before'])}"),
        ("Removed", f"{100 * report['reduction']:.6g}%", asked),
        ("Quality retained", *quality),
        ("Predicted loss increase", *loss),
        ("Time", str(datetime.timedelta(seconds=round(seconds))), f"{count(seconds)} seconds"),
        ("Peak memory", _size(peak), f"{count(peak)} bytes on {report.get('device')}"),
        ("Calibration", count(report["tokens"]), "training tokens"),
    ]
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)} <small>{escape(note)}</small></dd></div>"
        for name, value, note in cards
    )


def _page(facts: Facts, plots: list[Plot]) -> str:
    figures = {
        plot.key: f"<figure>{as_svg(plot)}<figcaption>{plot.title}.</figcaption></figure>"
        for plot in plots
    }
    sections = sections_of(facts, figures)
    links = "".join(f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title, _ in sections)
    options = facts.recipe["options"]
    title = escape(f"{facts.out.name}: {facts.report['reduction']:.1%} smaller")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{CSS}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="soft">{escape(options.get("model"))} compressed by lillama with preset
{escape(options.get("preset"))}; this page was written by lillama {escape(__version__)}.</p>
</header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>
<dl>{_cards(facts)}</dl>
{"".join(body for *_, body in sections)}
</main>
</body>
</html>
"""


def report(out: str | Path, **options: Any) -> list[Path]:
    """Write OUT/report.html, one file that needs no network. Same as `lillama report`.

    Args:
        out: a folder that `compress` wrote.
        options: the other fields of `lillama.config.ReportConfig`: events (the JSON lines of the
            run), eval (what `lillama eval OUT --against MODEL --json` printed), png (a folder for
            the plots as PNG), open (show the page in the browser).

    Returns:
        The files written: the page, then the PNG files.

    Raises:
        InputError: matplotlib (extra lillama[report]) is not installed, a file of OUT is missing or
            damaged, or the events or the quality are another run's.
        RunError: a file cannot be written, or there is no browser to open it.
    """
    paths = {name: Path(v) for name in ("events", "eval", "png") if (v := options.get(name))}
    config = ReportConfig(out=Path(out), **{**options, **paths})
    check_matplotlib()
    recover(config.out)
    facts = read_facts(config)
    written = [config.out / PAGE]
    with whole_file(written[0], "report", overwrite=True) as part:
        plots = plots_of(facts)
        # a lone surrogate, which JSON can hold and UTF-8 cannot, becomes a reference
        page = _page(facts, plots).encode("utf-8", "xmlcharrefreplace")
        with disk_errors(written[0]):
            part.write_bytes(page)
    if config.png is not None:
        with disk_errors(config.png):
            config.png.mkdir(exist_ok=True)
        for plot in plots:
            written.append(config.png / f"{plot.key}.png")
            with whole_file(written[-1], "report", overwrite=True) as part, disk_errors(part):
                part.write_bytes(as_png(plot))
    if config.open and not webbrowser.open(written[0].resolve().as_uri()):
        raise RunError(f"no browser was found; {written[0]} is written, open it yourself")
    return written
