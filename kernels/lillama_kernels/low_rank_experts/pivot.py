"""low_rank_experts with every factorised expert in the pivot gauge: see pivot_low_rank_linear.

Each expert's R outputs that are its inner products themselves are gathered with the others by an
order of its own.
"""

import torch
from torch import Tensor

from lillama_kernels import reference
from lillama_kernels.dispatch import Impl, resolve_impl
from lillama_kernels.low_rank_experts.op import check_dense, check_routing, check_same
from lillama_kernels.reference import PivotExpertFactors, PivotProjectionFactors

__all__ = ["PivotExpertFactors", "PivotProjectionFactors", "pivot_low_rank_experts"]


def pivot_low_rank_experts(
    hidden: Tensor,
    topk_index: Tensor,
    topk_weight: Tensor,
    factors: PivotExpertFactors,
    impl: Impl = "auto",
) -> Tensor:
    """out = sum_k weight_k * down(silu(gate(x)) * up(x)) over the k experts of each token, a
    projection of expert e being W_e = cat([A_e, C_e A_e])[order_e].

    PyTorch's products, one expert after the other; there is no Triton kernel yet. It reads the
    number of each expert's rows back from a GPU, so that no CUDA graph can capture it, except under
    torch.compile where no expert is dense.

    Args:
        hidden, topk_index, topk_weight: as for `low_rank_experts`.
        factors: gate and up map H to I, down maps I to H; each expert and projection has a rank of
            its own, 0 meaning a dense weight. An order must be a permutation of 0..N-1 where its
            rank is not 0 (not checked: that would stop a GPU).
        impl: see `lillama_kernels.dispatch`.

    Returns:
        [M, H], dtype of hidden. Differentiable in hidden, topk_weight and every A, C and W.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, an index is out of range, or `impl` is
            unknown.
        NotImplementedError: `impl="triton"`.
    """
    gate, up, down = factors
    num_experts = len(gate.ranks)
    check_routing(hidden, topk_index, topk_weight, num_experts)
    hidden_size, intermediate_size = hidden.shape[1], _out_features(gate)
    _check_projection("gate", gate, num_experts, hidden_size, intermediate_size)
    _check_projection("up", up, num_experts, hidden_size, intermediate_size)
    _check_projection("down", down, num_experts, intermediate_size, hidden_size)
    check_same(hidden, topk_index, topk_weight, factors)
    resolve_impl("pivot_low_rank_experts", impl, hidden)
    return reference.low_rank_experts(hidden, topk_index, topk_weight, factors)


def _out_features(factors: PivotProjectionFactors) -> int:
    """N; 0 where the shapes are such that they will be refused."""
    if factors.W is not None:
        return factors.W.shape[1] if factors.W.ndim == 3 else 0
    return 0 if factors.order is None else factors.order.shape[-1]


def _check_projection(
    name: str, factors: PivotProjectionFactors, num_experts: int, K: int, N: int
) -> None:
    if not check_dense(name, factors, num_experts, K, N):
        return
    ranks, A, C, order, _ = factors
    rank, rest = max(ranks), N - min(rank for rank in ranks if rank)
    if A is None or C is None or A.ndim != 3 or C.ndim != 3 or A.shape[1] != C.shape[2]:
        raise ValueError(f"{name}.A must be [E, R, K] and {name}.C [E, Q, R] with one R")
    if A.shape[0] != num_experts or A.shape[1] < rank or A.shape[2] != K:
        raise ValueError(
            f"{name}.A must be [E, R, K] = [{num_experts}, {rank} or more, {K}], "
            f"got {list(A.shape)}"
        )
    if C.shape[0] != num_experts or C.shape[1] < rest:
        raise ValueError(
            f"{name}.C must be [E, Q, R] with E = {num_experts} and Q = N - the smallest rank = "
            f"{rest} or more, got {list(C.shape)}"
        )
    if order is None or order.shape != (num_experts, N):
        got = None if order is None else list(order.shape)
        raise ValueError(f"{name}.order must be [E, N] = [{num_experts}, {N}], got {got}")
    if order.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}.order must be int32 or int64, got {order.dtype}")
