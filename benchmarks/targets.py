"""What the kernels are to reach on an NVIDIA H200, as data: medians against the same run's rivals.

A case covers several rows of results; it is judged by the worst of them.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["TARGETS", "Goal", "Target", "judge"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """One column: the rival's median over ours is at least `least` in a mode; without a rival, the
    percent of the ceiling is."""

    column: str
    least: float
    rival: str | None = None
    mode: str = "graph"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """rows: patterns of benchmark names with "(" for "[", which fnmatch would take for a set."""

    case: str
    rows: tuple[str, ...]
    goals: tuple[Goal, ...] = field(default=())


def _goals(cublas: float, compiled: float, dense: float | None, percent: float) -> tuple[Goal, ...]:
    goals = [
        Goal(column="eager", least=cublas, rival="cublas", mode="eager"),
        Goal(column="compiled", least=compiled, rival="compiled"),
    ]
    if dense is not None:
        goals.append(Goal(column="dense", least=dense, rival="dense"))
    return (*goals, Goal(column="ceiling", least=percent))


LINEAR = "bench_low_rank_linear("
TARGETS = [
    Target(
        case="Mixtral linear, decode M = 1 to 16, rank 1024",
        rows=tuple(f"{LINEAR}mixtral-8x7b-w?-R1024-M{m}-forward)" for m in (1, 4, 16)),
        goals=_goals(1.6, 1.25, 2.7, 80),
    ),
    Target(
        case="Mixtral linear, decode, rank 2048",
        rows=tuple(f"{LINEAR}mixtral-8x7b-w?-R2048-M{m}-forward)" for m in (1, 4, 16)),
        goals=_goals(1.4, 1.15, 1.45, 88),
    ),
    Target(
        case="Mamba and Phi linear, decode, rank 1024",
        rows=tuple(
            f"{LINEAR}{model}-*-R1024-M{m}-forward)"
            for model in ("mamba-2.8b", "phi-2")
            for m in (1, 4, 16)
        ),
        goals=_goals(2.0, 1.3, 1.8, 60),
    ),
    Target(
        case="Mixtral linear, prefill M >= 2048, rank 1024",
        rows=tuple(f"{LINEAR}mixtral-8x7b-w?-R1024-M{m}-forward)" for m in (2048, 4096, 16384)),
        goals=_goals(0.98, 0.98, 2.7, 85),
    ),
    Target(
        case="any linear, prefill M >= 2048",
        rows=tuple(f"{LINEAR}*-M{m}-forward)" for m in (2048, 4096, 16384)),
        goals=_goals(0.98, 0.98, None, 85),
    ),
    Target(
        case="loss forward and backward, [4096, 4096] bf16",
        rows=("bench_distill_loss(mixtral-8x7b-M4096)",),
        goals=(
            Goal(column="eager", least=14, rival="eager", mode="eager"),
            Goal(column="compiled", least=1.5, rival="compiled"),
            Goal(column="ceiling", least=88),
        ),
    ),
]


def _value(row: Mapping[str, Any], goal: Goal) -> float | None:
    """None where the row has no such rival."""
    if goal.rival is None:
        return row["percent_of_ceiling"]
    return row["speedup"].get(goal.mode, {}).get(goal.rival)


def judge(
    target: Target, rows: Sequence[tuple[str, Mapping[str, Any]]]
) -> list[tuple[Goal, float | None]]:
    """Each goal with the smallest value among the target's rows, None where nothing was measured.

    Args:
        rows: name and extra_info of the results.
    """
    covered = [
        row
        for name, row in rows
        if any(
            fnmatch.fnmatchcase(name.replace("[", "(").replace("]", ")"), p) for p in target.rows
        )
    ]
    judged = []
    for goal in target.goals:
        values = [value for row in covered if (value := _value(row, goal)) is not None]
        judged.append((goal, min(values) if values else None))
    return judged
