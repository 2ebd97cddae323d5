"""Marks of pivots and the order that they stand for."""

import itertools

import pytest
import torch

from lillama.checkpoint.pivots import is_permutation, permutation_of, pivot_mask_of
from tests.pivot_orders import random_order


@pytest.mark.parametrize("num_outputs", [1, 7, 63, 257])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_order_gathers_rows_where_the_marks_put_them(num_outputs, share, device):
    """Rows of A in ascending order of their outputs, and so those of C."""
    rank = max(1, int(share * num_outputs))
    generator = torch.Generator().manual_seed(num_outputs)
    marks = torch.zeros(num_outputs, dtype=torch.uint8)
    marks[torch.randperm(num_outputs, generator=generator)[:rank]] = 1
    W = torch.randn(num_outputs, 3, generator=generator)
    stored = torch.cat([W[marks == 1], W[marks == 0]])
    order = permutation_of(marks.to(device), rank)
    assert order.dtype == torch.int32 and order.device.type == device.type
    assert is_permutation(order)
    assert torch.equal(stored[order.cpu().long()], W)
    assert torch.equal(pivot_mask_of(order, rank).cpu(), marks)
    assert pivot_mask_of(order, rank).dtype == torch.uint8


def test_an_offloaded_order_is_refused():
    with pytest.raises(ValueError, match="of 6 outputs is offloaded.* without offload_buffers"):
        pivot_mask_of(torch.empty(6, dtype=torch.int32, device="meta"), 3)


def test_orders_of_a_batch_are_those_of_its_rows():
    ranks = [1, 4, 9, 16]
    marks = torch.stack([pivot_mask_of(random_order(16, rank), rank) for rank in ranks])
    found = permutation_of(marks, torch.tensor(ranks)[:, None])
    for row, order, rank in zip(marks, found, ranks, strict=True):
        assert torch.equal(order, permutation_of(row, rank))
    assert found.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_order_is_a_permutation_exactly_where_the_marks_fit(dtype):
    """Every row of five marks that are 0, 1 or neither, at every rank."""
    fit = 0
    for values in itertools.product([0, 1, 2, 255], repeat=5):
        marks = torch.tensor(values, dtype=dtype)
        for rank in range(1, 6):
            fits = max(values) <= 1 and sum(values) == rank
            assert is_permutation(permutation_of(marks, rank)) == fits, (values, rank)
            fit += fits
    assert fit == 31


@pytest.mark.parametrize(
    ("order", "rank"),
    [
        ([1, 0, 2, 3], 2),  # rows of A out of order
        ([0, 1, 3, 2], 2),  # rows of C
        ([0, 0, 1, 2], 2),  # no permutation
        ([0, 1, 2, -1], 3),
        ([0, 1, 2, 4], 3),
    ],
)
def test_an_order_that_marks_cannot_hold_is_refused(order, rank):
    with pytest.raises(ValueError, match=f"of 4 outputs at rank {rank} must name each once"):
        pivot_mask_of(torch.tensor(order, dtype=torch.int32), rank)
