# Triton's functions are not what they look like to a type checker:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
"""Triton kernels of pivot_low_rank_linear: y[:, n] = [z, z C^T][:, order[n]] + bias[n], z = x A^T.

[z, z C^T] never lies in memory, and no copy of y in another order is made. What reads or writes in
which order follows from the bytes:

Few rows (decode): weights are all that counts. A program owns neighbouring outputs, so that y is
written in order, and gathers the rows of C that these are: a row is R contiguous numbers, which
load as fast from anywhere. Outputs that are pivots load nothing and take their column of z, which
is in the L2 cache. So K R + (N - R) R numbers are read, and `order` as it is stored: its inverse
would take a launch more. z comes from low_rank_linear's first kernel.

Many rows: products count, and an output that is a pivot must cost none. A program owns neighbouring
rows of C, and stores where `places`, the inverse of order, says: [z, z C^T] column c is output
places[c]. The columns of z are stored there as z is computed. Where C's rows are in the order of
their outputs, as `lillama` writes them, neighbours are stored near each other.

Backward puts the columns of dy into the order of [z, z C^T] once; then all are plain products. A
product that gathers columns in its inner loop would load them number by number, at every tile.

Letters as in reference.py.
"""

import triton
import triton.language as tl

from lillama_kernels.launch import multiple_of_8
from lillama_kernels.low_rank_linear.kernels import _product_tile, _second_tile, _store_y

__all__ = [
    "_pivot_low_rank_linear_permute_kernel",
    "_pivot_low_rank_linear_places_kernel",
    "_pivot_low_rank_linear_product_kernel",
    "_pivot_low_rank_linear_second_kernel",
]


# M is not specialised: serving changes it every step, and a new value must not compile again.
@triton.jit(do_not_specialize=["M"])
def _pivot_low_rank_linear_second_kernel(
    z_ptr, c_ptr, order_ptr, bias_ptr, y_ptr, M, N, R, stride_cn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    SPLIT_K: tl.constexpr, HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """y of up to BLOCK_M rows from z in SPLIT_K parts."""
    N = multiple_of_8(N, ALIGNED)
    R = multiple_of_8(R, ALIGNED)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    column = tl.load(order_ptr + offs_n, mask=mask_n, other=0)
    is_pivot = column < R
    c_rows = c_ptr + tl.maximum(column - R, 0).to(tl.int64)[:, None] * multiple_of_8(
        stride_cn, ALIGNED
    )
    z_rows = z_ptr + offs_m.to(tl.int64)[:, None] * R
    stride_zs = M.to(tl.int64) * R
    acc = _second_tile(
        z_rows, c_rows, mask_m, mask_n & (column >= R), R, stride_zs,
        BLOCK_M, BLOCK_N, BLOCK_R, SPLIT_K, USE_PDL,
    )  # fmt: skip
    picked = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for s in tl.static_range(SPLIT_K):
        picked += tl.load(
            z_rows + s * stride_zs + column[None, :],
            mask=mask_m[:, None] & (mask_n & is_pivot)[None, :],
            other=0.0,
            cache_modifier=".cg",  # as _add_parts
        ).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    # not a sum: z times the zeros in C's place is NaN where z is infinite
    acc = tl.where(is_pivot[None, :], picked, acc)
    _store_y(y_ptr, bias_ptr, acc, offs_m, offs_n, mask_m, mask_n, N, HAS_BIAS)


@triton.jit
def _pivot_low_rank_linear_places_kernel(order_ptr, places_ptr, N, BLOCK_N: tl.constexpr):
    """places[order[n]] = n."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    column = tl.load(order_ptr + offs_n, mask=mask_n, other=0)
    tl.store(places_ptr + column, offs_n, mask=mask_n)


@triton.jit(do_not_specialize=["M"])
def _pivot_low_rank_linear_product_kernel(
    a_ptr, b_ptr, places_ptr, bias_ptr, z_ptr, y_ptr, M, N, K, stride_a, stride_b, stride_ym,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    KEEP_Z: tl.constexpr, HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """y[m, places[n]] = sum_k a[m, k] b[n, k] + bias[places[n]] for n < N.

    KEEP_Z: the sum alone is z[m, n] too; N is R then. places begins with the place of n = 0.
    """
    acc, offs_m, offs_n, mask_n = _product_tile(
        a_ptr, b_ptr, M, N, K, stride_a, stride_b,
        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, True, True, ALIGNED,  # type: ignore[arg-type]
    )  # fmt: skip
    rows = offs_m.to(tl.int64)[:, None]
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    if KEEP_Z:
        z_ptrs = z_ptr + rows * multiple_of_8(N, ALIGNED) + offs_n[None, :]
        tl.store(z_ptrs, acc.to(z_ptr.dtype.element_ty), mask=mask)
    place = tl.load(places_ptr + offs_n, mask=mask_n, other=0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + place, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rows * stride_ym + place[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _pivot_low_rank_linear_permute_kernel(
    x_ptr, places_ptr, y_ptr, M, N, stride_xm, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """y[m, n] = x[m, places[n]]."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    place = tl.load(places_ptr + offs_n, mask=offs_n < N, other=0)
    rows = offs_m.to(tl.int64)[:, None]
    x = tl.load(x_ptr + rows * stride_xm + place[None, :], mask=mask, other=0.0)
    tl.store(y_ptr + rows * N + offs_n[None, :], x, mask=mask)
