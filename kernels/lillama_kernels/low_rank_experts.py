"""A mixture-of-experts layer whose gate, up and down weights are low-rank factors, ranks ragged."""

from torch import Tensor

from lillama_kernels import reference
from lillama_kernels.impl import Impl, resolve_impl
from lillama_kernels.reference import ExpertFactors, ProjectionFactors

__all__ = ["ExpertFactors", "ProjectionFactors", "low_rank_experts"]


def _check_projection(
    name: str, factors: ProjectionFactors, num_experts: int, in_features: int, out_features: int
) -> None:
    ranks, A, B, W = factors
    num_dense = ranks.count(0)
    if len(ranks) != num_experts or min(ranks) < 0:
        raise ValueError(f"{name}.ranks must hold {num_experts} numbers >= 0, got {list(ranks)}")
    if (num_dense > 0) != (W is not None) or (W is not None and W.shape[0] != num_dense):
        got = None if W is None else list(W.shape)
        raise ValueError(f"{name}.W must hold the {num_dense} experts of rank 0, got {got}")
    if W is not None and W.shape[1:] != (out_features, in_features):
        raise ValueError(
            f"{name}.W must be [.., N, K] with N, K = {out_features}, {in_features}, "
            f"got {list(W.shape)}"
        )
    if num_dense == num_experts:
        return
    if A is None or B is None or A.ndim != 3 or B.ndim != 3 or A.shape[1] != B.shape[2]:
        raise ValueError(f"{name}.A must be [E, R, K] and {name}.B [E, N, R] with one R")
    if A.shape[0] != num_experts or B.shape[0] != num_experts or max(ranks) > A.shape[1]:
        raise ValueError(
            f"{name}.A and {name}.B must hold {num_experts} experts of rank >= {max(ranks)}, "
            f"got {list(A.shape)} and {list(B.shape)}"
        )
    if A.shape[2] != in_features or B.shape[1] != out_features:
        raise ValueError(
            f"{name}.A must have K = {in_features} and {name}.B N = {out_features}, "
            f"got {list(A.shape)} and {list(B.shape)}"
        )


def low_rank_experts(
    hidden: Tensor,
    topk_index: Tensor,
    topk_weight: Tensor,
    factors: ExpertFactors,
    impl: Impl = "auto",
) -> Tensor:
    """out = sum_k weight_k * down(silu(gate(x)) * up(x)) over the k experts of each token.

    Args:
        hidden: [M, H], floating point.
        topk_index: [M, k] int64; an index >= E contributes zero.
        topk_weight: [M, k], the routing weights.
        factors: gate and up map H to I, down maps I to H; each expert and projection has a rank of
            its own, 0 meaning a dense weight.
        impl: see `lillama_kernels.impl`.

    Returns:
        [M, H], dtype of hidden. Differentiable in hidden, topk_weight and every factor. The result
        does not depend on the order of tokens or on the run (no atomics).

    Raises:
        ValueError: shapes do not fit or `impl` is unknown.
        NotImplementedError: `impl="triton"`, which does not exist yet.
    """
    if hidden.ndim != 2:
        raise ValueError(f"hidden must be [M, H], got {list(hidden.shape)}")
    if topk_index.ndim != 2 or topk_index.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"topk_index must be [M, k] with M = {hidden.shape[0]}, got {list(topk_index.shape)}"
        )
    if topk_weight.shape != topk_index.shape:
        raise ValueError(
            f"topk_weight must have topk_index's shape {list(topk_index.shape)}, "
            f"got {list(topk_weight.shape)}"
        )
    gate, up, down = factors
    num_experts, hidden_size = len(gate.ranks), hidden.shape[1]
    one = gate.B if gate.W is None else gate.W
    intermediate_size = 0 if one is None or one.ndim != 3 else one.shape[1]
    _check_projection("gate", gate, num_experts, hidden_size, intermediate_size)
    _check_projection("up", up, num_experts, hidden_size, intermediate_size)
    _check_projection("down", down, num_experts, intermediate_size, hidden_size)
    resolve_impl("low_rank_experts", impl, hidden)
    return reference.low_rank_experts(hidden, topk_index, topk_weight, factors)
