"""`lillama plan`: its options and the call, with --advise the advice. Defaults are in config.py and
config_advice.py."""

import dataclasses
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lillama.cli_advice import print_advice
from lillama.cli_options import (
    ActivationMemory,
    BudgetOption,
    DeviceOption,
    GaugeOption,
    Json,
    Model,
    Revision,
    SeqLen,
    StrategyOption,
    TargetsOption,
    TokensOption,
    TrainOption,
    names,
)
from lillama.cli_output import print_json, print_rows, progress_bar
from lillama.config import PlanConfig, parse_bytes
from lillama.config_advice import AdviceConfig
from lillama.errors import InputError
from lillama.hub import at_revision

__all__ = ["plan"]


def _defaults(config: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(config)}


_PLAN, _ADVICE = _defaults(PlanConfig), _defaults(AdviceConfig)
ACTIVATION_MEMORY = f"{_PLAN['activation_memory'] // 2**30}GiB"

Reduction = Annotated[
    float | None,
    typer.Option(
        help="Share of the whole model's parameters to remove, between 0 and 1; with --advise it "
        "may be left out.",
        show_default=False,
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="default, fast, whitened or paper; when left out default, or what the advice is.",
        show_default=False,
    ),
]
Advise = Annotated[
    bool,
    typer.Option(
        "--advise", help="Look at the weights and measure: spectra, forecasts, a recommendation."
    ),
]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        help="With --advise: calibration text, from which quality is predicted; repeat for more.",
        show_default=False,
    ),
]
Retain = Annotated[
    float | None,
    typer.Option(
        help="With --advise: base perplexity divided by perplexity to keep; "
        f"{_ADVICE['retain']} when left out.",
        show_default=False,
    ),
]


def plan(
    model: Model,
    reduction: Reduction = None,
    revision: Revision = None,
    preset: Preset = None,
    strategy: StrategyOption = None,
    targets: TargetsOption = None,
    gauge: GaugeOption = None,
    budget: BudgetOption = _PLAN["budget"],
    tokens: TokensOption = None,
    seq_len: SeqLen = _PLAN["seq_len"],
    train: TrainOption = _PLAN["train"],
    activation_memory: ActivationMemory = ACTIVATION_MEMORY,
    advise: Advise = False,
    text: Texts = None,
    retain: Retain = None,
    device: DeviceOption = _ADVICE["device"],
    as_json: Json = False,
) -> None:
    """Show what a compression would do and need; reads headers only, but with --advise."""
    model = at_revision(model, revision)
    shared = {
        "targets": names(targets),
        "gauge": gauge,
        "tokens": tokens,
        "seq_len": seq_len,
        "activation_memory": parse_bytes("--activation-memory", activation_memory),
    }
    if advise:
        changes = {
            "--no-train": not train,
            f"--strategy {strategy}": strategy not in (None, "global"),
            f"--budget {budget}": budget != _PLAN["budget"],
        }
        if wrong := [option for option, is_given in changes.items() if is_given]:
            raise InputError(
                "--advise compares presets fast and default as they are; leave "
                f"{', '.join(wrong)} out"
            )
        _advise(model, reduction, preset, text or [], retain, device, as_json, shared)
        return
    only = {"--text": text, "--retain": retain, "--device": device != _ADVICE["device"]}
    if given := [option for option, value in only.items() if value]:
        raise InputError(f"{', '.join(given)} of plan need --advise; add it or leave them out")
    if reduction is None:
        raise InputError("Missing option '--reduction'; give it, or --advise, which proposes one")
    from lillama.compress.plan import plan as run

    chosen: Any = preset or _PLAN["preset"]
    which: Any = strategy
    _print(
        run(model, reduction, preset=chosen, strategy=which, train=train, budget=budget, **shared),
        f"{model}, --reduction {reduction}",
        as_json,
    )


def _advise(
    model: str,
    reduction: float | None,
    preset: str | None,
    text: list[str],
    retain: float | None,
    device: str,
    as_json: bool,
    shared: dict[str, Any],
) -> None:
    from lillama.compress.advise import advise as run

    with progress_bar() as progress:
        document = run(
            model,
            reduction=reduction,
            text=tuple(text),
            progress=progress,
            preset=preset,
            retain=_ADVICE["retain"] if retain is None else retain,
            device=device,
            **shared,
        )
    if as_json:
        print_json(document)
    else:
        print_advice(str(model), document)


def _print(document: dict[str, Any], title: str, as_json: bool) -> None:
    if as_json:
        print_json(document)
        return
    table = Table(title=title)
    for column in ("matrix", "shape", "rank", "break-even", "params before", "params after"):
        table.add_column(column, justify="left" if column == "matrix" else "right")
    for row in document.pop("matrices"):
        shape = f"{row['shape'][0]} x {row['shape'][1]}"
        numbers = (row["rank"], row["break_even_rank"], row["params_before"], row["params_after"])
        table.add_row(row["name"], shape, *(f"{number:,}" for number in numbers))
    Console().print(table)
    print_rows("whole model", document)
