# Triton's functions are not what they look like to a type checker:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
"""Triton kernels of low_rank_linear, y_i = (x A_i^T) B_i^T + bias_i for pairs with one x, and of
its pivot form, y[:, n] = [z, z C^T][:, order[n]] + bias[n] with z = x A^T.

Few rows (decode): a first kernel writes z = x A^T for all pairs at once, a second one all y_i. The
second starts while the first still runs and waits, with its first weight tile already loaded, for z
(programmatic dependent launch). The pivot form's second kernel owns neighbouring outputs, so that y
is written in order, and gathers the rows of C that these are: a row is R contiguous numbers, which
load as fast from anywhere. Outputs that are pivots load nothing and take their column of z from L2.
Many rows: plain tiled products.

Letters as in reference.py; R is the sum of the pairs' ranks where A is the concatenation of theirs.
K is summed in SPLIT_K parts, which are added up in a fixed order.
"""

import triton
import triton.language as tl

from lillama_kernels.launch import multiple_of_8

__all__: list[str] = []  # kernels are private: launchers call them


@triton.jit
def _first_tile(
    x_ptr, a_ptr, z_ptr, pid_r, pid_s, M, K, R, stride_xm, stride_ar,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):  # fmt: skip
    """z[s, :, r block] = x[:, part s of K] A[r block, part s of K]^T."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    mask_r = offs_r < R
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    a_rows = a_ptr + offs_r.to(tl.int64)[:, None] * stride_ar
    blocks = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for block in tl.range(pid_s * blocks, (pid_s + 1) * blocks):
        offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(
            x_rows + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_K]
        a = tl.load(
            a_rows + offs_k[None, :], mask=mask_r[:, None] & mask_k[None, :], other=0.0
        )  # [BLOCK_R, BLOCK_K]
        acc = tl.dot(x, a.T, acc, input_precision="ieee")
    z_rows = z_ptr + (pid_s.to(tl.int64) * M + offs_m)[:, None] * R
    tl.store(
        z_rows + offs_r[None, :],
        acc.to(z_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_r[None, :],
    )


@triton.jit
def _load_b(b_rows, mask_n, block, R, BLOCK_R: tl.constexpr):
    offs_r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    return tl.load(
        b_rows + offs_r[None, :], mask=mask_n[:, None] & (offs_r < R)[None, :], other=0.0
    )


@triton.jit
def _add_parts(
    acc, z_rows, b, mask_m, block, R, stride_zs, BLOCK_R: tl.constexpr, SPLIT_K: tl.constexpr
):
    """acc + (sum of z's parts) b^T, part by part and in order.

    Parts are stored rounded to the dtype of the weights. Together they err as much as z rounded
    once: the squares of the parts' rounding errors add up to that of the whole.
    """
    offs_r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = mask_m[:, None] & (offs_r < R)[None, :]
    for s in tl.static_range(SPLIT_K):
        part = z_rows + s * stride_zs + offs_r[None, :]
        # through L2 only: other multiprocessors wrote z in a launch that still ends
        z = tl.load(part, mask=mask, other=0.0, cache_modifier=".cg")  # [BLOCK_M, BLOCK_R]
        acc = tl.dot(z, b.T, acc, input_precision="ieee")
    return acc


@triton.jit
def _second_tile(
    z_rows, b_rows, mask_m, mask_n, R, stride_zs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT_K: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """z b^T [BLOCK_M, BLOCK_N]; the first tile of b is loaded before the wait for z."""
    b = _load_b(b_rows, mask_n, 0, R, BLOCK_R)  # [BLOCK_N, BLOCK_R]
    if USE_PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = _add_parts(acc, z_rows, b, mask_m, 0, R, stride_zs, BLOCK_R, SPLIT_K)
    for block in tl.range(1, tl.cdiv(R, BLOCK_R)):
        b = _load_b(b_rows, mask_n, block, R, BLOCK_R)
        acc = _add_parts(acc, z_rows, b, mask_m, block, R, stride_zs, BLOCK_R, SPLIT_K)
    return acc


@triton.jit
def _store_y(
    y_ptr, bias_ptr, acc, offs_m, offs_n, mask_m, mask_n, N,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_rows = y_ptr + offs_m.to(tl.int64)[:, None] * N
    tl.store(
        y_rows + offs_n[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_n[None, :],
    )


# M is not specialised: serving changes it every step, and a new value must not compile again.
@triton.jit(do_not_specialize=["M"])
def _low_rank_linear_first_kernel(
    x_ptr, a_ptr, z_ptr, M, K, R, stride_xm, stride_ar,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr, ALIGNED: tl.constexpr, USE_PDL: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """WAIT: x comes from a kernel that may still run."""
    if USE_PDL:
        # at once: the second kernel loads weights meanwhile and waits for z by itself
        tl.extra.cuda.gdc_launch_dependents()
    if WAIT:
        tl.extra.cuda.gdc_wait()
    _first_tile(
        x_ptr, a_ptr, z_ptr, tl.program_id(0), tl.program_id(1), M,
        multiple_of_8(K, ALIGNED), multiple_of_8(R, ALIGNED),
        multiple_of_8(stride_xm, ALIGNED), multiple_of_8(stride_ar, ALIGNED),
        BLOCK_M, BLOCK_R, BLOCK_K, SPLIT_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _low_rank_linear_second_kernel(
    z_ptr, b_ptrs, bias_ptrs, y_ptrs, M, R, Ns, Rs, stride_bns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    SPLIT_K: tl.constexpr, BIASES: tl.constexpr, ALIGNED: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Bit i of BIASES says whether pair i has a bias."""
    pid = tl.program_id(0)
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    stride_z = multiple_of_8(R, ALIGNED)
    stride_zs = M.to(tl.int64) * stride_z
    first_block = 0
    first_r = 0
    for i in tl.static_range(len(b_ptrs)):
        N = multiple_of_8(Ns[i], ALIGNED)
        rank = multiple_of_8(Rs[i], ALIGNED)
        blocks_n = tl.cdiv(N, BLOCK_N)
        if (pid >= first_block) & (pid < first_block + blocks_n):
            offs_n = (pid - first_block) * BLOCK_N + tl.arange(0, BLOCK_N)
            mask_n = offs_n < N
            b_rows = b_ptrs[i] + offs_n.to(tl.int64)[:, None] * multiple_of_8(
                stride_bns[i], ALIGNED
            )
            z_rows = z_ptr + offs_m.to(tl.int64)[:, None] * stride_z + first_r
            acc = _second_tile(
                z_rows, b_rows, mask_m, mask_n, rank, stride_zs,
                BLOCK_M, BLOCK_N, BLOCK_R, SPLIT_K, USE_PDL,
            )  # fmt: skip
            _store_y(
                y_ptrs[i], bias_ptrs[i], acc, offs_m, offs_n, mask_m, mask_n, N,
                (BIASES >> i) & 1,
            )  # fmt: skip
        first_block += blocks_n
        first_r += rank


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
def _product_tile(
    a_ptr, b_ptr, M, N, K, stride_a, stride_b,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    A_ROWS_ARE_M: tl.constexpr, B_ROWS_ARE_N: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The program's tile of sum_k a[m, k] b[n, k], its rows, its columns and which of these are.

    a lies in memory as rows of m (A_ROWS_ARE_M) or as rows of k, b as rows of n or as rows of k;
    stride_a and stride_b are the distances between rows.
    """
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    # GROUP_M rows of tiles together, column by column, so that both operands stay in L2
    group = pid // (GROUP_M * blocks_n)
    first_m = group * GROUP_M
    rows_here = min(blocks_m - first_m, GROUP_M)
    within = pid % (GROUP_M * blocks_n)
    offs_m = (first_m + within % rows_here) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (within // rows_here) * BLOCK_N + tl.arange(0, BLOCK_N)
    stride_a = multiple_of_8(stride_a, ALIGNED)
    stride_b = multiple_of_8(stride_b, ALIGNED)
    # an extent along memory is aligned with its stride; the other extent may be any number
    limit_m = M if A_ROWS_ARE_M else multiple_of_8(M, ALIGNED)
    limit_n = N if B_ROWS_ARE_N else multiple_of_8(N, ALIGNED)
    mask_m = offs_m < limit_m
    mask_n = offs_n < limit_n
    if A_ROWS_ARE_M or B_ROWS_ARE_N:
        limit_k = multiple_of_8(K, ALIGNED)
    else:
        limit_k = K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in tl.range(0, tl.cdiv(K, BLOCK_K)):
        offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < limit_k
        if A_ROWS_ARE_M:
            a_ptrs = a_ptr + offs_m.to(tl.int64)[:, None] * stride_a + offs_k[None, :]
            a = tl.load(a_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        else:
            a_ptrs = a_ptr + offs_k.to(tl.int64)[:, None] * stride_a + offs_m[None, :]
            a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_m[None, :], other=0.0).T
        if B_ROWS_ARE_N:
            b_ptrs = b_ptr + offs_n.to(tl.int64)[:, None] * stride_b + offs_k[None, :]
            b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0).T
        else:
            b_ptrs = b_ptr + offs_k.to(tl.int64)[:, None] * stride_b + offs_n[None, :]
            b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc, offs_m, offs_n, mask_n


# One of M, N and K is the number of rows, which one depends on the product: none is specialised.
@triton.jit(do_not_specialize=["M", "N", "K"])
def _low_rank_linear_matmul_kernel(
    a_ptr, b_ptr, bias_ptr, c_ptr, M, N, K, stride_a, stride_b, stride_cm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    A_ROWS_ARE_M: tl.constexpr, B_ROWS_ARE_N: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """c[m, n] = sum_k a[m, k] b[n, k] (+ bias[n]) (ACCUMULATE: + c[m, n])."""
    acc, offs_m, offs_n, mask_n = _product_tile(
        a_ptr, b_ptr, M, N, K, stride_a, stride_b,
        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, A_ROWS_ARE_M, B_ROWS_ARE_N, ALIGNED,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    c_rows = c_ptr + offs_m.to(tl.int64)[:, None] * multiple_of_8(stride_cm, ALIGNED)
    c_ptrs = c_rows + offs_n[None, :]
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    if ACCUMULATE:
        acc += tl.load(c_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=mask)
