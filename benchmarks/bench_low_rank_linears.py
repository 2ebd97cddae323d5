"""low_rank_linears, layers with one input, beside a call for each and beside cuBLAS."""

import pytest
import torch
from lillama_kernels import low_rank_linear, low_rank_linears, reference
from lillama_kernels.testing import check_values
from torch import Tensor

from benchmarks.shapes import SHARED_LINEARS, SharedLinearsShape
from benchmarks.timing import compare, num_input_sets, step


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
    return {"x": normal(shape.rows, k), "A": normal(r * len(layers), k), **Bs}


def shared(x: Tensor, A: Tensor, **Bs: Tensor) -> list[Tensor]:
    return low_rank_linears(x, list(A.chunk(len(Bs))), list(Bs.values()))


def apart(x: Tensor, A: Tensor, **Bs: Tensor) -> list[Tensor]:
    pairs = zip(A.chunk(len(Bs)), Bs.values(), strict=True)
    return [low_rank_linear(x, a, b) for a, b in pairs]


def cublas(x: Tensor, A: Tensor, **Bs: Tensor) -> list[Tensor]:
    return reference.low_rank_linears(x, A.chunk(len(Bs)), list(Bs.values()), [None] * len(Bs))


@pytest.mark.parametrize("shape", SHARED_LINEARS, ids=lambda s: s.name)
def bench_low_rank_linears(benchmark, shape, dtype, device):
    size, outputs = torch.finfo(dtype).bits // 8, sum(shape.out_features)
    numbers = shape.rank * (shape.in_features * len(shape.out_features) + outputs)
    count = num_input_sets(size * numbers, device)
    sets = [inputs_of(shape, dtype, device, seed) for seed in range(count)]
    functions = {"ours": shared, "apart": apart, "cublas": cublas}
    for function in functions.values():
        check_values(function, cublas, sets[0])
    compare(
        benchmark,
        {name: [step(f, given, False) for given in sets] for name, f in functions.items()},
        shape=shape,
        dtype=dtype,
        device=device,
        flop=2.0 * shape.rows * numbers,
        bytes_moved=size * (numbers + shape.rows * (shape.in_features + outputs)),
    )
