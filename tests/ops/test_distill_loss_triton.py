"""The Triton kernels of distill_loss against each form's formula in fp64, values and gradients.

On the CPU they run in Triton's interpreter, with the bf16 of tests/interpreter.py.
"""

import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lillama_kernels import distill_loss, distill_loss_and_grad
from lillama_kernels.reference import LOSS_FLOOR
from lillama_kernels.testing import (
    assert_close_to_truth,
    check_op,
    distill_loss_inputs,
    poison_empty,
)
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

from tests.ops.precision import each_dtype, each_half, full, some

FORMS = ["l1_cosine", "nmse"]
each_form = pytest.mark.parametrize("form", FORMS)
REDUCTIONS = ["mean", "sum", "none"]
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
triton_loss = functools.partial(distill_loss, impl="triton")


def token_loss(a: Tensor, y: Tensor, form: str) -> Tensor:
    if form == "nmse":
        return (a - y).square().sum(-1) / y.square().sum(-1)
    norm_a, norm_y = (t.square().sum(-1).sqrt() for t in (a, y))
    cosine = (a * y).sum(-1) / (norm_a * norm_y)
    return (a - y).abs().sum(-1) / a.shape[-1] + torch.log(1 + torch.exp(-cosine))


def oracle(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    reduction: str = "mean",
    form: str = "l1_cosine",
) -> Tensor:
    work = torch.promote_types(student.dtype, torch.float32)
    loss = token_loss(student.to(work), teacher.to(work), form)
    counted = torch.ones_like(loss) if mask is None else mask.to(work)
    loss = loss * counted
    if reduction == "none":
        return loss
    return loss.sum() / counted.sum() if reduction == "mean" else loss.sum()


def check(student: Tensor, teacher: Tensor, noncontiguous: bool = False, **arguments) -> None:
    """Value, gradient, and that distill_loss_and_grad says the same."""

    def truth(student: Tensor) -> Tensor:
        return oracle(student, teacher.to(student.dtype), **arguments)

    op = functools.partial(triton_loss, teacher=teacher, **arguments)
    check_op(op, truth, {"student": student}, noncontiguous=noncontiguous)
    if arguments.get("reduction", "mean") == "none":
        return
    with poison_empty():
        loss, grad = distill_loss_and_grad(student, teacher, **arguments, impl="triton")
    assert not loss.requires_grad and not grad.requires_grad
    expected = []
    for leaf in (student.detach(), student.detach().double()):
        value = truth(leaf.requires_grad_())
        expected.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    (baseline, baseline_grad), (exact, exact_grad) = expected
    assert_close_to_truth(loss, exact, baseline, "loss")
    assert_close_to_truth(grad, exact_grad, baseline_grad, "grad")


def inputs_of(rows, features, dtype, device, seed=0) -> tuple[dict[str, Tensor], Tensor]:
    return distill_loss_inputs(rows, features, dtype=dtype, device=device, seed=seed)


@each_dtype
@each_form
@some("size", [(1, 8), (63, 100)], [(100, 63), (257, 7)])
def test_distill_loss_triton_values_and_grads(size, form, dtype, device):
    inputs, mask = inputs_of([size[0]], size[1], dtype, device)
    check(**inputs, form=form)
    check(**inputs, form=form, mask=mask)


@each_half
@each_form
def test_distill_loss_triton_in_16_bits(form, dtype, device):
    inputs, mask = inputs_of([9], 100, dtype, device)
    check(**inputs, form=form, mask=mask)


@each_dtype
@each_form
@each_reduction
def test_distill_loss_triton_mask(reduction, form, dtype, device):
    inputs, mask = inputs_of([4, 9], 40, dtype, device)
    check(**inputs, form=form, reduction=reduction)
    check(**inputs, form=form, reduction=reduction, mask=mask)


@each_dtype
@pytest.mark.parametrize("features", [1, 16, 257, 2560, 4100, 16384], ids=lambda h: f"H{h}")
def test_distill_loss_triton_every_tile(features, dtype, device):
    # one feature has cosine 1 or -1, at which its gradient is 0 up to rounding
    form = "nmse" if features == 1 else "l1_cosine"
    inputs, mask = inputs_of([5], features, dtype, device)
    check(**inputs, mask=mask, form=form)


@each_dtype
@each_form
@some("features", [16_385], [20_000], lambda h: f"H{h}")
def test_distill_loss_triton_more_features_than_registers(features, form, dtype, device):
    inputs, mask = inputs_of([3], features, dtype, device)
    check(**inputs, mask=mask, form=form)


@each_dtype
@each_reduction
def test_distill_loss_triton_noncontiguous(reduction, dtype, device):
    inputs, mask = inputs_of([3, 21], 100, dtype, device)
    inputs["teacher"] = inputs["teacher"].transpose(0, 2).contiguous().transpose(0, 2)
    mask = mask.T.contiguous().T
    check(**inputs, mask=mask, reduction=reduction, noncontiguous=True)


def test_distill_loss_triton_expanded_teacher(device):
    inputs, _ = inputs_of([6], 40, torch.float32, device)
    check(inputs["student"], inputs["teacher"][:1].expand(6, -1))


def test_distill_loss_triton_teacher_of_another_dtype(device):
    inputs, mask = inputs_of([6], 40, torch.float16, device)
    check(inputs["student"], inputs["teacher"].float(), mask=mask)
    check(inputs["student"].float(), inputs["teacher"], mask=mask)


@each_form
@each_reduction
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_distill_loss_triton_masked_tokens_do_not_matter(bad, reduction, form, device):
    inputs, mask = inputs_of([4, 9], 40, torch.float32, device)
    results = []
    for filler in (1.0, bad):
        kept = {n: t.masked_fill(~mask[..., None], filler) for n, t in inputs.items()}
        kept["student"].requires_grad_()
        with poison_empty():
            loss = triton_loss(**kept, mask=mask, reduction=reduction, form=form)
            (grad,) = torch.autograd.grad(loss.sum(), kept["student"])
            results += [loss, grad]
            if reduction != "none":
                given = {"mask": mask, "reduction": reduction, "form": form, "impl": "triton"}
                results += distill_loss_and_grad(**kept, **given)
        assert not grad[~mask].any() and grad[mask].any()
    half = len(results) // 2
    torch.testing.assert_close(results[:half], results[half:], rtol=0, atol=0)


@each_form
@pytest.mark.parametrize("scales", [(0, 1), (1, 0), (0, 0), (1e-30, 1), (1e-12, 1e-12)], ids=str)
def test_distill_loss_triton_tiny_vectors_as_the_reference(scales, form, device):
    """Where PyTorch clamps the norms: its own result is the standard."""
    inputs, _ = inputs_of([5], 40, torch.float32, device)
    student = (inputs["student"] * scales[0]).requires_grad_()
    teacher = inputs["teacher"] * scales[1]
    results = []
    for impl in ("reference", "triton"):
        loss = distill_loss(student, teacher, form=form, impl=impl, reduction="none")
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), student)[0]))
    for expected, found in zip(*results, strict=True):
        assert found.isfinite().all()
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * max(scale, 1e-30))


@each_dtype
@pytest.mark.parametrize("features", [1, 100, 4096], ids=lambda h: f"H{h}")
def test_distill_loss_triton_floor(features, dtype, device):
    teacher = inputs_of([5], features, dtype, device)[0]["teacher"]
    student = teacher.clone().requires_grad_()
    loss = triton_loss(student, teacher)
    assert loss.item() == pytest.approx(LOSS_FLOOR, rel=1e-6)
    (grad,) = torch.autograd.grad(loss, student)
    assert grad.abs().max() < 1e-6


@each_form
@pytest.mark.parametrize("size", [0.02, 50.0, 5e3], ids=lambda s: f"{s:g}")
def test_distill_loss_triton_fp16_gradients_round_once(size, form, device):
    """Features of any size, with a loss scale that brings the gradient into fp16's range."""
    inputs, mask = inputs_of([5], 4096, torch.float16, device)
    student, teacher = (t * size for t in inputs.values())
    scale = 2.0**8 if form == "l1_cosine" or size < 1 else 2.0**18

    def scaled(student: Tensor, loss: Callable[..., Tensor] = triton_loss) -> Tensor:
        return loss(student, teacher.to(student.dtype), mask, form=form) * scale

    check_op(scaled, functools.partial(scaled, loss=oracle), {"student": student})


@each_form
@pytest.mark.parametrize("weight", [0.0, 1e-4])
def test_distill_loss_triton_fp16_zero_student(weight, form, device):
    """Its gradient, of order 1e8, must not overflow before it is scaled."""
    inputs, _ = inputs_of([3], 40, torch.float16, device)
    inputs["student"][1] = 0.0
    weights, grads = torch.tensor([1.0, weight, 1.0], device=device), []
    for impl in ("reference", "triton"):
        inputs["student"] = inputs["student"].detach().requires_grad_()
        loss = distill_loss(**inputs, reduction="none", form=form, impl=impl)
        grads.append(torch.autograd.grad(loss, inputs["student"], weights)[0])
    assert grads[0].isfinite().all()
    torch.testing.assert_close(grads[1], grads[0], rtol=2e-3, atol=1e-6)


@full
@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    rows=st.integers(1, 40),
    features=st.integers(8, 150),
    half=st.booleans(),
    form=st.sampled_from(FORMS),
    reduction=st.sampled_from(REDUCTIONS),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_distill_loss_triton_any_shape(rows, features, half, form, reduction, masked, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if half else torch.float32
    inputs, mask = inputs_of([rows], features, dtype, device, seed)
    given = {"mask": mask} if masked else {}
    check(**inputs, form=form, reduction=reduction, **given)


@full
@each_dtype
def test_distill_loss_triton_repeats_bit_for_bit(dtype, device):
    inputs, mask = inputs_of([300], 100, dtype, device)
    given = {**inputs, "mask": mask, "impl": "triton"}
    first, second = (distill_loss_and_grad(**given) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_distill_loss_triton_offsets_beyond_int32(device):
    """Rows 2^30 elements apart; memory that nobody touches costs nothing on the CPU."""
    inputs, _ = inputs_of([3], 16, torch.float16, device)
    far = torch.empty(2**31 + 16, dtype=torch.float16, device=device)
    student = far.as_strided((3, 16), (2**30, 1)).copy_(inputs["student"])
    given = {"teacher": inputs["teacher"], "impl": "triton"}
    near, apart = (distill_loss_and_grad(s, **given) for s in (inputs["student"], student))
    torch.testing.assert_close(near, apart, rtol=0, atol=0)


def test_distill_loss_triton_zero_tokens(device):
    empty = torch.ones(0, 8, device=device, requires_grad=True)
    teacher = empty.detach()
    loss = triton_loss(empty, teacher, reduction="sum")
    assert loss == 0 and torch.autograd.grad(loss, empty)[0].shape == (0, 8)
    assert triton_loss(empty, teacher, reduction="none").shape == (0,)
    assert distill_loss_and_grad(empty, teacher, reduction="sum", impl="triton")[0] == 0


# How it is called
def test_distill_loss_triton_writes_a_gradient_in_backward_only(device, monkeypatch):
    inputs, _ = inputs_of([5], 16, torch.float32, device)
    op, seen = torch.ops.lillama.distill_loss_rows, []

    def spy(*args):
        seen.append(op(*args))
        return seen[-1]

    monkeypatch.setattr(torch.ops.lillama, "distill_loss_rows", spy)
    assert not triton_loss(**inputs).requires_grad
    inputs["student"].requires_grad_()
    with torch.no_grad():
        triton_loss(**inputs)
    triton_loss(**inputs).backward()
    assert [grad.numel() for _, grad in seen] == [0, 0, 0, 5 * 16]


def test_distill_loss_triton_refuses_a_second_derivative(device):
    inputs, _ = inputs_of([5], 16, torch.float32, device)
    student = inputs["student"].requires_grad_()
    loss = triton_loss(**inputs)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative in Triton; pass impl='reference'"):
        grad.sum().backward()


def test_distill_loss_triton_opcheck(device):
    inputs, mask = inputs_of([5], 16, torch.float32, device)
    student, teacher = inputs.values()
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    op = torch.ops.lillama.distill_loss_rows
    check_one = functools.partial(torch.library.opcheck, op, test_utils=checks)
    for form in FORMS:
        check_one((student.clone().requires_grad_(), teacher, mask, None, form, False))
    weight = torch.rand(5, device=device)
    for share in (None, weight, weight[2:3].expand(5)):
        check_one((student, teacher, None, share, "l1_cosine", True))


# torch 2.13's tracer instantiates autograd functions and so warns about itself
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@some("reduction", ["mean"], ["sum", "none"])
def test_distill_loss_triton_compiles_into_one_graph(reduction, device):
    torch.compiler.reset()
    inputs, mask = inputs_of([4, 9], 40, torch.float32, device)
    inputs["student"].requires_grad_()

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        loss = function(**inputs, mask=mask, reduction=reduction)
        return loss.detach(), torch.autograd.grad(loss.sum(), inputs["student"])[0]

    compiled = torch.compile(triton_loss, fullgraph=True, backend="aot_eager")
    with functorch_config.patch(donated_buffer=False):
        torch.testing.assert_close(run(compiled), run(triton_loss), rtol=1e-6, atol=1e-7)
    if reduction != "none":
        given = {"mask": mask, "reduction": reduction, "impl": "triton"}
        both = torch.compile(distill_loss_and_grad, fullgraph=True, backend="aot_eager")
        expected, found = (f(**inputs, **given) for f in (distill_loss_and_grad, both))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reentrant", [False, True])
def test_distill_loss_triton_checkpointed(reentrant, device):
    inputs, mask = inputs_of([9], 40, torch.float32, device)
    student = inputs["student"].requires_grad_()
    run = functools.partial(triton_loss, teacher=inputs["teacher"], mask=mask)
    (expected,) = torch.autograd.grad(run(student), student)
    loss = checkpoint(run, student, use_reentrant=reentrant)
    assert isinstance(loss, Tensor)
    loss.backward()
    assert student.grad is not None and torch.equal(student.grad, expected)


def test_distill_loss_triton_ignores_autocast(device):
    inputs, mask = inputs_of([9], 40, torch.float32, device)
    expected = triton_loss(**inputs, mask=mask)
    with torch.autocast(device.type, torch.float16):
        torch.testing.assert_close(triton_loss(**inputs, mask=mask), expected, rtol=0, atol=0)


def test_distill_loss_triton_captured_on_a_graph(device):
    if device.type != "cuda":
        pytest.skip("needs a GPU: CUDA graphs")
    inputs, mask = inputs_of([64], 4096, torch.bfloat16, device)
    expected = distill_loss_and_grad(**inputs, mask=mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = distill_loss_and_grad(**inputs, mask=mask)
    for tensor in found:
        tensor.fill_(float("nan"))
    graph.replay()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# Where it cannot run
def test_distill_loss_triton_refuses_fp64(device):
    x = torch.ones(3, 8, dtype=torch.float64, device=device)
    for student, teacher in ((x, x), (x.float(), x)):
        with pytest.raises(TypeError, match="take float32, float16, bfloat16; got float64"):
            triton_loss(student, teacher)
