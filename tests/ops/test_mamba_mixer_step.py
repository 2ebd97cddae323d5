"""mamba_mixer_step: the reference against transformers' mixer, the kernels against the reference.

transformers' mixer itself is compared through whole models in tests/integrations.
"""

import pytest
import torch
from lillama_kernels import MixerWeights, mamba_mixer_step, mamba_mixer_step_runs_triton
from lillama_kernels.testing import assert_close_to_truth, poison_empty
from lillama_kernels.tiles import MIXER_MAX_ROWS
from torch import Tensor

from tests.ops.precision import each_dtype, each_half, some

HIDDEN, CHANNELS, STATE, DT_RANK, WIDTH = 24, 40, 5, 6, 4
SPLIT_HIDDEN = 2048  # enough columns for K in several parts


def make(
    rows: int, dtype: torch.dtype, device: torch.device, biases: bool = True, length: int = 4,
    hidden: int = HIDDEN,
) -> tuple[Tensor, Tensor, Tensor, MixerWeights]:  # fmt: skip
    """x, conv_state, ssm_state (fp32) and weights; A_log and dt_bias near Mamba's initial ones."""
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return (torch.randn(size, generator=g) * size[-1] ** -0.5).to(device, dtype)

    def bias(size: int) -> Tensor | None:
        return normal(size) if biases else None

    d, s, p = CHANNELS, STATE, DT_RANK
    a_log = torch.log(torch.arange(1.0, s + 1)).expand(d, -1).contiguous().to(device)
    weights = MixerWeights(
        in_A=normal(16, hidden), in_B=normal(2 * d, 16), in_bias=bias(2 * d), conv=normal(d, WIDTH),
        conv_bias=bias(d), x_proj=normal(p + 2 * s, d), dt=normal(d, p),
        dt_bias=normal(d) - 1.5, A_log=a_log, D=torch.ones(d, device=device),
        out_A=normal(8, d), out_B=normal(hidden, 8), out_bias=bias(hidden),
    )  # fmt: skip
    x = (torch.randn(rows, hidden, generator=g)).to(device, dtype)
    conv = torch.randn(rows, d, length, generator=g).to(device, dtype)
    return x, conv, torch.randn(rows, d, s, generator=g).to(device), weights


def run(impl, x, conv_state, ssm_state, weights) -> tuple[Tensor, ...]:
    """y and the states after the step, which are given as copies."""
    states = conv_state.clone(), ssm_state.clone()
    with poison_empty():
        return mamba_mixer_step(x, *states, weights, impl=impl), *states


def double(x, conv_state, ssm_state, weights) -> tuple:
    wide = MixerWeights(*(None if t is None else t.double() for t in weights))
    return x.double(), conv_state.double(), ssm_state.double(), wide


def check(given: tuple) -> None:
    actual, again = run("triton", *given), run("triton", *given)
    truth, baseline = run("reference", *double(*given)), run("reference", *given)
    dtype = given[0].dtype
    for i, name in enumerate(("y", "conv_state", "ssm_state")):
        # what the fp32 state is made of was rounded to the dtype of x
        assert_close_to_truth(actual[i].to(dtype), truth[i], baseline[i].to(dtype), name)
        assert torch.equal(actual[i], again[i]), name


@each_dtype
@some("rows", [3], [1, MIXER_MAX_ROWS], lambda m: f"B{m}")
def test_mamba_mixer_step_triton(rows, dtype, device):
    check(make(rows, dtype, device))


@each_half
def test_mamba_mixer_step_triton_in_16_bits(dtype, device):
    check(make(3, dtype, device))


@some("options", [(False, 3), (True, 6)], [(True, 3), (False, 6), (False, 4)])
def test_mamba_mixer_step_triton_options(options, device):
    biases, length = options
    check(make(2, torch.float32, device, biases, length))


def test_mamba_mixer_step_triton_in_parts_of_k(device):
    """fp16 splits K of in_proj, and its consumers add the parts up."""
    check(make(2, torch.float16, device, hidden=SPLIT_HIDDEN))


def test_mamba_mixer_step_triton_strided(device):
    x, conv_state, ssm_state, weights = make(2, torch.float32, device)
    expected = run("triton", x, conv_state, ssm_state, weights)
    wide = [torch.stack([t, t], dim=-1) for t in (x, conv_state, ssm_state)]
    views = [t[..., 0] for t in wide]
    y = mamba_mixer_step(*views, weights, impl="triton")
    for found, wanted in zip((y, *views[1:]), expected, strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(wide[1][..., 1], conv_state) and torch.equal(wide[2][..., 1], ssm_state)


def test_mamba_mixer_step_is_a_well_formed_op(device):
    x, conv_state, ssm_state, weights = make(2, torch.float32, device)
    checks = ("test_schema", "test_faketensor")
    op = torch.ops.lillama.mamba_mixer_step.default
    torch.library.opcheck(op, (x, conv_state, ssm_state, *weights), test_utils=checks)


def test_mamba_mixer_step_auto_is_the_reference_on_a_cpu(device):
    x, conv_state, ssm_state, weights = make(2, torch.float32, device)
    if device.type == "cpu":
        assert not mamba_mixer_step_runs_triton(x, weights)
        found = run("auto", x, conv_state, ssm_state, weights)
        assert all(map(torch.equal, found, run("reference", x, conv_state, ssm_state, weights)))
    assert not mamba_mixer_step_runs_triton(x[:, :0], weights._replace(in_A=weights.in_A[:, :0]))


def test_mamba_mixer_step_refuses_more_sequences_on_triton(device):
    given = make(MIXER_MAX_ROWS + 1, torch.float32, device)
    with pytest.raises(ValueError, match=r"takes 1 to 16 sequences .* got x \[17, 24\]"):
        run("triton", *given)
    assert run("reference", *given)[0].shape == (MIXER_MAX_ROWS + 1, HIDDEN)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("in_B", lambda t: t[1:], r"in_B must be \[80, 16\], got \[79, 16\]"),
        ("x_proj", lambda t: t[:, 1:], r"x_proj must be \[16, 40\], got \[16, 39\]"),
        ("dt", lambda t: t.double(), r"dt must have the dtype of x, torch\.float32, got torch\.fl"),
        ("out_bias", lambda t: t.to("meta"), r"out_bias must be on the device of x, cpu, got meta"),
    ],
    ids=["shape", "x_proj", "dtype", "device"],
)
def test_mamba_mixer_step_rejects(name, change, message):
    x, conv_state, ssm_state, weights = make(2, torch.float32, torch.device("cpu"))
    weights = weights._replace(**{name: change(getattr(weights, name))})
    with pytest.raises(ValueError, match=message):
        mamba_mixer_step(x, conv_state, ssm_state, weights)


def test_mamba_mixer_step_rejects_states():
    x, conv_state, ssm_state, weights = make(2, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"conv_state must be \[2, 40, 3\], got \[2, 40, 2\]"):
        mamba_mixer_step(x, conv_state[..., :2], ssm_state, weights)
    with pytest.raises(ValueError, match=r"ssm_state must be \[2, 40, 5\], got \[1, 40, 5\]"):
        mamba_mixer_step(x, conv_state, ssm_state[:1], weights)
