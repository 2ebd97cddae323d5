"""`lillama finetune`: its options and the call."""

from typing import Annotated

import typer

from lillama.cli.options import (
    BatchSize,
    DeviceOption,
    Json,
    Model,
    Out,
    Overwrite,
    Packing,
    Revision,
    Seed,
    SeqLen,
    at_revision,
    defaults,
)
from lillama.cli.output import print_json, print_rows, progress_bar
from lillama.config import FinetuneConfig

__all__ = ["finetune"]

_DEFAULTS = defaults(FinetuneConfig)
Epochs = Annotated[int, typer.Option(help="How often every token is seen.")]
LearningRate = Annotated[
    float | None,
    typer.Option(help="Of AdamW, at its peak; from the model's divergence if left out."),
]
OwnTokens = Annotated[int, typer.Option(help="Further tokens, which the base model writes.")]
TrainingTokens = Annotated[int, typer.Option(help="Training tokens.")]
Texts = Annotated[
    list[str],
    typer.Option(
        "--text",
        help="UTF-8 text or jsonl file; wikitext2, c4, slimorca or ultrachat; or a dataset of the "
        "Hub, hf:NAME[@REVISION][:CONFIG[:SPLIT]][#FIELD]; repeat for more.",
        show_default=False,
    ),
]


def finetune(
    model: Model,
    out: Out,
    base: Annotated[str, typer.Option(help="The dense base model.", show_default=False)],
    text: Texts,
    revision: Revision = None,
    tokens: TrainingTokens = _DEFAULTS["tokens"],
    own_tokens: OwnTokens = _DEFAULTS["own_tokens"],
    seq_len: SeqLen = _DEFAULTS["seq_len"],
    batch_size: BatchSize = _DEFAULTS["batch_size"],
    packing: Packing = _DEFAULTS["packing"],
    epochs: Epochs = _DEFAULTS["epochs"],
    learning_rate: LearningRate = _DEFAULTS["learning_rate"],
    seed: Seed = _DEFAULTS["seed"],
    device: DeviceOption = _DEFAULTS["device"],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a compressed MODEL end to end on its base model's predictions."""
    from lillama.compress.train.finetune import finetune as run

    with progress_bar() as progress:
        report = run(
            at_revision(model, revision),
            out,
            base=base,
            text=tuple(text),
            progress=progress,
            tokens=tokens,
            own_tokens=own_tokens,
            seq_len=seq_len,
            batch_size=batch_size,
            packing=packing,
            epochs=epochs,
            learning_rate=learning_rate,
            seed=seed,
            device=device,
            overwrite=overwrite,
        )
    if as_json:
        print_json(report)
    else:
        print_rows(str(out), report)
