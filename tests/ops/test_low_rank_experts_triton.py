"""The Triton kernels of low_rank_experts against the reference in fp64: every path and gradient.

The reference is held to a loop over tokens in test_low_rank_experts.py. On the CPU the kernels run
in Triton's interpreter, with the bf16 of tests/interpreter.py.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lillama_kernels import kernels_impl, low_rank_experts, reference
from lillama_kernels.testing import (
    check_op,
    check_values,
    expert_factors,
    low_rank_experts_inputs,
    values_and_grads,
)
from lillama_kernels.tiles import EXPERTS_DECODE_MAX_TOKENS, route_tile
from torch import Tensor

from tests.ops.precision import each_dtype, each_half, full, some

HIDDEN, INTERMEDIATE = 24, 40
Ranks = dict[str, tuple[int, ...]]
# four experts: ragged, dense (0) among factorised, all dense, and all of one rank
RAGGED: Ranks = {"gate": (8, 16, 40, 8), "up": (16, 8, 8, 24), "down": (8, 24, 8, 16)}
MIXED: Ranks = {"gate": (8, 0, 24, 0), "up": (0, 8, 0, 24), "down": (8, 0, 0, 16)}
DENSE: Ranks = {"gate": (0,) * 4, "up": (0,) * 4, "down": (0,) * 4}
HALF: Ranks = {"gate": (0,) * 4, "up": (8,) * 4, "down": (0,) * 4}


def make(num_rows: int, top_k: int, ranks: Ranks, dtype: torch.dtype, device: torch.device):
    return low_rank_experts_inputs(
        num_rows, top_k, HIDDEN, INTERMEDIATE, ranks, dtype=dtype, device=device
    )


def calls(index: Tensor, ranks: Ranks, **options: Any) -> tuple[Callable[..., Tensor], ...]:
    """The op on Triton and the reference, as functions of the floating tensors.

    Without an `up_A` among them, gate's is up's too.
    """

    def with_factors(function: Callable[..., Tensor], **given: Any) -> Callable[..., Tensor]:
        def call(hidden: Tensor, topk_weight: Tensor, **tensors: Tensor) -> Tensor:
            factors = expert_factors(tensors, ranks)
            if "up_A" not in tensors and "gate_A" in tensors and max(ranks["up"]) > 0:
                factors = factors._replace(up=factors.up._replace(A=tensors["gate_A"]))
            return function(hidden, index, topk_weight, factors, **given)

        return call

    op = with_factors(low_rank_experts, impl="triton", **options)
    return op, with_factors(reference.low_rank_experts)


def check(inputs: dict[str, Tensor], index: Tensor, ranks: Ranks, **options: Any) -> None:
    op, oracle = calls(index, ranks, **options)
    check_values(op, oracle, inputs)
    check_op(op, oracle, inputs)


KINDS = {"ragged": RAGGED, "mixed": MIXED, "dense": DENSE, "half": HALF}


# 3 tokens without gradients run the decode kernels, training and 20 tokens the others
@each_dtype
@some("kind", ["ragged", "mixed"], ["dense", "half"])
@some("num_rows", [3], [20], lambda m: f"M{m}")
def test_low_rank_experts_triton(num_rows, kind, dtype, device):
    check(*make(num_rows, 2, KINDS[kind], dtype, device), KINDS[kind])


@pytest.mark.parametrize("kind", ["dense", "half"])
def test_low_rank_experts_triton_values(kind, device):
    for num_rows in (3, 17):
        inputs, index = make(num_rows, 2, KINDS[kind], torch.float32, device)
        check_values(*calls(index, KINDS[kind]), inputs)


@each_half
def test_low_rank_experts_triton_in_16_bits(dtype, device):
    check(*make(5, 2, MIXED, dtype, device), MIXED)


def test_low_rank_experts_triton_counts_in_several_blocks(device, monkeypatch):
    """Of 64 (token, place) pairs, where the committed tile counts 1024 of four experts."""
    from lillama_kernels.low_rank_experts import launch

    tile = dataclasses.replace(route_tile(4), blocks={"BLOCK_P": 64, "BLOCK_E": 4})
    monkeypatch.setattr(launch, "route_tile", lambda num_experts: tile)
    inputs, index = make(36, 2, MIXED, torch.float32, device)
    check_values(*calls(index, MIXED), inputs)


@full
@each_dtype
def test_low_rank_experts_triton_many_rows(dtype, device):
    """Several tiles an expert."""
    check(*make(300, 2, RAGGED, dtype, device), RAGGED)


# E experts, k of them for each token; a slot is an expert or, where k is small, a place
@some("size", [(1, 1), (5, 2)], [(2, 1), (8, 4), (8, 8), (64, 8)])
def test_low_rank_experts_triton_numbers_of_experts(size, device):
    num_experts, top_k = size
    ranks = {name: ((8, 16, 24, 8, 40) * 13)[:num_experts] for name in RAGGED}
    if num_experts > 5:
        ranks = {name: (8,) * num_experts for name in RAGGED}
    for num_rows, places in ((3, top_k), (20, 1)):
        inputs, index = make(num_rows, places, ranks, torch.float32, device)
        check_values(*calls(index, ranks), inputs)


@full
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (5, 2), (8, 4), (8, 8)], ids=str)
def test_low_rank_experts_triton_gradients_of_numbers_of_experts(size, device):
    ranks = {name: (8,) * size[0] for name in RAGGED}
    inputs, index = make(3, size[1], ranks, torch.float32, device)
    check_op(*calls(index, ranks), inputs)


ROUTES = [
    pytest.param(lambda index: index.clamp(max=1), id="two-empty-experts"),
    pytest.param(lambda index: (index + 2).clamp(max=4), id="half-to-none"),
    pytest.param(lambda index: torch.full_like(index, 2), id="all-to-one", marks=full),
    pytest.param(lambda index: torch.full_like(index, 4), id="all-to-none"),
]


@pytest.mark.parametrize("route", ROUTES)
@some("num_rows", [5], [1, 33], lambda m: f"M{m}")
def test_low_rank_experts_triton_routing(num_rows, route, device):
    inputs, index = make(num_rows, 2, MIXED, torch.float32, device)
    index = route(index)
    check(inputs, index, MIXED)
    if bool((index == 4).all()):
        assert not calls(index, MIXED)[0](**inputs).any()


def test_low_rank_experts_triton_one_first_factor_for_gate_and_up(device):
    """Its gradient is the sum of both."""
    inputs, index = make(3, 2, RAGGED, torch.float32, device)
    inputs["up_B"] = torch.nn.functional.pad(inputs["up_B"], (0, 16))
    del inputs["up_A"]
    check(inputs, index, RAGGED)


@each_dtype
def test_low_rank_experts_triton_noncontiguous(dtype, device):
    inputs, index = make(17, 2, MIXED, dtype, device)
    op, oracle = calls(index.T.contiguous().T, MIXED)
    check_op(op, oracle, inputs, noncontiguous=True)


def test_low_rank_experts_triton_takes_columns_and_int32(device):
    """A view whose rows lie apart is read in place; other integers are converted."""
    inputs, index = make(5, 2, RAGGED, torch.float32, device)
    op, _ = calls(index, RAGGED)
    expected = op(**inputs)
    for start, width in ((0, HIDDEN + 8), (1, HIDDEN + 8), (0, HIDDEN + 1)):
        wide = torch.full((5, width), float("nan"), device=device)
        wide[:, start : start + HIDDEN] = inputs["hidden"]
        given = inputs | {"hidden": wide[:, start : start + HIDDEN]}
        assert torch.equal(calls(index.int(), RAGGED)[0](**given), expected)


@some("kind", ["mixed"], ["ragged", "half"])
@some("num_rows", [3], [20], lambda m: f"M{m}")
def test_low_rank_experts_triton_ignores_the_padding(num_rows, kind, device):
    ranks = KINDS[kind]
    inputs, index = make(num_rows, 2, ranks, torch.float32, device)
    op, _ = calls(index, ranks)
    grad = torch.randn(num_rows, HIDDEN, generator=torch.Generator().manual_seed(1)).to(device)
    before = values_and_grads(op, inputs, [grad])
    for name, each in ranks.items():
        for expert, rank in enumerate(each):
            if f"{name}_A" in inputs:
                inputs[f"{name}_A"][expert, rank:] = float("nan")
                inputs[f"{name}_B"][expert, :, rank:] = float("nan")
                for letter, dim in (("A", 0), ("B", 1)):
                    part = before[f"grad {name}_{letter}"][expert]
                    assert not part.narrow(dim, rank, part.shape[dim] - rank).any()
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    out = op(**leaves)
    assert torch.equal(out, before["output 0"])
    found = torch.autograd.grad(out, list(leaves.values()), grad)
    for name, tensor in zip(leaves, found, strict=True):
        assert torch.equal(tensor, before[f"grad {name}"]), name
    with torch.no_grad():
        assert not op(**inputs).isnan().any()


def test_low_rank_experts_triton_no_tokens(device):
    inputs, index = make(0, 2, MIXED, torch.float32, device)
    op, _ = calls(index, MIXED)
    results = values_and_grads(op, inputs, [torch.zeros(0, HIDDEN, device=device)])
    assert results.pop("output 0").shape == (0, HIDDEN)
    assert not any(tensor.any() for tensor in results.values())
    with torch.no_grad():
        assert op(**inputs).shape == (0, HIDDEN)


@some("names", [("hidden",)], [("down_B", "topk_weight", "gate_A", "gate_W", "up_B", "down_A")])
def test_low_rank_experts_triton_only_the_gradients_asked_for(names, device):
    inputs, index = make(5, 2, MIXED, torch.float32, device)
    op, _ = calls(index, MIXED)
    grads = values_and_grads(op, inputs, [torch.ones(5, HIDDEN, device=device)])
    for name in names:
        alone = {n: t.detach().requires_grad_(n == name) for n, t in inputs.items()}
        (grad,) = torch.autograd.grad(op(**alone).sum(), [alone[name]])
        assert torch.equal(grad, grads[f"grad {name}"]), name


def test_low_rank_experts_triton_has_no_second_gradient(device):
    inputs, index = make(3, 2, RAGGED, torch.float32, device)
    op, _ = calls(index, RAGGED)
    hidden = inputs.pop("hidden").requires_grad_()
    (grad,) = torch.autograd.grad(op(hidden, **inputs).sum(), [hidden], create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_low_rank_experts_triton_under_autocast(device):
    dtype = torch.bfloat16
    inputs, index = make(5, 2, MIXED, torch.float32, device)
    op, oracle = calls(index, MIXED)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    with torch.autocast(device.type, dtype):
        out = op(**leaves)
    out.sum().backward()
    expected = oracle(**{n: t.detach() for n, t in inputs.items()})
    assert out.dtype == torch.float32
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in leaves.values())
    torch.testing.assert_close(out, expected, rtol=3e-2, atol=3e-2)


@full
@pytest.mark.parametrize("num_rows", [3, 20], ids=lambda m: f"M{m}")
def test_low_rank_experts_triton_compiled(num_rows, device):
    torch.compiler.reset()
    inputs, index = make(num_rows, 2, MIXED, torch.float32, device)
    op, _ = calls(index, MIXED)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    grad = torch.randn(num_rows, HIDDEN, generator=torch.Generator().manual_seed(1)).to(device)
    results = values_and_grads(compiled, inputs, [grad])
    for name, expected in values_and_grads(op, inputs, [grad]).items():
        assert torch.equal(results[name], expected), name
    with torch.no_grad():
        assert torch.equal(compiled(**inputs), op(**inputs))


@pytest.mark.parametrize("num_rows", [0, 3], ids=lambda m: f"M{m}")
def test_low_rank_experts_triton_is_a_well_formed_op(num_rows, device):
    inputs, index = make(num_rows, 2, MIXED, torch.float32, device)
    factors = [t for name, t in inputs.items() if name not in ("hidden", "topk_weight")]
    given = [f"{p}_{letter}" in inputs for p in MIXED for letter in "ABW"]
    ranks = [rank for each in MIXED.values() for rank in each]
    arguments = (inputs["hidden"], index, inputs["topk_weight"], factors, given, ranks)
    op = torch.ops.lillama.low_rank_experts.default
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for save in (False, True):
        torch.library.opcheck(op, (*arguments, save), test_utils=checks)


@pytest.mark.parametrize("num_rows", [EXPERTS_DECODE_MAX_TOKENS, 40], ids=lambda m: f"M{m}")
def test_low_rank_experts_triton_in_a_cuda_graph(num_rows, device):
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    inputs, index = make(num_rows, 2, MIXED, torch.bfloat16, device)
    op, _ = calls(index, MIXED)
    with torch.no_grad():
        expected = op(**inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = op(**inputs)
        index.copy_(index.flip(0))  # another routing in the same graph
        graph.replay()
        again = op(**inputs)
    assert torch.equal(out, again) and not torch.equal(out, expected)


# What is refused
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ranks": {**RAGGED, "up": (16, 8, 8, 20)}},
            r"multiples of 8 .* up's rank 20, up.A's rows 20; pad",
        ),
        ({"dtype": torch.float64}, r"Triton kernels take float32, float16, bfloat16; got float64"),
    ],
    ids=["rank", "fp64"],
)
def test_low_rank_experts_triton_refuses(change, message, device):
    ranks = change.get("ranks", RAGGED)
    inputs, index = make(3, 2, ranks, change.get("dtype", torch.float32), device)
    with pytest.raises((ValueError, TypeError), match=message):
        calls(index, ranks)[0](**inputs)


def test_low_rank_experts_auto_is_the_reference_on_a_cpu(monkeypatch):
    inputs, index = make(3, 2, RAGGED, torch.float32, torch.device("cpu"))
    ran: list[str] = []
    original = torch.ops.lillama.low_rank_experts

    @functools.wraps(original)
    def spy(*args: Any) -> Any:
        ran.append("triton")
        return original(*args)

    monkeypatch.setattr(torch.ops.lillama, "low_rank_experts", spy)
    factors = expert_factors(inputs, RAGGED)
    given = (inputs["hidden"], index, inputs["topk_weight"], factors)
    low_rank_experts(*given)
    assert not ran
    with kernels_impl("triton"):
        low_rank_experts(*given)
    assert ran == ["triton"]
