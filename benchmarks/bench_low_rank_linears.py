"""low_rank_linears, layers with one input, beside a call for each and beside cuBLAS."""

import functools

import pytest
import torch
from lillama_kernels import low_rank_linear, low_rank_linears, reference
from torch import Tensor

from benchmarks.rows import Work, compare, compiled, variant
from benchmarks.shapes import SHARED_LINEARS, SharedLinearsShape
from benchmarks.timing import num_input_sets


def inputs_of(
    shape: SharedLinearsShape, dtype: torch.dtype, device: torch.device, seed: int
) -> dict[str, Tensor]:
    """x, one A with the rows of all layers, and a B for each."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        random = torch.randn(size, generator=generator, device=device)
        return (random * size[-1] ** -0.5).to(dtype)

    k, r, layers = shape.in_features, shape.rank, shape.out_features
    Bs = {f"B{i}": normal(n, r) for i, n in enumerate(layers)}
    x = normal(shape.rows, k) * k**0.5
    return {"x": x, "A": normal(r * len(layers), k), **Bs}


def shared(x: Tensor, A: Tensor, **Bs: Tensor) -> list[Tensor]:
    return low_rank_linears(x, list(A.chunk(len(Bs))), list(Bs.values()))


def separate(x: Tensor, A: Tensor, **Bs: Tensor) -> list[Tensor]:
    pairs = zip(A.chunk(len(Bs)), Bs.values(), strict=True)
    return [low_rank_linear(x, a, b) for a, b in pairs]


def cublas(x: Tensor, A: Tensor, **Bs: Tensor) -> list[Tensor]:
    return reference.low_rank_linears(x, A.chunk(len(Bs)), list(Bs.values()), [None] * len(Bs))


def cublas_shared(x: Tensor, A: Tensor, **Bs: Tensor) -> list[Tensor]:
    """The same saving without a kernel of ours: one product for all first stages."""
    zs = torch.nn.functional.linear(x, A).chunk(len(Bs), dim=-1)
    return [torch.nn.functional.linear(z, b) for z, b in zip(zs, Bs.values(), strict=True)]


@pytest.mark.parametrize("shape", SHARED_LINEARS, ids=lambda s: s.name)
def bench_low_rank_linears(benchmark, shape, dtype, device):
    size, outputs = torch.finfo(dtype).bits // 8, sum(shape.out_features)
    numbers = shape.rank * (shape.in_features * len(shape.out_features) + outputs)
    num_sets = num_input_sets(size * numbers, device, at_least=4)
    sets = [inputs_of(shape, dtype, device, seed) for seed in range(num_sets)]
    timed = functools.partial(variant, oracle=cublas, sets=sets, backward=False)
    variants = {"ours": timed(shared), "ours_separate": timed(separate)}
    for function in (cublas, cublas_shared):
        variants[function.__name__] = timed(function, thorough=False)
    if device.type == "cuda" and shape.rows == 16:
        (function,) = compiled(cublas)
        variants["compiled"] = timed(function, thorough=False)
    work = Work(
        flop=2.0 * shape.rows * numbers,
        bytes_moved=size * (numbers + shape.rows * (shape.in_features + outputs)),
    )
    compare(benchmark, variants, shape=shape, dtype=dtype, device=device, work=work)
