"""The options that several commands share: their types and what --help says of them. Defaults are
in config.py."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "ActivationMemory",
    "BatchSize",
    "BudgetOption",
    "DeviceOption",
    "DtypeOption",
    "GaugeOption",
    "Json",
    "Model",
    "Out",
    "Overwrite",
    "Packing",
    "PresetOption",
    "Reduction",
    "Revision",
    "Seed",
    "SeqLen",
    "StrategyOption",
    "TargetsOption",
    "TokensOption",
    "TrainOption",
    "at_revision",
    "defaults",
    "names",
]

Model = Annotated[
    str,
    typer.Argument(
        help="Checkpoint folder (safetensors), or ORG/NAME of the Hugging Face Hub.",
        show_default=False,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a MODEL of the Hub.", show_default=False),
]
Out = Annotated[Path, typer.Argument(help="Folder to create.", show_default=False)]
BatchSize = Annotated[int, typer.Option(help="Blocks a forward pass.")]
Reduction = Annotated[
    float,
    typer.Option(
        help="Share of the whole model's parameters to remove, between 0 and 1.", show_default=False
    ),
]
PresetOption = Annotated[
    str,
    typer.Option(
        help="default; fast: no training; best: then the whole model too; whitened: no gradients, "
        "uniform ranks; paper: the published recipe."
    ),
]
StrategyOption = Annotated[
    str | None,
    typer.Option(
        help="global, uniform or bottom; the preset's choice when left out.",
        show_default=False,
    ),
]
BudgetOption = Annotated[
    str,
    typer.Option(
        help="What --reduction is a share of: stored (the checkpoint's bytes) or active (the "
        "parameters that one token uses)."
    ),
]
GaugeOption = Annotated[
    str | None,
    typer.Option(
        help="How factors are stored: plain, or pivot: more rank at one size; the "
        "preset's choice when left out.",
        show_default=False,
    ),
]
TargetsOption = Annotated[
    str | None,
    typer.Option(
        help="Comma-separated matrices to factorise, e.g. in_proj,out_proj.", show_default=False
    ),
]
SeqLen = Annotated[int, typer.Option(help="Tokens a block.")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document as the last line of stdout.")
]
Packing = Annotated[
    bool, typer.Option(help="Fill blocks with text end to end, or pad one sample a block.")
]
Seed = Annotated[int, typer.Option(help="Chooses the calibration text and its order.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if lillama wrote it.")]
TokensOption = Annotated[
    int | None,
    typer.Option(
        help="Calibration tokens; when left out 2,000,000, with preset fast 262,144, of which it "
        "takes at most 256 for each of hidden_size (65,536 of a narrow model).",
        show_default=False,
    ),
]
TrainOption = Annotated[
    bool, typer.Option(help="Train the factors, or stop at the initialisation.")
]
ActivationMemory = Annotated[
    str,
    typer.Option(
        help="Host memory for activations between blocks; what exceeds it goes to files by OUT."
    ),
]


def names(values: str | None) -> tuple[str, ...] | None:
    """ "a, b" -> ("a", "b")"""
    return (
        None
        if values is None
        else tuple(part.strip() for part in values.split(",") if part.strip())
    )


def defaults(config: type) -> dict[str, Any]:
    """Return a command's defaults, to show them in its help."""
    return {field.name: field.default for field in dataclasses.fields(config)}


def at_revision(model: str, revision: str | None) -> str:
    """Return MODEL with its --revision; `lillama.models.hub` says what it refuses."""
    from lillama.models.hub import at_revision as named

    return named(model, revision)
