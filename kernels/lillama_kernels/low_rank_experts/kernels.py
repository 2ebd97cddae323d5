# Triton's functions are not what they look like to a type checker:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false
"""Triton kernels of low_rank_experts' forward: four products over the rows of every expert.

    first   z = x A_gate^T | x A_up^T        gated   h = silu(z_g B_gate^T) * (z_u B_up^T)
    first   z2 = h A_down^T                  second  w * (z2 B_down^T), scattered to (token, place)

A row is one (token, place in its top k). Many rows: they are sorted by expert
(route_kernels.py) and every tile of rows belongs to one expert. Few tokens
(DECODE): a "slot" is one of the experts in use, its rows are all tokens, masked, and nothing is
sorted; the last product loops over the slots and sums them, so that a layer is four launches, each
of which loads its first weights before it waits for the one in front. The backward pass runs
`first` and `second` too, on the transposed factors (W_ROWS_ARE_N false).

A projection of rank 0 is dense: one product with its W takes the place of two. The kernels get the
ranks as arguments, one number an expert (see pack_ranks), so that no table must be copied to the
GPU. Letters as in reference.py; every tensor is contiguous but for the row stride of x.
"""

import triton
import triton.language as tl

from lillama_kernels.launch import multiple_of_8
from lillama_kernels.low_rank_experts.products import (
    _expert_ranks,
    _product,
    _project,
    _rank_of,
    _rows_of_slot,
    _rows_of_tile,
    _scaled,
    _tile_of,
)

__all__: list[str] = []  # kernels are private: launchers call them


@triton.jit
def _part_of(
    packed, block, x_ptr, x2_ptr, a_ptr, a2_ptr, R, R2, SHIFT: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which of two projections a block of columns of z is of: the expert's rank, the padded one,
    where it starts in z, the block within it, and what it multiplies."""
    rank, _ = _rank_of(packed, SHIFT, True)
    if PARTS == 2:
        rank2, _ = _rank_of(packed, SHIFT + 16, True)
        blocks = tl.cdiv(R, BLOCK_N)
        second = block >= blocks
        return (
            tl.where(second, rank2, rank), tl.where(second, R2, R), tl.where(second, R, 0),
            tl.where(second, block - blocks, block), tl.where(second, x2_ptr, x_ptr),
            tl.where(second, a2_ptr, a_ptr),
        )  # fmt: skip
    else:
        return rank, R, 0, block, x_ptr, a_ptr


# The number of tokens changes with every call and must not compile again.
@triton.jit(do_not_specialize=["M", "slots"])
def _low_rank_experts_first_kernel(
    x_ptr, x2_ptr, a_ptr, a2_ptr, z_ptr, weight_ptr, other_ptr, dot_ptr,
    index_ptr, table_ptr, row_ptr, ranks, M, slots, K, R, R2, stride_x,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SHIFT: tl.constexpr, PARTS: tl.constexpr,
    GATHER: tl.constexpr, SCALE: tl.constexpr, W_ROWS_ARE_N: tl.constexpr,
    DECODE: tl.constexpr, BY_PLACE: tl.constexpr, BLOCK_T: tl.constexpr, USE_PDL: tl.constexpr,
    WAIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """z[:, :R] = x A_e^T up to the expert's rank, for one projection (SHIFT) or two.

    PARTS 2: columns R to R + R2 get x2 A2_e^T, ranks SHIFT + 16. GATHER: rows of x are tokens, else
    stored rows. SCALE: multiply by the routing weight, after the dot with `other` (z of the forward
    pass), which gives that weight's gradient: dot [blocks of R, M * k].
    """
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    K = multiple_of_8(K, True)
    R = multiple_of_8(R, True)
    R2 = multiple_of_8(R2, True)
    blocks_n = tl.cdiv(R, BLOCK_N)
    width = R
    if PARTS == 2:
        blocks_n += tl.cdiv(R2, BLOCK_N)
        width += R2
    blocks_m = slots
    if not DECODE:
        blocks_m = tl.load(table_ptr + NUM_EXPERTS + 1)
    for step in tl.range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0)):
        tile, block = _tile_of(step, blocks_m, blocks_n, GROUP_M)
        expert, stored, token, place, mask_m, active = _rows_of_tile(
            index_ptr, table_ptr, row_ptr, tile, M, NUM_EXPERTS, TOP_K, BLOCK_M, BLOCK_T,
            BY_PLACE, DECODE,
        )  # fmt: skip
        rank, limit, start, block, l_ptr, w_ptr = _part_of(
            _expert_ranks(ranks, expert), block, x_ptr, x2_ptr, a_ptr, a2_ptr, R, R2, SHIFT,
            PARTS, BLOCK_N,
        )  # fmt: skip
        if active & (block * BLOCK_N < rank):
            offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
            mask_n = offs_n < rank
            source = token if GATHER else stored
            l_rows = source[:, None] * multiple_of_8(stride_x, True)
            stride_w = K if W_ROWS_ARE_N else limit
            w_off = expert.to(tl.int64) * K * limit
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            acc = _product(
                acc, l_ptr + l_rows, mask_m, w_ptr + w_off, stride_w, offs_n, mask_n, K,
                BLOCK_K, W_ROWS_ARE_N, WAIT,
            )  # fmt: skip
            mask = mask_m[:, None] & mask_n[None, :]
            z_at = stored[:, None] * width + start + offs_n[None, :]
            if SCALE:
                other = tl.load(other_ptr + z_at, mask=mask, other=0.0).to(tl.float32)
                dot_at = block.to(tl.int64) * M * TOP_K + place
                acc = _scaled(acc, other, dot_ptr + dot_at, weight_ptr + place, mask_m)
            tl.store(z_ptr + z_at, acc.to(z_ptr.dtype.element_ty), mask=mask)
    if WAIT:  # programs without work too: a kernel's end must mean the end of those before it
        tl.extra.cuda.gdc_wait()


@triton.jit(do_not_specialize=["M", "slots"])
def _low_rank_experts_gated_kernel(
    x_ptr, z_ptr, b_ptr, b2_ptr, w_ptr, w2_ptr, h_ptr, gate_ptr, up_ptr,
    index_ptr, table_ptr, row_ptr, ranks, M, slots, H, INNER, R, R2, stride_x,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SAVE: tl.constexpr, HAS_DENSE: tl.constexpr,
    DECODE: tl.constexpr, BY_PLACE: tl.constexpr, BLOCK_T: tl.constexpr, USE_PDL: tl.constexpr,
    WAIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """h = silu(gate) * up; SAVE: gate and up too."""
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    H = multiple_of_8(H, True)
    INNER = multiple_of_8(INNER, True)
    R = multiple_of_8(R, True)
    R2 = multiple_of_8(R2, True)
    width = R + R2
    blocks_n = tl.cdiv(INNER, BLOCK_N)
    blocks_m = slots
    if not DECODE:
        blocks_m = tl.load(table_ptr + NUM_EXPERTS + 1)
    for step in tl.range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0)):
        tile, block = _tile_of(step, blocks_m, blocks_n, GROUP_M)
        expert, stored, token, _, mask_m, active = _rows_of_tile(
            index_ptr, table_ptr, row_ptr, tile, M, NUM_EXPERTS, TOP_K, BLOCK_M, BLOCK_T,
            BY_PLACE, DECODE,
        )  # fmt: skip
        if active:
            offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
            x_rows = token * multiple_of_8(stride_x, True)
            z_rows = stored * width
            gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            packed = _expert_ranks(ranks, expert)
            rank, dense = _rank_of(packed, 1, HAS_DENSE)
            gate = _project(
                gate, z_ptr, z_rows, x_ptr, x_rows, mask_m, expert, rank, dense, b_ptr, w_ptr,
                offs_n, INNER, R, H, BLOCK_K, True, HAS_DENSE, WAIT,
            )  # fmt: skip
            up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            rank, dense = _rank_of(packed, 17, HAS_DENSE)
            up = _project(
                up, z_ptr, z_rows + R, x_ptr, x_rows, mask_m, expert, rank, dense, b2_ptr,
                w2_ptr, offs_n, INNER, R2, H, BLOCK_K, True, HAS_DENSE, False,
            )  # fmt: skip
            mask = mask_m[:, None] & (offs_n < INNER)[None, :]
            at = stored[:, None] * INNER + offs_n[None, :]
            # rounded here as between two layers, whether or not they are kept
            gate = gate.to(h_ptr.dtype.element_ty)
            up = up.to(h_ptr.dtype.element_ty)
            if SAVE:
                tl.store(gate_ptr + at, gate, mask=mask)
                tl.store(up_ptr + at, up, mask=mask)
            gate = gate.to(tl.float32)
            h = gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)
            tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=mask)
    if WAIT:
        tl.extra.cuda.gdc_wait()


@triton.jit(do_not_specialize=["M", "slots"])
def _low_rank_experts_second_kernel(
    z_ptr, l_ptr, l2_ptr, b_ptr, b2_ptr, w_ptr, w2_ptr, weight_ptr, out_ptr,
    index_ptr, table_ptr, row_ptr, ranks, M, slots, N, K, R, R2,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SHIFT: tl.constexpr, PARTS: tl.constexpr,
    SCALE: tl.constexpr, W_ROWS_ARE_N: tl.constexpr, HAS_DENSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out [M * k, N] at each row's (token, place) = z B_e^T, for one projection or, PARTS 2, the
    sum of two; SCALE: times the routing weight. Dense projections read l and l2 [.., K]."""
    N = multiple_of_8(N, True)
    K = multiple_of_8(K, True)
    R = multiple_of_8(R, True)
    R2 = multiple_of_8(R2, True)
    width = R + R2 if PARTS == 2 else R
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_m = tl.load(table_ptr + NUM_EXPERTS + 1)
    for step in tl.range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0)):
        tile, block = _tile_of(step, blocks_m, blocks_n, GROUP_M)
        expert, stored, _, place, mask_m, _ = _rows_of_tile(
            index_ptr, table_ptr, row_ptr, tile, M, NUM_EXPERTS, TOP_K, BLOCK_M, 1, False, False
        )
        offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        z_rows = stored * width
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        packed = _expert_ranks(ranks, expert)
        rank, dense = _rank_of(packed, SHIFT, HAS_DENSE)
        acc = _project(
            acc, z_ptr, z_rows, l_ptr, stored * K, mask_m, expert, rank, dense, b_ptr, w_ptr,
            offs_n, N, R, K, BLOCK_K, W_ROWS_ARE_N, HAS_DENSE, False,
        )  # fmt: skip
        if PARTS == 2:
            rank, dense = _rank_of(packed, SHIFT + 16, HAS_DENSE)
            acc = _project(
                acc, z_ptr, z_rows + R, l2_ptr, stored * K, mask_m, expert, rank, dense,
                b2_ptr, w2_ptr, offs_n, N, R2, K, BLOCK_K, W_ROWS_ARE_N, HAS_DENSE, False,
            )  # fmt: skip
        if SCALE:
            weight = tl.load(weight_ptr + place, mask=mask_m, other=0.0).to(tl.float32)
            acc *= weight[:, None]
        tl.store(
            out_ptr + place[:, None] * N + offs_n[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=mask_m[:, None] & (offs_n < N)[None, :],
        )


@triton.jit(do_not_specialize=["M", "slots"])
def _low_rank_experts_decode_kernel(
    z_ptr, h_ptr, b_ptr, w_ptr, weight_ptr, out_ptr, index_ptr, ranks, M, slots, N, K, R,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, HAS_DENSE: tl.constexpr,
    BY_PLACE: tl.constexpr, BLOCK_T: tl.constexpr, USE_PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [M, N] = sum over the slots, in their order, of w * (z2 B_down^T)."""
    N = multiple_of_8(N, True)
    K = multiple_of_8(K, True)
    R = multiple_of_8(R, True)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    place = offs_m[:, None] * TOP_K + tl.arange(0, BLOCK_T)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if USE_PDL:
        tl.extra.cuda.gdc_wait()
    for slot in tl.range(0, slots):
        expert, mask_m, active, named = _rows_of_slot(
            index_ptr, slot, M, NUM_EXPERTS, TOP_K, BLOCK_M, BLOCK_T, BY_PLACE
        )
        if active:
            stored = (slot * BLOCK_M + offs_m).to(tl.int64)
            rank, dense = _rank_of(_expert_ranks(ranks, expert), 33, HAS_DENSE)
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            acc = _project(
                acc, z_ptr, stored * R, h_ptr, stored * K, mask_m, expert, rank, dense, b_ptr,
                w_ptr, offs_n, N, R, K, BLOCK_K, True, HAS_DENSE, False,
            )  # fmt: skip
            weight = tl.load(weight_ptr + place, mask=named, other=0.0).to(tl.float32)
            total += tl.sum(weight, axis=1)[:, None] * acc
    tl.store(
        out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=(offs_m < M)[:, None] & (offs_n < N)[None, :],
    )
