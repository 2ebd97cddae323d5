"""`lillama export`: its options and the call."""

from typing import Annotated

import typer

from lillama.cli.options import Json, Model, Out, Revision, at_revision, defaults
from lillama.cli.output import print_json, print_rows
from lillama.config import ExportConfig

__all__ = ["export"]

_DEFAULTS = defaults(ExportConfig)
FormatOption = Annotated[
    str,
    typer.Option(help="dense: factors multiplied out; plain or pivot: the other gauge."),
]


def export(
    model: Model,
    out: Out,
    revision: Revision = None,
    format: FormatOption = _DEFAULTS["format"],
    as_json: Json = False,
) -> None:
    """Write a compressed MODEL in another format: dense, for tools that know nothing of lillama."""
    from lillama.checkpoint.export import export as run

    report = run(at_revision(model, revision), out, format=format)
    if as_json:
        print_json(report)
    else:
        print_rows(str(out), report)
