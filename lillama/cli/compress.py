"""`lillama compress`: its options and the call."""

from pathlib import Path
from typing import Annotated

import typer

from lillama.cli.options import (
    ActivationMemory,
    BudgetOption,
    DeviceOption,
    DtypeOption,
    GaugeOption,
    Json,
    Model,
    Out,
    Overwrite,
    Packing,
    PresetOption,
    Reduction,
    Revision,
    Seed,
    SeqLen,
    StrategyOption,
    TargetsOption,
    TokensOption,
    TrainOption,
    at_revision,
    defaults,
    names,
)
from lillama.cli.output import print_json, print_rows, progress_bar
from lillama.config import CompressConfig, parse_bytes

__all__ = ["compress"]

_DEFAULTS = defaults(CompressConfig)
CalibrationTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        help="UTF-8 text or jsonl file; wikitext2, c4, slimorca or ultrachat; or a "
        "dataset of the Hub, hf:NAME[@REVISION][:CONFIG[:SPLIT]][#FIELD]; repeat for more. Without "
        "any the model writes its own.",
        show_default=False,
    ),
]
LossOption = Annotated[
    str, typer.Option(help="joint, teacher or student: whose inputs the student block is fed.")
]
CheckpointSeconds = Annotated[
    float, typer.Option(help="How often the state inside a block is saved.")
]
EventsOption = Annotated[
    Path | None, typer.Option(help="File to append JSON lines to: losses, blocks, the end.")
]
ACTIVATION_MEMORY = f"{_DEFAULTS['activation_memory'] // 2**30}GiB"


def compress(
    model: Model,
    out: Out,
    reduction: Reduction,
    text: CalibrationTexts = None,
    revision: Revision = None,
    tokens: TokensOption = None,
    seq_len: SeqLen = _DEFAULTS["seq_len"],
    preset: PresetOption = _DEFAULTS["preset"],
    strategy: StrategyOption = None,
    targets: TargetsOption = None,
    gauge: GaugeOption = None,
    budget: BudgetOption = _DEFAULTS["budget"],
    loss: LossOption = _DEFAULTS["loss"],
    packing: Packing = _DEFAULTS["packing"],
    train: TrainOption = _DEFAULTS["train"],
    seed: Seed = _DEFAULTS["seed"],
    dtype: DtypeOption = _DEFAULTS["dtype"],
    device: DeviceOption = _DEFAULTS["device"],
    activation_memory: ActivationMemory = ACTIVATION_MEMORY,
    checkpoint_seconds: CheckpointSeconds = _DEFAULTS["checkpoint_seconds"],
    events: EventsOption = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make MODEL smaller: factorise its weights and train the factors block by block."""
    from lillama.compress.pipeline import compress as run

    with progress_bar() as progress:
        report = run(
            at_revision(model, revision),
            out,
            reduction=reduction,
            text=tuple(text or ()),
            progress=progress,
            tokens=tokens,
            seq_len=seq_len,
            preset=preset,
            strategy=strategy,
            targets=names(targets),
            gauge=gauge,
            budget=budget,
            loss=loss,
            packing=packing,
            train=train,
            seed=seed,
            dtype=dtype,
            device=device,
            activation_memory=parse_bytes("--activation-memory", activation_memory),
            checkpoint_seconds=checkpoint_seconds,
            events=events,
            overwrite=overwrite,
        )
    if report.pop("process", 0):
        return  # under torchrun the first one speaks
    if as_json:
        print_json(report)
        return
    blocks = report.pop("blocks")
    print_rows(f"{out}: {len(blocks)} blocks compressed", report)
