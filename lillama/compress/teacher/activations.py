"""Where the streams between two blocks live: on the GPU, in host memory, or in files beside OUT.

A stream [n, T, H] is read and written by rows. What does not fit the budget goes to a file; files
are read one batch ahead and written behind, so that the disk works while the block computes.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lillama.errors import RunError

__all__ = ["ActivationMemory", "ActivationStore", "prefetched", "stored", "stored_dtype"]

Read = TypeVar("Read")


class ActivationStore:
    """One stream [n, T, H] by rows. Subclasses decide where it lives."""

    background = False  # whether reading waits for something a thread could wait for

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, rows: Tensor) -> Tensor:
        """Rows [b, T, H], on the CPU or where the stream lives. rows [b] int64 on the CPU."""
        raise NotImplementedError

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Replace rows by values [b, T, H] of any dtype and device."""
        raise NotImplementedError

    def flush(self) -> None:
        """Wait for what is still being written; before rows are read that were written."""

    def close(self) -> None:
        """Give the memory or the file back; a second time does nothing."""


class _InMemory(ActivationStore):
    """A stream in memory; `freed()` is called once, when it is closed."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        pin: bool = False,
        freed: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(shape, dtype)
        self.values = torch.empty(shape, dtype=dtype, device=device, pin_memory=pin)
        self._freed = freed

    def read(self, rows: Tensor) -> Tensor:
        return self.values[rows.to(self.values.device)]

    def write(self, rows: Tensor, values: Tensor) -> None:
        self.values[rows.to(self.values.device)] = values.to(self.values.device, self.dtype)

    def close(self) -> None:
        self.values = torch.empty(0)
        freed, self._freed = self._freed, None
        if freed is not None:
            freed()


def stored_dtype(device: torch.device) -> torch.dtype:
    """Of a stream: a GPU computes a block's products in bf16, and storing more digits would not add
    any."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _bytes_of(values: Tensor) -> Any:
    """The memory of a CPU tensor, for reading and writing."""
    return values.view(torch.uint8).numpy()


def stored(values: Tensor) -> ActivationStore:
    """A stream in memory that holds these values [n, T, H]."""
    n, T, H = values.shape
    store = _InMemory((n, T, H), values.dtype, values.device)
    store.values.copy_(values)
    return store


class _OnDisk(ActivationStore):
    """A file without a name: it is gone when the process ends, however it ends."""

    background = True
    PENDING = 2  # batches waiting to be written

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, folder: Path) -> None:
        super().__init__(shape, dtype)
        self.folder = folder
        self.row_bytes = shape[1] * shape[2] * dtype.itemsize
        self._writer = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()
        try:
            name = folder / f".stream-{os.getpid()}-{id(self):x}"
            self._file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            name.unlink()
            os.posix_fallocate(self._file, 0, max(1, shape[0] * self.row_bytes))
        except OSError as error:
            raise RunError(
                f"the disk of {folder} has no room for the activations ("
                f"{shape[0] * self.row_bytes / 2**30:.2f} GiB each of three): {error}; "
                "free space, raise --activation-memory or lower --tokens"
            ) from error

    def read(self, rows: Tensor) -> Tensor:
        values = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        for number, row in enumerate(rows.tolist()):
            self._transfer(os.preadv, values[number], row)
        return values

    def write(self, rows: Tensor, values: Tensor) -> None:
        while len(self._pending) >= self.PENDING:
            self._pending.popleft().result()
        values = values.to("cpu", self.dtype).contiguous()

        def store() -> None:
            for number, row in enumerate(rows.tolist()):
                self._transfer(os.pwritev, values[number], row)

        self._pending.append(self._writer.submit(store))

    def _transfer(self, call: Callable[..., int], row_values: Tensor, row: int) -> None:
        view = memoryview(_bytes_of(row_values)).cast("B")
        done = 0
        while done < self.row_bytes:
            try:
                moved = call(self._file, [view[done:]], row * self.row_bytes + done)
            except OSError as error:
                raise RunError(f"the activations in {self.folder} are lost: {error}") from error
            if moved == 0:
                raise RunError(f"the activations in {self.folder} are lost: the file is cut short")
            done += moved

    def flush(self) -> None:
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        if self._file < 0:
            return
        try:
            self.flush()
        finally:
            self._writer.shutdown()
            os.close(self._file)
            self._file = -1


class ActivationMemory:
    """Hands out streams: on the GPU while `device_bytes` last, then in host memory (pinned where
    there is a GPU) while `host_bytes` last, then in files of `folder`. A stream that is closed
    makes room for another."""

    def __init__(
        self, device: torch.device, host_bytes: int, folder: Path, device_bytes: int = 0
    ) -> None:
        self.device = device
        self.left = {"device": device_bytes, "host": host_bytes}
        self.folder = folder

    @classmethod
    def for_run(cls, device: torch.device, host_bytes: int, folder: Path) -> "ActivationMemory":
        """With `device_bytes` of a GPU."""
        return cls(device, host_bytes, folder, cls.device_bytes(device))

    @staticmethod
    def device_bytes(device: torch.device) -> int:
        """A third of what is free on a GPU."""
        return torch.cuda.mem_get_info(device)[0] // 3 if device.type == "cuda" else 0

    def new(self, shape: tuple[int, int, int], dtype: torch.dtype) -> ActivationStore:
        """A stream of undefined values.

        Raises:
            RunError: neither memory nor the disk has room.
        """
        size = shape[0] * shape[1] * shape[2] * dtype.itemsize
        on_gpu = self.device.type == "cuda"
        for tier in ("device", "host"):
            if size <= self.left[tier]:
                store = _InMemory(
                    shape,
                    dtype,
                    self.device if tier == "device" else torch.device("cpu"),
                    pin=on_gpu and tier == "host",
                    freed=lambda tier=tier: self._take(tier, -size),
                )
                self._take(tier, size)
                return store
        return _OnDisk(shape, dtype, self.folder)

    def _take(self, tier: str, num_bytes: int) -> None:
        self.left[tier] -= num_bytes


def prefetched(
    batches: Iterable[Any], read: Callable[[Any], Read], background: bool
) -> Iterator[tuple[Any, Read]]:
    """(batch, read(batch)) for each batch; with `background` a thread reads one batch ahead."""
    if not background:
        for batch in batches:
            yield batch, read(batch)
        return
    with ThreadPoolExecutor(1) as reader:
        ahead: tuple[Any, Future[Read]] | None = None
        for batch in batches:
            following = batch, reader.submit(read, batch)
            if ahead is not None:
                yield ahead[0], ahead[1].result()
            ahead = following
        if ahead is not None:
            yield ahead[0], ahead[1].result()
