"""One page about a compression: what `lillama report` and `lillama.report` call."""

import webbrowser
from pathlib import Path
from typing import Any

from lillama.config import ReportConfig
from lillama.errors import RunError
from lillama.folder_writer import disk_errors, recover, whole_file
from lillama.report_data import read_facts
from lillama.report_page import page_of
from lillama.report_plots import plots_of
from lillama.report_svg import as_png, check_matplotlib

__all__ = ["PAGE", "report"]

PAGE = "report.html"


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
        page = page_of(facts, plots).encode("utf-8", "xmlcharrefreplace")
        with disk_errors(written[0]):
            part.write_bytes(page)
    if config.png is not None:
        with disk_errors(config.png):
            config.png.mkdir(exist_ok=True)
        for plot in plots.values():
            written.append(config.png / f"{plot.key}.png")
            with whole_file(written[-1], "report", overwrite=True) as part, disk_errors(part):
                part.write_bytes(as_png(plot))
    if config.open and not webbrowser.open(written[0].resolve().as_uri()):
        raise RunError(f"no browser was found; {written[0]} is written, open it yourself")
    return written
