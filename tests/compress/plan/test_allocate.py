"""Ranks under a budget: the promises of every strategy, over random shapes and reductions."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lillama.compress.plan.allocate import (
    RankRules,
    allocate,
    allocate_globally,
    max_removable,
    removed,
)
from lillama.compress.plan.matrix import Matrix
from lillama.config import RANK_MULTIPLE
from lillama.errors import InputError

STRATEGIES = ("uniform", "bottom")
few = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def models(draw: st.DrawFn) -> tuple[list[Matrix], int, RankRules]:
    """(matrices of up to 4 blocks, parameters of the whole model, rules)."""
    size = st.integers(20, 400)
    shapes = draw(st.lists(st.tuples(size, size), min_size=1, max_size=4))
    blocks = draw(st.integers(1, 4))
    matrices = [
        Matrix(f"layers.{block}.m{number}", block, N, K)
        for block in range(blocks)
        for number, (N, K) in enumerate(shapes)
    ]
    rest = draw(st.integers(0, 200_000))
    rules = RankRules.for_hidden_size(draw(st.sampled_from([32, 64, 128, 192])))
    return matrices, rest + sum(m.N * m.K for m in matrices), rules


def largest_step(matrices: list[Matrix], strategy: str, rules: RankRules) -> int:
    """The most parameters that one rank step of any matrix removes."""
    if strategy == "uniform":
        return max(RANK_MULTIPLE * (m.N + m.K) for m in matrices)
    steps = [rules.step * (m.N + m.K) for m in matrices]
    for m in matrices:
        candidates = [r for r in range(rules.min_rank, min(m.N, m.K), rules.step) if m.saved(r) > 0]
        if candidates:
            steps.append(m.saved(max(candidates)))
    return max(steps)


@pytest.mark.parametrize("strategy", STRATEGIES)
@few
@given(model=models(), share=st.floats(0.01, 1))
def test_allocate_removes_what_is_asked_and_at_most_one_step_more(strategy, model, share):
    matrices, params, rules = model
    reduction = share * max_removable(matrices, strategy, rules) / params
    ranks = allocate(matrices, params, reduction, strategy, rules)
    total = removed(matrices, ranks)
    assert total >= reduction * params - 1e-6
    if ranks:
        assert total < reduction * params + largest_step(matrices, strategy, rules)


@pytest.mark.parametrize("strategy", STRATEGIES)
@few
@given(model=models(), share=st.floats(0.01, 1))
def test_allocate_gives_ranks_that_are_allowed(strategy, model, share):
    matrices, params, rules = model
    reduction = share * max_removable(matrices, strategy, rules) / params
    ranks = allocate(matrices, params, reduction, strategy, rules)
    by_name = {m.name: m for m in matrices}
    assert list(ranks) == [m.name for m in matrices if m.name in ranks], "order of the matrices"
    smallest = RANK_MULTIPLE if strategy == "uniform" else rules.min_rank
    for name, rank in ranks.items():
        assert rank % RANK_MULTIPLE == 0
        assert smallest <= rank <= by_name[name].break_even_rank
        assert by_name[name].saved(rank) > 0


@few
@given(model=models(), share=st.floats(0.01, 0.99))
def test_allocate_layered_presses_blocks_in_order(model, share):
    """A block is touched only when those before it are at their smallest ranks; within a block no
    matrix is more than one step ahead."""
    matrices, params, rules = model
    reduction = share * max_removable(matrices, "bottom", rules) / params
    ranks = allocate(matrices, params, reduction, "bottom", rules)
    touched = sorted({m.block for m in matrices if m.name in ranks})
    if not touched:
        return
    last = max(touched)
    for m in matrices:
        can = any(m.saved(r) > 0 for r in range(rules.min_rank, min(m.N, m.K), rules.step))
        if m.block < last and can:
            assert ranks[m.name] == rules.min_rank
        if m.block > last:
            assert m.name not in ranks
    current = [m for m in matrices if m.block == last and m.name in ranks]
    levels = {}
    for m in current:
        levels.setdefault((m.N, m.K), []).append(ranks[m.name])
    assert all(max(same) - min(same) <= rules.step for same in levels.values())


@few
@given(model=models(), share=st.floats(0.01, 1))
def test_allocate_uniform_treats_equal_shapes_equally(model, share):
    matrices, params, rules = model
    reduction = share * max_removable(matrices, "uniform", rules) / params
    ranks = allocate(matrices, params, reduction, "uniform", rules)
    levels: dict[tuple[int, int], list[int]] = {}
    for m in matrices:
        # a dense matrix counts as the first multiple at which nothing is saved
        dense = m.break_even_rank + RANK_MULTIPLE
        rank = ranks[m.name] if m.name in ranks else dense
        levels.setdefault((m.N, m.K), []).append(rank)
    assert all(max(same) - min(same) <= RANK_MULTIPLE for same in levels.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
@few
@given(model=models())
def test_allocate_unreachable_reduction_names_a_maximum_that_works(strategy, model):
    matrices, params, rules = model
    reachable = max_removable(matrices, strategy, rules) / params
    with pytest.raises(InputError, match="cannot be reached") as caught:
        allocate(matrices, params, reachable + 0.001, strategy, rules)
    found = re.search(r"at most ([\d.e-]+) of the model's parameters", str(caught.value))
    assert found is not None, str(caught.value)
    maximum = float(found[1])
    assert reachable - 2e-4 < maximum <= reachable
    if maximum > 0:
        ranks = allocate(matrices, params, maximum, strategy, rules)
        assert removed(matrices, ranks) >= maximum * params - 1e-6


@pytest.mark.parametrize(
    ("hidden_size", "min_rank", "step"),
    [(4096, 1024, 256), (128, 32, 8), (192, 48, 16), (32, 8, 8), (100, 24, 8), (2, 8, 8)],
)
def test_rank_rules_scale_with_hidden_size(hidden_size, min_rank, step):
    assert RankRules.for_hidden_size(hidden_size) == RankRules(min_rank=min_rank, step=step)


@few
@given(N=st.integers(1, 500), K=st.integers(1, 500))
def test_matrix_break_even_rank_is_the_largest_multiple_that_saves(N, K):
    m = Matrix("m", 0, N, K)
    rank = m.break_even_rank
    assert rank % RANK_MULTIPLE == 0
    assert rank == 0 or m.saved(rank) > 0
    assert m.saved(rank + RANK_MULTIPLE) <= 0


def falling(matrix: Matrix, scale: float, power: float) -> list[float]:
    """A convex loss over `matrix.ranks`, 0 where nothing is left out."""
    top = min(matrix.N, matrix.K)
    return [scale * (1 - rank / top) ** power for rank in matrix.ranks]


def total_loss(losses: dict[str, list[float]], ranks: dict[str, int]) -> float:
    return sum(losses[name][rank // RANK_MULTIPLE - 1] for name, rank in ranks.items())


@few
@given(model=models(), share=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_global_removes_what_is_asked_and_wastes_no_step(model, share, seed):
    matrices, params, rules = model
    losses = {
        m.name: falling(m, 1.0 + (seed * (i + 1)) % 7, 1 + (seed + i) % 3)
        for i, m in enumerate(matrices)
    }
    reduction = share * max_removable(matrices, "global", rules) / params
    ranks = allocate_globally(matrices, params, reduction, losses)
    spare = removed(matrices, ranks) - reduction * params
    assert spare >= -1e-6
    for m in matrices:
        assert ranks.get(m.name, RANK_MULTIPLE) in m.ranks or not m.ranks
        # no step up fits any more
        if (rank := ranks.get(m.name)) is not None and rank < m.break_even_rank:
            assert m.saved(rank) - m.saved(rank + RANK_MULTIPLE) > spare


def test_global_is_the_best_there_is_up_to_one_step():
    """Against every combination of ranks of three matrices."""
    matrices = [Matrix("a", 0, 64, 64), Matrix("b", 0, 96, 48), Matrix("c", 1, 40, 120)]
    losses = {m.name: falling(m, s, 2.0) for m, s in zip(matrices, (1.0, 3.0, 0.5), strict=True)}
    params = sum(m.N * m.K for m in matrices)
    for reduction in (0.1, 0.25, 0.4, 0.6):
        found = allocate_globally(matrices, params, reduction, losses)
        choices = [[(m.name, rank) for rank in (0, *m.ranks)] for m in matrices]
        options = [
            {name: rank for name, rank in combination if rank}
            for combination in itertools.product(*choices)
        ]
        step = max(8 * (m.N + m.K) for m in matrices)
        fitting = [r for r in options if removed(matrices, r) >= reduction * params]
        best = min(total_loss(losses, ranks) for ranks in fitting)
        harder = [r for r in options if removed(matrices, r) >= reduction * params + step]
        bound = min(total_loss(losses, ranks) for ranks in harder)
        assert best <= total_loss(losses, found) <= bound


def test_global_takes_from_what_costs_nothing_and_leaves_the_rest_dense():
    matrices = [Matrix("free", 0, 64, 64), Matrix("dear", 1, 64, 64)]
    losses = {"free": [0.0] * 3, "dear": [9.0, 8.0, 7.0]}
    assert allocate_globally(matrices, 8192, 0.3, losses) == {"free": 8}
    # more than it has to give
    assert set(allocate_globally(matrices, 8192, 0.45, losses)) == {"free", "dear"}


def test_global_jumps_over_ranks_off_the_hull():
    """The first step below dense costs nearly all the loss: one matrix takes all of it."""
    matrices = [Matrix("a", 0, 64, 64), Matrix("b", 1, 64, 64)]
    losses = {name: [1.0, 0.99, 0.98] for name in "ab"}
    assert allocate_globally(matrices, 8192, 0.35, losses) == {"a": 8}
