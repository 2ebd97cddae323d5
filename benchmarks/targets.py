"""What the kernels are to reach on an NVIDIA H200, as data: medians against the same run's rivals.

A case covers several rows of results and is judged by the worst of them; it is met only when all of
them were measured.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.shapes import EXPERTS, LINEARS, LOSSES, ExpertsShape, LinearShape

__all__ = ["COLUMNS", "GPU", "TARGETS", "Goal", "Target", "Verdict", "judge"]

# how the result files of the GPU that the targets are for begin
GPU = "nvidia-h200"
COLUMNS = {
    "eager": "two cuBLAS calls (loss: plain PyTorch; Mamba: transformers), all eager",
    "compiled": "torch.compile max-autotune",
    "factorised": "strongest with the same factors",
    "dense": "dense cuBLAS (experts: transformers; Mamba block: on our kernels)",
    "ceiling": "of the ceiling",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """In every row and in a mode, the fastest of the rivals takes `least` times as long as ours;
    without rivals, ours reaches `least` percent of the ceiling. column: one of COLUMNS."""

    column: str
    least: float
    rows: tuple[str, ...]
    rivals: tuple[str, ...] = ()
    mode: str = "graph"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    case: str
    goals: tuple[Goal, ...]


class Verdict(NamedTuple):
    """worst: the smallest value, None where no row was measured. num_rows: how many were."""

    goal: Goal
    worst: float | None
    num_rows: int

    @property
    def met(self) -> bool:
        """Every row was measured and reaches it."""
        every = self.num_rows == len(self.goal.rows)
        return every and self.worst is not None and self.worst >= self.goal.least


def _linears(keep: Callable[[LinearShape], bool]) -> list[LinearShape]:
    return [s for s in LINEARS if s.needs_gpu and not s.full and keep(s)]


def _names(shapes: Iterable[LinearShape]) -> tuple[str, ...]:
    return tuple(f"bench_low_rank_linear[{shape.name}-forward]" for shape in shapes)


def _dense_over_low_rank(shape: LinearShape) -> float:
    """How many times the weights, and at most the time, the dense layer has."""
    k, n = shape.in_features, shape.out_features
    return k * n / (shape.rank * (k + n))


def _goals(
    shapes: list[LinearShape], eager: float, compiled: float, dense: float, percent: float
) -> tuple[Goal, ...]:
    """With each column's target; the dense one only for layers that have so much to gain."""
    rows = _names(shapes)
    with_compiled = _names(shape for shape in shapes if shape.compiled)
    with_gain = _names(shape for shape in shapes if _dense_over_low_rank(shape) > dense)
    return (
        Goal(column="eager", least=eager, rows=rows, rivals=("cublas",), mode="eager"),
        Goal(column="compiled", least=compiled, rows=with_compiled, rivals=("compiled",)),
        Goal(column="dense", least=dense, rows=with_gain, rivals=("dense",)),
        Goal(column="ceiling", least=percent, rows=rows),
    )


def _decode(models: tuple[str, ...], rank: int) -> list[LinearShape]:
    return _linears(lambda s: s.name.startswith(models) and s.rank == rank and s.rows <= 16)


def _experts(keep: Callable[[ExpertsShape], bool], kind: str) -> tuple[str, ...]:
    """Rows of Mixtral's layer at rank 1024, evenly routed."""
    return tuple(
        f"bench_low_rank_experts[{s.name}-{kind}]"
        for s in EXPERTS
        if s.needs_gpu and s.rank == 1024 and not s.skewed and keep(s)
    )


def _experts_goals(
    rows: tuple[str, ...], factorised: float, dense: float, percent: float, decode: bool
) -> tuple[Goal, ...]:
    # a loop over the experts waits for the GPU, so it is timed with launches only
    loops = () if decode else ("cublas_loop", "compiled_loop")
    dense_rivals = ("dense", "dense_batched") if decode else ("dense",)
    return (
        Goal(column="factorised", least=factorised, rows=rows, rivals=("grouped_mm",), mode="graph")
        if decode
        else Goal(
            column="factorised", least=factorised, rows=rows, rivals=("grouped_mm", *loops),
            mode="eager",
        ),
        Goal(column="dense", least=dense, rows=rows, rivals=dense_rivals),
        Goal(column="ceiling", least=percent, rows=rows),
    )  # fmt: skip


SCAN = ("bench_selective_scan[mamba-2.8b-B1-T4096]",)
BLOCK = ("bench_mamba_block[mamba-2.8b-B1-T1]",)
LOSS = tuple(
    f"bench_distill_loss[{s.name}-training]"
    for s in LOSSES
    if (s.rows, s.hidden_size) == (4096, 4096)
)
TARGETS = [
    Target(
        case="Mixtral linear, decode M = 1 to 16, rank 1024",
        goals=_goals(_decode(("mixtral",), 1024), 1.6, 1.25, 2.7, 80),
    ),
    Target(
        case="Mixtral linear, decode M = 1 to 16, rank 2048",
        goals=_goals(_decode(("mixtral",), 2048), 1.4, 1.15, 1.45, 88),
    ),
    Target(
        case="Mamba and Phi linear, decode M = 1 to 16, rank 1024",
        goals=_goals(_decode(("mamba", "phi"), 1024), 2.0, 1.3, 1.8, 60),
    ),
    Target(
        case="any linear, prefill M >= 2048",
        goals=_goals(_linears(lambda s: s.rows >= 2048), 0.98, 0.98, 2.7, 85),
    ),
    Target(
        case="loss forward and backward, [4096, 4096]",
        goals=(
            Goal(column="eager", least=14, rows=LOSS, rivals=("eager",), mode="eager"),
            Goal(column="compiled", least=1.5, rows=LOSS, rivals=("compiled", "compiled_and_grad")),
            Goal(column="ceiling", least=88, rows=LOSS),
        ),
    ),
    Target(
        case="Mixtral experts, decode T = 1 to 16, rank 1024",
        goals=_experts_goals(_experts(lambda s: s.rows <= 16, "forward"), 1.5, 2.7, 80, True),
    ),
    Target(
        case="Mixtral experts, prefill T = 4096, rank 1024",
        goals=_experts_goals(_experts(lambda s: s.rows == 4096, "forward"), 1.2, 2.6, 75, False),
    ),
    Target(
        case="Mixtral experts, forward and backward T = 4096, rank 1024",
        goals=_experts_goals(_experts(lambda s: s.rows == 4096, "training"), 1.2, 2.5, 70, False),
    ),
    Target(
        case="selective scan of Mamba-2.8B, forward and backward, 4096 tokens",
        goals=(
            Goal(column="eager", least=50, rows=SCAN, rivals=("transformers_eager",), mode="eager"),
            Goal(column="ceiling", least=60, rows=SCAN, mode="eager"),
        ),
    ),
    Target(
        case="Mamba-2.8B block, decode of one token",
        goals=(
            Goal(
                column="eager", least=3, rows=BLOCK, rivals=("transformers_low_rank",), mode="eager"
            ),
            Goal(column="dense", least=1.3, rows=BLOCK, rivals=("dense_on_ours",)),
        ),
    ),
]


def _value(row: Mapping[str, Any], goal: Goal) -> float | None:
    """None where the row has not all that the goal compares."""
    found = row["modes"].get(goal.mode, {})
    if not {"ours", *goal.rivals} <= found.keys():
        return None
    if not goal.rivals:
        return found["ours"]["percent_of_ceiling"]
    return min(found[rival]["median_us"] for rival in goal.rivals) / found["ours"]["median_us"]


def judge(target: Target, rows: Mapping[str, Mapping[str, Any]]) -> list[Verdict]:
    """Each goal of the target beside what was measured.

    Args:
        rows: extra_info of the results by name.
    """
    verdicts = []
    for goal in target.goals:
        values = [
            value
            for name in goal.rows
            if name in rows and (value := _value(rows[name], goal)) is not None
        ]
        verdicts.append(Verdict(goal, min(values, default=None), len(values)))
    return verdicts
