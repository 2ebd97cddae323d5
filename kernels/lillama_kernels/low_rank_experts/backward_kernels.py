# Triton's functions are not what they look like to a type checker:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false
"""Triton kernels of low_rank_experts' backward that forward has none like.

    gated_grad   dh = dz2 A_down, and from it, gate and up: d gate, d up and h again
    weight_grad  of one factor of every expert, summed over the expert's rows

The other products run on the forward's kernels: dz2 = d out B_down and dz = d gate B_gate |
d up B_up on `first`, d x = dz_g A_gate + dz_u A_up on `second`. Letters and layout as there.
"""

import triton
import triton.language as tl

from lillama_kernels.launch import multiple_of_8
from lillama_kernels.low_rank_experts.products import (
    _expert_ranks,
    _project,
    _rank_of,
    _rows_of_tile,
    _scaled,
    _tile_of,
)

__all__: list[str] = []  # kernels are private: launchers call them


@triton.jit(do_not_specialize=["M"])
def _low_rank_experts_gated_grad_kernel(
    dz_ptr, dout_ptr, a_ptr, w_ptr, gate_ptr, up_ptr, weight_ptr, dgate_ptr, dup_ptr, h_ptr,
    dot_ptr, index_ptr, table_ptr, row_ptr, ranks, M, H, INNER, R, stride_dout,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, HAS_DENSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """d gate, d up and h, each [rows, I], from dz2 [rows, R], which has the routing weight in it.

    A dense down projection gives dh from d out [M, H] itself; then the weight comes in here, and
    its gradient's part of this block of I goes to dot [blocks of I, M * k].
    """
    H = multiple_of_8(H, True)
    INNER = multiple_of_8(INNER, True)
    R = multiple_of_8(R, True)
    blocks_n = tl.cdiv(INNER, BLOCK_N)
    blocks_m = tl.load(table_ptr + NUM_EXPERTS + 1)
    for step in tl.range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0)):
        tile, block = _tile_of(step, blocks_m, blocks_n, GROUP_M)
        expert, stored, token, place, mask_m, _ = _rows_of_tile(
            index_ptr, table_ptr, row_ptr, tile, M, NUM_EXPERTS, TOP_K, BLOCK_M, 1, False, False
        )
        offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        rank, dense = _rank_of(_expert_ranks(ranks, expert), 33, HAS_DENSE)
        dh = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        dh = _project(
            dh, dz_ptr, stored * R, dout_ptr, token * multiple_of_8(stride_dout, True), mask_m,
            expert, rank, dense, a_ptr, w_ptr, offs_n, INNER, R, H, BLOCK_K, False, HAS_DENSE,
            False,
        )  # fmt: skip
        mask = mask_m[:, None] & (offs_n < INNER)[None, :]
        at = stored[:, None] * INNER + offs_n[None, :]
        gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        h = gate * sigmoid * up
        if HAS_DENSE:
            if rank == 0:
                dot_at = block.to(tl.int64) * M * TOP_K + place
                dh = _scaled(dh, h, dot_ptr + dot_at, weight_ptr + place, mask_m)
        dgate = dh * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
        tl.store(dup_ptr + at, (dh * gate * sigmoid).to(dup_ptr.dtype.element_ty), mask=mask)
        tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _low_rank_experts_weight_grad_kernel(
    l_ptr, r_ptr, grad_ptr, weight_ptr, table_ptr, row_ptr, ranks, N, K, stride_l, stride_r,
    TOP_K: tl.constexpr, SHIFT: tl.constexpr, RANK_IS: tl.constexpr,
    TOKENS_L: tl.constexpr, TOKENS_R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, GROUP_N: tl.constexpr,
):  # fmt: skip
    """grad[e, n, k] = sum over the expert's rows of l[row, n] r[row, k].

    TOKENS_L, TOKENS_R: rows of that operand are tokens, not stored rows; those of l are then times
    the routing weights.
    RANK_IS "N" (of A) or "K" (of B): that size of grad [E, N, K] is the rank, and what is beyond
    the expert's becomes 0. "none": grad [.., N, K] of the experts whose projection is dense.
    """
    N = multiple_of_8(N, True)
    K = multiple_of_8(K, True)
    stride_l = multiple_of_8(stride_l, True)
    stride_r = multiple_of_8(stride_r, True)
    expert = tl.program_id(1)
    rank, dense = _rank_of(_expert_ranks(ranks, expert), SHIFT, True)
    limit_n = N
    limit_k = K
    target = expert
    wanted = True
    if RANK_IS == "N":
        limit_n = rank
    elif RANK_IS == "K":
        limit_k = rank
    else:
        target = dense
        wanted = rank == 0
    if wanted:
        tile_n, tile_k = _tile_of(
            tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K), GROUP_N
        )
        offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_n = offs_n < limit_n
        mask_k = offs_k < limit_k
        first = tl.load(table_ptr + expert)
        last = tl.load(table_ptr + expert + 1)
        # a tile of padding is written without being computed
        if (tile_n * BLOCK_N >= limit_n) | (tile_k * BLOCK_K >= limit_k):
            last = first
        acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        for start in tl.range(first, last, BLOCK_P):
            offs_p = start + tl.arange(0, BLOCK_P)
            mask_p = offs_p < last
            place = offs_p.to(tl.int64)
            row_l = place
            row_r = place
            if TOKENS_L or TOKENS_R:
                place = tl.load(row_ptr + offs_p, mask=mask_p, other=0).to(tl.int64)
                row_l = place // TOP_K if TOKENS_L else row_l
                row_r = place // TOP_K if TOKENS_R else row_r
            at = l_ptr + row_l[:, None] * stride_l + offs_n[None, :]
            left = tl.load(at, mask=mask_p[:, None] & mask_n[None, :], other=0.0)
            if TOKENS_L:
                weight = tl.load(weight_ptr + place, mask=mask_p, other=0.0).to(tl.float32)
                left = (left.to(tl.float32) * weight[:, None]).to(left.dtype)
            at = r_ptr + row_r[:, None] * stride_r + offs_k[None, :]
            right = tl.load(at, mask=mask_p[:, None] & mask_k[None, :], other=0.0)
            acc = tl.dot(left.T, right, acc, input_precision="ieee")
        at = target.to(tl.int64) * N * K + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
        mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
        tl.store(grad_ptr + at, acc.to(grad_ptr.dtype.element_ty), mask=mask)
