"""pivot_low_rank_linear beside PyTorch's products and gather, these compiled, the plain gauge with
as many numbers, and the dense layer it replaces."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from lillama_kernels import low_rank_linear, pivot_low_rank_linear, reference
from torch import Tensor

from benchmarks.bench_low_rank_linear import inputs_of, work_of
from benchmarks.pivot_shapes import PIVOTS
from benchmarks.rows import Variant, compare, compiled, variant
from benchmarks.shapes import LinearShape
from benchmarks.timing import num_input_sets, step


def order_of(shape: LinearShape, device: torch.device) -> Tensor:
    """[N] int32 as `lillama` writes it: any pivots, and the rows of C in the order of outputs."""
    chosen = torch.randperm(shape.out_features, generator=torch.Generator().manual_seed(0))
    pivots, rest = chosen[: shape.rank], chosen[shape.rank :].sort().values
    return torch.cat([pivots, rest]).argsort().to(device, torch.int32)


def pivot_inputs(
    shape: LinearShape, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the factorised and what the dense layer take."""
    low_rank, dense = inputs_of(shape, dtype, device, seed)
    return low_rank | {"C": low_rank.pop("B")[shape.rank :].clone()}, dense


ROWS = [pytest.param(s, False, id=f"{s.name}-forward") for s in PIVOTS]
ROWS += [
    pytest.param(s, True, id=f"{s.name}-training", marks=pytest.mark.full if s.needs_gpu else [])
    for s in PIVOTS
    if s.rows >= 256
]


@pytest.mark.parametrize(("shape", "backward"), ROWS)
def bench_pivot_low_rank_linear(benchmark, shape, backward, dtype, device):
    k, n, r = shape.in_features, shape.out_features, shape.rank
    size = torch.finfo(dtype).bits // 8
    numbers = r * (k + n - r)
    # multiples of 8 run our kernels
    plain = dataclasses.replace(shape, rank=numbers // (k + n) // 8 * 8)
    num_sets = num_input_sets(
        size * (numbers + shape.rows * k), device, at_least=4 if shape.rows <= 64 else 2
    )
    seeds = range(num_sets)
    pairs = [pivot_inputs(shape, dtype, device, seed) for seed in seeds]
    plain_sets = [inputs_of(plain, dtype, device, seed)[0] for seed in seeds]
    order = order_of(shape, device)
    composed = functools.partial(reference.pivot_low_rank_linear, order=order)
    ours = functools.partial(pivot_low_rank_linear, order=order)
    timed = functools.partial(
        variant, oracle=composed, sets=[given for given, _ in pairs], backward=backward
    )
    variants = {"ours": timed(ours), "cublas": timed(composed, thorough=False)}
    if device.type == "cuda":
        variants["ours_triton"] = timed(functools.partial(ours, impl="triton"))
        if shape.compiled and not backward:
            (function,) = compiled(composed)
            variants["compiled"] = timed(function, thorough=False)
    works = {
        "plain_gauge": work_of(shape, plain.rank * (k + n), size, backward),
        "dense": work_of(shape, k * n, size, backward),
    }
    calls = {
        "plain_gauge": [step(low_rank_linear, given, backward) for given in plain_sets],
        "dense": [step(F.linear, given, backward) for _, given in pairs],
    }
    variants |= {name: Variant(calls=calls[name], work=work) for name, work in works.items()}
    work = work_of(shape, numbers, size, backward)
    compare(benchmark, variants, shape=shape, dtype=dtype, device=device, work=work)
