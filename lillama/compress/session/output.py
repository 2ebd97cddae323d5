"""The folder that `lillama compress` writes: claimed before any work, opened when it is known what
goes into it, by the first of the processes for all."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch

from lillama.checkpoint.folder import FolderWriter
from lillama.checkpoint.writer import CheckpointWriter, check_space
from lillama.compress.plan.disk import disk_text, measures, peak_disk
from lillama.compress.session.processes import Processes
from lillama.compress.session.session import Session, block_shard, shard_names
from lillama.compress.teacher.activations import ActivationMemory, stored_dtype
from lillama.config import CompressConfig
from lillama.errors import LillamaError
from lillama.models.hub import recorded

__all__ = ["check_disk", "check_disk_again", "claimed", "how_to_go_on", "open_writer"]

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def claimed(config: CompressConfig, processes: Processes) -> Iterator[FolderWriter | None]:
    """Hold OUT before anything is done for it. The first process holds it; what it refuses, all
    refuse."""
    claim = {"command": "compress", "options": recorded(config)}
    folder, problem = None, None
    if processes.is_first:
        try:
            # nothing to go on from where the whole is trained: its blocks have their own folder
            resumes = not config.finetune
            folder = FolderWriter(config.out, claim, overwrite=config.overwrite, resumes=resumes)
        except LillamaError as error:
            problem = error
    with contextlib.nullcontext() if folder is None else folder:
        processes.raise_together(problem)
        yield folder


def check_disk(
    session: Session, device: torch.device, writer: CheckpointWriter | None = None
) -> None:
    """Refuse a run that its disk has no room for; `writer` has what is there already.

    Raises:
        RunError: too little is free; the message says what needs it.
    """
    options, plan = session.config, session.plan
    assert plan.headers is not None
    done, present = None, 0
    if writer is not None:
        present = sum(f.stat().st_size for f in writer.staging.iterdir() if f.is_file())
        if writer.journal.last(kind="allocation") or not measures(plan, options):
            blocks = range(len(plan.block_paths))
            done = {index for index in blocks if writer.done(block_shard(index)) is not None}
    on_device = ActivationMemory.device_bytes(device)
    found = peak_disk(
        plan,
        dataclasses.replace(options, activation_memory=options.activation_memory + on_device),
        plan.headers,
        dtype=session.save_dtype,
        value_bytes=stored_dtype(device).itemsize,
        world_size=session.processes.world_size,
        done=done,
    )
    text = disk_text(found)
    logger.info("the run needs of the disk %s", text)
    check_space(options.out, found["peak"] - present, "run", f" more ({text})")


def open_writer(session: Session, recipe: dict[str, Any]) -> CheckpointWriter:
    """Take the unfinished folder up in the first process; what it refuses, all refuse."""
    options, processes = session.config, session.processes
    shards = shard_names(len(session.plan.block_paths))
    writer, problem = None, None
    if processes.is_first:
        try:
            writer = CheckpointWriter(options.out, recipe, shards, folder=session.folder)
            check_disk(session, session.device, writer)
        except LillamaError as error:
            problem = error
    if problem is not None and writer is not None:
        writer.__exit__(type(problem), problem, None)
    processes.raise_together(problem)
    if writer is None:
        writer = CheckpointWriter(options.out, recipe, shards, worker=processes.process)
    processes.barrier()  # nobody adds to the journals before all have read them
    return writer


def check_disk_again(session: Session) -> None:
    """As `check_disk`, now that the ranks are known: a block in training is as large as its largest
    rank makes it."""
    problem = None
    if session.processes.is_first:
        try:
            check_disk(session, session.device, session.writer)
        except LillamaError as error:
            problem = error
    session.processes.raise_together(problem)


def how_to_go_on(writer: CheckpointWriter) -> str:
    """Return the end of an error message: what is kept, and what to do."""
    if not writer.journal.records:
        return ""
    done = sum(writer.done(shard) is not None for shard in writer.shards)
    return (
        f"; {done} of {len(writer.shards)} shards are finished in {writer.staging}: "
        "the same command goes on from there"
    )
