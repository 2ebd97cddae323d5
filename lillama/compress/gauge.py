"""From factors B [N, R] and A [R, K] to the pivot gauge: R rows of B become the identity."""

from typing import NamedTuple

import torch
from torch import Tensor

from lillama.pivots import order_of

__all__ = ["PivotFactors", "plain_of", "rounded", "to_pivot"]

# No number of C is larger. In bf16, of a trained Mamba's weights at ranks 64 and 96, factors so
# bounded round off 1.7 to 2.0 times what plain ones do; with a bound of 2 it is 2.2 to 2.4 times.
LARGEST = 1.05


class PivotFactors(NamedTuple):
    """W = cat([A, C A])[order]. A [R, K], C [N - R, R] in fp64, their rows in ascending order of
    their outputs; pivots [N] uint8, 1 for rows of A (see lillama/pivots.py). largest: max |C|."""

    A: Tensor
    C: Tensor
    pivots: Tensor
    largest: float

    @property
    def order(self) -> Tensor:
        """[N] int32, as `pivot_low_rank_linear` takes it."""
        return order_of(self.pivots, len(self.A))


def _first_pivots(B: Tensor) -> Tensor:
    """R rows of B [N, R] by elimination with row pivoting, as LU does it."""
    _, pivots, _ = torch.linalg.lu_factor_ex(B)
    rows = list(range(len(B)))
    for place, other in enumerate((pivots - 1).tolist()):
        rows[place], rows[other] = rows[other], rows[place]
    return torch.tensor(rows[: B.shape[1]], device=B.device)


def to_pivot(A: Tensor, B: Tensor) -> PivotFactors:
    """The same product with R of its rows as they are.

    Rows are exchanged until no number of C exceeds LARGEST (maxvol, Goreinov et al. 2010: each
    exchange multiplies the volume of the chosen rows by that number, so it ends). Where B has not
    full rank, what its chosen rows do not span is 0.
    """
    A, B = A.double(), B.double()
    N, R = B.shape
    chosen = _first_pivots(B)
    C = _coefficients(B, chosen)
    for _ in range(4 * N):
        largest, place = C.abs().flatten().max(0)
        if float(largest) <= LARGEST:
            break
        row, column = divmod(int(place), R)
        chosen[column] = row
        # a rank-one change of the inverse, as in the simplex method
        pivot_row = C[row].clone()
        pivot_row[column] -= 1.0
        C = C - torch.outer(C[:, column] / C[row, column], pivot_row)
    chosen = chosen.sort().values
    pivots = torch.zeros(N, dtype=torch.uint8, device=B.device)
    pivots[chosen] = 1
    C = _coefficients(B, chosen)[pivots == 0]  # without the rounding of the exchanges
    return PivotFactors(B[chosen] @ A, C, pivots, float(C.abs().max()) if len(C) else 0.0)


def rounded(found: PivotFactors, dtype: torch.dtype) -> PivotFactors:
    """As stored in `dtype`. A is rounded first and C fitted to what is left of it: the rounding of
    A would else reach every other output multiplied by C. Where the rows of A do not determine C,
    it stays as it was."""
    A = found.A.to(dtype)
    kept = A.double()
    target = (found.C @ found.A) @ kept.mT
    C, failed = torch.linalg.solve_ex(kept @ kept.mT, target.mT)
    fitted = C.mT if int(failed) == 0 and bool((C.abs() <= 2 * LARGEST).all()) else found.C
    return found._replace(A=A, C=fitted.to(dtype))


def _coefficients(B: Tensor, chosen: Tensor) -> Tensor:
    """Every row of B by the chosen ones: X [N, R] with X B[chosen] = B, of least norm."""
    rows = B[chosen]
    solved, failed = torch.linalg.solve_ex(rows.mT, B.mT)
    if int(failed) == 0 and bool(torch.isfinite(solved).all()):
        return solved.mT.contiguous()
    return B @ torch.linalg.pinv(rows)


def plain_of(A: Tensor, C: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """The same factors in the plain gauge: A and B [N, R], which holds the identity."""
    eye = torch.eye(C.shape[1], dtype=C.dtype, device=C.device)
    return A, torch.cat([eye, C])[order.long()]
