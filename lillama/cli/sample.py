"""`lillama sample`: its options and the call."""

from pathlib import Path
from typing import Annotated

import typer

from lillama.cli.options import DeviceOption, Json, Model, Revision, SeqLen, at_revision, defaults
from lillama.cli.output import print_json, print_rows, progress_bar
from lillama.config import SampleConfig

__all__ = ["sample"]

_DEFAULTS = defaults(SampleConfig)
File = Annotated[Path, typer.Argument(help="Jsonl file to create.", show_default=False)]
Tokens = Annotated[int, typer.Option(help="Tokens to write, at least.")]
Temperature = Annotated[float, typer.Option(help="1 draws what the model holds likely.")]
Sequences = Annotated[int, typer.Option(help="Sequences written side by side.")]
Seed = Annotated[int, typer.Option(help="Of the sampling.")]


def sample(
    model: Model,
    out: File,
    revision: Revision = None,
    tokens: Tokens = _DEFAULTS["tokens"],
    seq_len: SeqLen = _DEFAULTS["seq_len"],
    temperature: Temperature = _DEFAULTS["temperature"],
    batch_size: Sequences = _DEFAULTS["batch_size"],
    seed: Seed = _DEFAULTS["seed"],
    device: DeviceOption = _DEFAULTS["device"],
    as_json: Json = False,
) -> None:
    """Let MODEL write calibration text by itself, for --text."""
    from lillama.data.sample import sample as run

    with progress_bar() as progress:
        report = run(
            at_revision(model, revision),
            out,
            progress=progress,
            tokens=tokens,
            seq_len=seq_len,
            temperature=temperature,
            batch_size=batch_size,
            seed=seed,
            device=device,
        )
    if as_json:
        print_json(report)
    else:
        print_rows(str(out), report)
