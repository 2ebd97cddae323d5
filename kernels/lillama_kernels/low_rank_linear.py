"""y = x A^T B^T + bias: a linear layer whose weight [N, K] is the product B [N, R] @ A [R, K]."""

from torch import Tensor

from lillama_kernels import reference
from lillama_kernels.impl import Impl, resolve_impl

__all__ = ["low_rank_linear"]


def low_rank_linear(
    x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None, impl: Impl = "auto"
) -> Tensor:
    """y = x A^T B^T + bias, differentiable in every tensor.

    Args:
        x: [..., K], floating point; zero rows give zero rows.
        A: [R, K], dtype and device of x.
        B: [N, R], dtype and device of x.
        bias: [N] or None.
        impl: see `lillama_kernels.impl`.

    Returns:
        [..., N], dtype of x (autocast applies as for nn.Linear).

    Raises:
        ValueError: shapes do not fit or `impl` is unknown.
        NotImplementedError: `impl="triton"`, which does not exist yet.
    """
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(
            f"A must be [R, K] and B [N, R] with one R, got A {list(A.shape)} and B {list(B.shape)}"
        )
    if x.ndim == 0 or x.shape[-1] != A.shape[1]:
        raise ValueError(f"x must be [..., K] with K = {A.shape[1]} as in A, got {list(x.shape)}")
    if bias is not None and bias.shape != (B.shape[0],):
        raise ValueError(f"bias must be [N] = [{B.shape[0]}] as in B, got {list(bias.shape)}")
    resolve_impl("low_rank_linear", impl, x)
    return reference.low_rank_linear(x, A, B, bias)
