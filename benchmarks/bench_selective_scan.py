"""selective_scan forward and backward beside transformers' eager scan, a Python loop over time.

The loop's backward fills a full-size zero tensor per step, so its time grows with the square of T.
"""

from typing import Any

import pytest
from lillama_kernels import selective_scan
from lillama_kernels.mamba import reference
from lillama_kernels.testing import assert_close_to_truth, selective_scan_inputs, values_and_grads
from torch import Tensor
from transformers.models.mamba import modeling_mamba

from benchmarks.rows import Variant, Work, compare
from benchmarks.shapes import SCANS
from benchmarks.timing import modes_of, step

# the function under the decorator that looks for mamba_ssm's kernel
EAGER = getattr(
    modeling_mamba.mamba_selective_scan, "__wrapped__", modeling_mamba.mamba_selective_scan
)


def ours(**inputs: Any) -> Tensor:
    return selective_scan(**inputs, delta_softplus=True)[0]


def truth(**inputs: Any) -> Tensor:
    return reference.selective_scan(**inputs, delta_softplus=True)[0]


def eager(x: Tensor, delta: Tensor, **inputs: Any) -> Tensor:
    return EAGER(x, delta, **inputs, delta_softplus=True)


def check(inputs: dict[str, Tensor]) -> None:
    """Hold ours to the tolerance rule with transformers' scan as the baseline."""
    grads = [inputs["z"].clone()]
    double = {name: tensor.double() for name, tensor in inputs.items()}
    wanted = values_and_grads(truth, double, [grads[0].double()])
    plain = values_and_grads(eager, inputs, grads)
    for name, tensor in values_and_grads(ours, inputs, grads).items():
        assert_close_to_truth(tensor, wanted[name], plain[name], name)


@pytest.mark.parametrize("shape", SCANS, ids=lambda s: s.name)
def bench_selective_scan(benchmark, shape, dtype, device):
    sizes = (shape.channels, shape.state_size, shape.steps)
    # one sequence: the eager scan takes seconds for more, and twice that for two backwards
    few = selective_scan_inputs(1, *sizes, dtype=dtype, device=device)
    del few["initial_state"]
    inputs = selective_scan_inputs(shape.batch, *sizes, dtype=dtype, device=device)
    # transformers' scan takes none
    del inputs["initial_state"]
    fast = step(ours, inputs, backward=True)
    fast()
    # forward reads x, delta, z and writes y; backward reads those and grad_y, writes three grads
    row = compare(
        benchmark,
        {
            "ours": Variant(calls=[fast], check=lambda: check(few)),
            "transformers_eager": Variant(calls=[step(eager, inputs, backward=True)]),
        },
        shape=shape,
        dtype=dtype,
        device=device,
        work=Work(bytes_moved=11.0 * inputs["x"].numel() * inputs["x"].element_size()),
        rounds=1 if shape.min_speedup else 3,
        warmup_rounds=0,
        sample_s=0.0,
        modes=modes_of(device, graph=False),
    )
    if device.type == "cpu":
        speedup = row["speedup"]["wall"]["transformers_eager"]
        assert speedup >= shape.min_speedup, f"{speedup:.1f}x, wanted {shape.min_speedup:.0f}x"
