"""A weight that may be factorised: its shape, and what its factors take."""

import math
from dataclasses import dataclass
from typing import Literal

from lillama.config import RANK_MULTIPLE

__all__ = ["Matrix", "Side", "moment_side"]

Side = Literal["input", "output"]


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight [N, K] that may be factorised; `name` is its hub name without `.weight`. `block`
    is -1 for the token embeddings and the number of blocks for the output head.

    pivot: whether its factors are stored in the pivot gauge, R (K + N - R) numbers instead of
    R (K + N), and a mark for each of the outputs: N, of the embeddings K. counts: what one of its
    numbers counts in the budget; 1 where that is what is stored.
    """

    name: str
    block: int
    N: int
    K: int
    pivot: bool = False
    counts: int = 1

    def numbers(self, rank: int) -> int:
        """Parameters of its factors."""
        return rank * (self.N + self.K - (rank if self.pivot else 0))

    @property
    def mark_bytes(self) -> int:
        """What takes room beside its factors: one byte for each of the outputs."""
        outputs = self.K if self.block < 0 else self.N
        return outputs if self.pivot else 0

    @property
    def marks(self) -> int:
        """The same as whole numbers of 16 bits; counted so where numbers are wider, too."""
        return (self.mark_bytes + 1) // 2

    def rank_at(self, fraction: float) -> float:
        """The exact rank whose factors and marks take `fraction` of what the weight takes."""
        total = self.N + self.K
        if not self.pivot:
            return fraction * self.N * self.K / total
        left = max(0.0, fraction * self.N * self.K - self.marks)
        return (total - math.sqrt(max(0.0, total**2 - 4 * left))) / 2

    @property
    def ranks(self) -> range:
        """Those that save parameters."""
        return range(RANK_MULTIPLE, self.break_even_rank + 1, RANK_MULTIPLE)

    @property
    def break_even_rank(self) -> int:
        """Largest multiple of RANK_MULTIPLE that saves parameters; 0 when there is none."""
        largest = (self.N * self.K - 1) // (self.N + self.K)
        if self.pivot:
            largest = min(self.N, self.K) - 1
            while largest > 0 and self.saved(largest) <= 0:
                largest -= 1
        return largest // RANK_MULTIPLE * RANK_MULTIPLE

    def params_saved(self, rank: int) -> int:
        """Parameters removed by rank `rank`."""
        return self.N * self.K - self.numbers(rank)

    def saved(self, rank: int) -> int:
        """What rank `rank` frees of the budget, where the marks count too."""
        return self.counts * (self.params_saved(rank) - self.marks)


def moment_side(N: int, K: int) -> Side:
    """Return the smaller side of a weight [N, K]: the one whose moments its factors need."""
    return "input" if K <= N else "output"
