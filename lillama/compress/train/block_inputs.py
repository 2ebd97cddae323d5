"""What a student block, or the output head, is trained and judged on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lillama.compress.teacher.activations import ActivationStore

__all__ = ["BlockInputs", "HeadInputs"]


@dataclass
class BlockInputs:
    """Hidden states of one set of sequences before a decoder block, and behind its teacher.

    teacher, student, target: stores of [n, T, H]; `student` is the same object as `teacher` until a
    block was compressed. mask [n, T] bool or None. `kwargs(rows)` gives the block's keyword
    arguments for a list of rows.
    """

    teacher: ActivationStore
    student: ActivationStore
    target: ActivationStore
    mask: Tensor | None
    kwargs: Callable[[Tensor], dict[str, Any]]

    @property
    def diverged(self) -> bool:
        return self.student is not self.teacher

    @property
    def background(self) -> bool:
        return any(s.background for s in (self.teacher, self.student, self.target))


@dataclass(frozen=True)
class HeadInputs:
    """What the last block puts out: teacher, student stores of [n, T, H]; mask [n, T] or None."""

    teacher: ActivationStore
    student: ActivationStore
    mask: Tensor | None

    def tokens(self, rows: Tensor) -> int:
        """Those that count."""
        if self.mask is None:
            return rows.numel() * self.student.shape[1]
        return int(self.mask[rows].sum())
