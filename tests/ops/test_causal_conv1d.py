"""causal_conv1d against its formula, one sum over the window per output."""

import functools

import pytest
import torch
from lillama_kernels import causal_conv1d
from lillama_kernels.testing import causal_conv1d_inputs, check_op
from torch import Tensor

DTYPES = [
    pytest.param(torch.float64, id="fp64"),
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16"),
]


def oracle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: Tensor | None = None,
) -> Tensor:
    work = torch.promote_types(x.dtype, torch.float32)
    width, steps = weight.shape[1], x.shape[2]
    past = x[:, :, :1].expand(-1, -1, width - 1) * 0 if initial_state is None else initial_state
    padded = torch.cat([past, x], dim=2).to(work)
    y = sum(weight[:, w, None].to(work) * padded[:, :, w : w + steps] for w in range(width))
    assert isinstance(y, Tensor)
    if bias is not None:
        y = y + bias.to(work)[:, None]
    if activation is not None:
        y = y / (1 + torch.exp(-y))
    return y.to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "silu"], ids=["linear", "silu"])
@pytest.mark.parametrize(
    "size",
    [(1, 1, 1, 4), (2, 3, 2, 4), (2, 63, 15, 4), (2, 5, 100, 4), (1, 5, 257, 3), (2, 5, 63, 1)],
    ids=lambda s: "B{}-D{}-T{}-W{}".format(*s),
)
def test_causal_conv1d_values_and_grads(size, activation, dtype, device):
    inputs = causal_conv1d_inputs(*size, dtype=dtype, device=device)
    op = functools.partial(causal_conv1d, activation=activation)
    check_op(op, functools.partial(oracle, activation=activation), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_conv1d_noncontiguous(dtype, device):
    inputs = causal_conv1d_inputs(2, 5, 63, 4, dtype=dtype, device=device)
    check_op(causal_conv1d, oracle, inputs, noncontiguous=True)


@pytest.mark.parametrize("missing", ["bias", "initial_state"])
def test_causal_conv1d_optional_inputs(missing, device):
    inputs = causal_conv1d_inputs(2, 5, 17, 4, dtype=torch.float32, device=device)
    del inputs[missing]
    check_op(causal_conv1d, oracle, inputs)


def test_causal_conv1d_swish_is_silu(device):
    inputs = causal_conv1d_inputs(2, 5, 17, 4, dtype=torch.float32, device=device)
    swish = causal_conv1d(**inputs, activation="swish")
    assert torch.equal(swish, causal_conv1d(**inputs, activation="silu"))
    assert not torch.equal(swish, causal_conv1d(**inputs))


@pytest.mark.parametrize("cut", [1, 2, 3, 8])
def test_causal_conv1d_halves_equal_whole(cut, device):
    inputs = causal_conv1d_inputs(2, 5, 17, 4, dtype=torch.float64, device=device)
    x, state = inputs.pop("x"), inputs.pop("initial_state")
    whole = causal_conv1d(x, **inputs, initial_state=state)
    first = causal_conv1d(x[:, :, :cut], **inputs, initial_state=state)
    carried = torch.cat([state, x[:, :, :cut]], dim=2)[:, :, -3:]
    second = causal_conv1d(x[:, :, cut:], **inputs, initial_state=carried)
    torch.testing.assert_close(torch.cat([first, second], 2), whole, rtol=1e-12, atol=1e-12)


def test_causal_conv1d_does_not_see_the_future(device):
    inputs = causal_conv1d_inputs(2, 5, 17, 4, dtype=torch.float64, device=device)
    before = causal_conv1d(**inputs)
    inputs["x"] = inputs["x"].clone()
    inputs["x"][:, :, 9] += 1.0
    changed = (causal_conv1d(**inputs) != before).any(0).any(0).nonzero().flatten().tolist()
    assert changed == [9, 10, 11, 12]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 5)}, r"x must be \[B, D, T\], got \[2, 5\]"),
        ({"weight": (4, 4)}, r"weight must be \[D, W\] with D = 5, got \[4, 4\]"),
        ({"weight": (5, 1, 4)}, r"weight must be \[D, W\]"),
        ({"bias": (4,)}, r"bias must be \[5\], got \[4\]"),
        ({"initial_state": (2, 5, 4)}, r"initial_state must be \[2, 5, 3\], got \[2, 5, 4\]"),
    ],
    ids=["x-2d", "channels", "weight-3d", "bias", "initial_state"],
)
def test_causal_conv1d_rejects(change, message, device):
    shapes = {"x": (2, 5, 17), "weight": (5, 4), "bias": (5,), "initial_state": (2, 5, 3)} | change
    x, weight, bias, state = (torch.zeros(shape, device=device) for shape in shapes.values())
    with pytest.raises(ValueError, match=message):
        causal_conv1d(x, weight, bias, initial_state=state)


def test_causal_conv1d_rejects_activation(device):
    inputs = causal_conv1d_inputs(1, 2, 3, 4, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match="activation must be None, 'silu' or 'swish', got 'relu'"):
        causal_conv1d(**inputs, activation="relu")
