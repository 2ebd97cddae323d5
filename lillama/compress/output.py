"""The folder that `lillama compress` writes: claimed before any work, opened when it is known what
goes into it, by the first of the processes for all."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from lillama.checkpoint_writer import CheckpointWriter, check_space
from lillama.compress.plan import Plan
from lillama.compress.ranks import Ranks
from lillama.compress.run import pieces_of
from lillama.config import CompressConfig
from lillama.errors import LillamaError
from lillama.folder_writer import FolderWriter

__all__ = ["claimed", "how_to_go_on", "open_writer"]


@contextlib.contextmanager
def claimed(config: CompressConfig, ranks: Ranks) -> Iterator[FolderWriter | None]:
    """OUT, held before anything is done for it. Process 0 holds it; what it refuses, all refuse."""
    claim = {"command": "compress", "options": config.recorded()}
    folder, problem = None, None
    if ranks.is_first:
        try:
            # nothing to go on from where the whole is trained: its blocks have their own folder
            resumes = not config.finetune
            folder = FolderWriter(config.out, claim, overwrite=config.overwrite, resumes=resumes)
        except LillamaError as error:
            problem = error
    with contextlib.nullcontext() if folder is None else folder:
        ranks.raise_together(problem)
        yield folder


def _bytes_to_write(options: CompressConfig, plan: Plan, writer: CheckpointWriter) -> int:
    """What is still to come of the result."""
    item = plan.item_bytes
    if options.dtype != "auto":
        item = getattr(torch, options.dtype).itemsize
    written = sum(header.num_bytes for header in writer.headers.values())
    return round(plan.params_after * item) - written


def open_writer(
    options: CompressConfig,
    plan: Plan,
    recipe: dict[str, Any],
    num_blocks: int,
    ranks: Ranks,
    folder: FolderWriter | None,
) -> CheckpointWriter:
    """Process 0 takes the unfinished folder up; what it refuses, all refuse."""
    pieces = pieces_of(num_blocks)
    writer, problem = None, None
    if ranks.is_first:
        try:
            writer = CheckpointWriter(options.out, recipe, pieces, folder=folder)
            check_space(options.out, _bytes_to_write(options, plan, writer))
        except LillamaError as error:
            problem = error
    if problem is not None and writer is not None:
        writer.__exit__(type(problem), problem, None)
    ranks.raise_together(problem)
    if writer is None:
        writer = CheckpointWriter(options.out, recipe, pieces, worker=ranks.rank)
    ranks.barrier()  # nobody adds to the journals before all have read them
    return writer


def how_to_go_on(writer: CheckpointWriter) -> str:
    """The end of an error message: what is kept, and what to do."""
    if not writer.journal.records:
        return ""
    done = sum(writer.done(piece) is not None for piece in writer.pieces)
    return (
        f"; {done} of {len(writer.pieces)} shards are finished in {writer.staging}: "
        "the same command goes on from there"
    )
