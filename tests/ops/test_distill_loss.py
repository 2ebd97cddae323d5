"""distill_loss against its formula and its analytic gradient."""

import functools

import pytest
import torch
from lillama_kernels import distill_loss, distill_loss_and_grad
from lillama_kernels.reference import LOSS_FLOOR
from lillama_kernels.testing import check_op, distill_loss_inputs
from torch import Tensor

DTYPES = [
    pytest.param(torch.float64, id="fp64"),
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16"),
]
REDUCTIONS = ["mean", "sum", "none"]


def oracle(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    work = torch.promote_types(student.dtype, torch.float32)
    a, y = student.to(work), teacher.to(work)
    cosine = (a * y).sum(-1) / ((a * a).sum(-1).sqrt() * (y * y).sum(-1).sqrt())
    loss = (a - y).abs().sum(-1) / a.shape[-1] + torch.log(1 + torch.exp(-cosine))
    counted = torch.ones_like(loss) if mask is None else mask.to(work)
    loss = loss * counted
    if reduction == "none":
        return loss
    return loss.sum() / counted.sum() if reduction == "mean" else loss.sum()


def check(student: Tensor, teacher: Tensor, noncontiguous: bool = False, **arguments) -> None:
    def bind(function, teacher):
        return lambda student: function(student, teacher.to(student.dtype), **arguments)

    # the oracle converts the teacher to fp64 for the truth; the op gets it as it is
    op = functools.partial(distill_loss, teacher=teacher, **arguments)
    check_op(op, bind(oracle, teacher), {"student": student}, noncontiguous=noncontiguous)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 257), (63, 100), (100, 63), (257, 7)], ids=lambda s: "M{}-H{}".format(*s)
)
def test_distill_loss_values_and_grads(size, masked, reduction, dtype, device):
    inputs, mask = distill_loss_inputs([size[0]], size[1], dtype=dtype, device=device)
    check(**inputs, mask=mask if masked else None, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_distill_loss_noncontiguous(reduction, dtype, device):
    inputs, mask = distill_loss_inputs([3, 21], 100, dtype=dtype, device=device)
    inputs["teacher"] = inputs["teacher"].transpose(0, 2).contiguous().transpose(0, 2)
    mask = mask.T.contiguous().T
    check(**inputs, mask=mask, reduction=reduction, noncontiguous=True)


def test_distill_loss_analytic_gradient(device):
    inputs, mask = distill_loss_inputs([4, 9], 16, dtype=torch.float64, device=device)
    a, y = inputs["student"].requires_grad_(), inputs["teacher"]
    (grad,) = torch.autograd.grad(distill_loss(a, y, mask), a)
    a = a.detach()
    norm_a, norm_y = a.norm(dim=-1, keepdim=True), y.norm(dim=-1, keepdim=True)
    cosine = (a * y).sum(-1, keepdim=True) / (norm_a * norm_y)
    grad_cosine = y / (norm_a * norm_y) - cosine * a / norm_a**2
    expected = (a - y).sign() / 16 - torch.sigmoid(-cosine) * grad_cosine
    expected = expected * mask[..., None] / mask.sum()
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_distill_loss_reductions_agree(reduction, device):
    inputs, mask = distill_loss_inputs([4, 9], 16, dtype=torch.float32, device=device)
    each = distill_loss(**inputs, mask=mask, reduction="none")
    assert each.shape == (4, 9) and not each[~mask].any() and (each[mask] > 0).all()
    expected = each[mask].mean() if reduction == "mean" else each[mask].sum()
    torch.testing.assert_close(distill_loss(**inputs, mask=mask, reduction=reduction), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_distill_loss_masked_tokens_do_not_matter(reduction, device):
    inputs, mask = distill_loss_inputs([4, 9], 16, dtype=torch.float32, device=device)
    student, teacher = inputs["student"], inputs["teacher"]
    other = torch.where(mask[..., None], student, 1e3 * student + 7).requires_grad_()
    student.requires_grad_()
    losses = [distill_loss(s, teacher, mask, reduction=reduction) for s in (student, other)]
    assert torch.equal(*losses)
    grads = [
        torch.autograd.grad(loss.sum(), s) for loss, s in zip(losses, (student, other), strict=True)
    ]
    assert torch.equal(grads[0][0], grads[1][0])
    assert not grads[0][0][~mask].any() and grads[0][0][mask].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [1, 100, 4096], ids=lambda h: f"H{h}")
def test_distill_loss_floor(hidden_size, dtype, device):
    inputs, _ = distill_loss_inputs([5], hidden_size, dtype=dtype, device=device)
    teacher = inputs["teacher"]
    student = teacher.clone().requires_grad_()
    loss = distill_loss(student, teacher)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.item() == pytest.approx(LOSS_FLOOR, rel=1e-6) == pytest.approx(0.3133, abs=1e-4)
    # a minimum: the gradient of |a - y| is taken as 0 there
    (grad,) = torch.autograd.grad(loss, student)
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("student_scale", "teacher_scale"), [(0, 1), (1, 0), (0, 0)], ids=["student", "teacher", "both"]
)
def test_distill_loss_zero_vectors_are_finite(student_scale, teacher_scale, dtype, device):
    inputs, _ = distill_loss_inputs([5], 100, dtype=dtype, device=device)
    student = (inputs["student"] * student_scale).requires_grad_()
    teacher = inputs["teacher"] * teacher_scale
    loss = distill_loss(student, teacher, reduction="none")
    # cosine 0: log 2 beside the absolute difference
    expected = (student - teacher).detach().to(loss.dtype).abs().mean(-1) + 0.6931471805599453
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert grad.isfinite().all()


def test_distill_loss_large_bf16_values(device):
    # in range for bf16 and fp32, beyond fp16's 65504
    inputs, _ = distill_loss_inputs([5], 100, dtype=torch.bfloat16, device=device)
    scaled = {name: tensor * 1e6 for name, tensor in inputs.items()}
    check(**scaled)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 8), (4, 9)), r"must both be \[\.\.\., H\].*\[4, 8\] and \[4, 9\]"),
        (((4, 8), (1, 8)), r"must both be \[\.\.\., H\].*\[4, 8\] and \[1, 8\]"),
        (((8,), (8,)), r"at least one leading dimension, got \[8\]"),
    ],
    ids=["hidden-size", "broadcast", "vector"],
)
def test_distill_loss_rejects_shapes(shapes, message, device):
    student, teacher = (torch.zeros(shape, device=device) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        distill_loss(student, teacher)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((3, 8), torch.bool, r"mask must be bool \[3\], got torch.bool \[3, 8\]"),
        ((1,), torch.bool, r"mask must be bool \[3\], got torch.bool \[1\]"),
        ((3,), torch.int64, r"mask must be bool \[3\], got torch.int64 \[3\]"),
    ],
    ids=["per-feature", "broadcast", "int64"],
)
def test_distill_loss_rejects_mask(shape, dtype, message, device):
    x = torch.ones(3, 8, device=device)
    with pytest.raises(ValueError, match=message):
        distill_loss(x, x, torch.ones(shape, dtype=dtype, device=device))


def test_distill_loss_rejects_teacher_with_grad(device):
    x = torch.ones(3, 8, device=device)
    with pytest.raises(ValueError, match="teacher must not require grad; detach it"):
        distill_loss(x, x.clone().requires_grad_())


def test_distill_loss_rejects_reduction(device):
    x = torch.ones(3, 8, device=device)
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none, got 'average'"):
        distill_loss(x, x, reduction="average")  # type: ignore[arg-type]


def test_distill_loss_rejects_no_tokens():
    x, mask = torch.ones(3, 8), torch.zeros(3, dtype=torch.bool)
    for student, given in ((x, mask), (x[:0], None), (x[:0], mask[:0])):
        with pytest.raises(ValueError, match="the loss is over no tokens"):
            distill_loss(student, student, given)
    # a sum over no tokens is 0, and there is nothing to divide
    assert distill_loss(x, x, mask, reduction="sum") == 0
    assert distill_loss(x, x, mask, reduction="none").tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "l2"}, "form must be one of l1_cosine, nmse, got 'l2'"),
        ({"teacher": torch.ones(3, 8, dtype=torch.int64)}, "teacher must be floating point"),
        ({"student": torch.ones(3, 8, dtype=torch.int64)}, "student must be floating point"),
        ({"teacher": torch.ones(3, 8, device="meta")}, "teacher must be on the student's device"),
        ({"mask": torch.ones(3, dtype=torch.bool, device="meta")}, "mask must be on the student"),
        ({"student": torch.ones(3, 0), "teacher": torch.ones(3, 0)}, "have no features"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_distill_loss_rejects(changes, message):
    given = {"student": torch.ones(3, 8), "teacher": torch.ones(3, 8), **changes}
    with pytest.raises(ValueError, match=message):
        distill_loss(**given)


def test_distill_loss_and_grad_rejects_none():
    x = torch.ones(3, 8)
    with pytest.raises(ValueError, match="needs reduction mean or sum, got 'none'"):
        distill_loss_and_grad(x, x, reduction="none")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("form", ["l1_cosine", "nmse"])
def test_distill_loss_and_grad_equals_autograd(form, reduction, device):
    inputs, mask = distill_loss_inputs([4, 9], 16, dtype=torch.float32, device=device)
    given = {"mask": mask, "form": form}
    student = inputs["student"].requires_grad_()
    loss = distill_loss(**inputs, **given, reduction=reduction)
    (expected,) = torch.autograd.grad(loss, student)
    value, grad = distill_loss_and_grad(**inputs, **given, reduction=reduction)
    assert not value.requires_grad and not grad.requires_grad
    torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(grad, expected)
