"""low_rank_linears, layers with one input, against each layer alone by einsum in fp64."""

import pytest
import torch
from lillama_kernels import low_rank_linear, low_rank_linears
from lillama_kernels.testing import (
    assert_close_to_truth,
    check_op,
    low_rank_linear_inputs,
    poison_empty,
)
from torch import Tensor

from tests.ops.precision import each_dtype, some

RANKS, WIDTHS = (24, 8, 40), (100, 16, 33)


def oracle(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    y = torch.einsum("mk,rk,nr->mn", x, A, B) if x.dtype == torch.float64 else x @ A.T @ B.T
    return y if bias is None else y + bias


def pairs_of(rows: int, dtype: torch.dtype, device: torch.device, adjacent: bool):
    x = low_rank_linear_inputs([rows], 48, 8, 8, dtype=dtype, device=device)["x"]
    g = torch.Generator().manual_seed(3)
    whole = (torch.randn(sum(RANKS), 48, generator=g) / 7).to(device, dtype)
    As = list(whole.split(RANKS)) if adjacent else [A.clone() for A in whole.split(RANKS)]
    sizes = zip(WIDTHS, RANKS, strict=True)
    Bs = [(torch.randn(n, r, generator=g) / r**0.5).to(device, dtype) for n, r in sizes]
    biases = [torch.randn(100, generator=g).to(device, dtype), None, None]
    return x, As, Bs, biases


@each_dtype
@pytest.mark.parametrize("adjacent", [True, False], ids=["adjacent", "apart"])
@some("rows", [3], [1, 40, 70, 130], lambda m: f"M{m}")
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_low_rank_linears_values_and_grads(impl, rows, adjacent, dtype, device):
    x, As, Bs, biases = pairs_of(rows, dtype, device, adjacent)
    with poison_empty(), torch.no_grad():
        ys = low_rank_linears(x, As, Bs, biases, impl=impl)
    for y, *pair in zip(ys, As, Bs, biases, strict=True):
        wide = [None if t is None else t.double() for t in (x, *pair)]
        assert_close_to_truth(y, oracle(*wide), oracle(x, *pair))

    inputs = {"x": x, "bias": biases[0]}
    inputs |= {f"A{i}": A for i, A in enumerate(As)} | {f"B{i}": B for i, B in enumerate(Bs)}

    def shared(x: Tensor, bias: Tensor, **factors: Tensor) -> list[Tensor]:
        As, Bs = ([factors[f"{name}{i}"] for i in range(3)] for name in "AB")
        return low_rank_linears(x, As, Bs, [bias, None, None], impl=impl)

    def apart(x: Tensor, bias: Tensor, **factors: Tensor) -> list[Tensor]:
        given = (bias, None, None)
        return [oracle(x, factors[f"A{i}"], factors[f"B{i}"], given[i]) for i in range(3)]

    check_op(shared, apart, inputs)


def test_low_rank_linears_reads_adjacent_factors_in_place(device, monkeypatch):
    x, As, Bs, biases = pairs_of(3, torch.float32, device, adjacent=True)
    with torch.no_grad():
        expected = low_rank_linears(x, [A.clone() for A in As], Bs, biases, impl="triton")
        monkeypatch.setattr(torch, "cat", lambda *_: pytest.fail("copied the factors"))
        ys = low_rank_linears(x, As, Bs, biases, impl="triton")
    for y, other in zip(ys, expected, strict=True):
        assert torch.equal(y, other)


def test_low_rank_linears_unused_output(device):
    x, As, Bs, _ = pairs_of(7, torch.float32, device, adjacent=False)
    for tensor in (x, *As, *Bs):
        tensor.requires_grad_()
    low_rank_linears(x, As, Bs, impl="triton")[1].sum().backward()
    found = [t.grad.clone() if t.grad is not None else None for t in (x, As[1], Bs[1])]
    assert Bs[0].grad is not None and not Bs[0].grad.any()
    for tensor in (x, *As, *Bs):
        tensor.grad = None
    low_rank_linear(x, As[1], Bs[1], impl="triton").sum().backward()
    for tensor, grad in zip((x, As[1], Bs[1]), found, strict=True):
        torch.testing.assert_close(grad, tensor.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("counts", "message"),
    [((0, 0), "at least one; got 0, 0 and 0"), ((2, 1), "got 2, 1 and 2")],
    ids=["none", "unequal"],
)
def test_low_rank_linears_rejects_lists(counts, message, device):
    x, As, Bs, _ = pairs_of(3, torch.float32, device, adjacent=True)
    with pytest.raises(ValueError, match=message):
        low_rank_linears(x, As[: counts[0]], Bs[: counts[1]])


def test_low_rank_linears_names_the_layer(device):
    x, As, Bs, _ = pairs_of(3, torch.float32, device, adjacent=True)
    As[1] = As[1][:, :40]
    with pytest.raises(ValueError, match=r"K = 40 as in A of layer 1, got \[3, 48\]"):
        low_rank_linears(x, As, Bs)
