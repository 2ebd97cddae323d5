"""The report as one HTML page: no script, request or `style` attribute; text from files escaped."""

import base64
import hashlib
import math
from collections.abc import Mapping

from lillama.report.data import Facts
from lillama.report.sections import escape, format_number, sections_of
from lillama.report.svg import Plot, Stylesheet
from lillama.version import __version__

__all__ = ["page_of"]

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
"""


def _size(num_bytes: float) -> str:
    power = min(len(UNITS) - 1, int(math.log(max(1, num_bytes), 1024)))
    return f"{num_bytes / 1024**power:,.{0 if power == 0 else 2}f} {UNITS[power]}"


def _seconds(value: float) -> str:
    minutes, seconds = divmod(value, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:.0f} h {minutes:.0f} min"
    return f"{minutes:.0f} min {seconds:.0f} s" if minutes else f"{seconds:.1f} s"


def _summary(facts: Facts) -> str:
    report, quality = facts.report, facts.quality
    retained = None if quality is None else quality.get("retained")
    increase = report.get("predicted_loss_increase")
    asked = f"{100 * report['target_reduction']:.6g}% were asked for"
    cards = [
        (
            "Parameters",
            format_number(report["params_after"]),
            f"of {format_number(report['params_before'])}",
        ),
        ("Bytes", _size(report["bytes_after"]), f"of {_size(report['bytes_before'])}"),
        ("Removed", f"{100 * report['reduction']:.6g}%", asked),
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
        ("Time", _seconds(report["seconds"]), f"{format_number(report['seconds'])} seconds"),
        (
            "Peak memory",
            _size(report["peak_memory_bytes"]),
            f"{format_number(report['peak_memory_bytes'])} bytes on {report.get('device')}",
        ),
        ("Calibration", f"{format_number(report['tokens'])}", "training tokens"),
    ]
    items = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)} <small>{escape(note)}</small></dd></div>"
        for name, value, note in cards
    )
    return f"<dl>{''.join(items)}</dl>"


def page_of(facts: Facts, plots: Mapping[str, Plot]) -> str:
    styles = Stylesheet()
    found = sections_of(facts, plots, styles)
    links = "".join(f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title, _ in found)
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
<title>{escape(title)}</title>
<style>{css}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="soft">{escape(facts.base)} compressed by lillama with preset {escape(preset)}; this
page was written by lillama {escape(__version__)}.</p>
</header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>
{_summary(facts)}
{"".join(body for _, _, body in found)}
</main>
</body>
</html>
"""
