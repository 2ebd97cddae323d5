"""Which outputs of a matrix in the pivot gauge are rows of A: a mask in files, a permutation in
memory.

W = cat([A, C A])[permutation]. Rows of A and of C lie in ascending order of their outputs, so that
one byte an output says it all in a checkpoint; the operations take four bytes an output.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lillama.checkpoint.names import PERMUTATION, PIVOT_MASK

__all__ = [
    "as_stored",
    "is_permutation",
    "permutation_of",
    "pivot_mask_of",
    "pivot_rows",
    "wrong_pivot_mask",
]


def permutation_of(pivot_mask: Tensor, rank: int | Tensor) -> Tensor:
    """Return what a mask stands for: a permutation exactly where it fits the rank.

    Args:
        pivot_mask: [..., N] integers, 1 where an output is a row of A and 0 where it is one of C.
        rank: R, or [..., 1] where that of each matrix is its own.

    Returns:
        [..., N] int32 on the device of the mask: output n is row permutation[n] of cat([A, C A]),
        and -1 where the mask is neither 1 nor 0, or 1 of more outputs than A has rows.
    """
    pivots = pivot_mask == 1
    pivots_before = pivots.cumsum(-1, dtype=torch.int32) - pivots.int()
    others_before = torch.arange(pivot_mask.shape[-1], device=pivot_mask.device) - pivots_before
    permutation = torch.where(pivot_mask == 0, rank + others_before, -1)
    return torch.where(pivots & (pivots_before < rank), pivots_before, permutation).to(torch.int32)


def pivot_mask_of(permutation: Tensor, rank: int) -> Tensor:
    """Return the mask [N] uint8 of a permutation [N], on its device.

    Raises:
        ValueError: a mask cannot express it, or it is offloaded.
    """
    if permutation.is_meta:
        raise ValueError(
            f"the permutation of {len(permutation)} outputs is offloaded, and its mask cannot be "
            "saved; load the model without offload_buffers=True"
        )
    mask = (permutation < rank).to(torch.uint8)
    wanted = permutation_of(mask, rank)
    if not (is_permutation(permutation) and torch.equal(wanted, permutation.to(torch.int32))):
        raise ValueError(
            f"the permutation of {len(permutation)} outputs at rank {rank} must name each once, "
            "with the rows of A and those of C in ascending order of their outputs, got another "
            "one, which a checkpoint cannot hold; sort the rows of A and of C"
        )
    return mask


def is_permutation(permutation: Tensor) -> bool:
    """Return whether [N] names each of 0..N-1 once."""
    return torch.equal(permutation.sort().values, torch.arange(len(permutation)).to(permutation))


def pivot_rows(C: Tensor, permutation: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
    """Return the rows `rows` of B = cat([identity, C])[permutation], all unless told."""
    eye = torch.eye(C.shape[1], dtype=C.dtype, device=C.device)
    return torch.cat([eye, C])[permutation[rows].long()]


def as_stored(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return a matrix's tensors, by the ends of their names, with a mask in place of a permutation.
    Raises ValueError as `pivot_mask_of`."""
    stored = dict(tensors)
    if PERMUTATION in stored:
        stored[PIVOT_MASK] = pivot_mask_of(stored.pop(PERMUTATION), rank)
    return stored


def wrong_pivot_mask(name: str, rank: int, num_outputs: int) -> str:
    """Return what to say of the tensor `name` where the `permutation_of` it is none."""
    return (
        f"{name} must be 1 for {rank} of {num_outputs} outputs and 0 for the others; "
        "the checkpoint is damaged: copy it again, or compress again"
    )
