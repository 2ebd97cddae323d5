"""selective_scan against the recurrence written as one loop over time."""

import functools
from typing import Any

import pytest
import torch
from lillama_kernels import selective_scan
from lillama_kernels.testing import check_op, selective_scan_inputs, values_and_grads
from torch import Tensor

DTYPES = [
    pytest.param(torch.float64, id="fp64"),
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16"),
]
OPTIONAL = ["D", "z", "delta_bias", "initial_state"]


def oracle(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    work = torch.promote_types(x.dtype, torch.float32)
    u, dt, rate, enter, leave = (t.to(work) for t in (x, delta, A, B, C))
    if delta_bias is not None:
        dt = dt + delta_bias.to(work)[None, :, None]
    if delta_softplus:
        dt = torch.logaddexp(dt, torch.zeros_like(dt))
    h = torch.zeros(*x.shape[:2], A.shape[1], dtype=work, device=x.device)
    if initial_state is not None:
        h = initial_state.to(work)
    ys = []
    for t in range(x.shape[2]):
        step = dt[:, :, t, None]
        h = torch.exp(step * rate) * h + step * u[:, :, t, None] * enter[:, None, :, t]
        ys.append(torch.einsum("bds,bs->bd", h, leave[:, :, t]))
    y = torch.stack(ys, dim=-1)
    if D is not None:
        y = y + D.to(work)[None, :, None] * u
    if z is not None:
        gate = z.to(work)
        y = y * gate / (1 + torch.exp(-gate))
    return y.to(x.dtype), h


op_softplus = functools.partial(selective_scan, delta_softplus=True)
oracle_softplus = functools.partial(oracle, delta_softplus=True)


# around the op's chunk of 16 steps
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [1, 2, 15, 16, 17, 63, 100], ids=lambda t: f"T{t}")
def test_selective_scan_values_and_grads(steps, dtype, device):
    inputs = selective_scan_inputs(2, 8, 4, steps, dtype=dtype, device=device)
    check_op(op_softplus, oracle_softplus, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size",
    [(1, 1, 1, 3), (1, 63, 16, 17), (3, 100, 1, 5)],
    ids=lambda s: "B{}-D{}-S{}-T{}".format(*s),
)
def test_selective_scan_odd_shapes(size, dtype, device):
    # a seed whose lone numbers are not the small rest of a cancelling sum
    inputs = selective_scan_inputs(*size, dtype=dtype, device=device, seed=1)
    check_op(op_softplus, oracle_softplus, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_selective_scan_noncontiguous(dtype, device):
    inputs = selective_scan_inputs(2, 8, 4, 17, dtype=dtype, device=device)
    check_op(op_softplus, oracle_softplus, inputs, noncontiguous=True)


@pytest.mark.parametrize("missing", [*([name] for name in OPTIONAL), OPTIONAL], ids="-".join)
def test_selective_scan_optional_inputs(missing, device):
    inputs = selective_scan_inputs(2, 8, 4, 17, dtype=torch.float32, device=device)
    for name in missing:
        del inputs[name]
    check_op(op_softplus, oracle_softplus, inputs)


def test_selective_scan_without_softplus(device):
    inputs = selective_scan_inputs(2, 8, 4, 17, dtype=torch.float32, device=device)
    del inputs["delta_bias"]
    inputs["delta"] = inputs["delta"].abs() * 0.3
    check_op(selective_scan, oracle, inputs)


@pytest.mark.parametrize("used", [0, 1], ids=["y", "last_state"])
def test_selective_scan_grads_of_one_output(used, device):
    inputs = selective_scan_inputs(2, 8, 4, 17, dtype=torch.float64, device=device)
    shapes = [(2, 8, 17), (2, 8, 4)]
    # an expanded gradient, as sum().backward() gives
    grad = [torch.ones((), dtype=torch.float64, device=device).expand(shapes[used])]
    actual = values_and_grads(lambda **kw: op_softplus(**kw)[used], inputs, grad)
    truth = values_and_grads(lambda **kw: oracle_softplus(**kw)[used], inputs, grad)
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, truth[name], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("steps", [1, 3, 17], ids=lambda t: f"T{t}")
def test_selective_scan_gradcheck(steps, device):
    inputs = selective_scan_inputs(1, 2, 2, steps, dtype=torch.float64, device=device)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    assert torch.autograd.gradcheck(
        lambda *tensors: op_softplus(**dict(zip(inputs, tensors, strict=True))), leaves
    )


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 30])
def test_selective_scan_halves_equal_whole(cut, device):
    inputs = selective_scan_inputs(2, 8, 4, 31, dtype=torch.float64, device=device)

    def halves(initial_state: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        over_time = {"x", "delta", "B", "C", "z"}
        first = {n: t[:, :, :cut] if n in over_time else t for n, t in rest.items()}
        second = {n: t[:, :, cut:] if n in over_time else t for n, t in rest.items()}
        y_first, state = op_softplus(**first, initial_state=initial_state)
        y_second, state = op_softplus(**second, initial_state=state)
        return torch.cat([y_first, y_second], dim=2), state

    # gradients too: they cross the cut through the state
    check_op(halves, op_softplus, inputs)


def test_selective_scan_zero_state_is_no_state(device):
    inputs = selective_scan_inputs(2, 8, 4, 17, dtype=torch.float32, device=device)
    inputs["initial_state"] = torch.zeros_like(inputs["initial_state"])
    given = op_softplus(**inputs)
    del inputs["initial_state"]
    for one, two in zip(given, op_softplus(**inputs), strict=True):
        assert torch.equal(one, two)


def test_selective_scan_long_decay_stays_finite(device):
    # delta of 30 makes exp(delta A) underflow: the state forgets all but the last input
    inputs = selective_scan_inputs(1, 2, 3, 20, dtype=torch.float32, device=device)
    inputs["delta"] = torch.full_like(inputs["delta"], 30.0)
    for name in OPTIONAL:
        del inputs[name]
    check_op(selective_scan, oracle, inputs)
    _, last = selective_scan(**inputs)
    newest = 30.0 * inputs["x"][:, :, -1, None] * inputs["B"][:, None, :, -1]
    torch.testing.assert_close(last, newest)


def test_selective_scan_state_is_fp32(device):
    inputs = selective_scan_inputs(1, 2, 3, 5, dtype=torch.bfloat16, device=device)
    y, last = op_softplus(**inputs)
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)


def test_selective_scan_refuses_double_backward(device):
    inputs = selective_scan_inputs(1, 2, 3, 5, dtype=torch.float64, device=device)
    x = inputs.pop("x").requires_grad_()
    y, _ = op_softplus(x, **inputs)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 8)}, r"x must be \[B, D, T\] with T >= 1, got \[2, 8\]"),
        ({"x": (2, 8, 0)}, r"x must be \[B, D, T\] with T >= 1, got \[2, 8, 0\]"),
        ({"A": (5, 4)}, r"A must be \[D, S\] with D = 8 as in x, got \[5, 4\]"),
        ({"A": (8,)}, r"A must be \[D, S\]"),
        ({"delta": (2, 8, 16)}, r"delta must be \[2, 8, 17\], got \[2, 8, 16\]"),
        ({"B": (2, 17, 4)}, r"B must be \[2, 4, 17\], got \[2, 17, 4\]"),
        ({"C": (2, 4, 1)}, r"C must be \[2, 4, 17\], got \[2, 4, 1\]"),
        ({"D": (4,)}, r"D must be \[8\], got \[4\]"),
        ({"z": (1, 8, 17)}, r"z must be \[2, 8, 17\], got \[1, 8, 17\]"),
        ({"delta_bias": (1,)}, r"delta_bias must be \[8\], got \[1\]"),
        ({"initial_state": (2, 4, 8)}, r"initial_state must be \[2, 8, 4\], got \[2, 4, 8\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_selective_scan_rejects(change, message, device):
    inputs = selective_scan_inputs(2, 8, 4, 17, dtype=torch.float32, device=device)
    inputs |= {name: torch.zeros(shape, device=device) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        selective_scan(**inputs)
