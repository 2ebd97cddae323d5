"""The distillation loss of one block: per token mean_H |a - y| - log sigmoid(cos(a, y))."""

from typing import Literal

import torch
from torch import Tensor

from lillama_kernels import reference
from lillama_kernels.impl import Impl, resolve_impl

__all__ = ["distill_loss"]


def distill_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Feature-distillation loss of Sy et al. 2024 (arXiv 2412.16719), padding left out.

    Args:
        student: [..., H], floating point; gradients flow here only.
        teacher: [..., H], shape and device of student, must not require grad.
        mask: [...] bool, True where a token counts; None counts all.
        reduction: "mean" and "sum" over the counted tokens, "none" for [...] with 0 where masked.
        impl: see `lillama_kernels.impl`.

    Returns:
        fp32 (fp64 for fp64 inputs). Its floor, student = teacher, is log(1 + 1/e) = 0.3133.

    Raises:
        ValueError: shapes differ, the teacher requires grad, no token counts (seen on the CPU; a
            CUDA mask is not read back, there the mean over no tokens is NaN), or a name is unknown.
        NotImplementedError: `impl="triton"`, which does not exist yet.
    """
    if student.shape != teacher.shape or student.ndim < 2:
        raise ValueError(
            "student and teacher must both be [..., H] with at least one leading dimension, "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )
    if teacher.requires_grad:
        raise ValueError("teacher must not require grad; detach it")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
    if mask is not None:
        if mask.shape != student.shape[:-1] or mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be bool {list(student.shape[:-1])}, got {mask.dtype} {list(mask.shape)}"
            )
    if reduction == "mean":
        empty = student.shape[:-1].numel() == 0
        if mask is not None and not mask.is_cuda and not torch.compiler.is_compiling():
            empty = not bool(mask.any())
        if empty:
            raise ValueError("the loss is over no tokens; give at least one that the mask counts")
    resolve_impl("distill_loss", impl, student)
    return reference.distill_loss(student, teacher, mask, reduction)
