"""pivot_low_rank_linear against the dense weight its factors stand for, and every gradient."""

import pytest
import torch
from lillama_kernels import pivot_low_rank_linear
from lillama_kernels.testing import check_op, pivot_low_rank_linear_inputs
from torch import Tensor

DTYPES = [
    pytest.param(torch.float64, id="fp64"),
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16"),
]
SIZES = [(1, 1, 1, 1), (1, 257, 63, 8), (63, 100, 48, 7), (100, 63, 257, 100), (63, 40, 24, 24)]


def made(size, dtype, device):
    """The op and its oracle as functions of the floating tensors, and these."""
    rows, k, n, r = size
    inputs, order = pivot_low_rank_linear_inputs([rows], k, n, r, dtype=dtype, device=device)

    def op(x: Tensor, A: Tensor, C: Tensor, bias: Tensor | None = None) -> Tensor:
        return pivot_low_rank_linear(x, A, C, order, bias)

    def oracle(x: Tensor, A: Tensor, C: Tensor, bias: Tensor | None = None) -> Tensor:
        z = torch.einsum("...k,rk->...r", x, A)
        rest = torch.einsum("...r,nr->...n", z, C)
        columns = [*z.unbind(-1), *rest.unbind(-1)]
        y = torch.stack([columns[int(place)] for place in order], -1)
        return y if bias is None else y + bias

    return op, oracle, inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "M{}-K{}-N{}-R{}".format(*s))
def test_pivot_values_and_grads(size, dtype, device):
    check_op(*made(size, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pivot_noncontiguous_and_without_bias(dtype, device):
    op, oracle, inputs = made((63, 100, 48, 7), dtype, device)
    check_op(op, oracle, inputs, noncontiguous=True)
    del inputs["bias"]
    check_op(op, oracle, inputs)


def test_pivot_leading_dimensions_and_zero_rows(device):
    inputs, order = pivot_low_rank_linear_inputs(
        (2, 3), 20, 12, 4, dtype=torch.float32, device=device
    )
    arguments = [inputs[name] for name in ("A", "C")]
    y = pivot_low_rank_linear(inputs["x"], *arguments, order, inputs["bias"])
    flat = pivot_low_rank_linear(inputs["x"].flatten(0, 1), *arguments, order, inputs["bias"])
    torch.testing.assert_close(y.flatten(0, 1), flat)
    assert pivot_low_rank_linear(inputs["x"][:, :0], *arguments, order).shape == (2, 0, 12)


def test_pivot_is_a_linear_layer_of_the_whole_weight(device):
    inputs, order = pivot_low_rank_linear_inputs([5], 40, 24, 8, dtype=torch.float64, device=device)
    eye = torch.eye(8, dtype=torch.float64, device=device)
    B = torch.cat([eye, inputs["C"]])[order]
    want = inputs["x"] @ (B @ inputs["A"]).T + inputs["bias"]
    torch.testing.assert_close(pivot_low_rank_linear(order=order, **inputs), want)


BAD = {
    "A": ({"A": torch.zeros(3, 19)}, r"x must be \[..., K\] with K = 19"),
    "C": ({"C": torch.zeros(8, 5)}, r"A must be \[R, K\] and C \[N - R, R\] with one R"),
    "order": ({"order": torch.zeros(11, dtype=torch.long)}, r"order must be int32 or int64 \[N\]"),
    "floating order": ({"order": torch.zeros(12)}, r"order must be int32 or int64"),
    "bias": ({"bias": torch.zeros(11)}, r"bias must be \[N\] = \[12\]"),
    "dtype": ({"C": torch.zeros(8, 4).double()}, r"C must have the dtype of x"),
    "device": ({"A": torch.zeros(4, 20, device="meta")}, r"A must be on the device of x"),
}


@pytest.mark.parametrize("case", BAD)
def test_pivot_refuses_what_does_not_fit(case):
    inputs, order = pivot_low_rank_linear_inputs([5], 20, 12, 4, dtype=torch.float32, device="cpu")
    changed, message = BAD[case]
    if case == "A":
        changed = {"A": torch.zeros(4, 19)}
    with pytest.raises(ValueError, match=message):
        pivot_low_rank_linear(**{"order": order, **inputs, **changed})


def test_pivot_autocast(device):
    inputs, order = pivot_low_rank_linear_inputs([5], 20, 12, 4, dtype=torch.float32, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y = pivot_low_rank_linear(order=order, **inputs)
    rounded = {name: tensor.bfloat16() for name, tensor in inputs.items()}
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, pivot_low_rank_linear(order=order, **rounded))
