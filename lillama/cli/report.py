"""`lillama report`: its options and the call. Defaults are in config.py."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]

Folder = Annotated[Path, typer.Argument(help="Folder that compress wrote.", show_default=False)]
Events = Annotated[
    Path | None,
    typer.Option(help="What compress --events wrote: loss curves.", show_default=False),
]
Eval = Annotated[
    Path | None,
    typer.Option(help="What eval --against MODEL --json printed: quality.", show_default=False),
]
Png = Annotated[Path | None, typer.Option(help="Folder for the plots as PNG.", show_default=False)]
Open = Annotated[bool, typer.Option("--open", help="Show the page in the browser.")]


def report(
    out: Folder, events: Events = None, eval: Eval = None, png: Png = None, open: Open = False
) -> None:
    """Write OUT/report.html: sizes, ranks, losses, time and quality of a compression."""
    from lillama.report import report as run

    for file in run(out, events=events, eval=eval, png=png, open=open):
        print(file, flush=True)
