"""y = x W^T + bias for a W [N, K] of rank R whose factors are in the pivot gauge.

Any product B A stays the same under B -> B S, A -> S^-1 A. With S^-1 = R rows of B these rows
become the identity: R outputs are the R inner products themselves, and only C [N - R, R] is left of
B. That stores and multiplies R (K + N - R) numbers instead of R (K + N).
"""

import torch
from torch import Tensor

from lillama_kernels import reference
from lillama_kernels.impl import Impl, autocasting, resolve_impl

__all__ = ["pivot_low_rank_linear"]


def pivot_low_rank_linear(
    x: Tensor,
    A: Tensor,
    C: Tensor,
    order: Tensor,
    bias: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """y[..., n] = [z, z C^T][..., order[n]] + bias[n] with z = x A^T, differentiable in x, A, C and
    bias. Two of PyTorch's products and a gather; there is no Triton kernel yet.

    Args:
        x: [..., K], floating point; zero rows give zero rows.
        A: [R, K], dtype and device of x.
        C: [N - R, R], dtype and device of x; N - R may be 0.
        order: [N] int32 or int64, device of x, a permutation of 0..N-1 (not checked: that would
            stop a GPU). Output n is column order[n] of [z, z C^T].
        bias: [N] or None, dtype and device of x.
        impl: see `lillama_kernels.impl`.

    Returns:
        [..., N], dtype of x (autocast applies as for nn.Linear).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `impl` is unknown.
        NotImplementedError: `impl="triton"`.
    """
    _check(x, A, C, order, bias)
    resolve_impl("pivot_low_rank_linear", impl, x)
    return reference.pivot_low_rank_linear(x, A, C, order, bias)


def _check(x: Tensor, A: Tensor, C: Tensor, order: Tensor, bias: Tensor | None) -> None:
    if A.ndim != 2 or C.ndim != 2 or A.shape[0] != C.shape[1] or 0 in A.shape:
        raise ValueError(
            "A must be [R, K] and C [N - R, R] with one R, A not empty, got A "
            f"{list(A.shape)} and C {list(C.shape)}"
        )
    N = A.shape[0] + C.shape[0]
    if order.shape != (N,) or order.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"order must be int32 or int64 [N] = [{N}], got {order.dtype} {list(order.shape)}"
        )
    if x.ndim == 0 or x.shape[-1] != A.shape[1]:
        raise ValueError(f"x must be [..., K] with K = {A.shape[1]} as in A, got {list(x.shape)}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias must be [N] = [{N}], got {list(bias.shape)}")
    for name, tensor in (("A", A), ("C", C), ("order", order), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
        if tensor is None or name == "order":
            continue
        if tensor.dtype != x.dtype and not autocasting(x):
            raise ValueError(f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
