"""`lillama import-upstream`: its options and the call."""

from pathlib import Path
from typing import Annotated

import typer

from lillama.cli_options import Json, Out
from lillama.cli_output import print_json, print_rows

__all__ = ["import_upstream"]

Folder = Annotated[
    Path,
    typer.Argument(
        help="What the published code wrote: its --output-folder, or what save_lr_llm saved.",
        show_default=False,
    ),
]
Base = Annotated[
    Path, typer.Option(help="The dense model that was compressed.", show_default=False)
]


def import_upstream(folder: Folder, out: Out, base: Base, as_json: Json = False) -> None:
    """Write a model that the paper's published code compressed in lillama's format."""
    from lillama.upstream import import_upstream as run

    report = run(folder, out, base=base)
    if as_json:
        print_json(report)
    else:
        print_rows(str(out), report)
