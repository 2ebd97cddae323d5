"""low_rank_linear beside the dense layer it replaces."""

import pytest
import torch
import torch.nn.functional as F
from lillama_kernels import low_rank_linear, reference
from lillama_kernels.testing import check_op, low_rank_linear_inputs

from benchmarks.shapes import LINEARS
from benchmarks.timing import interleaved, record, step


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("shape", LINEARS, ids=lambda s: s.name)
def bench_low_rank_linear(benchmark, shape, backward, dtype, device):
    m, k, n, r = shape.rows, shape.in_features, shape.out_features, shape.rank
    inputs = low_rank_linear_inputs([m], k, n, r, dtype=dtype, device=device)
    check_op(low_rank_linear, reference.low_rank_linear, inputs)
    dense = {
        "input": inputs["x"],
        "weight": torch.randn(n, k, device=device, dtype=dtype) * k**-0.5,
        "bias": inputs["bias"],
    }
    ours = step(low_rank_linear, inputs, backward)
    seconds = interleaved({"ours": ours, "dense": step(F.linear, dense, backward)}, rounds=20)
    flop = 2.0 * m * r * (k + n) * (3 if backward else 1)
    record(benchmark, seconds, "dense", shape=shape, dtype=dtype, device=device, flop=flop)
    benchmark.pedantic(ours, rounds=20, warmup_rounds=1)
