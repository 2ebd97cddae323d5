"""Ranks for every target matrix under one budget: pure functions of shapes, no tensors.

An allocation is {name: rank} holding the factorised ones only. Every
strategy removes at least what is asked and at most one rank step more.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lillama.compress.plan.matrix import Matrix
from lillama.config import RANK_MULTIPLE, Strategy
from lillama.errors import InputError

__all__ = ["RankRules", "allocate", "allocate_globally", "max_removable", "removed"]


@dataclass(frozen=True, slots=True)
class RankRules:
    """Smallest rank of any matrix and the step of bottom.

    The published Mixtral run used 1024 and 256 at hidden_size 4096, that is hidden_size / 4 and /
    16.
    """

    min_rank: int
    step: int

    @classmethod
    def for_hidden_size(cls, hidden_size: int) -> "RankRules":
        def rounded(value: float) -> int:
            multiples = math.floor(value / RANK_MULTIPLE + 0.5)
            return max(1, multiples) * RANK_MULTIPLE

        return cls(min_rank=rounded(hidden_size / 4), step=rounded(hidden_size / 16))


def removed(matrices: Sequence[Matrix], ranks: dict[str, int]) -> int:
    """What an allocation frees of the budget."""
    return sum(matrix.saved(ranks[matrix.name]) for matrix in matrices if matrix.name in ranks)


def _candidates(matrix: Matrix, rules: RankRules) -> list[int]:
    """Ranks bottom may give, largest first; all of them remove parameters."""
    ranks = range(rules.min_rank, min(matrix.N, matrix.K), rules.step)
    return [rank for rank in reversed(ranks) if matrix.saved(rank) > 0]


def _layered(matrices: Sequence[Matrix], needed: int, rules: RankRules) -> dict[str, int]:
    """The published search: press a block's matrices step by step to min_rank, then the next
    block's."""
    moves = [
        (matrix.block, -rank, order, matrix)
        for order, matrix in enumerate(matrices)
        for rank in _candidates(matrix, rules)
    ]
    ranks: dict[str, int] = {}
    total = 0
    for _, negative_rank, _, matrix in sorted(moves, key=lambda move: move[:3]):
        if total >= needed:
            break
        before = matrix.saved(ranks[matrix.name]) if matrix.name in ranks else 0
        ranks[matrix.name] = -negative_rank
        total += matrix.saved(-negative_rank) - before
    return ranks


def _uniform_ranks(matrices: Sequence[Matrix], fraction: float) -> dict[str, int]:
    """Every matrix at `fraction` of its exact break-even rank, rounded down to the multiple."""
    ranks = {}
    for matrix in matrices:
        rank = math.floor(matrix.rank_at(fraction) / RANK_MULTIPLE + 1e-9) * RANK_MULTIPLE
        rank = max(RANK_MULTIPLE, rank)
        if matrix.saved(rank) > 0:
            ranks[matrix.name] = rank
    return ranks


def _uniform(matrices: Sequence[Matrix], needed: int) -> dict[str, int]:
    """The same share of break-even for all, then single steps back up while the target still
    holds."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if removed(matrices, _uniform_ranks(matrices, middle)) >= needed:
            low = middle
        else:
            high = middle
    ranks = _uniform_ranks(matrices, low)
    spare = removed(matrices, ranks) - needed
    order = sorted(
        (m for m in matrices if m.name in ranks),
        key=lambda m: (m.numbers(ranks[m.name]) / (m.N * m.K), m.block, m.name),
    )
    for matrix in order:
        rank = ranks[matrix.name]
        raised = rank + RANK_MULTIPLE
        to_dense = matrix.saved(raised) <= 0
        cost = matrix.saved(rank) if to_dense else matrix.saved(rank) - matrix.saved(raised)
        if cost > spare:
            continue
        spare -= cost
        if to_dense:
            del ranks[matrix.name]
        else:
            ranks[matrix.name] = raised
    return ranks


def max_removable(matrices: Sequence[Matrix], strategy: Strategy, rules: RankRules) -> int:
    """Parameters removed when every matrix has its smallest allowed rank."""
    if strategy in ("uniform", "global"):
        return removed(matrices, _uniform_ranks(matrices, 0.0))
    smallest = {m.name: min(c) for m in matrices if (c := _candidates(m, rules))}
    return removed(matrices, smallest)


def allocate(
    matrices: Sequence[Matrix],
    total_params: int,
    reduction: float,
    strategy: Strategy,
    rules: RankRules,
    what: str = "the model's parameters",
) -> dict[str, int]:
    """Choose ranks that free at least `reduction` of `total_params`, what the whole model counts in
    the budget (for an error: `what` that is), in the order of `matrices`; where the gauge is plain
    and what is stored counts, that is the share of parameters removed.
    "global" needs more than shapes: it gives the ranks of "uniform" here, see `allocate_globally`.

    Raises:
        InputError: the target cannot be reached; the message says what can.
    """
    needed = _needed(total_params, reduction)
    reachable = max_removable(matrices, strategy, rules)
    by_shape = strategy in ("uniform", "global")
    if needed > reachable:
        limit = math.floor(reachable / total_params * 1e4) / 1e4
        floor = RANK_MULTIPLE if by_shape else rules.min_rank
        raise InputError(
            f"--reduction {reduction} cannot be reached: with strategy {strategy} and ranks of at "
            f"least {floor} at most {limit} of {what} can be removed"
            + ("" if by_shape else "; lower --reduction or use --strategy uniform")
        )
    ranks = _uniform(matrices, needed) if by_shape else _layered(matrices, needed, rules)
    return {matrix.name: ranks[matrix.name] for matrix in matrices if matrix.name in ranks}


def _needed(total_params: int, reduction: float) -> int:
    return math.ceil(reduction * total_params - 1e-6)


@dataclass(frozen=True, slots=True)
class _Move:
    """From rank `before` (0: dense) to `after`: numbers saved, loss added."""

    matrix: Matrix
    before: int
    after: int
    saved: int
    loss: float

    @property
    def price(self) -> float:
        return self.loss / self.saved


def _moves(matrix: Matrix, losses: Sequence[float]) -> list[_Move]:
    """The steps down the lower convex hull of loss against numbers saved, cheapest first: with any
    budget the best ranks of several matrices lie on their hulls, up to one step."""
    points = [(0, 0.0, 0)]
    points += [
        (matrix.saved(rank), max(0.0, losses[rank // RANK_MULTIPLE - 1]), rank)
        for rank in reversed(matrix.ranks)
    ]
    hull: list[tuple[int, float, int]] = []
    for point in points:
        while len(hull) > 1:
            (x0, y0, _), (x1, y1, _) = hull[-2:]
            if (y1 - y0) * (point[0] - x0) < (point[1] - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append(point)
    return [
        _Move(matrix, low[2], high[2], high[0] - low[0], high[1] - low[1])
        for low, high in zip(hull, hull[1:], strict=False)
    ]


def _give_back(
    matrices: Sequence[Matrix],
    losses: Mapping[str, Sequence[float]],
    ranks: dict[str, int],
    spare: int,
) -> None:
    """Spend numbers removed in excess where a step up takes most loss off for each of them."""

    def loss(matrix: Matrix, rank: int) -> float:
        return losses[matrix.name][rank // RANK_MULTIPLE - 1] if rank else 0.0

    while True:
        best: tuple[float, Matrix, int, int] | None = None
        for matrix in matrices:
            rank = ranks.get(matrix.name, 0)
            if rank == 0:
                continue
            raised = rank + RANK_MULTIPLE if rank < matrix.break_even_rank else 0
            cost = matrix.saved(rank) - (matrix.saved(raised) if raised else 0)
            gain = (loss(matrix, rank) - loss(matrix, raised)) / cost
            if cost <= spare and gain > 0 and (best is None or gain > best[0]):
                best = gain, matrix, raised, cost
        if best is None:
            return
        _, matrix, raised, cost = best
        spare -= cost
        if raised:
            ranks[matrix.name] = raised
        else:
            del ranks[matrix.name]


def allocate_globally(
    matrices: Sequence[Matrix],
    total_params: int,
    reduction: float,
    losses: Mapping[str, Sequence[float]],
) -> dict[str, int]:
    """Ranks that remove at least `reduction` of `total_params` and add the least loss, where every
    matrix's loss adds to the others'.

    losses: for each matrix that may be factorised, its loss at each of `Matrix.ranks`; dense is 0.
    The budget goes to the steps that save most numbers for the loss they add. Within the step of
    one matrix of the best there is. Others stay dense. That the budget can be met is checked by
    `allocate`.
    """
    needed = _needed(total_params, reduction)
    allowed = [matrix for matrix in matrices if matrix.name in losses]
    moves = [move for matrix in allowed for move in _moves(matrix, losses[matrix.name])]
    ranks: dict[str, int] = {}
    total = 0
    # each matrix's own moves are in order of price already, and sorting keeps equal ones so
    for move in sorted(moves, key=lambda move: move.price):
        if total >= needed:
            break
        total += move.saved
        ranks[move.matrix.name] = move.after
    _give_back(allowed, losses, ranks, total - needed)
    return {matrix.name: ranks[matrix.name] for matrix in matrices if matrix.name in ranks}
