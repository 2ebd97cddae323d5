"""low_rank_linear against its formula in indices, summed by einsum in fp64."""

import pytest
import torch
from lillama_kernels import low_rank_linear
from lillama_kernels.testing import check_op, low_rank_linear_inputs
from torch import Tensor

DTYPES = [
    pytest.param(torch.float64, id="fp64"),
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16"),
]
SIZES = [(1, 1, 1, 1), (1, 257, 63, 8), (63, 100, 48, 7), (100, 63, 257, 100), (257, 100, 1, 63)]


def oracle(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    z = torch.einsum("...k,rk->...r", x, A)
    y = torch.einsum("...r,nr->...n", z, B)
    return y if bias is None else y + bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "M{}-K{}-N{}-R{}".format(*s))
def test_low_rank_linear_values_and_grads(size, dtype, device):
    m, k, n, r = size
    inputs = low_rank_linear_inputs([m], k, n, r, dtype=dtype, device=device)
    check_op(low_rank_linear, oracle, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_linear_noncontiguous(dtype, device):
    inputs = low_rank_linear_inputs([63], 100, 48, 7, dtype=dtype, device=device)
    check_op(low_rank_linear, oracle, inputs, noncontiguous=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_linear_without_bias(dtype, device):
    inputs = low_rank_linear_inputs([63], 100, 48, 7, dtype=dtype, device=device)
    del inputs["bias"]
    check_op(low_rank_linear, oracle, inputs)


@pytest.mark.parametrize("rows", [(), (3, 5), (2, 1, 4)], ids=["vector", "3d", "4d"])
def test_low_rank_linear_leading_dimensions(rows, device):
    inputs = low_rank_linear_inputs(rows, 20, 12, 4, dtype=torch.float32, device=device)
    check_op(low_rank_linear, oracle, inputs)


def test_low_rank_linear_zero_rows(device):
    inputs = low_rank_linear_inputs([0], 20, 12, 4, dtype=torch.float32, device=device)
    assert low_rank_linear(**inputs).shape == (0, 12)
    # the factors' gradients are sums over no rows: zero, not uninitialised
    check_op(low_rank_linear, oracle, inputs)


def test_low_rank_linear_equals_dense_product(device):
    inputs = low_rank_linear_inputs([63], 100, 48, 7, dtype=torch.float64, device=device)
    dense = inputs["x"] @ (inputs["B"] @ inputs["A"]).T + inputs["bias"]
    torch.testing.assert_close(low_rank_linear(**inputs), dense, rtol=1e-10, atol=1e-10)


def test_low_rank_linear_autocast(device):
    inputs = low_rank_linear_inputs([63], 100, 48, 7, dtype=torch.float32, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y = low_rank_linear(**inputs)
    rounded = {name: tensor.bfloat16() for name, tensor in inputs.items()}
    assert torch.equal(y, low_rank_linear(**rounded))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": (7, 99)}, r"x must be \[\.\.\., K\] with K = 99 as in A, got \[63, 100\]"),
        ({"A": (6, 100)}, r"one R, got A \[6, 100\] and B \[48, 7\]"),
        ({"A": (1, 7, 100)}, r"A must be \[R, K\]"),
        ({"B": (7,)}, r"A must be \[R, K\]"),
        ({"x": ()}, r"x must be \[\.\.\., K\]"),
        ({"bias": (47,)}, r"bias must be \[N\] = \[48\] as in B, got \[47\]"),
        ({"bias": (1, 48)}, r"bias must be \[N\]"),
    ],
    ids=["in_features", "rank", "A-3d", "B-1d", "x-scalar", "bias-size", "bias-2d"],
)
def test_low_rank_linear_rejects(change, message, device):
    shapes = {"x": (63, 100), "A": (7, 100), "B": (48, 7), "bias": (48,)} | change
    x, A, B, bias = (torch.zeros(shape, device=device) for shape in shapes.values())
    with pytest.raises(ValueError, match=message):
        low_rank_linear(x, A, B, bias)


@pytest.mark.parametrize("name", ["A", "B", "bias"])
def test_low_rank_linear_rejects_other_dtypes_and_devices(name):
    inputs = low_rank_linear_inputs([3], 16, 8, 8, dtype=torch.float32, device="cpu")
    message = f"{name} must have the dtype of x, torch.float32, got torch.float16"
    with pytest.raises(ValueError, match=message):
        low_rank_linear(**inputs | {name: inputs[name].half()})
    with pytest.raises(ValueError, match=f"{name} must be on the device of x, cpu, got meta"):
        low_rank_linear(**inputs | {name: inputs[name].to("meta")})


@pytest.mark.parametrize("shapes", [((0, 16), (8, 0)), ((4, 0), (8, 4)), ((4, 16), (0, 4))])
def test_low_rank_linear_rejects_empty_factors(shapes):
    A, B = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="A and B must not be empty, got A"):
        low_rank_linear(torch.zeros(3, A.shape[1]), A, B)
