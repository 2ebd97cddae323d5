"""From factors B [N, R] and A [R, K] to the pivot gauge: R rows of B become the identity."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lillama.checkpoint.names import FACTOR_A, FACTOR_B, FACTOR_C, PIVOT_MASK
from lillama.checkpoint.pivots import permutation_of, pivot_rows

__all__ = ["PivotFactors", "pivot_tensors", "plain_tensors", "rounded", "to_pivot"]

# No number of C is larger. In bf16, of a trained Mamba's weights at ranks 64 and 96, factors so
# bounded round off 1.7 to 2.0 times what plain ones do; with a bound of 2 it is 2.2 to 2.4 times.
LARGEST = 1.05


class PivotFactors(NamedTuple):
    """W = cat([A, C A])[permutation]. A [R, K], C [N - R, R] in fp64, their rows in ascending order
    of their outputs; pivot_mask [N] uint8, 1 for rows of A (see `pivots.py`). largest: max |C|."""

    A: Tensor
    C: Tensor
    pivot_mask: Tensor
    largest: float

    @property
    def permutation(self) -> Tensor:
        """[N] int32, as `pivot_low_rank_linear` takes it."""
        return permutation_of(self.pivot_mask, len(self.A))


def _first_pivots(B: Tensor) -> Tensor:
    """Return R rows of B [N, R] by elimination with row pivoting, as LU does it."""
    _, pivots, _ = torch.linalg.lu_factor_ex(B)
    rows = list(range(len(B)))
    for place, other in enumerate((pivots - 1).tolist()):
        rows[place], rows[other] = rows[other], rows[place]
    return torch.tensor(rows[: B.shape[1]], device=B.device)


def _exchange(C: Tensor, chosen: Tensor) -> None:
    """Change `chosen` [R], and C [N, R] with it, until no number of C exceeds LARGEST.

    It goes in rounds, among the rows that have larger ones: of an output head these are few, and
    all its other rows follow in one product instead of one for each exchange.
    """
    N, R = C.shape
    left = 4 * N
    while left > 0:
        rows = (torch.maximum(C.amax(1), -C.amin(1)) > LARGEST).nonzero()[:, 0]
        if len(rows) == 0:
            return
        part, changed = C[rows], {}
        while left > 0:
            largest, place = part.abs().flatten().max(0)
            if float(largest) <= LARGEST:
                break
            row, column = divmod(int(place), R)
            changed[column] = int(rows[row])
            # a rank-one change of the inverse, as in the simplex method
            pivot_row = part[row].clone()
            pivot_row[column] -= 1.0
            part.addr_(part[:, column] / part[row, column], pivot_row, alpha=-1)
            left -= 1
        columns, new = torch.tensor([*changed.items()], device=C.device).mT
        chosen[columns] = new
        pivot_rows = C[new]
        block = pivot_rows[:, columns]
        pivot_rows[torch.arange(len(columns), device=C.device), columns] -= 1.0
        # the determinant of the block is the product of what was exchanged: above 1
        C.addmm_(C[:, columns], torch.linalg.solve(block, pivot_rows), alpha=-1)


def to_pivot(A: Tensor, B: Tensor) -> PivotFactors:
    """Return the same product with R of its rows as they are.

    Rows are exchanged until no number of C exceeds LARGEST (maxvol, Goreinov et al. 2010: each
    exchange multiplies the volume of the chosen rows by that number, so it ends). Where B has not
    full rank, what its chosen rows do not span is 0.
    """
    A, B = A.double(), B.double()
    N, R = B.shape
    chosen = _first_pivots(B)
    _exchange(_coefficients(B, chosen), chosen)
    chosen = chosen.sort().values
    mask = torch.zeros(N, dtype=torch.uint8, device=B.device)
    mask[chosen] = 1
    C = _coefficients(B, chosen)[mask == 0]  # without the rounding of the exchanges
    return PivotFactors(B[chosen] @ A, C, mask, float(C.abs().max()) if len(C) else 0.0)


def rounded(found: PivotFactors, dtype: torch.dtype) -> PivotFactors:
    """Return them as stored in `dtype`. A is rounded first and C fitted to what is left of it: the
    rounding of A would else reach every other output multiplied by C. Where the rows of A do not
    determine C, it stays as it was."""
    A = found.A.to(dtype)
    kept = A.double()
    target = found.C @ (found.A @ kept.mT)
    C, failed = torch.linalg.solve_ex(kept @ kept.mT, target.mT)
    fitted = C.mT if int(failed) == 0 and bool((C.abs() <= 2 * LARGEST).all()) else found.C
    return found._replace(A=A, C=fitted.to(dtype))


def _coefficients(B: Tensor, chosen: Tensor) -> Tensor:
    """Return every row of B by the chosen ones: X [N, R] with X B[chosen] = B, of least norm."""
    rows = B[chosen]
    solved, failed = torch.linalg.solve_ex(rows.mT, B.mT)
    if int(failed) == 0 and bool(torch.isfinite(solved).all()):
        return solved.mT.contiguous()
    return B @ torch.linalg.pinv(rows)


def pivot_tensors(
    A: Tensor, B: Tensor, dtype: torch.dtype, *, is_embedding: bool = False
) -> tuple[dict[str, Tensor], float]:
    """Return what the checkpoint stores of W = B A [N, K] in the pivot gauge, by the ends of the
    names, rounded to `dtype` (see `factor_shapes`); and max |C|.

    A [R, K] and B [N, R], of any dtype. is_embedding: W is the table [V, H] of the embeddings,
    whose outputs are its columns: W^T = A^T B^T is what is brought into the gauge.
    """
    found = rounded(to_pivot(B.mT, A.mT) if is_embedding else to_pivot(A, B), dtype)
    first = {FACTOR_B: found.A.mT.contiguous()} if is_embedding else {FACTOR_A: found.A}
    return {**first, FACTOR_C: found.C, PIVOT_MASK: found.pivot_mask}, found.largest


def plain_tensors(stored: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return A [R, K] and B [N, R] of what the checkpoint stores of a matrix in either gauge, by
    the ends of the names, in the dtype that they have."""
    if FACTOR_C not in stored:
        return stored[FACTOR_A], stored[FACTOR_B]
    C = stored[FACTOR_C]
    rows = pivot_rows(C, permutation_of(stored[PIVOT_MASK], C.shape[1]))
    return (stored[FACTOR_A], rows) if FACTOR_A in stored else (rows.mT, stored[FACTOR_B])
