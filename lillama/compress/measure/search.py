"""Ranks that need more than shapes: measured once, entered into the journal, the same from then
on."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from lillama.checkpoint.shard_file import entries_of
from lillama.checkpoint.writer import CheckpointWriter
from lillama.compress.distributed import Ranks
from lillama.compress.measure.gradients import MatrixSensitivity
from lillama.compress.measure.sensitivity import measure_sensitivity, sample_of
from lillama.compress.plan.allocate import Matrix, allocate_globally
from lillama.compress.plan.plan import Plan
from lillama.compress.stop import StopRequest
from lillama.compress.teacher.activations import ActivationMemory
from lillama.compress.teacher.blocks import TeacherBlocks
from lillama.compress.train.outside import HEAD
from lillama.config import CompressConfig
from lillama.data.sequences import TokenBlocks
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


def _measure(
    options: CompressConfig,
    plan: Plan,
    teacher: TeacherBlocks,
    blocks: TokenBlocks,
    writer: CheckpointWriter,
    tick: Callable[[str, int], None],
) -> dict[str, object]:
    """The journal's record: ranks, the loss they cost, and what other ranks would."""
    losses: dict[str, list[float]] = {}

    def on_block(index: int, found: dict[str, MatrixSensitivity]) -> None:
        losses.update({name: value.losses for name, value in found.items()})
        if options.recipe.init == "fisher":
            kept = {name: value.gradient.cpu() for name, value in found.items()}
            if index < 0:
                kept = {f"{name}.gradient": value for name, value in kept.items()}
                moments = {name: value.moment for name, value in found.items()}
                kept |= {f"{n}.moment": m.cpu() for n, m in moments.items() if m is not None}
            writer.add_gradients(HEAD if index < 0 else f"block-{index}", entries_of(kept))

    memory = ActivationMemory.for_run(teacher.device, options.activation_memory, writer.staging)
    recipe = options.recipe
    matrices = _candidates(plan)
    measure_sensitivity(teacher, matrices, blocks, recipe, memory, tick, options.seed, on_block)
    ranks = plan.ranks
    if not plan.ranks_are_final:
        ranks = allocate_globally(plan.matrices, plan.budget_total, options.reduction, losses)
    chosen = {matrix.name: matrix.ranks.index(ranks[matrix.name])
              for matrix in plan.matrices if ranks.get(matrix.name) in matrix.ranks}  # fmt: skip
    increase = sum(losses[name][place] for name, place in chosen.items())
    curves = rank_losses(matrices, ranks, losses)
    return {"ranks": ranks, "loss_increase": increase, "rank_losses": curves}


def search_ranks(
    options: CompressConfig,
    plan: Plan,
    teacher: TeacherBlocks,
    blocks: TokenBlocks,
    writer: CheckpointWriter,
    ranks: Ranks,
    stop: StopRequest,
    progress: Callable[[str, int, int], None] | None,
) -> tuple[Plan, float | None]:
    """The plan with its final ranks, and the loss that they are expected to cost before training
    (nats a token; None where nothing was measured).

    Rank 0 measures; the others read its journal. What init "fisher" needs of each block lies in the
    writer's `gradients_of` afterwards.

    Raises:
        RunError: see `measure_sensitivity`; or the caller asked for an end.
    """
    recipe = options.recipe
    if plan.ranks_are_final and recipe.init != "fisher":
        return plan, None
    problem = None
    if ranks.is_first and writer.journal.last(kind="allocation") is None:
        sample = sample_of(blocks, recipe.gradient_tokens(plan.config.hidden_size)).input_ids
        first = max(0, min(matrix.block for matrix in _candidates(plan)))
        total = sample.numel() * (2 * len(teacher.blocks) - first)
        done = 0

        def tick(stage: str, tokens: int) -> None:
            nonlocal done
            done += tokens
            if progress is not None:
                progress(stage, done, total)
            stop.check()

        try:
            record = _measure(options, plan, teacher, blocks, writer, tick)
            writer.note("allocation", **record)
        except LillamaError as error:
            problem = error
    ranks.raise_together(problem)
    if not ranks.is_first:
        writer.reload()
    record = writer.journal.last(kind="allocation")
    assert record is not None
    increase = record["loss_increase"]
    logger.info("expected to cost %.4f nats a token before training", increase)
    return replace(plan, ranks=record["ranks"], ranks_are_final=True), increase
