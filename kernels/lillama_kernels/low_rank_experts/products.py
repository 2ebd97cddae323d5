# Triton's functions are not what they look like to a type checker:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false
"""What the Triton kernels of low_rank_experts share: whose rows a tile has, and its product.

Letters, layout and DECODE as in kernels.py.
"""

import triton
import triton.language as tl

from lillama_kernels.launch import multiple_of_8

__all__: list[str] = []  # private: what launchers share


@triton.jit
def _expert_ranks(ranks, expert):
    """The number of pack_ranks of one expert."""
    packed = ranks[0]
    for i in tl.static_range(1, len(ranks)):
        packed = tl.where(expert == i, ranks[i], packed)
    return packed


@triton.jit
def _rank_of(packed, SHIFT: tl.constexpr, HAS_DENSE: tl.constexpr):
    """Rank of one projection; 0 for a dense one, and which of these it is."""
    field = ((packed >> SHIFT) & 0xFFFF).to(tl.int32)
    if HAS_DENSE:
        field = tl.where(field % 2 == 1, 0, field)
    return multiple_of_8(field, True), ((packed >> (SHIFT + 3)) & 0x1FFF).to(tl.int32)


@triton.jit
def _rows_of_slot(
    index_ptr, slot, M, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr, BY_PLACE: tl.constexpr,
):  # fmt: skip
    """DECODE: expert of a slot, which tokens are routed to it [BLOCK_M], and its place in each.

    A slot is an expert or, BY_PLACE, the first of the M * k (token, place) that names its expert.
    """
    offs_m = tl.arange(0, BLOCK_M)[:, None]
    offs_t = tl.arange(0, BLOCK_T)[None, :]
    place = offs_m * TOP_K + offs_t
    real = (offs_m < M) & (offs_t < TOP_K)
    index = tl.load(index_ptr + place, mask=real, other=NUM_EXPERTS)  # [BLOCK_M, BLOCK_T]
    expert = slot
    if BY_PLACE:
        expert = tl.load(index_ptr + slot).to(tl.int32)
    named = (index == expert) & real
    mask_m = tl.max(named.to(tl.int32), axis=1) > 0
    active = (expert >= 0) & (expert < NUM_EXPERTS) & (tl.max(mask_m.to(tl.int32), axis=0) > 0)
    if BY_PLACE:
        active = active & (tl.sum(tl.sum((named & (place < slot)).to(tl.int32), axis=1)) == 0)
    return expert, mask_m, active, named


@triton.jit
def _rows_of_tile(
    index_ptr, table_ptr, row_ptr, tile, M, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BY_PLACE: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """Expert of a tile of rows; where its rows are stored, their token and (token, place), each
    [BLOCK_M] int64; which of them count; whether any does."""
    offs_m = tl.arange(0, BLOCK_M)
    if DECODE:
        expert, mask_m, active, named = _rows_of_slot(
            index_ptr, tile, M, NUM_EXPERTS, TOP_K, BLOCK_M, BLOCK_T, BY_PLACE
        )
        token = offs_m.to(tl.int64)
        return expert, tile.to(tl.int64) * BLOCK_M + token, token, token, mask_m, active
    else:
        # [offsets of the experts' rows E+1, number of tiles, then expert and first row of each]
        tiles_ptr = table_ptr + NUM_EXPERTS + 2
        expert = tl.load(tiles_ptr + 2 * tile)
        stored = tl.load(tiles_ptr + 2 * tile + 1) + offs_m
        mask_m = stored < tl.load(table_ptr + expert + 1)
        place = tl.load(row_ptr + stored, mask=mask_m, other=0).to(tl.int64)
        return expert, stored.to(tl.int64), place // TOP_K, place, mask_m, True


@triton.jit
def _tile_of(step, blocks_m, blocks_n, GROUP_M: tl.constexpr):
    """Tile (m, n) of a step: GROUP_M rows of tiles together, column by column, so that a weight
    tile is used by all of them while it is in L2."""
    group = step // (GROUP_M * blocks_n)
    first_m = group * GROUP_M
    group_m = tl.minimum(blocks_m - first_m, GROUP_M)
    inside = step % (GROUP_M * blocks_n)
    return first_m + inside % group_m, inside // group_m


@triton.jit
def _load_w(w_ptr, stride_w, offs_n, mask_n, block, K, BLOCK_K: tl.constexpr,
            W_ROWS_ARE_N: tl.constexpr):  # fmt: skip
    """Tile [BLOCK_K, BLOCK_N] of a weight stored as rows of n or as rows of k."""
    offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    if W_ROWS_ARE_N:
        w = tl.load(
            w_ptr + offs_n[:, None] * stride_w + offs_k[None, :],
            mask=mask_n[:, None] & mask_k[None, :],
            other=0.0,
        ).T
    else:
        w = tl.load(
            w_ptr + offs_k.to(tl.int64)[:, None] * stride_w + offs_n[None, :],
            mask=mask_k[:, None] & mask_n[None, :],
            other=0.0,
        )
    return w


@triton.jit
def _product(
    acc, l_rows, mask_m, w_ptr, stride_w, offs_n, mask_n, K,
    BLOCK_K: tl.constexpr, W_ROWS_ARE_N: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """acc + l w over K; WAIT: for the kernel in front, once the first weights are on their way."""
    offs_k = tl.arange(0, BLOCK_K)
    offs_n = offs_n.to(tl.int64)
    first = 0
    if WAIT:
        w = _load_w(w_ptr, stride_w, offs_n, mask_n, 0, K, BLOCK_K, W_ROWS_ARE_N)
        tl.extra.cuda.gdc_wait()
        mask = mask_m[:, None] & (offs_k < K)[None, :]
        # through L2 only: other multiprocessors wrote it in a kernel that may still end
        rows = tl.load(l_rows + offs_k[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        acc = tl.dot(rows, w, acc, input_precision="ieee")
        first = 1
    for block in tl.range(first, tl.cdiv(K, BLOCK_K)):
        mask = mask_m[:, None] & (block * BLOCK_K + offs_k < K)[None, :]
        rows = tl.load(
            l_rows + block * BLOCK_K + offs_k[None, :], mask=mask, other=0.0, cache_modifier=".cg"
        )
        w = _load_w(w_ptr, stride_w, offs_n, mask_n, block, K, BLOCK_K, W_ROWS_ARE_N)
        acc = tl.dot(rows, w, acc, input_precision="ieee")
    return acc


@triton.jit
def _project(
    acc, z_ptr, z_rows, dense_ptr, dense_rows, mask_m, expert, rank, dense, b_ptr, w_ptr, offs_n,
    N, R, K,
    BLOCK_K: tl.constexpr, W_ROWS_ARE_N: tl.constexpr, HAS_DENSE: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    """acc + z B_e^T, or the dense rows times W_e^T where the expert's rank is 0.

    B [E, N, R] and W [.., N, K], or with rows of k instead of n [E, R, N] and [.., K, N]. z_rows
    and dense_rows are where the rows begin. One loop for both cases: two would have twice the
    shared memory.
    """
    l_ptr = z_ptr
    l_rows = z_rows
    at = b_ptr + expert.to(tl.int64) * R * N
    stride = R if W_ROWS_ARE_N else N
    inner = rank
    if HAS_DENSE:
        whole = rank == 0
        l_ptr = tl.where(whole, dense_ptr, z_ptr)
        # both are multiples of 8, which the choice would hide from the compiler
        l_rows = multiple_of_8(tl.where(whole, dense_rows, z_rows), True)
        at = tl.where(whole, w_ptr + dense.to(tl.int64) * K * N, at)
        inner = tl.where(whole, K, rank)
        if W_ROWS_ARE_N:
            stride = tl.where(whole, K, R)
    return _product(
        acc, l_ptr + l_rows[:, None], mask_m, at, stride, offs_n, offs_n < N, inner,
        BLOCK_K, W_ROWS_ARE_N, WAIT,
    )  # fmt: skip


@triton.jit
def _scaled(grad, value, dot_ptr, weight_ptr, mask_m):
    """grad times the rows' routing weights; their own gradient, grad . value, goes to dot."""
    tl.store(dot_ptr, tl.sum(grad * value, axis=1), mask=mask_m)
    weight = tl.load(weight_ptr, mask=mask_m, other=0.0).to(tl.float32)
    return grad * weight[:, None]
