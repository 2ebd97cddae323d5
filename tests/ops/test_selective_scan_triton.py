"""The Triton kernels of selective_scan against one loop over time in fp64: values, every gradient.

On the CPU they run in Triton's interpreter, with the bf16 of tests/interpreter.py.
"""

import functools

import pytest
import torch
from lillama_kernels import selective_scan, selective_state_update
from lillama_kernels.testing import check_op, check_values, selective_scan_inputs, values_and_grads
from torch import Tensor

from tests.ops.precision import each_dtype, each_half, full, some

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
    delta_softplus: bool = True,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h = exp(dt A) h + dt x B; y = (C h + D x) silu(z), step after step."""
    work = torch.promote_types(x.dtype, torch.float32)
    u, raw = x.to(work), delta.to(work)
    raw = raw if delta_bias is None else raw + delta_bias.to(work)[:, None]
    dt = torch.logaddexp(raw, torch.zeros_like(raw)) if delta_softplus else raw
    h = u.new_zeros(*x.shape[:2], A.shape[1]) if initial_state is None else initial_state.to(work)
    ys = []
    for t in range(x.shape[2]):
        enter = (dt[..., t] * u[..., t])[..., None] * B.to(work)[:, None, :, t]
        h = torch.exp(dt[..., t, None] * A.to(work)) * h + enter
        ys.append((h * C.to(work)[:, None, :, t]).sum(-1))
    y = torch.stack(ys, dim=-1)
    y = y if D is None else y + D.to(work)[:, None] * u
    y = y if z is None else y * torch.nn.functional.silu(z.to(work))
    return y.to(x.dtype), h


op = functools.partial(selective_scan, delta_softplus=True, impl="triton")


def channels_last(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """x, z, B and C as transformers hands them over: neighbours in the second dimension."""
    near = {
        name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
        for name in ("x", "z", "B", "C")
    }
    return inputs | near


# around the chunk of 64 steps
@each_dtype
@some("steps", [1, 65], [2, 63, 64], lambda t: f"T{t}")
def test_selective_scan_triton(steps, dtype, device):
    inputs = selective_scan_inputs(2, 5, 2, steps, dtype=dtype, device=device)
    check_op(op, oracle, inputs)
    check_values(op, oracle, channels_last(inputs))


def test_selective_scan_triton_several_blocks_of_channels(device):
    inputs = selective_scan_inputs(1, 18, 2, 17, dtype=torch.float32, device=device)
    check_op(op, oracle, inputs)


@each_half
def test_selective_scan_triton_in_16_bits(dtype, device):
    inputs = selective_scan_inputs(1, 18, 2, 66, dtype=dtype, device=device)
    check_op(op, oracle, channels_last(inputs))


@full
def test_selective_scan_triton_1000_steps(device):
    inputs = selective_scan_inputs(1, 2, 2, 1000, dtype=torch.float32, device=device)
    check_op(op, oracle, inputs)


@some("missing", [OPTIONAL, ["D", "initial_state"]], [[name] for name in OPTIONAL], "-".join)
def test_selective_scan_triton_optional_inputs(missing, device):
    inputs = selective_scan_inputs(2, 5, 2, 17, dtype=torch.float32, device=device)
    for name in missing:
        del inputs[name]
    check_op(op, oracle, inputs)


def test_selective_scan_triton_without_softplus(device):
    inputs = selective_scan_inputs(2, 5, 2, 17, dtype=torch.float32, device=device)
    del inputs["delta_bias"]
    inputs["delta"] = inputs["delta"].abs() * 0.3
    plain = functools.partial(selective_scan, impl="triton")
    check_op(plain, functools.partial(oracle, delta_softplus=False), inputs)


@each_dtype
def test_selective_scan_triton_noncontiguous(dtype, device):
    inputs = selective_scan_inputs(2, 5, 2, 17, dtype=dtype, device=device)
    check_op(op, oracle, inputs, noncontiguous=True)


def test_selective_scan_triton_mixed_dtypes(device):
    """As in a 16-bit model: A, D, the bias and the state are fp32."""
    inputs = selective_scan_inputs(2, 5, 2, 17, dtype=torch.float16, device=device)
    for name in ("A", "D", "delta_bias", "initial_state"):
        inputs[name] = inputs[name].float()
    check_op(op, oracle, inputs)


def test_selective_scan_triton_in_two_parts(device):
    """Carried state, values and gradients through it."""
    inputs = selective_scan_inputs(2, 5, 2, 90, dtype=torch.float32, device=device)
    over_time = ("x", "delta", "B", "C", "z")

    def halves(initial_state: Tensor, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        ys = []
        for part in (slice(0, 70), slice(70, None)):
            given = {n: t[..., part] if n in over_time else t for n, t in tensors.items()}
            y, initial_state = op(**given, initial_state=initial_state)
            ys.append(y)
        return torch.cat(ys, dim=-1), initial_state

    check_op(halves, oracle, inputs)


@pytest.mark.parametrize("used", [0, 1], ids=["y", "last_state"])
def test_selective_scan_triton_grads_of_one_output(used, device):
    inputs = selective_scan_inputs(2, 5, 2, 17, dtype=torch.float32, device=device)
    # an expanded gradient, as sum().backward() gives
    grad = torch.ones((), device=device).expand([(2, 5, 17), (2, 5, 2)][used])
    actual = values_and_grads(lambda **kw: op(**kw)[used], inputs, [grad])
    double = {name: tensor.double() for name, tensor in inputs.items()}
    truth = values_and_grads(lambda **kw: oracle(**kw)[used], double, [grad.double()])
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor.double(), truth[name], rtol=1e-4, atol=1e-5, msg=name)


def test_selective_scan_triton_large_steps(device):
    """Decays that underflow and a softplus beyond exp's range stay finite."""
    inputs = selective_scan_inputs(1, 3, 2, 17, dtype=torch.float32, device=device)
    inputs["delta"] = inputs["delta"] * 100
    check_op(op, oracle, inputs)


def test_selective_scan_triton_small_steps(device):
    """softplus of -15 is 3e-7, which 1 + e^x in fp32 would have rounded to a few bits."""
    inputs = selective_scan_inputs(1, 3, 2, 17, dtype=torch.float32, device=device)
    inputs["delta"] = inputs["delta"] - 15
    del inputs["D"], inputs["initial_state"]
    check_op(op, oracle, inputs)


@full
def test_selective_scan_triton_compiled(device):
    torch.compiler.reset()
    inputs = selective_scan_inputs(2, 5, 2, 17, dtype=torch.float32, device=device)
    inputs = channels_last(inputs)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    grads = [torch.ones(2, 5, 17, device=device), torch.ones(2, 5, 2, device=device)]
    results = values_and_grads(compiled, inputs, grads)
    for name, expected in values_and_grads(op, inputs, grads).items():
        assert torch.equal(results[name], expected), name


def test_selective_scan_triton_is_a_well_formed_op(device):
    inputs = selective_scan_inputs(1, 3, 2, 5, dtype=torch.float32, device=device)
    names = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias")
    given = [channels_last(inputs)[name].requires_grad_() for name in names]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    state = inputs["initial_state"].requires_grad_()
    scan = torch.ops.lillama.selective_scan.default
    torch.library.opcheck(scan, (*given, True, state), test_utils=checks)
    step = [tensor.detach()[..., 0] if tensor.ndim == 3 else tensor.detach() for tensor in given]
    update = torch.ops.lillama.selective_state_update.default
    torch.library.opcheck(update, (state.detach(), *step, True), test_utils=checks)


def test_selective_scan_triton_has_no_second_gradient(device):
    inputs = selective_scan_inputs(1, 3, 2, 3, dtype=torch.float32, device=device)
    x = inputs.pop("x").requires_grad_()
    (grad,) = torch.autograd.grad(op(x, **inputs)[0].sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_selective_scan_triton_empty_batch(device):
    inputs = selective_scan_inputs(0, 5, 2, 3, dtype=torch.float32, device=device)
    y, last = op(**inputs)
    assert y.shape == (0, 5, 3) and last.shape == (0, 5, 2)


# The step for decoding
@each_dtype
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_selective_state_update_steps_equal_the_scan(impl, dtype, device):
    inputs = selective_scan_inputs(2, 37, 3, 6, dtype=dtype, device=device)
    expected, last = oracle(**inputs)
    state = inputs["initial_state"].float()
    fixed = {name: inputs[name] for name in ("A", "D")}
    for t in range(6):
        step = {name: inputs[name][..., t] for name in ("x", "B", "C", "z")}
        y = selective_state_update(
            state, dt=inputs["delta"][..., t], **step, **fixed, dt_bias=inputs["delta_bias"],
            dt_softplus=True, impl=impl,
        )  # fmt: skip
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(y, expected[..., t], rtol=8 * eps, atol=8 * eps)
        assert y.dtype == dtype
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_selective_state_update_without_options(impl, device):
    inputs = selective_scan_inputs(2, 5, 3, 1, dtype=torch.float32, device=device)
    given = {name: inputs[name][..., 0] for name in ("x", "B", "C")}
    wide = torch.zeros(2, 5, 3, 2, device=device)
    state = wide[..., 0]  # strided, and other than fp32 below
    y = selective_state_update(state, dt=inputs["delta"][..., 0], A=inputs["A"], **given, impl=impl)
    steps = {name: inputs[name] for name in ("x", "delta", "A", "B", "C")}
    expected, last = oracle(**steps, delta_softplus=False)
    torch.testing.assert_close(y, expected[..., 0])
    torch.testing.assert_close(state, last)
    assert not wide[..., 1].any()
    half = torch.zeros(2, 5, 3, dtype=torch.float16, device=device)
    selective_state_update(half, dt=inputs["delta"][..., 0], A=inputs["A"], **given, impl=impl)
    assert torch.equal(half, last.half())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 5, 1)}, r"x must be \[B, D\], got \[2, 5, 1\]"),
        ({"A": (4, 3)}, r"A must be \[D, S\] with D = 5 as in x, got \[4, 3\]"),
        ({"state": (2, 3, 5)}, r"state must be \[2, 5, 3\], got \[2, 3, 5\]"),
        ({"dt": (2, 1)}, r"dt must be \[2, 5\], got \[2, 1\]"),
        ({"B": (2, 5)}, r"B must be \[2, 3\], got \[2, 5\]"),
        ({"C": (3,)}, r"C must be \[2, 3\], got \[3\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_selective_state_update_rejects(change, message, device):
    shapes = {"state": (2, 5, 3), "x": (2, 5), "dt": (2, 5), "A": (5, 3), "B": (2, 3), "C": (2, 3)}
    given = {name: torch.zeros(shape, device=device) for name, shape in (shapes | change).items()}
    with pytest.raises(ValueError, match=message):
        selective_state_update(**given)


def test_selective_state_update_rejects_another_device():
    given = {name: torch.zeros(2, 5) for name in ("x", "dt")}
    with pytest.raises(ValueError, match="state must be on the device of x, cpu, got meta"):
        selective_state_update(
            torch.zeros(2, 5, 3, device="meta"), **given, A=torch.zeros(5, 3),
            B=torch.zeros(2, 3), C=torch.zeros(2, 3),
        )  # fmt: skip


def test_selective_scan_triton_refuses_fp64(device):
    inputs = selective_scan_inputs(1, 3, 2, 3, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match="take float32, float16, bfloat16; got float64"):
        op(**inputs)
