"""Write one safetensors file tensor by tensor: no more than one of them is in memory."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["DTYPES", "Entry", "entries_of", "file_sha256", "write_shard"]

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
CHUNK_BYTES = 1 << 24


class Entry(NamedTuple):
    """A tensor that `make` will give, on any device, when its turn has come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def entries_of(tensors: dict[str, Tensor]) -> list[Entry]:
    """Entries of tensors that are there already."""
    return [Entry(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()]


def write_shard(file: Path, entries: Iterable[Entry]) -> str:
    """Write the entries, the wider dtypes first so that every tensor is aligned; flush to disk.

    Returns the sha256 of the file. Raises OSError.
    """
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in ordered:
        start, end = end, end + entry.num_bytes
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with file.open("wb") as stream:

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            stream.write(data)

        put(len(text).to_bytes(8, "little") + text)
        for entry in ordered:
            tensor = entry.make().detach().to("cpu").contiguous()
            assert tensor.dtype == entry.dtype and tuple(tensor.shape) == entry.shape, entry
            data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
            put(memoryview(data))
            del data
            del tensor  # before the next is made
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def file_sha256(file: Path) -> str:
    """sha256 of a whole file. Raises OSError."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
