"""The rule that chooses an implementation, and the switch that forces it."""

import logging
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import lillama_kernels
import pytest
import torch
from lillama_kernels import (
    MixerWeights,
    PivotExpertFactors,
    PivotProjectionFactors,
    kernels_impl,
)
from lillama_kernels import dispatch as rule
from lillama_kernels.dispatch import resolve_impl
from lillama_kernels.testing import (
    causal_conv1d_inputs,
    distill_loss_inputs,
    expert_factors,
    low_rank_experts_inputs,
    low_rank_linear_inputs,
    selective_scan_inputs,
    ssd_scan_inputs,
)
from torch import Tensor

from tests.ops.precision import some

NOT_OPS = {"ExpertFactors", "MixerWeights", "ProjectionFactors", "kernels_impl"}
NOT_OPS |= {"PivotExpertFactors", "PivotProjectionFactors", "mamba_mixer_step_runs_triton"}
OPS = sorted(set(lillama_kernels.__all__) - NOT_OPS)
# of each kind one: other ops compile in `make test-all`
COMPILED = {"distill_loss", "low_rank_experts", "low_rank_linears", "selective_scan", "ssd_scan"}
CPU = torch.zeros(1)
# resolve_impl asks a tensor only for these
CUDA = cast(Tensor, SimpleNamespace(is_cuda=True, dtype=torch.float32, device="cuda"))


def pivot_expert_factors(tensors: dict[str, Tensor]) -> PivotExpertFactors:
    """Of two experts of rank 2: rows of B serve as C."""
    parts = []
    for name in ("gate", "up", "down"):
        A, B = tensors[f"{name}_A"], tensors[f"{name}_B"]
        order = torch.arange(B.shape[1], device=B.device).repeat(2, 1)
        parts.append(PivotProjectionFactors((2, 2), A, B[:, 2:], order, None))
    return PivotExpertFactors(*parts)


def inputs_of(op: str, device: torch.device) -> dict:
    where = {"dtype": torch.float32, "device": device}
    ranks = {"gate": (2, 2), "up": (2, 2), "down": (2, 2)}
    inputs: dict[str, object] = {}
    match op:
        case "causal_conv1d":
            inputs |= causal_conv1d_inputs(1, 2, 3, 4, **where)
        case "causal_conv1d_update":
            tensors = causal_conv1d_inputs(1, 2, 1, 4, **where)
            inputs |= {n: tensors[n] for n in ("x", "weight", "bias")}
            inputs["conv_state"] = tensors["initial_state"]
        case "distill_loss" | "distill_loss_and_grad":
            inputs |= distill_loss_inputs([3], 4, **where)[0]
        case "low_rank_experts":
            tensors, index = low_rank_experts_inputs(3, 1, 4, 6, ranks, **where)
            inputs |= {n: tensors[n] for n in ("hidden", "topk_weight")}
            inputs |= {"topk_index": index, "factors": expert_factors(tensors, ranks)}
        case "low_rank_linear":
            inputs |= low_rank_linear_inputs([3], 4, 5, 2, **where)
        case "pivot_low_rank_experts":
            tensors, index = low_rank_experts_inputs(3, 1, 4, 6, ranks, **where)
            inputs |= {n: tensors[n] for n in ("hidden", "topk_weight")}
            inputs |= {"topk_index": index, "factors": pivot_expert_factors(tensors)}
        case "pivot_low_rank_linear":
            inputs |= low_rank_linear_inputs([3], 4, 3, 2, **where)
            inputs["C"] = inputs.pop("B")
            inputs["order"] = torch.arange(5, device=device).flip(0)
            inputs["bias"] = None
        case "low_rank_linears":
            tensors = low_rank_linear_inputs([3], 4, 5, 2, **where)
            inputs |= {"x": tensors["x"], "As": [tensors["A"]] * 2, "Bs": [tensors["B"]] * 2}
        case "mamba_mixer_step":
            one = torch.ones(1, 1, **where)
            weights = {name: one for name in MixerWeights._fields}
            weights |= {
                name: one[0] for name in ("in_bias", "conv_bias", "dt_bias", "D", "out_bias")
            }
            weights |= {"in_B": one.expand(2, 1), "in_bias": one[0].expand(2)}
            weights |= {"x_proj": one.expand(3, 1)}
            inputs |= {"x": one, "weights": MixerWeights(**weights)}
            inputs |= {name: torch.ones(1, 1, 1, **where) for name in ("conv_state", "ssm_state")}
        case "selective_state_update":
            tensors = selective_scan_inputs(1, 2, 3, 1, **where)
            inputs |= {n: tensors[n][..., 0] for n in ("x", "B", "C")}
            inputs |= {"dt": tensors["delta"][..., 0], "A": tensors["A"]}
            inputs["state"] = tensors["initial_state"]
        case "ssd_scan":
            inputs |= ssd_scan_inputs(1, 3, 2, 4, 1, 4, **where)
        case "ssd_state_update":
            tensors = ssd_scan_inputs(1, 1, 2, 4, 1, 4, **where)
            inputs |= {n: tensors[n][:, 0] for n in ("x", "dt", "B", "C")}
            inputs |= {"A": tensors["A"], "state": tensors["initial_state"]}
        case "selective_scan":
            inputs |= selective_scan_inputs(1, 2, 3, 4, **where)
        case _:
            raise AssertionError(f"{op} has no case here; add it")
    return inputs


def call(op: str, device: torch.device, **arguments):
    return getattr(lillama_kernels, op)(**inputs_of(op, device), **arguments)


def assert_equal(actual: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(rule, "TRITON_OPS", frozenset())


@pytest.fixture
def one_kernel(monkeypatch):
    monkeypatch.setattr(rule, "TRITON_OPS", frozenset({"fast"}))
    # with --device=cuda it is off
    monkeypatch.setattr(rule, "interpreting", lambda: True)


@pytest.mark.parametrize("op", OPS)
def test_triton_without_a_kernel_is_refused(op, no_kernels, device):
    name = {"low_rank_linears": "low_rank_linear", "distill_loss_and_grad": "distill_loss"}
    name |= {"selective_state_update": "selective_scan", "causal_conv1d_update": "causal_conv1d"}
    name |= {"ssd_state_update": "ssd_scan"}
    with pytest.raises(NotImplementedError, match=f"{name.get(op, op)} has no Triton kernel yet"):
        call(op, device, impl="triton")
    with kernels_impl("triton"), pytest.raises(NotImplementedError, match=name.get(op, op)):
        call(op, device)


@pytest.mark.parametrize("op", OPS)
def test_unknown_impl_is_refused(op, device):
    with pytest.raises(ValueError, match="impl must be one of auto, reference, triton, got 'cuda'"):
        call(op, device, impl="cuda")


@pytest.mark.parametrize("op", OPS)
def test_explicit_argument_wins_over_the_switch(op, no_kernels, device):
    with kernels_impl("triton"):
        forced = call(op, device, impl="reference")
    with kernels_impl("reference"), pytest.raises(NotImplementedError, match="no Triton kernel"):
        call(op, device, impl="triton")
    plain = call(op, device)
    assert_equal(forced, plain)


def test_auto_rule(one_kernel):
    assert resolve_impl("fast", "auto", CUDA) == "triton"
    assert resolve_impl("fast", "auto", CPU) == "reference"
    assert resolve_impl("plain", "auto", CUDA) == "reference"
    assert resolve_impl("fast", "reference", CUDA) == "reference"
    assert resolve_impl("fast", "triton", CPU) == "triton"


def test_switch_forces_and_restores(one_kernel):
    with kernels_impl("reference"):
        assert resolve_impl("fast", "auto", CUDA) == "reference"
        with kernels_impl("triton"):
            assert resolve_impl("fast", "auto", CPU) == "triton"
            with kernels_impl("auto"):
                assert resolve_impl("fast", "auto", CPU) == "reference"
                assert resolve_impl("fast", "auto", CUDA) == "triton"
            assert resolve_impl("fast", "auto", CPU) == "triton"
        assert resolve_impl("fast", "auto", CUDA) == "reference"
    assert resolve_impl("fast", "auto", CUDA) == "triton"


def test_switch_for_named_ops_only(one_kernel):
    with kernels_impl("triton", ops=["fast"]):
        assert resolve_impl("fast", "auto", CPU) == "triton"
        assert resolve_impl("plain", "auto", CPU) == "reference"
    assert resolve_impl("fast", "auto", CPU) == "reference"


def test_the_ops_own_table_decides_for_auto_only(one_kernel):
    assert resolve_impl("fast", "auto", CUDA, auto="reference") == "reference"
    assert resolve_impl("fast", "triton", CUDA, auto="reference") == "triton"
    assert resolve_impl("fast", "auto", CPU, auto="triton") == "reference"


def test_auto_without_the_package_is_the_reference(one_kernel, monkeypatch):
    monkeypatch.setattr(rule, "has_triton", lambda: False)
    assert resolve_impl("fast", "auto", CUDA) == "reference"
    with pytest.raises(NotImplementedError, match="the package triton, which is not installed"):
        resolve_impl("fast", "triton", CUDA)


def test_no_gpu_has_tiles_without_the_package(monkeypatch):
    monkeypatch.setattr(rule, "has_triton", lambda: False)
    monkeypatch.setattr(rule, "interpreting", lambda: pytest.fail("imports triton"))
    assert rule.target_of(torch.device("cuda", 0)) is None


def test_triton_on_a_cpu_needs_the_interpreter(one_kernel, monkeypatch):
    monkeypatch.setattr(rule, "interpreting", lambda: False)
    assert resolve_impl("fast", "triton", CUDA) == "triton"
    with pytest.raises(NotImplementedError, match="needs tensors on a CUDA device, got cpu"):
        resolve_impl("fast", "triton", CPU)


def test_the_interpreter_refuses_bf16_that_nobody_mended(one_kernel, monkeypatch):
    monkeypatch.setattr(rule, "interprets_bf16", False)
    monkeypatch.setattr(rule, "interpreting", lambda: True)
    with pytest.raises(NotImplementedError, match="computes bfloat16 wrongly"):
        resolve_impl("fast", "triton", CPU.bfloat16())
    with pytest.raises(NotImplementedError, match="computes bfloat16 wrongly"):
        resolve_impl("fast", "triton", CPU, dtype=torch.bfloat16)


def test_switch_restores_after_an_exception(one_kernel):
    with pytest.raises(KeyError), kernels_impl("reference"):
        raise KeyError
    assert resolve_impl("fast", "auto", CUDA) == "triton"


def test_switch_refuses_unknown_names(one_kernel):
    with pytest.raises(ValueError, match="impl must be one of .* got 'fastest'"):
        with kernels_impl("fastest"):  # type: ignore[arg-type]
            pass
    assert resolve_impl("fast", "auto", CUDA) == "triton"


def test_switch_stays_in_its_thread(one_kernel):
    seen = []
    with kernels_impl("reference"):
        thread = threading.Thread(target=lambda: seen.append(resolve_impl("fast", "auto", CUDA)))
        thread.start()
        thread.join()
    assert seen == ["triton"]


def test_choice_is_logged_once(one_kernel, monkeypatch, caplog):
    monkeypatch.setattr(rule, "_logged", set())
    with caplog.at_level(logging.INFO, logger=rule.__name__):
        for _ in range(2):
            resolve_impl("fast", "auto", CUDA)
        resolve_impl("fast", "auto", CPU)
    assert [record.getMessage() for record in caplog.records] == [
        "fast runs its triton implementation (asked: auto)",
        "fast runs its reference implementation (asked: auto)",
    ]


# torch 2.13's tracer instantiates autograd functions and so warns about itself
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@some("op", sorted(COMPILED), sorted(set(OPS) - COMPILED))
def test_ops_compile_into_one_graph(op, device):
    torch.compiler.reset()
    compiled = torch.compile(getattr(lillama_kernels, op), fullgraph=True, backend="aot_eager")
    expected = call(op, device)
    torch.testing.assert_close(compiled(**inputs_of(op, device)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("forced", "expected"), [("triton", 1.0), ("reference", 2.0)])
def test_compiled_code_keeps_the_switch_it_was_traced_under(forced, expected, one_kernel):
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def number(x: Tensor) -> Tensor:
        return x + (1 if resolve_impl("fast", "auto", x) == "triton" else 2)

    with kernels_impl(forced):
        assert number(CPU) == expected
    assert number(CPU) == expected
