"""distill_loss, value and gradient, beside plain PyTorch, eager and compiled."""

import functools

import pytest
import torch
from lillama_kernels import distill_loss, distill_loss_and_grad, reference
from lillama_kernels.testing import assert_close_to_truth, check_op, distill_loss_inputs
from torch import Tensor

from benchmarks.shapes import LOSSES
from benchmarks.timing import compare, num_input_sets, step


def check_and_grad(student: Tensor, teacher: Tensor, mask: Tensor) -> None:
    """distill_loss_and_grad by the rule that check_op holds the others to."""
    found = distill_loss_and_grad(student, teacher, mask)
    baseline = reference.distill_loss_and_grad(student, teacher, mask)
    truth = reference.distill_loss_and_grad(student.double(), teacher.double(), mask)
    for i, name in enumerate(("loss", "grad")):
        assert_close_to_truth(found[i], truth[i], baseline[i], name)


@pytest.mark.parametrize("shape", LOSSES, ids=lambda s: s.name)
def bench_distill_loss(benchmark, shape, dtype, device):
    """All tokens count in what is timed; what is checked has a mask."""
    size = torch.finfo(dtype).bits // 8
    one_pass = size * shape.rows * shape.hidden_size
    given = {"dtype": dtype, "device": device}
    sets = [
        distill_loss_inputs([shape.rows], shape.hidden_size, **given, seed=seed)
        for seed in range(num_input_sets(3 * one_pass, device))
    ]
    (first, mask), functions = sets[0], {"ours": distill_loss, "eager": reference.distill_loss}
    if device.type == "cuda":
        torch.compiler.reset()
        mode = "max-autotune-no-cudagraphs"
        functions["compiled"] = torch.compile(reference.distill_loss, mode=mode, dynamic=False)
    check_and_grad(**first, mask=mask)

    def masked(student: Tensor) -> Tensor:
        # the teacher in the student's dtype: the truth is in fp64
        return distill_loss(student, first["teacher"].to(student.dtype), mask)

    def plain(student: Tensor) -> Tensor:
        return reference.distill_loss(student, first["teacher"].to(student.dtype), mask)

    check_op(masked, plain, {"student": first["student"]})
    variants = {
        f"{name}_autograd" if name == "ours" else name: [
            step(functools.partial(f, teacher=i["teacher"]), {"student": i["student"]}, True)
            for i, _ in sets
        ]
        for name, f in functions.items()
    }
    variants["ours"] = [functools.partial(distill_loss_and_grad, **inputs) for inputs, _ in sets]
    # student and teacher in, one gradient out
    compare(benchmark, variants, shape=shape, bytes_moved=3.0 * one_pass, **given)
