"""Which outputs of a matrix in the pivot gauge are rows of A: marks in files, an order in memory.

W = cat([A, C A])[order]. Rows of A and of C lie in ascending order of their outputs, so that one
byte an output says it all in a checkpoint; the operations take the order, four bytes an output.
"""

import torch
from torch import Tensor

__all__ = ["is_permutation", "marks_of", "order_of", "wrong_marks"]


def order_of(marks: Tensor, rank: int | Tensor) -> Tensor:
    """The order that marks stand for: a permutation exactly where they fit the rank.

    Args:
        marks: [..., N] integers, 1 where an output is a row of A and 0 where it is one of C.
        rank: R, or [..., 1] where that of each matrix is its own.

    Returns:
        [..., N] int32 on the device of `marks`: output n is row order[n] of cat([A, C A]), and -1
        where a mark is neither 1 nor 0, or the 1 of more outputs than A has rows.
    """
    pivots = marks == 1
    pivots_before = pivots.cumsum(-1, dtype=torch.int32) - pivots.int()
    others_before = torch.arange(marks.shape[-1], device=marks.device) - pivots_before
    order = torch.where(marks == 0, rank + others_before, -1)
    return torch.where(pivots & (pivots_before < rank), pivots_before, order).to(torch.int32)


def marks_of(order: Tensor, rank: int) -> Tensor:
    """The marks [N] uint8 of an order [N], on its device.

    Raises:
        ValueError: marks cannot express it, or it is offloaded.
    """
    if order.is_meta:
        raise ValueError(
            f"the order of {len(order)} outputs is offloaded, and its marks cannot be saved; load "
            "the model without offload_buffers=True"
        )
    marks = (order < rank).to(torch.uint8)
    if not (is_permutation(order) and torch.equal(order_of(marks, rank), order.to(torch.int32))):
        raise ValueError(
            f"the order of {len(order)} outputs at rank {rank} must be a permutation with the rows "
            "of A and those of C in ascending order of their outputs, got another one, which a "
            "checkpoint cannot hold; sort the rows of A and of C"
        )
    return marks


def is_permutation(order: Tensor) -> bool:
    """Whether an order [N] names each of 0..N-1 once."""
    return torch.equal(order.sort().values, torch.arange(len(order)).to(order))


def wrong_marks(name: str, rank: int, num_outputs: int) -> str:
    """What to say of the tensor `name` where `order_of` its marks is no permutation."""
    return (
        f"{name} must be 1 for {rank} of {num_outputs} outputs and 0 for the others; "
        "the checkpoint is damaged: copy it again, or compress again"
    )
