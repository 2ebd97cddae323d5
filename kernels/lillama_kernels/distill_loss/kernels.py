# Triton's functions are not what they look like to a type checker:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false
"""Triton kernels of distill_loss: loss and gradient of each token in one pass, and their launchers.

A program holds the features of its tokens in registers, so that student and teacher are read once;
more than 16384 features are read twice. The formulas are in kernels/README.md, "Loss forms".
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lillama_kernels.launch import current_device_of, multiple_of_8, rows_aligned, unit_stride
from lillama_kernels.tiles import loss_tile

__all__ = ["distill_loss_fwd"]


@triton.jit
def _apart(a, y, FORM: tl.constexpr):
    """What the form adds up over the features, element by element."""
    d = a - y
    return d * d if FORM == "nmse" else tl.abs(d)


@triton.jit
def _cosine(dot, norm_a, norm_y):
    """cos(a, y) with each norm at least 1e-8."""
    return dot / tl.maximum(norm_a, 1e-8) / tl.maximum(norm_y, 1e-8)


@triton.jit
def _loss(apart, dot, norm_a, norm_y, H, FORM: tl.constexpr):
    if FORM == "nmse":
        clamped = tl.maximum(norm_y, 1e-8)
        return apart / (clamped * clamped)
    else:
        return apart / H + tl.log(1.0 + tl.exp(-_cosine(dot, norm_a, norm_y)))


@triton.jit
def _gradient(a, y, dot, norm_a, norm_y, H, FORM: tl.constexpr):
    """Gradient of the token's loss in a; the statistics are [BLOCK_M, 1]."""
    d = a - y
    clamped_y = tl.maximum(norm_y, 1e-8)
    if FORM == "nmse":
        return 2.0 * d / clamped_y / clamped_y
    else:
        clamped_a = tl.maximum(norm_a, 1e-8)
        cosine = _cosine(dot, norm_a, norm_y)
        # of cos: y / (|a| |y|) - cos a / |a|^2; the norm itself has gradient 0 at a = 0
        over_norm = tl.where(norm_a > 0.0, 1.0 / tl.where(norm_a > 0.0, norm_a, 1.0), 0.0)
        of_cosine = y / clamped_a / clamped_y - a * (cosine / clamped_a * over_norm)
        sign = tl.where(d > 0.0, 1.0, 0.0) - tl.where(d < 0.0, 1.0, 0.0)
        return sign / H - of_cosine / (1.0 + tl.exp(cosine))


@triton.jit
def _load_both(student_rows, teacher_rows, offs_h, counted, H):
    """Features offs_h of the counted tokens, 0 elsewhere: what a masked row holds stays there."""
    mask = counted[:, None] & (offs_h < H)[None, :]
    a = tl.load(student_rows + offs_h[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(teacher_rows + offs_h[None, :], mask=mask, other=0.0).to(tl.float32)
    return a, y


@triton.jit
def _store_gradient(
    grad_rows, a, y, offs_h, in_range, share, dot, norm_a, norm_y, H, FORM: tl.constexpr
):
    grad = _gradient(a, y, dot[:, None], norm_a[:, None], norm_y[:, None], H, FORM)
    tl.store(
        grad_rows + offs_h[None, :],
        (grad * share[:, None]).to(grad_rows.dtype.element_ty),
        mask=in_range[:, None] & (offs_h < H)[None, :],
    )


# M changes with every batch and must not compile again; the share of a sum is one number, stride 0.
@triton.jit(do_not_specialize=["M", "stride_share"])
def _distill_loss_fwd_kernel(
    student_ptr, teacher_ptr, mask_ptr, share_ptr, loss_ptr, grad_ptr,
    M, H, stride_sm, stride_tm, stride_share,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, FORM: tl.constexpr, ONE_PASS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_SHARE: tl.constexpr, WANT_GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_h = tl.arange(0, BLOCK_H)
    H = multiple_of_8(H, ALIGNED)
    in_range = offs_m < M
    counted = in_range
    if HAS_MASK:
        counted = in_range & (tl.load(mask_ptr + offs_m, mask=in_range, other=0) != 0)
    student_rows = student_ptr + offs_m[:, None] * multiple_of_8(stride_sm, ALIGNED)
    teacher_rows = teacher_ptr + offs_m[:, None] * multiple_of_8(stride_tm, ALIGNED)
    grad_rows = grad_ptr + offs_m[:, None] * H
    a, y = _load_both(student_rows, teacher_rows, offs_h, counted, H)  # [BLOCK_M, BLOCK_H]
    apart, dot, square_a, square_y = _apart(a, y, FORM), a * y, a * a, y * y
    if not ONE_PASS:
        for start in tl.range(BLOCK_H, H, BLOCK_H):
            a, y = _load_both(student_rows, teacher_rows, start + offs_h, counted, H)
            apart += _apart(a, y, FORM)
            dot += a * y
            square_a += a * a
            square_y += y * y
    dot = tl.sum(dot, axis=1)
    norm_a = tl.sqrt(tl.sum(square_a, axis=1))
    norm_y = tl.sqrt(tl.sum(square_y, axis=1))
    loss = _loss(tl.sum(apart, axis=1), dot, norm_a, norm_y, H, FORM)
    tl.store(loss_ptr + offs_m, tl.where(counted, loss, 0.0), mask=in_range)
    if WANT_GRAD:
        share = tl.where(counted, 1.0, 0.0)
        if HAS_SHARE:
            share = tl.load(share_ptr + offs_m * stride_share, mask=counted, other=0.0)
        if ONE_PASS:
            _store_gradient(
                grad_rows, a, y, offs_h, in_range, share, dot, norm_a, norm_y, H, FORM
            )  # fmt: skip
        else:
            for start in tl.range(0, H, BLOCK_H):
                a, y = _load_both(student_rows, teacher_rows, start + offs_h, counted, H)
                _store_gradient(
                    grad_rows, a, y, start + offs_h, in_range, share, dot, norm_a, norm_y, H, FORM
                )  # fmt: skip


_fwd_kernel: Any = _distill_loss_fwd_kernel  # jitted functions mean nothing to a type checker


def distill_loss_fwd(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    share: Tensor | None,
    form: str,
    want_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Loss [M] fp32 of student and teacher [M, H]; gradient times share, or empty.

    share may be an expanded scalar.
    """
    student, teacher = unit_stride(student), unit_stride(teacher)
    rows, features = student.shape
    loss = student.new_empty(rows, dtype=torch.float32)
    grad = student.new_empty((rows, features) if want_grad else (0,))
    if rows == 0:
        return loss, grad
    aligned = rows_aligned(student, teacher)
    tile = loss_tile(features, aligned)
    with current_device_of(student):
        _fwd_kernel[(triton.cdiv(rows, tile.blocks["BLOCK_M"]),)](
            student, teacher,
            student if mask is None else mask.contiguous(),
            loss if share is None else share,
            loss, grad if want_grad else student,
            rows, features, student.stride(0), teacher.stride(0),
            1 if share is None else share.stride(0),
            FORM=form, ONE_PASS=features <= tile.blocks["BLOCK_H"], HAS_MASK=mask is not None,
            HAS_SHARE=share is not None, WANT_GRAD=want_grad, ALIGNED=aligned,
            **tile.blocks, **tile.options,
        )  # fmt: skip
    return loss, grad
