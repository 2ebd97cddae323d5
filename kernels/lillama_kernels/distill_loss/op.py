"""The distillation loss of one block: how far each token's features are from the teacher's."""

from typing import Any, get_args

import torch
from torch import Tensor

from lillama_kernels import reference
from lillama_kernels.dispatch import DTYPES, Impl, dtype_name, runs_triton
from lillama_kernels.reference import LossForm, Reduction

__all__ = ["distill_loss", "distill_loss_and_grad"]


def distill_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    form: LossForm = "l1_cosine",
    impl: Impl = "auto",
) -> Tensor:
    """Feature-distillation loss, by default that of Sy et al. 2024 (arXiv 2412.16719).

    With a the student's and y the teacher's features of a token, H of them:
        l1_cosine  mean_H |a - y| - log sigmoid(cos(a, y))
        nmse       |a - y|^2 / |y|^2
    A norm that divides is at least 1e-8. Gradients: kernels/README.md, "Loss forms".

    Triton reads both tensors once for the loss, and once more in backward, where it writes the
    gradient: five passes over memory. `distill_loss_and_grad` takes three.

    Args:
        student: [..., H], floating point; gradients flow here only. Autocast does not change it.
        teacher: [..., H], floating point, on the device of student; must not require grad.
        mask: [...] bool, True where a token counts; None counts all. What a masked token holds,
            NaN included, reaches neither the loss nor the gradient.
        reduction: "mean" or "sum" over the counted tokens, or "none" for [...] with 0 where masked.
        form: one of the above.
        impl: see `lillama_kernels.dispatch`; Triton takes fp32, fp16 and bf16.

    Returns:
        fp32 (fp64 for fp64 students). The floor of l1_cosine, student = teacher, is 0.3133.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the teacher requires grad; no token counts
            (seen on the CPU; a mask on a GPU is not read back, there the mean over nothing is NaN);
            or a name is unknown.
        TypeError, NotImplementedError: `impl="triton"` cannot take the dtype, or run there.
    """
    _check(student, teacher, mask, reduction, form)
    if not _runs_triton(student, teacher, impl):
        return reference.distill_loss(student, teacher, mask, reduction, form)
    rows, _ = torch.ops.lillama.distill_loss_rows(*_flat(student, teacher, mask), None, form, False)
    return reference.reduce_rows(rows.view(student.shape[:-1]), mask, reduction)


def distill_loss_and_grad(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    form: LossForm = "l1_cosine",
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient in the student, outside autograd.

    For a training loop that goes on with `student.backward(gradient)`: with Triton three passes
    over memory (two reads, one write), where `distill_loss(...).backward()` takes five.

    Args:
        As `distill_loss`; reduction "mean" or "sum".

    Returns:
        The loss, and its gradient [..., H] in the dtype of student. In fp16 the gradient of a mean
        over many tokens is out of range: take "sum", or autograd with a loss scale.

    Raises:
        As `distill_loss`.
    """
    _check(student, teacher, mask, reduction, form)
    if reduction == "none":
        raise ValueError("distill_loss_and_grad needs reduction mean or sum, got 'none'")
    if not _runs_triton(student, teacher, impl):
        return reference.distill_loss_and_grad(student, teacher, mask, reduction, form)
    with torch.no_grad():
        student_rows, teacher_rows, flat_mask = _flat(student, teacher, mask)
        share = None
        if reduction == "mean":  # computed where the mask lies, without waiting for the GPU
            count = student_rows.new_full((), len(student_rows), dtype=torch.float32)
            share = (1.0 / (count if mask is None else mask.sum())).expand(len(student_rows))
        rows, grad = torch.ops.lillama.distill_loss_rows(
            student_rows, teacher_rows, flat_mask, share, form, True
        )
        return reference.reduce_rows(rows, flat_mask, reduction), grad.view(student.shape)


def _check(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    reduction: str,
    form: str,
) -> None:
    if student.shape != teacher.shape or student.ndim < 2:
        raise ValueError(
            "student and teacher must both be [..., H] with at least one leading dimension, "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )
    if student.shape[-1] == 0:
        raise ValueError(f"student and teacher have no features, got {list(student.shape)}")
    for name, known, given in (
        ("reduction", get_args(Reduction), reduction),
        ("form", get_args(LossForm), form),
    ):
        if given not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {given!r}")
    tokens = list(student.shape[:-1])
    if mask is not None and (mask.shape != student.shape[:-1] or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool {tokens}, got {mask.dtype} {list(mask.shape)}")
    for name, tensor in (("student", student), ("teacher", teacher)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    for name, tensor in (("teacher", teacher), ("mask", mask)):
        if tensor is not None and tensor.device != student.device:
            raise ValueError(
                f"{name} must be on the student's device, {student.device}, got {tensor.device}"
            )
    if teacher.requires_grad:
        raise ValueError("teacher must not require grad; detach it")
    if reduction == "mean":
        empty = student.shape[:-1].numel() == 0
        # reading a GPU's mask would wait for it, and torch.compile cannot branch on one
        if mask is not None and mask.is_cpu and not torch.compiler.is_compiling():
            empty = not bool(mask.any())
        if empty:
            raise ValueError("the loss is over no tokens; give at least one that the mask counts")


def _runs_triton(student: Tensor, teacher: Tensor, impl: Impl) -> bool:
    # the interpreter is wrong in bf16, whichever of the two has it
    either = teacher.dtype if teacher.dtype == torch.bfloat16 else student.dtype
    known = student.dtype in DTYPES and teacher.dtype in DTYPES
    if not runs_triton("distill_loss", impl, student, known, either):
        return False
    for tensor in (student, teacher):
        dtype_name(tensor.dtype)  # refuses what the kernels do not take
    return True


def _flat(
    student: Tensor, teacher: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    features = student.shape[-1]
    flat_mask = None if mask is None else mask.reshape(-1)
    return student.reshape(-1, features), teacher.reshape(-1, features), flat_mask


# Ops that torch.compile, autograd and CUDA graphs see as one. triton is imported when they run.
@torch.library.custom_op("lillama::distill_loss_rows", mutates_args=())
def _rows(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    share: Tensor | None,
    form: str,
    want_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Loss of each token [M] fp32, and its gradient [M, H] times share [M] fp32.

    Without want_grad the gradient is empty. Autograd goes through calls without want_grad, and its
    backward is one with: the gradient is computed from the inputs again, not stored by forward.
    That moves as many bytes as reading and scaling a stored one, and rounds only once: in fp16 a
    stored gradient loses what is below 6e-8 or above 65504 before its factor arrives.
    """
    from lillama_kernels.distill_loss.kernels import distill_loss_fwd

    return distill_loss_fwd(student, teacher, mask, share, form, want_grad)


@_rows.register_fake
def _(student, teacher, mask, share, form, want_grad):
    grad = student.new_empty(student.shape if want_grad else (0,))
    return student.new_empty(student.shape[0], dtype=torch.float32), grad


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, mask, _, ctx.form, want_grad = inputs
    ctx.differentiable = not want_grad
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(student, teacher, mask)


def _autograd_backward(ctx: Any, grad_rows: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if not ctx.differentiable:
        raise RuntimeError("distill_loss has no second derivative in Triton; pass impl='reference'")
    grad = None
    if grad_rows is not None:
        _, grad = torch.ops.lillama.distill_loss_rows(*ctx.saved_tensors, grad_rows, ctx.form, True)
    return grad, None, None, None, None, None


_rows.register_autograd(_autograd_backward, setup_context=_setup_context)
