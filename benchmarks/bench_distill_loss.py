"""distill_loss, value and gradient, beside plain PyTorch, eager and compiled."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lillama_kernels import distill_loss, distill_loss_and_grad, reference
from lillama_kernels.testing import assert_close_to_truth, check_op, check_values
from torch import Tensor

from benchmarks.rows import Variant, Work, check_call, compare, compiled
from benchmarks.shapes import LOSSES
from benchmarks.timing import num_input_sets, step

# Of one feature: |a - y| 2 and its sum 1, a y, |a|^2 and |y|^2 2 each; of its gradient: sign 1,
# two products and two sums
FORWARD_FLOP, BACKWARD_FLOP = 9.0, 5.0


def inputs_of(
    rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device, seed: int
) -> dict[str, Tensor]:
    """The student near the teacher."""
    generator = torch.Generator(device).manual_seed(seed)
    teacher, noise = (
        torch.randn(rows, hidden_size, generator=generator, device=device) for _ in range(2)
    )
    return {"student": (teacher + 0.5 * noise).to(dtype), "teacher": teacher.to(dtype)}


def of_student(
    function: Callable[..., Any], teacher: Tensor, mask: Tensor | None = None
) -> Callable[[Tensor], Any]:
    """function with its other arguments fixed; the truth is in fp64, and its teacher too."""

    def run(student: Tensor) -> Any:
        return function(student, teacher.to(student.dtype), mask)

    return run


def autograd_variant(
    function: Callable[..., Tensor],
    sets: list[dict[str, Tensor]],
    backward: bool,
    mask: Tensor | None = None,
) -> Variant:
    """function and its backward; with a mask, that is used for the check and all tokens count in
    what is timed."""
    calls = [
        step(of_student(function, given["teacher"]), {"student": given["student"]}, backward)
        for given in sets
    ]
    student, teacher = {"student": sets[0]["student"]}, sets[0]["teacher"]

    def check() -> None:
        plain = of_student(reference.distill_loss, teacher, mask)
        if mask is None:
            check_call(calls[0], plain, student, backward)
        else:
            thorough = check_op if backward else check_values
            thorough(of_student(function, teacher, mask), plain, student)

    return Variant(calls=calls, check=check)


def and_grad_variant(
    function: Callable[..., tuple[Tensor, Tensor]],
    sets: list[dict[str, Tensor]],
    mask: Tensor | None = None,
) -> Variant:
    def check() -> None:
        student, teacher = sets[0]["student"], sets[0]["teacher"]
        found = of_student(function, teacher, mask)(student)
        plain = of_student(reference.distill_loss_and_grad, teacher, mask)
        three = (found, plain(student.double()), plain(student))
        for i, name in enumerate(("loss", "grad")):
            assert_close_to_truth(*(pair[i] for pair in three), name=name)

    return Variant(calls=[functools.partial(function, **given) for given in sets], check=check)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("shape", LOSSES, ids=lambda s: s.name)
def bench_distill_loss(benchmark, shape, backward, dtype, device):
    numbers, size = shape.rows * shape.hidden_size, torch.finfo(dtype).bits // 8
    num_sets = num_input_sets(2 * size * numbers, device, at_least=4)
    sizes = (shape.rows, shape.hidden_size, dtype, device)
    sets = [inputs_of(*sizes, seed) for seed in range(num_sets)]
    mask = torch.rand(shape.rows, generator=torch.Generator().manual_seed(0)).lt(0.67).to(device)
    ours = autograd_variant(distill_loss, sets, backward, mask)
    variants = {"ours": ours, "eager": autograd_variant(reference.distill_loss, sets, backward)}
    if backward:
        variants["ours"] = and_grad_variant(distill_loss_and_grad, sets, mask)
        variants["ours_autograd"] = ours
    if device.type == "cuda":
        # the second is one graph of both passes, where autograd makes two
        function, and_grad = compiled(reference.distill_loss, reference.distill_loss_and_grad)
        variants["compiled"] = autograd_variant(function, sets, backward)
        if backward:
            variants["compiled_and_grad"] = and_grad_variant(and_grad, sets)
    # student and teacher in, one gradient out
    work = Work(
        flop=numbers * (FORWARD_FLOP + (BACKWARD_FLOP if backward else 0.0)),
        bytes_moved=size * numbers * (3.0 if backward else 2.0),
    )
    compare(benchmark, variants, shape=shape, dtype=dtype, device=device, work=work)
