"""A mixture-of-experts layer whose gate, up and down weights are low-rank factors, ranks ragged."""

import torch
from torch import Tensor

from lillama_kernels import reference
from lillama_kernels.arguments import check_like
from lillama_kernels.dispatch import Impl, runs_triton, work_dtype
from lillama_kernels.low_rank_experts import autograd
from lillama_kernels.reference import (
    ExpertFactors,
    PivotExpertFactors,
    PivotProjectionFactors,
    ProjectionFactors,
)

__all__ = [
    "ExpertFactors",
    "ProjectionFactors",
    "check_dense",
    "check_routing",
    "check_same",
    "low_rank_experts",
]

# What the kernels' numbers for ranks have room for
MAX_RANK = 0xFFFF
PROJECTIONS = ExpertFactors._fields


def low_rank_experts(
    hidden: Tensor,
    topk_index: Tensor,
    topk_weight: Tensor,
    factors: ExpertFactors,
    impl: Impl = "auto",
) -> Tensor:
    """out = sum_k weight_k * down(silu(gate(x)) * up(x)) over the k experts of each token.

    "auto" on a GPU is Triton for fp32, fp16 and bf16 when H, I and every rank are multiples of 8
    and there are tiles for the GPU. It reads nothing back from the GPU, so that a CUDA graph can
    capture it.

    Args:
        hidden: [M, H], floating point.
        topk_index: [M, k], int64 or int32, experts 0 to E-1; E means no expert and contributes
            zero, as transformers' expert parallelism marks experts of other ranks. Other numbers
            raise on the CPU; on a GPU, where looking would wait for it, they contribute zero too.
        topk_weight: [M, k], the routing weights.
        factors: gate and up map H to I, down maps I to H; each expert and projection has a rank of
            its own, 0 meaning a dense weight.
        impl: see `lillama_kernels.dispatch`.

    Returns:
        [M, H], dtype of hidden. Differentiable (once, with Triton) in hidden, topk_weight and every
        factor. The result does not depend on the run (no atomics).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, an index is out of range, `impl` is
            unknown, or `impl="triton"` with sizes that are no multiples of 8.
        TypeError, NotImplementedError: `impl="triton"` cannot take the dtype, or run there.
    """
    gate, up, down = factors
    num_experts = len(gate.ranks)
    check_routing(hidden, topk_index, topk_weight, num_experts)
    hidden_size = hidden.shape[1]
    one = gate.B if gate.W is None else gate.W
    intermediate_size = 0 if one is None or one.ndim != 3 else one.shape[1]
    _check_projection("gate", gate, num_experts, hidden_size, intermediate_size)
    _check_projection("up", up, num_experts, hidden_size, intermediate_size)
    _check_projection("down", down, num_experts, intermediate_size, hidden_size)
    check_same(hidden, topk_index, topk_weight, factors)
    misaligned = _misaligned(hidden, factors)
    if not runs_triton("low_rank_experts", impl, hidden, not misaligned, work_dtype(hidden)):
        return reference.low_rank_experts(hidden, topk_index, topk_weight, factors)
    if misaligned:
        raise ValueError(
            f"low_rank_experts: Triton needs multiples of 8 up to {MAX_RANK}, got {misaligned}; "
            "pad the ranks or use impl='reference'"
        )
    return autograd.run(hidden, topk_index, topk_weight, factors)


def check_dense(
    name: str, factors: ProjectionFactors | PivotProjectionFactors, num_experts: int, K: int, N: int
) -> bool:
    """Refuse ranks and dense weights of one projection that do not fit; whether any expert of it is
    factorised."""
    ranks, W = factors.ranks, factors.W
    num_dense = ranks.count(0)
    if len(ranks) != num_experts or min(ranks) < 0:
        raise ValueError(f"{name}.ranks must hold {num_experts} numbers >= 0, got {list(ranks)}")
    if (num_dense > 0) != (W is not None) or (W is not None and W.shape[0] != num_dense):
        got = None if W is None else list(W.shape)
        raise ValueError(f"{name}.W must hold the {num_dense} experts of rank 0, got {got}")
    if W is not None and W.shape[1:] != (N, K):
        raise ValueError(f"{name}.W must be [.., N, K] with N, K = {N}, {K}, got {list(W.shape)}")
    return num_dense < num_experts


def _check_projection(
    name: str, factors: ProjectionFactors, num_experts: int, K: int, N: int
) -> None:
    if not check_dense(name, factors, num_experts, K, N):
        return
    ranks, A, B, _ = factors
    if A is None or B is None or A.ndim != 3 or B.ndim != 3 or A.shape[1] != B.shape[2]:
        raise ValueError(f"{name}.A must be [E, R, K] and {name}.B [E, N, R] with one R")
    got = f"got {list(A.shape)} and {list(B.shape)}"
    if A.shape[0] != num_experts or B.shape[0] != num_experts or max(ranks) > A.shape[1]:
        raise ValueError(
            f"{name}.A and {name}.B must hold {num_experts} experts of rank >= {max(ranks)}, {got}"
        )
    if A.shape[2] != K or B.shape[1] != N:
        raise ValueError(f"{name}.A must have K = {K} and {name}.B N = {N}, {got}")


def check_same(
    hidden: Tensor,
    topk_index: Tensor,
    topk_weight: Tensor,
    factors: ExpertFactors | PivotExpertFactors,
) -> None:
    """One device for all, one dtype for hidden and factors."""
    check_like("topk_index", topk_index, hidden, "hidden", dtype=False)
    check_like("topk_weight", topk_weight, hidden, "hidden", dtype=False)
    for projection, part in zip(PROJECTIONS, factors, strict=True):
        for field in part._fields[1:]:
            name, tensor = f"{projection}.{field}", getattr(part, field)
            check_like(name, tensor, hidden, "hidden", dtype=field != "order")


def check_routing(
    hidden: Tensor, topk_index: Tensor, topk_weight: Tensor, num_experts: int
) -> None:
    """Refuse shapes and, on the CPU, experts that there are not."""
    if hidden.ndim != 2:
        raise ValueError(f"hidden must be [M, H], got {list(hidden.shape)}")
    if topk_index.ndim != 2 or topk_index.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"topk_index must be [M, k] with M = {hidden.shape[0]}, got {list(topk_index.shape)}"
        )
    if topk_index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"topk_index must be int64 or int32, got {topk_index.dtype}")
    if topk_weight.shape != topk_index.shape:
        raise ValueError(
            f"topk_weight must have topk_index's shape {list(topk_index.shape)}, "
            f"got {list(topk_weight.shape)}"
        )
    if topk_index.is_cpu and topk_index.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in topk_index.aminmax())
        if low < 0 or high > num_experts:
            raise ValueError(
                f"topk_index must be in 0..{num_experts - 1}, or {num_experts} for no expert; "
                f"got {low if low < 0 else high}"
            )


def _misaligned(hidden: Tensor, factors: ExpertFactors) -> str:
    """What is no multiple of 8, as the kernels need it; empty when all is."""
    sizes = {"hidden_size": hidden.shape[1]}
    for name, part in zip(PROJECTIONS, factors, strict=True):
        one = part.B if part.W is None else part.W
        assert one is not None
        sizes[f"{name}'s out_features"] = one.shape[1]
        width = 0 if part.A is None else part.A.shape[1]
        for what, ranks in ((f"{name}'s rank", part.ranks), (f"{name}.A's rows", (width,))):
            sizes[what] = next((rank for rank in ranks if rank % 8 or rank > MAX_RANK), 0)
    return ", ".join(
        f"{name} {size}" for name, size in sizes.items() if size % 8 or size > MAX_RANK
    )
