"""distill_loss forward and backward beside its reference: the same code until a kernel exists."""

import pytest
from lillama_kernels import distill_loss, reference
from lillama_kernels.testing import check_op, distill_loss_inputs
from torch import Tensor

from benchmarks.shapes import LOSSES
from benchmarks.timing import interleaved, record, step


@pytest.mark.parametrize("shape", LOSSES, ids=lambda s: s.name)
def bench_distill_loss(benchmark, shape, dtype, device):
    inputs, mask = distill_loss_inputs([shape.rows], shape.hidden_size, dtype=dtype, device=device)
    teacher = inputs.pop("teacher")

    def op(student: Tensor) -> Tensor:
        return distill_loss(student, teacher.to(student.dtype), mask)

    def plain(student: Tensor) -> Tensor:
        return reference.distill_loss(student, teacher.to(student.dtype), mask)

    check_op(op, plain, inputs)
    ours = step(op, inputs, backward=True)
    variants = {"ours": ours, "reference": step(plain, inputs, backward=True)}
    seconds = interleaved(variants, rounds=20)
    # forward reads both tensors; backward reads both and writes one gradient
    record(
        benchmark,
        seconds,
        "reference",
        shape=shape,
        dtype=dtype,
        device=device,
        bytes_moved=5.0 * teacher.numel() * teacher.element_size(),
    )
    benchmark.pedantic(ours, rounds=20, warmup_rounds=1)
