"""The command line: parse, make one call, print. Logs and progress go to stderr, results to
stdout."""

import dataclasses
import logging
import signal
import sys
from typing import Annotated, Any

import typer
from huggingface_hub import constants
from huggingface_hub.utils import enable_progress_bars
from rich.logging import RichHandler

from lillama.cli_eval import evaluate
from lillama.cli_options import (
    ActivationMemory,
    BatchSize,
    BudgetOption,
    CalibrationTexts,
    CheckpointSeconds,
    DeviceOption,
    DtypeOption,
    Epochs,
    EventsOption,
    FormatOption,
    GaugeOption,
    Json,
    LearningRate,
    LossOption,
    Model,
    Out,
    Overwrite,
    OwnTokens,
    Packing,
    PresetOption,
    Reduction,
    Revision,
    Seed,
    SeqLen,
    StrategyOption,
    TargetsOption,
    Texts,
    TokensOption,
    TrainingTokens,
    TrainOption,
    names,
)
from lillama.cli_output import errors, print_json, print_rows, progress_bar
from lillama.cli_plan import plan
from lillama.cli_report import report
from lillama.cli_sample import sample
from lillama.cli_serve import serve
from lillama.cli_upstream import import_upstream
from lillama.config import (
    CompressConfig,
    ExportConfig,
    GenerateConfig,
    parse_bytes,
)
from lillama.config_finetune import FinetuneConfig
from lillama.errors import InputError, LillamaError
from lillama.hub import at_revision
from lillama.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="lillama",
    help="Low-rank compression of trained language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
# BadParameter < UsageError < ClickException: typer exports the first only, and may vendor click.
_CommandError: Any = typer.BadParameter.__mro__[2]


# Defaults live in config.py; the options below only show them.
def _defaults(config: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(config)}


_COMPRESS, _EXPORT, _FINETUNE, _GENERATE = map(
    _defaults, (CompressConfig, ExportConfig, FinetuneConfig, GenerateConfig)
)
ACTIVATION_MEMORY = f"{_COMPRESS['activation_memory'] // 2**30}GiB"


@app.command()
def compress(
    model: Model,
    out: Out,
    reduction: Reduction,
    text: CalibrationTexts = None,
    revision: Revision = None,
    tokens: TokensOption = None,
    seq_len: SeqLen = _COMPRESS["seq_len"],
    preset: PresetOption = _COMPRESS["preset"],
    strategy: StrategyOption = None,
    targets: TargetsOption = None,
    gauge: GaugeOption = None,
    budget: BudgetOption = _COMPRESS["budget"],
    loss: LossOption = _COMPRESS["loss"],
    packing: Packing = _COMPRESS["packing"],
    train: TrainOption = _COMPRESS["train"],
    seed: Seed = _COMPRESS["seed"],
    dtype: DtypeOption = _COMPRESS["dtype"],
    device: DeviceOption = _COMPRESS["device"],
    activation_memory: ActivationMemory = ACTIVATION_MEMORY,
    checkpoint_seconds: CheckpointSeconds = _COMPRESS["checkpoint_seconds"],
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
    if report.pop("rank", 0):
        return  # under torchrun the first one speaks
    if as_json:
        print_json(report)
        return
    blocks = report.pop("blocks")
    print_rows(f"{out}: {len(blocks)} blocks compressed", report)


app.command()(plan)


app.command("eval")(evaluate)


@app.command()
def finetune(
    model: Model,
    out: Out,
    base: Annotated[str, typer.Option(help="The dense base model.", show_default=False)],
    text: Texts,
    revision: Revision = None,
    tokens: TrainingTokens = _FINETUNE["tokens"],
    own_tokens: OwnTokens = _FINETUNE["own_tokens"],
    seq_len: SeqLen = _FINETUNE["seq_len"],
    batch_size: BatchSize = _FINETUNE["batch_size"],
    packing: Packing = _FINETUNE["packing"],
    epochs: Epochs = _FINETUNE["epochs"],
    learning_rate: LearningRate = _FINETUNE["learning_rate"],
    seed: Seed = _FINETUNE["seed"],
    device: DeviceOption = _FINETUNE["device"],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a compressed MODEL end to end on its base model's predictions."""
    from lillama.compress.finetune import finetune as run

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


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default=False)],
    revision: Revision = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = _GENERATE[
        "max_new_tokens"
    ],
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = _GENERATE["temperature"],
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = _GENERATE["seed"],
    device: DeviceOption = _GENERATE["device"],
) -> None:
    """Continue a prompt."""
    from lillama.serve.generate import generate as run

    text = run(
        at_revision(model, revision),
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        device=device,
    )
    print(prompt + text, flush=True)


@app.command()
def export(
    model: Model,
    out: Out,
    revision: Revision = None,
    format: FormatOption = _EXPORT["format"],
    as_json: Json = False,
) -> None:
    """Write a compressed MODEL in another format: dense, for tools that know nothing of lillama."""
    from lillama.export import export as run

    report = run(at_revision(model, revision), out, format=format)
    if as_json:
        print_json(report)
    else:
        print_rows(str(out), report)


app.command()(report)
app.command()(sample)
app.command()(serve)
app.command()(import_upstream)


def _version(shown: bool) -> None:
    if shown:
        print(f"lillama {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what is done, block by block.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    handler = RichHandler(console=errors, show_path=False)
    package = logging.getLogger("lillama")
    package.handlers = [handler]
    package.setLevel(logging.INFO if verbose else logging.WARNING)
    package.propagate = False
    if context.invoked_subcommand is None:
        raise InputError(
            "no command given; use compress, finetune, plan, eval, generate, export, report, "
            "sample, serve or import-upstream (see --help)"
        )


def _quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # the Hub's as well
    transformers_logging.set_verbosity_error()
    if errors.is_terminal and constants.HF_HUB_DISABLE_PROGRESS_BARS is not True:
        enable_progress_bars()  # of downloads


def main() -> None:
    """Entry point: errors become one line on stderr and an exit code, 2 usage and 1 failure."""
    import torch

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: clean up, then end
    try:
        _quiet_transformers()
        code = app(standalone_mode=False) or 0
        if code == 130:  # typer's silent answer to Ctrl-C
            raise KeyboardInterrupt
        sys.exit(code)
    except _CommandError as error:
        message, code = error.format_message(), error.exit_code
    except LillamaError as error:
        message, code = str(error), error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        message, code = "interrupted; nothing was left half-written", 1  # a second Ctrl-C
    except (MemoryError, torch.OutOfMemoryError):
        message, code = "out of memory; lower --seq-len or --tokens", 1
    except OSError as error:  # a folder without permission, a disk that went away
        message, code = str(error), 1
    print(f"lillama: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
