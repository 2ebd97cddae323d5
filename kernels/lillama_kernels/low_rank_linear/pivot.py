"""y = x W^T + bias for a W [N, K] of rank R whose factors are in the pivot gauge.

Any product B A stays the same under B -> B S, A -> S^-1 A. With S^-1 = R rows of B these rows
become the identity: R outputs are the R inner products themselves, and only C [N - R, R] is left of
B. That stores and multiplies R (K + N - R) numbers instead of R (K + N).
"""

from typing import Any

import torch
from torch import Tensor

from lillama_kernels import reference
from lillama_kernels.arguments import check_like
from lillama_kernels.dispatch import Impl, trains, work_dtype
from lillama_kernels.low_rank_linear.op import factors_run_triton
from lillama_kernels.tiles import DECODE_MAX_ROWS

__all__ = ["pivot_low_rank_linear"]


def pivot_low_rank_linear(
    x: Tensor,
    A: Tensor,
    C: Tensor,
    order: Tensor,
    bias: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """y[..., n] = [z, z C^T][..., order[n]] + bias[n] with z = x A^T, differentiable (once, with
    Triton) in x, A, C and bias.

    "auto" is as `low_rank_linear`'s, with K, R and N - R multiples of 8; elsewhere two of PyTorch's
    products and a gather.

    Args:
        x: [..., K], floating point; zero rows give zero rows.
        A: [R, K], dtype and device of x.
        C: [N - R, R], dtype and device of x; N - R may be 0.
        order: [N] int32 or int64, device of x, a permutation of 0..N-1 (not checked: that would
            stop a GPU; with Triton what is none reads and writes anywhere). Output n is column
            order[n] of [z, z C^T].
        bias: [N] or None, dtype and device of x.
        impl: see `lillama_kernels.dispatch`. "triton" takes any sizes and strides, at every number
            of rows and in training too.

    Returns:
        [..., N], dtype of x (autocast applies as for nn.Linear). Sums are fp32; z is rounded to the
        dtype before it is multiplied by C.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `impl` is unknown.
        TypeError, NotImplementedError: `impl="triton"` cannot take the dtype, or run there.
    """
    _check(x, A, C, order, bias)
    if not factors_run_triton("pivot_low_rank_linear", impl, x, [A, C], [bias]):
        return reference.pivot_low_rank_linear(x, A, C, order, bias)
    dtype = work_dtype(x)
    y, _ = torch.ops.lillama.pivot_low_rank_linear(
        x.reshape(-1, x.shape[-1]).to(dtype),
        A.to(dtype),
        C.to(dtype),
        order.to(torch.int32),
        None if bias is None else bias.to(dtype),
        trains(x, A, C, bias),
    )
    return y.view(*x.shape[:-1], y.shape[1])


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
        check_like(name, tensor, x, "x", dtype=name != "order")


# Ops that torch.compile, autograd and CUDA graphs see as one. triton is imported when they run.
@torch.library.custom_op("lillama::pivot_low_rank_linear", mutates_args=())
def _forward(
    x: Tensor, A: Tensor, C: Tensor, order: Tensor, bias: Tensor | None, save_z: bool
) -> tuple[Tensor, Tensor]:
    """y [M, N] for x [M, K] and order int32; z = x A^T [M, R], empty without save_z."""
    from lillama_kernels.launch import unit_stride
    from lillama_kernels.low_rank_linear import launch

    rows, rank, empty = x.shape[0], A.shape[0], x.new_empty((0, A.shape[0]))
    if rows == 0:
        return x.new_empty((0, len(order))), empty
    x, A, C = unit_stride(x), unit_stride(A), unit_stride(C)
    if rows <= DECODE_MAX_ROWS and not save_z:
        bias = None if bias is None else bias.contiguous()
        return launch.pivot_low_rank_linear_decode(x, A, C, order.contiguous(), bias), empty
    both = x.new_empty((rows, len(order)))  # [z, z C^T]
    z = launch.low_rank_linear_matmul(x, A, out=both[:, :rank])
    if len(C):
        launch.low_rank_linear_matmul(z, C, out=both[:, rank:])
    y = both.index_select(1, order)
    return y if bias is None else y.add_(bias), z.clone() if save_z else empty


@_forward.register_fake
def _(x, A, C, order, bias, save_z):
    rows = x.shape[0]
    return x.new_empty((rows, len(order))), x.new_empty((rows if save_z else 0, A.shape[0]))


@torch.library.custom_op(
    "lillama::pivot_low_rank_linear_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor A, Tensor C, Tensor order, Tensor z, bool needs_x, "
    "bool needs_A, bool needs_C) -> (Tensor, Tensor, Tensor)",
)
def _backward(dy, x, A, C, order, z, needs_x, needs_A, needs_C):
    """dx [M, K], dA [R, K] and dC [N - R, R]; empty where not needed.

    With d [M, N], the columns of dy in the order of [z, z C^T]: dC = d_rest^T z,
    dz = d_pivots + d_rest C, dA = dz^T x, dx = dz A.
    """
    from lillama_kernels.launch import unit_stride
    from lillama_kernels.low_rank_linear.launch import low_rank_linear_matmul as matmul

    needed = ((needs_x, x), (needs_A, A), (needs_C, C))
    if x.shape[0] == 0 or not (needs_x or needs_A or needs_C):
        dx, dA, dC = (x.new_zeros(like.shape if need else (0,)) for need, like in needed)
        return dx, dA, dC
    # column order[n] of [z, z C^T] became column n
    d = torch.empty_like(dy).index_copy_(1, order.long(), dy)
    dz, rest = d.split([A.shape[0], C.shape[0]], dim=1)
    dx, dA, dC = (x.new_empty(0) for _ in needed)  # three: an op's results must not be one tensor
    if needs_C:
        dC = matmul(rest.T, z.T) if len(C) else torch.empty_like(C)
    if not needs_x and not needs_A:
        return dx, dA, dC
    if len(C):
        matmul(rest, unit_stride(C).T, out=dz, accumulate=True)
    if needs_A:
        dA = matmul(dz.T, unit_stride(x).T)
    if needs_x:
        dx = matmul(dz, unit_stride(A).T)
    return dx, dA, dC


@_backward.register_fake
def _(dy, x, A, C, order, z, needs_x, needs_A, needs_C):
    needed = ((needs_x, x), (needs_A, A), (needs_C, C))
    dx, dA, dC = (x.new_empty(like.shape if need else (0,)) for need, like in needed)
    return dx, dA, dC


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, A, C, order, _, ctx.saved_z = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, A, C, order, output[1])


def _autograd_backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if not ctx.saved_z:
        raise RuntimeError("lillama::pivot_low_rank_linear has no gradient without save_z=True")
    if dy is None:
        return (None,) * 6
    needs = ctx.needs_input_grad
    grads = torch.ops.lillama.pivot_low_rank_linear_backward(dy, *ctx.saved_tensors, *needs[:3])
    dx, dA, dC = (grad if need else None for grad, need in zip(grads, needs, strict=False))
    return dx, dA, dC, None, dy.sum(0) if needs[4] else None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
