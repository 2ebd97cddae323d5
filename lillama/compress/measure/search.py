"""Ranks that need more than shapes: measured once, entered into the journal, the same from then
on."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from lillama.checkpoint.shard_file import entries_of
from lillama.checkpoint.writer import CheckpointWriter
from lillama.compress.measure.gradients import MatrixSensitivity
from lillama.compress.measure.sensitivity import measure_sensitivity, sample_of
from lillama.compress.plan.allocate import allocate_globally
from lillama.compress.plan.matrix import Matrix
from lillama.compress.plan.plan import Plan
from lillama.compress.session.session import HEAD, Session, block_shard
from lillama.errors import LillamaError

__all__ = ["MAX_POINTS", "measured_curves", "rank_losses", "search_ranks"]

logger = logging.getLogger(__name__)

# Points kept of a matrix's losses. A model of thousands of experts keeps fewer, so that its
# report.json stays at a few MB.
MAX_POINTS, MIN_POINTS, ALL_POINTS = 33, 9, 2**16


def _candidates(plan: Plan) -> Sequence[Matrix]:
    """The matrices whose gradients are needed."""
    if not plan.ranks_are_final:
        return plan.matrices
    return [matrix for matrix in plan.matrices if matrix.name in plan.ranks]


def rank_losses(
    matrices: Sequence[Matrix], ranks: Mapping[str, int], losses: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, float]]:
    """{matrix: {rank: loss left, nats a token, to 5 digits}}, as JSON holds it: at most MAX_POINTS
    of the measured `losses`, evenly spaced from the smallest rank to the largest, and the matrix's
    own of `ranks`. Matrices of one shape have the even ones in common."""
    limit = min(MAX_POINTS, max(MIN_POINTS, ALL_POINTS // max(1, len(losses))))
    found = {}
    for matrix in matrices:
        measured, last = losses.get(matrix.name, ()), len(matrix.ranks) - 1
        if not measured:
            continue
        if last < limit:
            places = set(range(last + 1))
        else:
            places = {round(i * last / (limit - 2)) for i in range(limit - 1)}
        if (chosen := ranks.get(matrix.name, 0)) in matrix.ranks:
            places.add(matrix.ranks.index(chosen))
        found[matrix.name] = {
            str(matrix.ranks[place]): float(f"{measured[place]:.5g}") for place in sorted(places)
        }
    return found


def measured_curves(writer: CheckpointWriter) -> dict[str, dict[str, float]] | None:
    """What `rank_losses` gave when the ranks were searched; None where nothing was measured."""
    record = writer.journal.last(kind="allocation")
    return None if record is None else record.get("rank_losses")


def _measure(session: Session, tick: Callable[[str, int], None]) -> dict[str, object]:
    """The journal's record: ranks, the loss they cost, and what other ranks would."""
    options, plan, recipe = session.config, session.plan, session.recipe
    losses: dict[str, list[float]] = {}

    def on_block(index: int, found: dict[str, MatrixSensitivity]) -> None:
        losses.update({name: value.losses for name, value in found.items()})
        if recipe.init == "fisher":
            kept = {name: value.gradient.cpu() for name, value in found.items()}
            if index < 0:
                kept = {f"{name}.gradient": value for name, value in kept.items()}
                moments = {name: value.moment for name, value in found.items()}
                kept |= {f"{n}.moment": m.cpu() for n, m in moments.items() if m is not None}
            shard = HEAD if index < 0 else block_shard(index)
            session.writer.add_gradients(shard, entries_of(kept))

    matrices = _candidates(plan)
    measure_sensitivity(
        session.teacher,
        matrices,
        session.sequences[0],
        recipe,
        session.new_memory(),
        tick,
        options.seed,
        on_block,
    )
    ranks = plan.ranks
    if not plan.ranks_are_final:
        ranks = allocate_globally(plan.matrices, plan.budget_total, options.reduction, losses)
    chosen = {matrix.name: matrix.ranks.index(ranks[matrix.name])
              for matrix in plan.matrices if ranks.get(matrix.name) in matrix.ranks}  # fmt: skip
    increase = sum(losses[name][place] for name, place in chosen.items())
    curves = rank_losses(matrices, ranks, losses)
    return {"ranks": ranks, "loss_increase": increase, "rank_losses": curves}


def search_ranks(session: Session) -> float | None:
    """Give the session's plan its final ranks, and return the loss that they are expected to cost
    before training (nats a token; None where nothing was measured).

    The first process measures; the others read its journal. What init "fisher" needs of each block
    lies in the writer's `gradients_of` afterwards.

    Raises:
        RunError: see `measure_sensitivity`; or the caller asked for an end.
    """
    plan, recipe, writer = session.plan, session.recipe, session.writer
    if plan.ranks_are_final and recipe.init != "fisher":
        return None
    problem = None
    if session.processes.is_first and writer.journal.last(kind="allocation") is None:
        tokens = recipe.gradient_tokens(plan.config.hidden_size)
        sample = sample_of(session.sequences[0], tokens).input_ids
        first = max(0, min(matrix.block for matrix in _candidates(plan)))
        count = session.counter(sample.numel() * (2 * len(session.teacher.blocks) - first))

        def tick(stage: str, tokens: int) -> None:
            count(stage, tokens)
            session.stop.check()

        try:
            writer.note("allocation", **_measure(session, tick))
        except LillamaError as error:
            problem = error
    session.processes.raise_together(problem)
    if not session.processes.is_first:
        writer.reload()
    record = writer.journal.last(kind="allocation")
    assert record is not None
    increase = record["loss_increase"]
    logger.info("expected to cost %.4f nats a token before training", increase)
    session.plan = replace(plan, ranks=record["ranks"], ranks_are_final=True)
    return increase
