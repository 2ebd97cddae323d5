"""`lillama plan`: its options and the call."""

from collections.abc import Iterable
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
    at_revision,
    defaults,
    names,
)
from lillama.cli.output import print_json, print_rows
from lillama.config import PlanConfig, parse_bytes

__all__ = ["plan"]

_DEFAULTS = defaults(PlanConfig)
ACTIVATION_MEMORY = f"{_DEFAULTS['activation_memory'] // 2**30}GiB"


def plan(
    model: Model,
    reduction: Reduction,
    revision: Revision = None,
    preset: PresetOption = _DEFAULTS["preset"],
    strategy: StrategyOption = None,
    targets: TargetsOption = None,
    gauge: GaugeOption = None,
    budget: BudgetOption = _DEFAULTS["budget"],
    tokens: TokensOption = None,
    seq_len: SeqLen = _DEFAULTS["seq_len"],
    train: TrainOption = _DEFAULTS["train"],
    activation_memory: ActivationMemory = ACTIVATION_MEMORY,
    as_json: Json = False,
) -> None:
    """Show what a compression would do and need; reads headers only."""
    from lillama.compress.plan.document import plan as run

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


def _kind_and_layer(name: str) -> tuple[str, int]:
    """model.layers.3.mlp.experts.7.w1 -> (experts.*.w1, 3); model.head -> (head, -1)"""
    parts = name.split(".")
    at = next((at for at, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return parts[-1], -1
    inside = ["*" if part.isdecimal() else part for part in parts[at + 1 :]]
    return ".".join(inside[-3:]), int(parts[at])


def _span(numbers: Iterable[int]) -> str:
    low, high = min(found := list(numbers)), max(found)
    return f"{low}" if low == high else f"{low}-{high}"


def table_rows(matrices: list[dict[str, Any]]) -> list[list[str]]:
    """Return one row for each kind of matrix and range of layers that have it in one shape:
    kind, layers, how many, shape, ranks, break-even rank and the share of parameters kept."""
    groups: list[tuple[tuple[str, list[int]], list[int], list[dict[str, Any]]]] = []
    named = [(*_kind_and_layer(matrix["name"]), matrix) for matrix in matrices]
    for kind, layer, matrix in sorted(named, key=lambda one: one[:2]):
        key = kind, matrix["shape"]
        if not groups or groups[-1][0] != key or layer > groups[-1][1][-1] + 1:
            groups.append((key, [], []))
        groups[-1][1].append(layer)
        groups[-1][2].append(matrix)
    rows = []
    for (kind, (N, K)), layers, found in groups:
        before, after = (sum(m[f"params_{when}"] for m in found) for when in ("before", "after"))
        spans = [_span(m[key] for m in found) for key in ("rank", "break_even_rank")]
        where = "" if layers[0] < 0 else _span(layers)
        rows.append([kind, where, f"{len(found)}", f"{N}x{K}", *spans, f"{after / before:.0%}"])
    return rows


def _print(document: dict[str, Any], title: str, as_json: bool) -> None:
    if as_json:
        print_json(document)
        return
    table = Table(title=title, caption="one line a matrix: --json")
    for column in ("matrix", "layers", "number", "shape", "rank", "break-even", "kept"):
        table.add_column(column, justify="left" if column == "matrix" else "right")
    for row in table_rows(document.pop("matrices")):
        table.add_row(*row)
    Console().print(table)
    print_rows("whole model", document)
