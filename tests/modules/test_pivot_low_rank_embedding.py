"""PivotLowRankEmbedding against the table that it stands for; and a head in that gauge."""

import pytest
import torch
import torch.nn.functional as F
from lillama_kernels.testing import check_op
from torch import Tensor

from lillama.modules.low_rank_embedding import PivotLowRankEmbedding
from lillama.modules.low_rank_linear import PivotLowRankLinear

V, H = 40, 24
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


def made(rank: int, device: torch.device, dtype: torch.dtype) -> PivotLowRankEmbedding:
    generator = torch.Generator().manual_seed(0)
    module = PivotLowRankEmbedding(V, H, rank, device=device, dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        module.lr_order.copy_(torch.randperm(H, generator=generator))
    return module


def as_function(module: torch.nn.Module, ids: Tensor):
    def op(**parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (ids,))

    return op


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 7, H], ids="R{}".format)
@pytest.mark.parametrize("shape", [(), (5,), (3, 63)], ids=str)
def test_forward_and_gradients_are_those_of_the_table(shape, rank, dtype, device):
    module = made(rank, device, dtype)
    ids = torch.randint(V, shape, generator=torch.Generator().manual_seed(1)).to(device)

    def oracle(lr_B: Tensor, lr_C: Tensor) -> Tensor:
        columns = torch.cat([lr_B, lr_B @ lr_C.mT], -1)
        return F.embedding(ids, columns[:, module.lr_order.long()])

    inputs = {name: parameter.detach() for name, parameter in module.named_parameters()}
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "lr_B": (V, rank),
        "lr_C": (H - rank, rank),
    }
    check_op(as_function(module, ids), oracle, inputs)
    out = module(ids)
    assert out.shape == (*shape, H) and out.dtype == dtype
    # R of the outputs are numbers of the table as they are
    assert torch.equal(out[..., module.lr_order.argsort()[:rank]], F.embedding(ids, module.lr_B))


def test_what_is_stored_and_what_stands_for_the_weight(device):
    module = made(7, device, torch.bfloat16)
    assert set(module.state_dict()) == {"lr_B", "lr_C", "lr_order"}
    assert module.lr_order.dtype == torch.int32 and module.lr_order.shape == (H,)
    again = PivotLowRankEmbedding(V, H, 7, device="meta")
    again.load_state_dict(module.state_dict(), assign=True)
    ids = torch.arange(V, device=device)
    assert torch.equal(again(ids), module(ids))
    assert module.weight.shape == (V, H) and module.weight.dtype == torch.bfloat16
    assert module.weight.is_meta  # nothing was computed


def test_weight_of_a_head_is_not_computed(device):
    head = PivotLowRankLinear(H, V, 7, device=device, dtype=torch.bfloat16, is_head=True)
    assert head.weight.shape == (V, H) and head.weight.dtype == torch.bfloat16
    assert head.weight.is_meta
    assert PivotLowRankLinear(H, V, 7, device=device).weight.device.type == device.type
