"""One page about a compression: what `lillama report` and `lillama.report` call."""

import webbrowser
from pathlib import Path
from typing import Any

from lillama.checkpoint_writer import disk_errors
from lillama.config import ReportConfig
from lillama.errors import RunError
from lillama.report.data import read_facts
from lillama.report.page import page_of
from lillama.report.plots import plots_of
from lillama.report.svg import as_png, check_matplotlib

__all__ = ["PAGE", "report"]

PAGE = "report.html"


def _write(file: Path, data: bytes) -> None:
    """All of it or nothing."""
    part = file.with_name(f".{file.name}.part")
    with disk_errors(file):
        try:
            part.write_bytes(data)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)


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
    facts = read_facts(config)
    plots = plots_of(facts)
    # a lone surrogate, which JSON can hold and UTF-8 cannot, becomes a reference
    page = page_of(facts, plots).encode("utf-8", "xmlcharrefreplace")
    written = [config.out / PAGE]
    _write(written[0], page)
    if config.png is not None:
        with disk_errors(config.png):
            config.png.mkdir(exist_ok=True)
        for plot in plots.values():
            file = config.png / f"{plot.key}.png"
            _write(file, as_png(plot))
            written.append(file)
    if config.open and not webbrowser.open(written[0].resolve().as_uri()):
        raise RunError(f"no browser was found; {written[0]} is written, open it yourself")
    return written
