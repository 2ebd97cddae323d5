"""Singular values of a model's matrices, beside those of random matrices of the same size and norm:
where both are alike, a factorisation has nothing to hold on to.

The squared singular values of a random matrix [N, K] with entries of variance s^2 fill the interval
of Marchenko and Pastur, s^2 (sqrt(N) +- sqrt(K))^2, with a known density. A weight's own spectrum
says less than `sensitivity`, which weighs it with inputs and gradients, but needs no text.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lillama.compress.allocate import Matrix

__all__ = ["NEAR_RANDOM", "Spectrum", "random_share", "sample_matrices", "spectrum_of"]

# FLOPs that a sample may cost: about a minute of two CPU cores
SAMPLE_FLOPS = 2e12
# Near-random: the factors of half a weight's size leave at least so much of the error that they
# leave of a random matrix.
NEAR_RANDOM = 0.9
# points of a spectrum that are kept
POINTS = 64


def kind_of(name: str) -> str:
    """ "w1" of any expert, "in_proj" of any block."""
    return name.rpartition(".")[2]


def _flops(matrix: Matrix) -> float:
    """Of the Gram matrix and its eigenvalues, which come at a fourth of its speed."""
    side = min(matrix.N, matrix.K)
    return 2.0 * matrix.N * matrix.K * side + 4 * 4 / 3 * side**3


def sample_matrices(matrices: Sequence[Matrix]) -> list[Matrix]:
    """All where that is cheap, else of each kind the middle one, then the first and the last, then
    what SAMPLE_FLOPS still allow; in the order of `matrices`. One of each kind is always there, but
    for those of the vocabulary where they are very large."""
    kinds: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        kinds.setdefault(kind_of(matrix.name), []).append(matrix)
    queues = []
    for group in kinds.values():
        if len(group) == 1 and _flops(group[0]) > SAMPLE_FLOPS:
            continue
        middle = group.pop(len(group) // 2)
        ends = [group.pop(0), *([group.pop()] if group else [])] if group else []
        queues.append([middle, *ends, *group])
    chosen: set[str] = set()
    spent = 0.0
    for place in range(max(map(len, queues), default=0)):
        for queue in queues:
            if place >= len(queue):
                continue
            spent += _flops(queue[place])
            if place and spent > SAMPLE_FLOPS:
                return [m for m in matrices if m.name in chosen]
            chosen.add(queue[place].name)
    return [m for m in matrices if m.name in chosen]


def random_share(N: int, K: int, rank: float) -> float:
    """Share of the squared norm of a random matrix [N, K] that its first `rank` singular values
    have, for large N and K.

    With b = min / max of N and K and squared singular values, over max s^2, at
    x = 1 + b + 2 sqrt(b) cos t, those above x are F(t) of all and have E(t) of the norm:
    F = integral from 0 to t of 2 sin^2 u / (pi x(u)), E = (t - sin t cos t) / pi.
    """
    b = min(N, K) / max(N, K)
    t = torch.linspace(0, math.pi, 8193, dtype=torch.float64)
    middle = (t[1:] + t[:-1]) / 2  # never where x is 0
    density = 2 * middle.sin() ** 2 / (math.pi * (1 + b + 2 * math.sqrt(b) * middle.cos()))
    count = torch.cat([torch.zeros(1, dtype=t.dtype), density.cumsum(0) * (t[1] - t[0])])
    place = min(int(torch.searchsorted(count, rank / min(N, K))), len(t) - 1)
    angle = float(t[place])
    return (angle - math.sin(angle) * math.cos(angle)) / math.pi


@dataclass(frozen=True)
class Spectrum:
    """Of one weight. values [min(N, K)]: its singular values, largest first, in fp64."""

    matrix: Matrix
    kind: str
    values: Tensor

    def share(self, rank: float) -> float:
        """Of the squared norm within `rank`; 1 where there is none at all."""
        squares = self.values**2
        total = float(squares.sum())
        return float(squares[: math.floor(rank)].sum()) / total if total else 1.0

    @property
    def half_rank(self) -> int:
        """Whose factors have half the numbers of the weight."""
        return max(1, math.floor(self.matrix.rank_at(0.5)))

    @property
    def near_random(self) -> bool:
        N, K, rank = self.matrix.N, self.matrix.K, self.half_rank
        return 1 - self.share(rank) >= NEAR_RANDOM * (1 - random_share(N, K, rank))

    @property
    def above_edge(self) -> int:
        """Singular values larger than any of a random matrix of the same size and norm."""
        N, K = self.matrix.N, self.matrix.K
        scale = float((self.values**2).sum() / (N * K)) ** 0.5
        return int((self.values > scale * (math.sqrt(N) + math.sqrt(K))).sum())

    def as_json(self) -> dict[str, Any]:
        N, K = self.matrix.N, self.matrix.K
        places = torch.linspace(0, len(self.values) - 1, min(POINTS, len(self.values)))
        points = self.values[places.round().long()]
        break_even = self.matrix.break_even_rank
        return {
            "name": self.matrix.name,
            "kind": self.kind,
            "shape": [N, K],
            # evenly spaced from the largest to the smallest
            "singular_values": [float(f"{value:.4g}") for value in points.tolist()],
            "half_rank": self.half_rank,
            "energy": round(self.share(self.half_rank), 4),
            "random_energy": round(random_share(N, K, self.half_rank), 4),
            "break_even_rank": break_even,
            "energy_at_break_even": round(self.share(break_even), 4),
            "random_energy_at_break_even": round(random_share(N, K, break_even), 4),
            "above_edge": self.above_edge,
            "near_random": self.near_random,
        }


def spectrum_of(matrix: Matrix, read: Callable[[str], Tensor], device: torch.device) -> Spectrum:
    """From the eigenvalues of W W^T or W^T W in fp64: what lies below 1e-8 of the largest is noise.

    read(name): the weight [N, K] of the matrix of that name, in any dtype.
    """
    weight = read(matrix.name).to(device, torch.float64)
    gram = weight @ weight.mT if matrix.N <= matrix.K else weight.mT @ weight
    values = torch.linalg.eigvalsh(gram).clamp_min(0).flip(0).sqrt()
    return Spectrum(matrix, kind_of(matrix.name), values.cpu())
