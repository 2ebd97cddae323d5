"""Ranks that need more than shapes: measured once, entered into the journal, the same from then
on."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from lillama.checkpoint_writer import CheckpointWriter
from lillama.compress.activations import ActivationMemory
from lillama.compress.allocate import Matrix, allocate_globally
from lillama.compress.blocks import TeacherBlocks
from lillama.compress.gradients import MatrixSensitivity
from lillama.compress.outside import HEAD
from lillama.compress.plan import Plan
from lillama.compress.ranks import Ranks
from lillama.compress.sensitivity import measure_sensitivity, sample_of
from lillama.compress.stop import StopRequest
from lillama.config import CompressConfig
from lillama.data import TokenBlocks
from lillama.errors import LillamaError
from lillama.shard_file import entries_of

__all__ = ["search_ranks"]

logger = logging.getLogger(__name__)


def _candidates(plan: Plan) -> Sequence[Matrix]:
    """The matrices whose gradients are needed."""
    if not plan.ranks_are_final:
        return plan.matrices
    return [matrix for matrix in plan.matrices if matrix.name in plan.ranks]


def _measure(
    options: CompressConfig,
    plan: Plan,
    teacher: TeacherBlocks,
    blocks: TokenBlocks,
    writer: CheckpointWriter,
    tick: Callable[[str, int], None],
) -> dict[str, object]:
    """The journal's record: ranks and the loss they cost."""
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
        ranks = allocate_globally(plan.matrices, plan.params_before, options.reduction, losses)
    chosen = {matrix.name: matrix.ranks.index(ranks[matrix.name])
              for matrix in plan.matrices if ranks.get(matrix.name) in matrix.ranks}  # fmt: skip
    increase = sum(losses[name][place] for name, place in chosen.items())
    return {"ranks": ranks, "loss_increase": increase}


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
        sample = sample_of(blocks, recipe.sensitivity_tokens).input_ids.numel()
        first = max(0, min(matrix.block for matrix in _candidates(plan)))
        total = sample * (2 * len(teacher.blocks) - first)
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
