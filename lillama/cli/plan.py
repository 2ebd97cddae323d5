"""`lillama plan`: its options and the call. Defaults are in config.py."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from lillama.cli.options import (
    ActivationMemory,
    BudgetOption,
    GaugeOption,
    Json,
    Model,
    PresetOption,
    Reduction,
    Revision,
    SeqLen,
    StrategyOption,
    TargetsOption,
    TokensOption,
    TrainOption,
    names,
)
from lillama.cli.output import print_json, print_rows
from lillama.config import PlanConfig, parse_bytes
from lillama.models.hub import at_revision

__all__ = ["plan"]

_PLAN: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(PlanConfig)}
ACTIVATION_MEMORY = f"{_PLAN['activation_memory'] // 2**30}GiB"


def plan(
    model: Model,
    reduction: Reduction,
    revision: Revision = None,
    preset: PresetOption = _PLAN["preset"],
    strategy: StrategyOption = None,
    targets: TargetsOption = None,
    gauge: GaugeOption = None,
    budget: BudgetOption = _PLAN["budget"],
    tokens: TokensOption = None,
    seq_len: SeqLen = _PLAN["seq_len"],
    train: TrainOption = _PLAN["train"],
    activation_memory: ActivationMemory = ACTIVATION_MEMORY,
    as_json: Json = False,
) -> None:
    """Show what a compression would do and need; reads headers only."""
    from lillama.compress.plan.plan import plan as run

    which: Any = {"preset": preset, "strategy": strategy, "gauge": gauge}
    document = run(
        at_revision(model, revision),
        reduction,
        targets=names(targets),
        budget=budget,
        tokens=tokens,
        seq_len=seq_len,
        train=train,
        activation_memory=parse_bytes("--activation-memory", activation_memory),
        **which,
    )
    _print(document, f"{model}, --reduction {reduction}", as_json)


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
