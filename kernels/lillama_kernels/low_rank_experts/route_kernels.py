# Triton's functions are not what they look like to a type checker:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false
"""Triton kernels that sort the rows of low_rank_experts by expert, and add up the places of a
token. Nothing is read back by the host: what depends on the routing is in a table on the GPU.

The table, int32: offsets of the experts' rows [E + 1], number of tiles, then for every tile of
BLOCK_M rows its expert and its first row. Rows keep the order of (token, place) within an expert.
"""

import triton
import triton.language as tl

from lillama_kernels.launch import multiple_of_8

__all__: list[str] = []  # kernels are private: launchers call them


@triton.jit
def _one_hot(index_ptr, offs, places, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """[BLOCK_P, BLOCK_E] int32: which expert each (token, place) names; none where out of range."""
    index = tl.load(index_ptr + offs, mask=offs < places, other=NUM_EXPERTS)
    experts = tl.arange(0, BLOCK_E)
    named = (index[:, None] == experts[None, :]) & (experts < NUM_EXPERTS)[None, :]
    return named.to(tl.int32)


@triton.jit(do_not_specialize=["places"])
def _low_rank_experts_count_kernel(
    index_ptr, count_ptr, places,
    NUM_EXPERTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """How often each expert is named in a block of places: count [blocks, BLOCK_E] int32."""
    block = tl.program_id(0)
    offs = block * BLOCK_P + tl.arange(0, BLOCK_P)
    named = _one_hot(index_ptr, offs, places, NUM_EXPERTS, BLOCK_E)
    tl.store(count_ptr + block * BLOCK_E + tl.arange(0, BLOCK_E), tl.sum(named, axis=0))


@triton.jit
def _write_tiles(
    table_ptr, totals, starts, max_tiles, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr,
    TILE_M: tl.constexpr,
):  # fmt: skip
    experts = tl.arange(0, BLOCK_E)
    tl.store(table_ptr + experts, starts, mask=experts < NUM_EXPERTS)
    tl.store(table_ptr + NUM_EXPERTS, tl.sum(totals, axis=0))
    tiles = (totals + TILE_M - 1) // TILE_M
    ends = tl.cumsum(tiles, axis=0)
    num_tiles = tl.sum(tiles, axis=0)
    tl.store(table_ptr + NUM_EXPERTS + 1, num_tiles)
    for first in tl.range(0, max_tiles, 64):
        tile = first + tl.arange(0, 64)
        before = (tile[:, None] >= ends[None, :]) & (experts < NUM_EXPERTS)[None, :]
        expert = tl.sum(before.to(tl.int32), axis=1)
        mine = expert[:, None] == experts[None, :]
        row = tl.sum(
            tl.where(mine, starts[None, :] + (tile[:, None] - (ends - tiles)[None, :]) * TILE_M, 0),
            axis=1,
        )
        at = table_ptr + NUM_EXPERTS + 2 + 2 * tile
        tl.store(at, expert, mask=tile < num_tiles)
        tl.store(at + 1, row, mask=tile < num_tiles)


@triton.jit(do_not_specialize=["places", "blocks", "max_tiles"])
def _low_rank_experts_place_kernel(
    index_ptr, count_ptr, table_ptr, row_ptr, places, blocks, max_tiles,
    NUM_EXPERTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
    TILE_M: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """row [places] int32: the (token, place) of every row sorted by expert; and the table.

    ONE_BLOCK: all places are in one block, which counts for itself.
    """
    pid = tl.program_id(0)
    offs = pid * BLOCK_P + tl.arange(0, BLOCK_P)
    named = _one_hot(index_ptr, offs, places, NUM_EXPERTS, BLOCK_E)
    experts = tl.arange(0, BLOCK_E)
    before = tl.zeros((BLOCK_E,), dtype=tl.int32)
    if ONE_BLOCK:
        totals = tl.sum(named, axis=0)
    else:
        totals = tl.zeros((BLOCK_E,), dtype=tl.int32)
        for first in tl.range(0, blocks, 16):
            block = first + tl.arange(0, 16)
            counts = tl.load(
                count_ptr + block[:, None] * BLOCK_E + experts[None, :],
                mask=(block < blocks)[:, None],
                other=0,
            )
            totals += tl.sum(counts, axis=0)
            before += tl.sum(tl.where((block < pid)[:, None], counts, 0), axis=0)
    starts = tl.cumsum(totals, axis=0) - totals
    inside = tl.cumsum(named, axis=0) - 1
    row = tl.sum(named * ((starts + before)[None, :] + inside), axis=1)
    tl.store(row_ptr + row, offs, mask=tl.sum(named, axis=1) > 0)
    if pid == 0:
        _write_tiles(table_ptr, totals, starts, max_tiles, NUM_EXPERTS, BLOCK_E, TILE_M)


@triton.jit(do_not_specialize=["M"])
def _low_rank_experts_combine_kernel(
    part_ptr, index_ptr, out_ptr, M, N,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [M, N] = sum over k, in order, of part [M * k, N]; an index out of range adds nothing."""
    token = tl.program_id(0).to(tl.int64)
    N = multiple_of_8(N, True)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        index = tl.load(index_ptr + token * TOP_K + k)
        counted = tl.where((index >= 0) & (index < NUM_EXPERTS), N, 0)
        part = part_ptr + (token * TOP_K + k) * N + offs_n
        acc += tl.load(part, mask=offs_n < counted, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * N + offs_n, acc.to(out_ptr.dtype.element_ty), mask=offs_n < N)
