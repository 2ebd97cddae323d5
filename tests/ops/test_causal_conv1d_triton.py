"""The Triton kernels of causal_conv1d against its formula in fp64: values, gradients, the step.

On the CPU they run in Triton's interpreter, with the bf16 of tests/interpreter.py.
"""

import functools

import pytest
import torch
from lillama_kernels import causal_conv1d, causal_conv1d_update
from lillama_kernels.testing import causal_conv1d_inputs, check_op, check_values, values_and_grads
from torch import Tensor

from tests.ops.precision import each_dtype, each_half, full

each_impl = pytest.mark.parametrize("impl", ["reference", "triton"])


def oracle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: Tensor | None = None,
) -> Tensor:
    """One window after the other."""
    work = torch.promote_types(x.dtype, torch.float32)
    width = weight.shape[1]
    past = x.new_zeros(*x.shape[:2], width - 1) if initial_state is None else initial_state
    padded = torch.cat([past, x], dim=2).to(work)
    windows = [padded[..., t : t + width] for t in range(x.shape[2])]
    y = torch.stack([(window * weight.to(work)).sum(-1) for window in windows], dim=-1)
    y = y if bias is None else y + bias.to(work)[:, None]
    return (y if activation is None else torch.nn.functional.silu(y)).to(x.dtype)


op = functools.partial(causal_conv1d, impl="triton")


def channels_last(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs | {"x": inputs["x"].transpose(1, 2).contiguous().transpose(1, 2)}


# tiles of 32 channels and 16 steps
CASES = [
    pytest.param((1, 1, 1, 4), "silu", id="B1-D1-T1-W4"),
    pytest.param((2, 3, 2, 4), None, id="B2-D3-T2-W4-linear"),
    pytest.param((1, 33, 15, 4), "silu", id="B1-D33-T15-W4"),
    pytest.param((1, 5, 33, 3), "silu", id="B1-D5-T33-W3"),
    pytest.param((2, 5, 16, 1), "silu", id="B2-D5-T16-W1"),
    pytest.param((2, 5, 63, 4), "silu", id="B2-D5-T63-W4", marks=full),
    pytest.param((2, 5, 63, 4), None, id="B2-D5-T63-W4-linear", marks=full),
    pytest.param((1, 2, 40, 8), "silu", id="B1-D2-T40-W8", marks=full),
    pytest.param((2, 33, 15, 4), None, id="B2-D33-T15-W4-linear", marks=full),
]


def check(size, activation, dtype, device) -> None:
    inputs = causal_conv1d_inputs(*size, dtype=dtype, device=device)
    ours = functools.partial(op, activation=activation)
    plain = functools.partial(oracle, activation=activation)
    check_op(ours, plain, inputs)
    check_values(ours, plain, channels_last(inputs))


@each_dtype
@pytest.mark.parametrize(("size", "activation"), CASES)
def test_causal_conv1d_triton(size, activation, dtype, device):
    check(size, activation, dtype, device)


@each_half
def test_causal_conv1d_triton_in_16_bits(dtype, device):
    check((1, 5, 18, 4), "silu", dtype, device)


@pytest.mark.parametrize("missing", [("bias",), ("initial_state",), ("bias", "initial_state")])
@each_dtype
def test_causal_conv1d_triton_optional_inputs(missing, dtype, device):
    inputs = causal_conv1d_inputs(2, 5, 17, 4, dtype=dtype, device=device)
    for name in missing:
        del inputs[name]
    check_op(op, oracle, inputs)


@each_dtype
def test_causal_conv1d_triton_noncontiguous(dtype, device):
    inputs = causal_conv1d_inputs(2, 5, 18, 4, dtype=dtype, device=device)
    ours = functools.partial(op, activation="silu")
    plain = functools.partial(oracle, activation="silu")
    check_op(ours, plain, inputs, noncontiguous=True)
    check_op(ours, plain, channels_last(inputs))


def test_causal_conv1d_triton_keeps_the_layout(device):
    inputs = causal_conv1d_inputs(2, 5, 17, 4, dtype=torch.float32, device=device)
    assert op(**inputs).is_contiguous()
    assert op(**channels_last(inputs)).transpose(1, 2).is_contiguous()


def test_causal_conv1d_triton_only_the_gradients_asked_for(device):
    inputs = causal_conv1d_inputs(1, 5, 9, 4, dtype=torch.float32, device=device)
    grads = values_and_grads(op, inputs, [torch.ones(1, 5, 9, device=device)])
    for name in inputs:
        alone = {n: t.detach().requires_grad_(n == name) for n, t in inputs.items()}
        (grad,) = torch.autograd.grad(op(**alone).sum(), [alone[name]])
        assert torch.equal(grad, grads[f"grad {name}"]), name


@full
def test_causal_conv1d_triton_compiled(device):
    torch.compiler.reset()
    inputs = channels_last(causal_conv1d_inputs(2, 5, 17, 4, dtype=torch.float32, device=device))
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    grads = [torch.ones(2, 5, 17, device=device)]
    results = values_and_grads(compiled, inputs, grads)
    for name, expected in values_and_grads(op, inputs, grads).items():
        assert torch.equal(results[name], expected), name


def test_causal_conv1d_triton_is_a_well_formed_op(device):
    inputs = channels_last(causal_conv1d_inputs(2, 5, 7, 4, dtype=torch.float32, device=device))
    x, weight, bias, state = (
        inputs[n].requires_grad_() for n in ("x", "weight", "bias", "initial_state")
    )
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    whole = torch.ops.lillama.causal_conv1d.default
    torch.library.opcheck(whole, (x, weight, bias, True, state), test_utils=checks)
    step = torch.ops.lillama.causal_conv1d_update.default
    given = [tensor.detach() for tensor in (x, state, weight, bias)]
    torch.library.opcheck(step, (*given, True), test_utils=checks)


def test_causal_conv1d_triton_empty(device):
    inputs = causal_conv1d_inputs(0, 5, 7, 4, dtype=torch.float32, device=device)
    assert op(**inputs).shape == (0, 5, 7)


def test_causal_conv1d_triton_refuses_fp64(device):
    inputs = causal_conv1d_inputs(1, 2, 3, 4, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match="take float32, float16, bfloat16; got float64"):
        op(**inputs)


# The step for decoding
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@each_impl
@pytest.mark.parametrize("length", [3, 4, 6], ids=lambda n: f"L{n}")
@pytest.mark.parametrize("cut", [1, 2], ids=lambda n: f"T{n}")
def test_causal_conv1d_update_steps_equal_the_whole(cut, length, impl, dtype, device):
    inputs = causal_conv1d_inputs(2, 5, 8, 4, dtype=dtype, device=device)
    expected = oracle(**inputs, activation="silu")
    x, past = inputs["x"], inputs["initial_state"]
    # fp32 for 16-bit inputs, strided, and with something older in front
    wide = torch.full((2, 5, length, 2), 7.0, device=device)
    state = wide[..., 0]
    state[..., length - 3 :] = past
    parts = [
        causal_conv1d_update(
            x[..., t : t + cut], state, inputs["weight"], inputs["bias"], "silu", impl=impl
        )
        for t in range(0, 8, cut)
    ]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(torch.cat(parts, 2), expected, rtol=4 * eps, atol=4 * eps)
    assert torch.equal(state, torch.cat([past, x], dim=2)[..., -length:].float())
    assert (wide[..., 1] == 7.0).all()


@each_impl
def test_causal_conv1d_update_without_options(impl, device):
    inputs = causal_conv1d_inputs(1, 3, 1, 4, dtype=torch.float32, device=device)
    state = inputs["initial_state"].clone()
    y = causal_conv1d_update(inputs["x"], state, inputs["weight"], impl=impl)
    del inputs["bias"]
    torch.testing.assert_close(y, oracle(**inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 5)}, r"x must be \[B, D, T\], got \[2, 5\]"),
        ({"conv_state": (2, 5, 2)}, r"conv_state must be \[2, 5, L\] with L >= 3, got \[2, 5, 2\]"),
        ({"conv_state": (2, 4, 3)}, r"conv_state must be \[2, 5, L\]"),
        ({"weight": (4, 4)}, r"weight must be \[D, W\] with D = 5, got \[4, 4\]"),
        ({"bias": (4,)}, r"bias must be \[5\], got \[4\]"),
    ],
    ids=["x-2d", "short", "channels", "weight", "bias"],
)
def test_causal_conv1d_update_rejects(change, message, device):
    shapes = {"x": (2, 5, 1), "conv_state": (2, 5, 3), "weight": (5, 4), "bias": (5,)} | change
    given = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        causal_conv1d_update(**given)


def test_causal_conv1d_update_rejects_another_device():
    with pytest.raises(ValueError, match="conv_state must be on the device of x, cpu, got meta"):
        causal_conv1d_update(
            torch.zeros(1, 2, 1), torch.zeros(1, 2, 3, device="meta"), torch.zeros(2, 4)
        )
