"""Streams in memory and in files: the same rows, whatever the tier, and clear words when it is
lost."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lillama.compress.teacher.activations import (
    ActivationMemory,
    ActivationStore,
    prefetched,
    stored,
)
from lillama.errors import RunError

SHAPE = (7, 3, 4)
DTYPES = [torch.float32, torch.bfloat16]


def memory(folder: Path, host_bytes: int = 0) -> ActivationMemory:
    return ActivationMemory(torch.device("cpu"), host_bytes, folder)


def values() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("host_bytes", [0, 10**6], ids=["disk", "host"])
def test_rows_come_back_as_they_were_written(host_bytes, dtype, tmp_path):
    store = memory(tmp_path, host_bytes).new(SHAPE, dtype)
    assert store.background == (host_bytes == 0) and len(store) == 7
    wanted = values().to(dtype)
    for rows in torch.tensor([4, 0, 6, 1, 5, 2, 3]).split(3):
        store.write(rows, values()[rows])
    store.flush()
    picks = torch.tensor([6, 6, 0, 3])
    found = store.read(picks)
    assert found.dtype == dtype and torch.equal(found, wanted[picks])
    store.write(torch.tensor([3]), torch.zeros(1, 3, 4))
    store.flush()
    assert torch.equal(store.read(torch.tensor([3, 4])), torch.stack([wanted[3] * 0, wanted[4]]))
    store.close()
    assert list(tmp_path.iterdir()) == [], "the file never had a name for long"


def test_memory_is_handed_out_until_it_is_spent(tmp_path):
    size = 7 * 3 * 4 * 4
    shared = memory(tmp_path, 2 * size + 1)
    stores = [shared.new(SHAPE, torch.float32) for _ in range(3)]
    assert [store.background for store in stores] == [False, False, True]
    assert not shared.new((1, 1, 0), torch.float32).background, "the rest is still there"
    for store in stores:
        store.close()


def test_closing_a_stream_gives_its_memory_back_once(tmp_path):
    size = 7 * 3 * 4 * 4
    shared = memory(tmp_path, 2 * size)
    first, second = (shared.new(SHAPE, torch.float32) for _ in range(2))
    first.close()
    first.close()
    again, beyond = (shared.new(SHAPE, torch.float32) for _ in range(2))
    assert [store.background for store in (again, beyond)] == [False, True]
    for store in (second, again, beyond, beyond):
        store.close()
    assert shared.left["host"] == 2 * size


def test_stored_holds_a_copy():
    given = values()
    store = stored(given)
    given.zero_()
    assert torch.equal(store.read(torch.arange(7)), values())


@pytest.mark.parametrize("background", [False, True])
def test_prefetched_reads_in_order_and_one_ahead(background):
    events: list[str] = []

    def read(batch: int) -> int:
        events.append(f"read {batch}")
        return 10 * batch

    for batch, found in prefetched(range(4), read, background):
        assert found == 10 * batch
        events.append(f"use {batch}")
    used = [event for event in events if event.startswith("use")]
    assert used == [f"use {i}" for i in range(4)]
    assert [event for event in events if event.startswith("read")] == [
        f"read {i}" for i in range(4)
    ]


@pytest.mark.parametrize("background", [False, True])
def test_prefetched_passes_an_error_on_and_ends_its_thread(background):
    def read(batch: int) -> int:
        if batch == 2:
            raise RunError("lost")
        return batch

    seen = []
    with pytest.raises(RunError, match="lost"):
        for batch, _ in prefetched(range(4), read, background):
            seen.append(batch)
    assert seen == [0, 1]


def full(*args: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_before_the_work_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match=r"has no room for the activations .*--activation-memory"):
        memory(tmp_path).new(SHAPE, torch.float32)
    assert list(tmp_path.iterdir()) == []


def use(call: str, store: ActivationStore) -> Callable[[], object]:
    rows = torch.tensor([1])
    if call == "preadv":
        return lambda: store.read(rows)
    return lambda: (store.write(rows, values()[:1]), store.flush())


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
@pytest.mark.parametrize("failure", ["error", "short"])
def test_a_disk_that_fails_on_the_way_is_told(call, failure, tmp_path, monkeypatch):
    store = memory(tmp_path).new(SHAPE, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full if failure == "error" else lambda *args: 0)
        with pytest.raises(RunError, match=r"the activations in .* are lost"):
            use(call, store)()
    store.close()
