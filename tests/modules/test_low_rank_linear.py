"""LowRankLinear against the dense layer whose weight is B A."""

import pytest
import torch
import torch.nn.functional as F
from lillama_kernels.testing import assert_close_to_truth
from torch import nn

from lillama.modules import LowRankLinear

K, N, RANK = 24, 16, 5
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
BIAS = [pytest.param(True, id="bias"), pytest.param(False, id="no-bias")]


def factorised(device: torch.device, dtype: torch.dtype, bias: bool) -> LowRankLinear:
    torch.manual_seed(0)
    layer = LowRankLinear(K, N, RANK, bias=bias, device=device, dtype=dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", BIAS)
def test_parameters_are_the_factors_and_the_bias(device, dtype, bias):
    layer = factorised(device, dtype, bias)
    assert (layer.lr_A.shape, layer.lr_B.shape) == ((RANK, K), (N, RANK))
    assert set(layer.state_dict()) == ({"lr_A", "lr_B", "bias"} if bias else {"lr_A", "lr_B"})
    for parameter in layer.parameters():
        assert (parameter.dtype, parameter.device.type) == (dtype, device.type)
        assert parameter.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", BIAS)
def test_forward_equals_dense_layer(device, dtype, bias):
    layer = factorised(device, dtype, bias)
    x = torch.randn(3, 7, K).to(device, dtype)
    weight = layer.lr_B.double() @ layer.lr_A.double()
    offset = None if layer.bias is None else layer.bias.double()
    truth = F.linear(x.double(), weight, offset)
    baseline = F.linear(F.linear(x, layer.lr_A), layer.lr_B, layer.bias)
    assert_close_to_truth(layer(x).detach(), truth.detach(), baseline.detach())


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_is_b_a_and_differentiable(device, dtype):
    layer = factorised(device, dtype, True)
    assert layer.weight.shape == (N, K)
    assert torch.equal(layer.weight, layer.lr_B @ layer.lr_A)
    grad = torch.randn(N, K).to(device, dtype)
    layer.weight.backward(grad)
    torch.testing.assert_close(layer.lr_A.grad, layer.lr_B.detach().T @ grad)
    torch.testing.assert_close(layer.lr_B.grad, grad @ layer.lr_A.detach().T)


def test_backward_reaches_factors_bias_and_input(device):
    layer = factorised(device, torch.float32, True)
    x = torch.randn(6, K, device=device, requires_grad=True)
    weight = layer.weight.detach().requires_grad_()
    assert layer.bias is not None
    bias = layer.bias.detach().clone().requires_grad_()
    twin = x.detach().clone().requires_grad_()
    grad = torch.randn(6, N, device=device)
    layer(x).backward(grad)
    F.linear(twin, weight, bias).backward(grad)
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(layer.bias.grad, bias.grad)
    assert weight.grad is not None
    torch.testing.assert_close(layer.lr_A.grad, layer.lr_B.detach().T @ weight.grad)
    torch.testing.assert_close(layer.lr_B.grad, weight.grad @ layer.lr_A.detach().T)


@pytest.mark.parametrize("rank", [1, N])
def test_rank_at_the_bounds_is_accepted(rank):
    assert LowRankLinear(K, N, rank).lr_A.shape == (rank, K)


@pytest.mark.parametrize("rank", [-1, 0, N + 1])
def test_rank_out_of_bounds_raises(rank):
    with pytest.raises(ValueError, match=rf"min\(in_features, out_features\) = {N}, got {rank}"):
        LowRankLinear(K, N, rank)


def test_extra_repr_names_sizes_rank_and_bias():
    text = repr(LowRankLinear(K, N, RANK, bias=True))
    assert text == f"LowRankLinear(in_features={K}, out_features={N}, rank={RANK}, bias=True)"
