"""The folder that `lillama compress` writes: claimed before any work, opened when it is known what
goes into it, by the first of the processes for all."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch

from lillama.checkpoint_writer import CheckpointWriter, check_space
from lillama.compress.activations import ActivationMemory, stored_dtype
from lillama.compress.disk import disk_text, measures, peak_disk
from lillama.compress.plan import Plan
from lillama.compress.ranks import Ranks
from lillama.compress.run import pieces_of
from lillama.config import CompressConfig
from lillama.errors import LillamaError
from lillama.folder_writer import FolderWriter

__all__ = ["check_disk", "check_disk_again", "claimed", "how_to_go_on", "open_writer"]

logger = logging.getLogger(__name__)


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


def check_disk(
    options: CompressConfig,
    plan: Plan,
    device: torch.device,
    world_size: int = 1,
    writer: CheckpointWriter | None = None,
) -> None:
    """Refuse a run that its disk has no room for; `writer` has what is there already.

    Raises:
        RunError: too little is free; the message says what needs it.
    """
    assert plan.headers is not None
    done, present = None, 0
    if writer is not None:
        present = sum(f.stat().st_size for f in writer.staging.iterdir() if f.is_file())
        if writer.journal.last(kind="allocation") or not measures(plan, options):
            blocks = range(len(plan.block_paths))
            done = {index for index in blocks if writer.done(f"block-{index}") is not None}
    on_device = ActivationMemory.device_bytes(device)
    found = peak_disk(
        plan,
        dataclasses.replace(options, activation_memory=options.activation_memory + on_device),
        plan.headers,
        dtype=None if options.dtype == "auto" else getattr(torch, options.dtype),
        value_bytes=stored_dtype(device).itemsize,
        world_size=world_size,
        done=done,
    )
    text = disk_text(found)
    logger.info("the run needs of the disk %s", text)
    check_space(options.out, found["peak"] - present, "run", f" more ({text})")


def open_writer(
    options: CompressConfig,
    plan: Plan,
    recipe: dict[str, Any],
    device: torch.device,
    ranks: Ranks,
    folder: FolderWriter | None,
) -> CheckpointWriter:
    """Process 0 takes the unfinished folder up; what it refuses, all refuse."""
    pieces = pieces_of(len(plan.block_paths))
    writer, problem = None, None
    if ranks.is_first:
        try:
            writer = CheckpointWriter(options.out, recipe, pieces, folder=folder)
            check_disk(options, plan, device, ranks.world, writer)
        except LillamaError as error:
            problem = error
    if problem is not None and writer is not None:
        writer.__exit__(type(problem), problem, None)
    ranks.raise_together(problem)
    if writer is None:
        writer = CheckpointWriter(options.out, recipe, pieces, worker=ranks.rank)
    ranks.barrier()  # nobody adds to the journals before all have read them
    return writer


def check_disk_again(
    options: CompressConfig,
    plan: Plan,
    device: torch.device,
    ranks: Ranks,
    writer: CheckpointWriter,
) -> None:
    """As `check_disk`, now that the ranks are known: a block in training is as large as its largest
    rank makes it."""
    problem = None
    if ranks.is_first:
        try:
            check_disk(options, plan, device, ranks.world, writer)
        except LillamaError as error:
            problem = error
    ranks.raise_together(problem)


def how_to_go_on(writer: CheckpointWriter) -> str:
    """The end of an error message: what is kept, and what to do."""
    if not writer.journal.records:
        return ""
    done = sum(writer.done(piece) is not None for piece in writer.pieces)
    return (
        f"; {done} of {len(writer.pieces)} shards are finished in {writer.staging}: "
        "the same command goes on from there"
    )
