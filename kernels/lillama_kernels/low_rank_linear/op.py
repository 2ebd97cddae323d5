"""y = x A^T B^T + bias: a linear layer whose weight [N, K] is the product B [N, R] @ A [R, K].

Also for several layers that share their input (q/k/v, gate/up), with one first stage for all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lillama_kernels import reference
from lillama_kernels.arguments import check_like
from lillama_kernels.dispatch import Impl, runs_triton, trains, work_dtype
from lillama_kernels.tiles import DECODE_MAX_ROWS

__all__ = ["factors_run_triton", "low_rank_linear", "low_rank_linears"]


def low_rank_linear(
    x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None, impl: Impl = "auto"
) -> Tensor:
    """y = x A^T B^T + bias, differentiable (once, with Triton) in every tensor.

    "auto" on a GPU is Triton for up to 64 rows without gradients (decode) and PyTorch's products
    for more rows and for training, until a measurement speaks for ours. Triton also wants fp32,
    fp16 or bf16, sizes K, N and R that are multiples of 8, and a GPU that there are tiles for.

    Args:
        x: [..., K], floating point; zero rows give zero rows.
        A: [R, K], dtype and device of x.
        B: [N, R], dtype and device of x.
        bias: [N] or None, dtype and device of x.
        impl: see `lillama_kernels.dispatch`. "triton" takes any sizes and strides, at every number
            of rows and in training too.

    Returns:
        [..., N], dtype of x (autocast applies as for nn.Linear). Sums are fp32; x A^T is rounded to
        the dtype in between, as by two nn.Linear.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `impl` is unknown.
        TypeError, NotImplementedError: `impl="triton"` cannot take the dtype, or run there.
    """
    _check_pair(x, A, B, bias, "{}")
    if factors_run_triton("low_rank_linear", impl, x, [A, B], [bias]):
        return _low_rank_linears_triton(x, [A], [B], [bias])[0]
    return reference.low_rank_linear(x, A, B, bias)


def low_rank_linears(
    x: Tensor,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    impl: Impl = "auto",
) -> list[Tensor]:
    """y_i = x A_i^T B_i^T + bias_i for layers with one input, as q/k/v or gate/up.

    Triton runs one first stage over all A_i and one second stage over all B_i. It reads the A_i in
    place when they lie behind each other in memory, as rows of one [sum of R_i, K] tensor do, and
    copies them together at every call when they do not.

    Args:
        x: [..., K], floating point.
        As, Bs: the factors [R_i, K] and [N_i, R_i], dtype and device of x; ranks may differ.
        biases: [N_i] or None for each, or None for all.
        impl: as in `low_rank_linear`.

    Returns:
        The y_i, each [..., N_i].

    Raises:
        As `low_rank_linear`; ValueError too when the lists are empty or of different lengths.
    """
    given = [None] * len(As) if biases is None else list(biases)
    if not As or not len(As) == len(Bs) == len(given):
        raise ValueError(
            "As, Bs and biases must have one entry for each layer, at least one; "
            f"got {len(As)}, {len(Bs)} and {len(given)}"
        )
    for i, (A, B, bias) in enumerate(zip(As, Bs, given, strict=True)):
        _check_pair(x, A, B, bias, f"{{}} of layer {i}")
    if factors_run_triton("low_rank_linear", impl, x, [*As, *Bs], given):
        return _low_rank_linears_triton(x, As, Bs, given)
    return reference.low_rank_linears(x, As, Bs, given)


def _check_pair(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, called: str) -> None:
    a, b, c = (called.format(name) for name in ("A", "B", "bias"))
    got = f"got {a} {list(A.shape)} and {b} {list(B.shape)}"
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(f"{a} must be [R, K] and {b} [N, R] with one R, {got}")
    if 0 in A.shape or 0 in B.shape:
        raise ValueError(f"{a} and {b} must not be empty, {got}")
    if x.ndim == 0 or x.shape[-1] != A.shape[1]:
        raise ValueError(f"x must be [..., K] with K = {A.shape[1]} as in {a}, got {list(x.shape)}")
    if bias is not None and bias.shape != (B.shape[0],):
        raise ValueError(f"{c} must be [N] = [{B.shape[0]}] as in {b}, got {list(bias.shape)}")
    for name, tensor in ((a, A), (b, B), (c, bias)):
        check_like(name, tensor, x, "x")


def factors_run_triton(
    op: str, impl: Impl, x: Tensor, factors: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> bool:
    """Whether an op of low-rank factors runs its Triton kernels; "auto" as `low_rank_linear` says.

    Raises:
        As `low_rank_linear`, without its first.
    """
    fits = (
        x.is_cuda  # first: torch.compile would hold on to the number of rows
        and x.shape[:-1].numel() <= DECODE_MAX_ROWS
        and all(size % 8 == 0 for matrix in factors for size in matrix.shape)
        and not trains(x, *factors, *biases)
    )
    return runs_triton(op, impl, x, fits, work_dtype(x))


def _low_rank_linears_triton(
    x: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    dtype = work_dtype(x)
    *ys, _ = torch.ops.lillama.low_rank_linears(
        x.reshape(-1, x.shape[-1]).to(dtype),
        [A.to(dtype) for A in As],
        [B.to(dtype) for B in Bs],
        [bias.to(dtype) for bias in biases if bias is not None],
        [bias is not None for bias in biases],
        trains(x, *As, *Bs, *biases),
    )
    return [y.view(*x.shape[:-1], y.shape[1]) for y in ys]


def _concatenated(As: Sequence[Tensor]) -> Tensor:
    """[sum of R_i, K]: the A_i where they lie, if that is behind each other, else a copy."""
    first, inner = As[0], As[0].shape[1]
    if len(As) == 1:
        return first
    offset, adjacent = first.storage_offset(), True
    for A in As:
        adjacent &= (
            A.stride() == (inner, 1)
            and A.storage_offset() == offset
            and A.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        )
        offset += A.numel()
    if not adjacent:
        return torch.cat(list(As))
    return first.as_strided((sum(A.shape[0] for A in As), inner), (inner, 1))


# Ops that torch.compile, autograd and CUDA graphs see as one. triton is imported when they run.
@torch.library.custom_op("lillama::low_rank_linears", mutates_args=())
def _forward(
    x: Tensor,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    given_biases: Sequence[Tensor],
    has_bias: Sequence[bool],
    save_z: bool,
) -> list[Tensor]:
    """Every y_i [M, N_i] for x [M, K]; then z = x A^T [M, sum of R_i], empty without save_z.

    given_biases are those of the pairs that has_bias names: autograd takes no list with gaps.
    """
    from lillama_kernels.launch import unit_stride
    from lillama_kernels.low_rank_linear import launch

    rows = x.shape[0]
    z = x.new_empty((rows if save_z else 0, sum(A.shape[0] for A in As)))
    if rows == 0:
        return [*(x.new_empty((0, B.shape[0])) for B in Bs), z]
    x, A = unit_stride(x), unit_stride(_concatenated(As))
    Bs = [unit_stride(B) for B in Bs]
    remaining = iter(given_biases)
    biases = [next(remaining).contiguous() if has else None for has in has_bias]
    if rows <= DECODE_MAX_ROWS and not save_z:
        return [*launch.low_rank_linear_decode(x, A, Bs, biases), z]
    z_all = launch.low_rank_linear_matmul(x, A, out=z if save_z else None)
    parts = z_all.split([B.shape[1] for B in Bs], dim=1)
    return [*map(launch.low_rank_linear_matmul, parts, Bs, biases), z]


@_forward.register_fake
def _(x, As, Bs, given_biases, has_bias, save_z):
    rows = x.shape[0]
    z = x.new_empty((rows if save_z else 0, sum(A.shape[0] for A in As)))
    return [*(x.new_empty((rows, B.shape[0])) for B in Bs), z]


@torch.library.custom_op(
    "lillama::low_rank_linears_backward",
    mutates_args=(),
    schema="(Tensor[] grads, Tensor x, Tensor[] As, Tensor[] Bs, Tensor z, bool needs_x, "
    "bool needs_A, bool[] needs_B) -> Tensor[]",
)
def _backward(grads, x, As, Bs, z, needs_x, needs_A, needs_B):
    """dx [M, K], dA [sum of R_i, K] and every dB_i [N_i, R_i]; empty where not needed.

    dz_i = dy_i B_i, dB_i = dy_i^T z_i, dA = dz^T x, dx = dz A; z_i, dz_i are the columns of pair i.
    """
    from lillama_kernels.launch import unit_stride
    from lillama_kernels.low_rank_linear.launch import low_rank_linear_matmul as matmul

    ranks, nothing = [B.shape[1] for B in Bs], (0,)
    if x.shape[0] == 0:
        wanted = [x.shape if needs_x else nothing]
        wanted += [(sum(ranks), x.shape[1]) if needs_A else nothing]
        wanted += [B.shape if needed else nothing for B, needed in zip(Bs, needs_B, strict=True)]
        return [x.new_zeros(shape) for shape in wanted]
    grads, Bs, x = [unit_stride(g) for g in grads], [unit_stride(B) for B in Bs], unit_stride(x)
    dBs = [
        matmul(grad.T, z_i.T) if needed else x.new_empty(nothing)
        for grad, z_i, needed in zip(grads, z.split(ranks, dim=1), needs_B, strict=True)
    ]
    if not needs_x and not needs_A:
        return [x.new_empty(nothing), x.new_empty(nothing), *dBs]
    dz = torch.empty_like(z)
    for grad, B, dz_i in zip(grads, Bs, dz.split(ranks, dim=1), strict=True):
        matmul(grad, B.T, out=dz_i)
    dA = matmul(dz.T, x.T) if needs_A else x.new_empty(nothing)
    dx = matmul(dz, unit_stride(_concatenated(As)).T) if needs_x else x.new_empty(nothing)
    return [dx, dA, *dBs]


@_backward.register_fake
def _(grads, x, As, Bs, z, needs_x, needs_A, needs_B):
    dBs = [x.new_empty(B.shape if needed else (0,)) for B, needed in zip(Bs, needs_B, strict=True)]
    dA = x.new_empty((sum(A.shape[0] for A in As), x.shape[1]) if needs_A else (0,))
    return [x.new_empty(x.shape if needs_x else (0,)), dA, *dBs]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, As, Bs, _, ctx.has_bias, ctx.saved_z = inputs
    ctx.pairs = len(As)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *As, *Bs, output[-1])


def _autograd_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    if not ctx.saved_z:
        raise RuntimeError("lillama::low_rank_linears has no gradient without save_z=True")
    x, *factors, z = ctx.saved_tensors
    As, Bs = factors[: ctx.pairs], factors[ctx.pairs :]
    needs_x, needs_As, needs_Bs, needs_biases, *_ = ctx.needs_input_grad
    dys = [
        x.new_zeros((x.shape[0], B.shape[0])) if grad is None else grad
        for grad, B in zip(grads[:-1], Bs, strict=True)
    ]
    biased = [dy for dy, has in zip(dys, ctx.has_bias, strict=True) if has]
    dx, dA, *dBs = torch.ops.lillama.low_rank_linears_backward(
        dys, x, As, Bs, z, needs_x, any(needs_As), list(needs_Bs)
    )
    dAs = dA.split([A.shape[0] for A in As]) if any(needs_As) else [None] * ctx.pairs
    return (
        dx if needs_x else None,
        [dA_i if needed else None for dA_i, needed in zip(dAs, needs_As, strict=True)],
        [dB if needed else None for dB, needed in zip(dBs, needs_Bs, strict=True)],
        [dy.sum(0) if needed else None for dy, needed in zip(biased, needs_biases, strict=True)],
        None,
        None,
    )


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
