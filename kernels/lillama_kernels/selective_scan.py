"""Mamba-1's selective scan over time, forward and backward, with carried state."""

from torch import Tensor

from lillama_kernels import reference_mamba
from lillama_kernels.impl import Impl, resolve_impl

__all__ = ["selective_scan"]


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_(t-1) + delta_t x_t B_t;  y_t = (C_t . h_t + D x_t) silu(z_t).

    Shapes (D channels, S state size; names as in Gu & Dao 2023, arXiv 2312.00752):
        x, delta, z: [B, D, T]. A: [D, S], negative in a trained model. B, C: [B, S, T]. D,
        delta_bias: [D].
        initial_state: [B, D, S], zeros when None. delta_softplus applies softplus to delta +
        delta_bias.
        impl: see `lillama_kernels.impl`.

    Returns:
        y [B, D, T] in x's dtype and the last state [B, D, S] in fp32 (fp64 for fp64 inputs).
        Differentiable once in every tensor.

    Raises:
        ValueError: a shape does not fit (named) or T is 0.
        NotImplementedError: `impl="triton"`, which does not exist yet.
    """
    if x.ndim != 3 or x.shape[2] == 0:
        raise ValueError(f"x must be [B, D, T] with T >= 1, got {list(x.shape)}")
    batch, channels, steps = x.shape
    if A.ndim != 2 or A.shape[0] != channels:
        raise ValueError(f"A must be [D, S] with D = {channels} as in x, got {list(A.shape)}")
    size = A.shape[1]
    wanted = {
        "delta": (delta, (batch, channels, steps)),
        "B": (B, (batch, size, steps)),
        "C": (C, (batch, size, steps)),
        "D": (D, (channels,)),
        "z": (z, (batch, channels, steps)),
        "delta_bias": (delta_bias, (channels,)),
        "initial_state": (initial_state, (batch, channels, size)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    resolve_impl("selective_scan", impl, x)
    return reference_mamba.selective_scan(
        x, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state
    )
