"""ssd_scan, matrix products in chunks of time, against one loop over time in fp64."""

import functools
import math

import pytest
import torch
from lillama_kernels import ssd_scan, ssd_state_update
from lillama_kernels.testing import check_op, check_values, ssd_scan_inputs
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
OPTIONAL = ["D", "dt_bias", "initial_state"]


def oracle(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h = exp(dt A) h + dt x (x) B; y = h C + D x, step after step."""
    work = torch.promote_types(x.dtype, torch.float32)
    u, raw, rate = x.to(work), dt.to(work), A.to(work)
    raw = raw if dt_bias is None else raw + dt_bias.to(work)
    steps = torch.logaddexp(raw, torch.zeros_like(raw)).clamp(*dt_limit)
    heads, groups = x.shape[2], B.shape[2]
    enter, leave = (t.to(work).repeat_interleave(heads // groups, dim=2) for t in (B, C))
    h = u.new_zeros(x.shape[0], heads, x.shape[3], B.shape[3])
    h = h if initial_state is None else initial_state.to(work)
    ys = []
    for t in range(x.shape[1]):
        step = steps[:, t, :, None, None]
        taken = u[:, t, :, :, None] * enter[:, t, :, None, :]
        h = torch.exp(step * rate[:, None, None]) * h + step * taken
        ys.append((h * leave[:, t, :, None, :]).sum(-1))
    y = torch.stack(ys, dim=1)
    y = y if D is None else y + D.to(work)[:, None] * u
    return y.to(x.dtype), h


op = functools.partial(ssd_scan, dt_softplus=True)


# around the chunk of 64 steps
@each_dtype
@pytest.mark.parametrize("steps", [1, 2, 63, 64, 65], ids=lambda t: f"T{t}")
def test_ssd_scan(steps, dtype, device):
    inputs = ssd_scan_inputs(1, steps, 2, 8, 1, 16, dtype=dtype, device=device)
    check_op(op, oracle, inputs)
    check_values(op, oracle, inputs)


def test_ssd_scan_of_several_groups_and_chunks(device):
    inputs = ssd_scan_inputs(2, 200, 4, 5, 2, 8, dtype=torch.float32, device=device)
    check_op(op, oracle, inputs)


@pytest.mark.parametrize("missing", [*([name] for name in OPTIONAL), OPTIONAL], ids="-".join)
def test_ssd_scan_optional_inputs(missing, device):
    inputs = ssd_scan_inputs(1, 17, 2, 8, 1, 16, dtype=torch.float32, device=device)
    for name in missing:
        del inputs[name]
    check_op(op, oracle, inputs)


def test_ssd_scan_limits_the_steps(device):
    inputs = ssd_scan_inputs(1, 33, 2, 8, 1, 16, dtype=torch.float32, device=device)
    limit = {"dt_limit": (0.1, 0.3)}
    check_op(functools.partial(op, **limit), functools.partial(oracle, **limit), inputs)


def test_ssd_scan_in_two_parts(device):
    """Carried state, values and gradients through it."""
    inputs = ssd_scan_inputs(1, 90, 2, 8, 1, 16, dtype=torch.float32, device=device)

    def halves(initial_state: Tensor, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        ys = []
        for part in (slice(0, 70), slice(70, None)):
            over_time = ("x", "dt", "B", "C")
            given = {n: t[:, part] if n in over_time else t for n, t in tensors.items()}
            y, initial_state = op(**given, initial_state=initial_state)
            ys.append(y)
        return torch.cat(ys, dim=1), initial_state

    check_op(halves, oracle, inputs)


def test_ssd_scan_noncontiguous(device):
    inputs = ssd_scan_inputs(1, 17, 2, 8, 1, 16, dtype=torch.float32, device=device)
    check_op(op, oracle, inputs, noncontiguous=True)


@each_dtype
def test_ssd_state_update_steps_equal_the_scan(dtype, device):
    inputs = ssd_scan_inputs(2, 5, 4, 6, 2, 16, dtype=dtype, device=device)
    expected, last = oracle(**inputs)
    state = inputs["initial_state"].float()
    fixed = {name: inputs[name] for name in ("A", "D", "dt_bias")}
    eps = torch.finfo(dtype).eps
    for t in range(5):
        step = {name: inputs[name][:, t] for name in ("x", "dt", "B", "C")}
        y = ssd_state_update(state, **step, **fixed, dt_softplus=True)
        torch.testing.assert_close(y, expected[:, t], rtol=8 * eps, atol=8 * eps)
        assert y.dtype == dtype
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (1, 3, 2)}, r"x must be \[B, T, nh, P\]"),
        ({"dt": (1, 3, 1)}, r"dt must be \[1, 3, 2\], got \[1, 3, 1\]"),
        ({"A": (3,)}, r"A must be \[2\], got \[3\]"),
        ({"C": (1, 3, 1, 5)}, r"C must be \[1, 3, 1, 4\], got \[1, 3, 1, 5\]"),
        ({"D": (1,)}, r"D must be \[2\], got \[1\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_ssd_scan_rejects(change, message, device):
    shapes = {"x": (1, 3, 2, 6), "dt": (1, 3, 2), "A": (2,), "B": (1, 3, 1, 4), "C": (1, 3, 1, 4)}
    given = {name: torch.zeros(shape, device=device) for name, shape in (shapes | change).items()}
    with pytest.raises(ValueError, match=message):
        ssd_scan(**given)


def test_ssd_scan_has_no_triton_kernel(device):
    inputs = ssd_scan_inputs(1, 1, 2, 8, 1, 16, dtype=torch.float32, device=device)
    step = {name: inputs[name][:, 0] for name in ("x", "dt", "B", "C")}
    message = "ssd_scan has no Triton kernel yet; pass impl='reference' or leave impl='auto'"
    with pytest.raises(NotImplementedError, match=message):
        ssd_scan(**inputs, impl="triton")
    with pytest.raises(NotImplementedError, match=message):
        ssd_state_update(inputs["initial_state"], **step, A=inputs["A"], impl="triton")
