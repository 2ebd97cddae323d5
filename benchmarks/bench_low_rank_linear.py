"""low_rank_linear beside two cuBLAS products, these compiled, and the dense layer it replaces."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lillama_kernels import low_rank_linear, reference
from lillama_kernels.testing import check_op, check_values, low_rank_linear_inputs
from torch import Tensor

from benchmarks.shapes import LINEARS, LinearShape
from benchmarks.timing import compare, num_input_sets, step


def compiled_reference() -> Callable[..., Tensor]:
    """Without its own CUDA graphs, so that all variants are captured alike."""
    torch.compiler.reset()
    mode = "max-autotune-no-cudagraphs"
    return torch.compile(reference.low_rank_linear, mode=mode, dynamic=False)


def dense_inputs(shape: LinearShape, given: dict[str, Tensor]) -> dict[str, Tensor]:
    k, n, x = shape.in_features, shape.out_features, given["x"]
    weight = torch.randn(n, k, device=x.device, dtype=x.dtype) * k**-0.5
    return {"input": x, "weight": weight, "bias": given["bias"]}


ROWS = [pytest.param(shape, False, id=f"{shape.name}-forward") for shape in LINEARS]
ROWS += [pytest.param(shape, True, id=f"{shape.name}-training") for shape in LINEARS if shape.train]


@pytest.mark.parametrize(("shape", "backward"), ROWS)
def bench_low_rank_linear(benchmark, shape, backward, dtype, device):
    m, k, n, r = shape.rows, shape.in_features, shape.out_features, shape.rank
    size = torch.finfo(dtype).bits // 8
    weights = size * r * (k + n)
    sets = [
        low_rank_linear_inputs([m], k, n, r, dtype=dtype, device=device, seed=i)
        for i in range(num_input_sets(weights, device))
    ]
    functions = {"ours": low_rank_linear, "cublas": reference.low_rank_linear}
    if device.type == "cuda":
        functions["triton"] = functools.partial(low_rank_linear, impl="triton")
        if shape.compiled:
            functions["compiled"] = compiled_reference()
    for name, function in functions.items():
        check_values(function, reference.low_rank_linear, sets[0])
        if backward and name != "compiled":  # whose gradients are PyTorch's affair
            check_op(function, reference.low_rank_linear, sets[0])
    variants = {
        name: [step(function, given, backward) for given in sets]
        for name, function in functions.items()
    }
    variants["dense"] = [step(F.linear, dense_inputs(shape, given), backward) for given in sets]
    passes = 3 if backward else 1
    compare(
        benchmark,
        variants,
        shape=shape,
        dtype=dtype,
        device=device,
        flop=2.0 * m * r * (k + n) * passes,
        # factors and rows in, rows out; backward reads them again and writes every gradient
        bytes_moved=passes * (weights + size * m * (k + n)),
    )
