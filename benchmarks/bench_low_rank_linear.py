"""low_rank_linear beside two cuBLAS products, these compiled, and the dense layer it replaces."""

import functools

import pytest
import torch
import torch.nn.functional as F
from lillama_kernels import low_rank_linear, reference
from torch import Tensor

from benchmarks.rows import Variant, Work, compare, compiled, variant
from benchmarks.shapes import LINEARS, LinearShape
from benchmarks.timing import num_input_sets, step


def inputs_of(
    shape: LinearShape, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the factorised and what the dense layer take; drawn where they are used, for drawing 16
    sets of 40 million numbers on a CPU takes longer than everything else."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        random = torch.randn(size, generator=generator, device=device)
        return (random * size[-1] ** -0.5).to(dtype)

    k, n, r = shape.in_features, shape.out_features, shape.rank
    bias = {"bias": normal(n)} if shape.bias else {}
    x = normal(shape.rows, k) * k**0.5
    low_rank = {"x": x, "A": normal(r, k), "B": normal(n, r)} | bias
    return low_rank, {"input": x, "weight": normal(n, k)} | bias


def work_of(shape: LinearShape, weights: int, size: int, backward: bool) -> Work:
    """Weights, rows in and rows out once; training reads the weights again and writes their
    gradient, reads x and the gradient of y, and writes that of x."""
    m, k, n = shape.rows, shape.in_features, shape.out_features
    if not backward:
        return Work(flop=2.0 * m * weights, bytes_moved=size * (weights + m * (k + n)))
    return Work(flop=6.0 * m * weights, bytes_moved=size * (3 * weights + m * (3 * k + 2 * n)))


ROWS = [pytest.param(s, False, id=f"{s.name}-forward") for s in LINEARS]
ROWS += [
    pytest.param(s, True, id=f"{s.name}-training", marks=[] if s.train else pytest.mark.full)
    for s in LINEARS
    if s.rows >= 256
]


@pytest.mark.parametrize(("shape", "backward"), ROWS)
def bench_low_rank_linear(benchmark, shape, backward, dtype, device):
    k, n, r = shape.in_features, shape.out_features, shape.rank
    size = torch.finfo(dtype).bits // 8
    work = work_of(shape, r * (k + n), size, backward)
    num_sets = num_input_sets(
        size * (r * (k + n) + shape.rows * k), device, at_least=4 if shape.rows <= 64 else 2
    )
    sets, dense_sets = zip(
        *(inputs_of(shape, dtype, device, seed) for seed in range(num_sets)), strict=True
    )
    timed = functools.partial(
        variant, oracle=reference.low_rank_linear, sets=sets, backward=backward
    )
    cublas = timed(reference.low_rank_linear, thorough=False)
    variants = {"ours": timed(low_rank_linear), "cublas": cublas}
    if device.type == "cuda":
        variants["ours_triton"] = timed(functools.partial(low_rank_linear, impl="triton"))
        if shape.compiled and not backward:
            (function,) = compiled(reference.low_rank_linear)
            variants["compiled"] = timed(function, thorough=False)
    variants["dense"] = Variant(
        calls=[step(F.linear, given, backward) for given in dense_sets],
        work=work_of(shape, k * n, size, backward),
    )
    compare(benchmark, variants, shape=shape, dtype=dtype, device=device, work=work)
