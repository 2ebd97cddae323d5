"""One run of `compress`: what all of its parts share, in one object."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lillama.checkpoint.folder import FolderWriter
from lillama.checkpoint.writer import CheckpointWriter
from lillama.compress.plan.plan import Plan
from lillama.compress.session.events import Events
from lillama.compress.session.processes import Processes
from lillama.compress.session.stop import StopRequest
from lillama.compress.teacher.activations import ActivationMemory
from lillama.compress.teacher.blocks import TeacherBlocks
from lillama.config import CompressConfig, Recipe
from lillama.data.sequences import TokenBlocks

__all__ = ["HEAD", "REST", "Counter", "Progress", "Session", "block_shard", "shard_names"]

# progress(stage, done, total): units are tokens run through a block
Progress = Callable[[str, int, int], None]
# names of the shards that hold what is outside the blocks
HEAD, REST = "head", "rest"


def block_shard(index: int) -> str:
    """Return the name of a block's shard."""
    return f"block-{index}"


def shard_names(num_blocks: int) -> list[str]:
    """Return the names of a compressed model's shards: one a block, two for what is outside."""
    return [*map(block_shard, range(num_blocks)), REST, HEAD]


class Counter:
    """Counts the tokens of one stretch of work and tells `progress` of them."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def __call__(self, stage: str, tokens: int) -> None:
        self.done += tokens
        if self.progress is not None:
            self.progress(stage, self.done, self.total)


@dataclass
class Session:
    """The command's options, the plan, the processes at work, who asks for an end and who is told;
    from `pipeline.py` on also the teacher, the training and held-out `sequences`, and the writer.

    folder: OUT, held by the first process. own_text: what the model wrote to calibrate on.
    """

    config: CompressConfig
    plan: Plan
    processes: Processes
    stop: StopRequest
    events: Events
    progress: Progress | None
    folder: FolderWriter | None = None
    own_text: Path | None = None
    teacher: TeacherBlocks = field(init=False)
    sequences: tuple[TokenBlocks, TokenBlocks] = field(init=False)
    writer: CheckpointWriter = field(init=False)

    @property
    def recipe(self) -> Recipe:
        return self.config.recipe

    @property
    def device(self) -> torch.device:
        return self.teacher.device

    @property
    def save_dtype(self) -> torch.dtype | None:
        """The dtype of what is written; None is the checkpoint's own."""
        return None if self.config.dtype == "auto" else getattr(torch, self.config.dtype)

    def counter(self, total: int) -> Counter:
        """Return a counter for a stretch of `total` tokens; only the first process tells."""
        return Counter(total, self.progress if self.processes.is_first else None)

    def new_memory(self) -> ActivationMemory:
        """Return where the hidden states of a stretch of work may live."""
        options = self.config
        return ActivationMemory.for_run(self.device, options.activation_memory, self.writer.staging)
