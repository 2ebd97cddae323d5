"""Headers of a checkpoint's shards: they tell all that is known before weights are read."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lillama.errors import InputError
from lillama.models.families import Family

__all__ = [
    "SHARD_INDEX",
    "SINGLE_SHARD",
    "TensorHeader",
    "hub_headers",
    "read_headers",
    "read_shard_headers",
    "shard_names",
    "tensor_bytes",
]

SINGLE_SHARD = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor of a checkpoint, as its shard tells it; `stored_name` where the shard calls it
    otherwise than we do."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    stored_name: str | None = None


def shard_names(path: Path) -> list[str]:
    """Return the names of a checkpoint's shards, whether they are there or not.

    Raises:
        InputError: the index is none.
    """
    index = path / SHARD_INDEX
    if not index.is_file():
        return [SINGLE_SHARD]
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is not an index of shards: {error!r}") from error
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{index} is not an index of shards: it names {names}")
    return names


def read_shard_headers(file: Path) -> dict[str, TensorHeader]:
    """As `read_headers`, for one file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise InputError(f"shard {file} is truncated or no safetensors file ({size} bytes)")
        try:
            entries = json.loads(stream.read(length))
            entries.pop("__metadata__", None)
            headers, end = {}, 0
            for name, entry in entries.items():
                first, last = entry["data_offsets"]
                shape = tuple(entry["shape"])
                headers[name] = TensorHeader(file, entry["dtype"], shape, last - first)
                end = max(end, last)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"shard {file} has a broken safetensors header: {error!r}") from error
    if size != 8 + length + end:
        raise InputError(
            f"shard {file} is truncated or damaged: it has {size} bytes, "
            f"its header wants {8 + length + end}"
        )
    return headers


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """Return names, shapes, dtypes and sizes of every tensor.

    Raises:
        InputError: no weights, a missing or truncated shard, a broken header.
    """
    headers: dict[str, TensorHeader] = {}
    for name in shard_names(path):
        if (path / name).is_file():
            headers.update(read_shard_headers(path / name))
        elif (path / SHARD_INDEX).is_file():
            raise InputError(f"shard {path / name} is missing; the index {SHARD_INDEX} names it")
        else:
            hint = "; only safetensors are read" if any(path.glob("*.bin")) else ""
            raise InputError(f"{path} holds no model.safetensors and no index of shards{hint}")
    return headers


def hub_headers(
    headers: dict[str, TensorHeader], family: Family, block_path: str
) -> dict[str, TensorHeader]:
    """Return the headers with the base model's prefix where the checkpoint has none: those that
    were saved without a head, as the hub's GPT-2 and OPT. `block_path`: runtime path of the
    blocks."""
    prefix = f"{block_path.partition('.')[0]}."
    if any(name.startswith(prefix) for name in headers):
        return headers
    return {
        name if name.startswith(f"{family.head}.") else prefix + name: replace(
            header, stored_name=name
        )
        for name, header in headers.items()
    }


def tensor_bytes(headers: Mapping[str, TensorHeader], skip: Iterable[str] = ()) -> int:
    """Return the bytes of all tensors but those named in `skip` (the sentinel)."""
    skipped = set(skip)
    return sum(header.num_bytes for name, header in headers.items() if name not in skipped)
