"""One safetensors file, tensor by tensor: what the library itself would read."""

import hashlib
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lillama.checkpoint.headers import read_shard_headers
from lillama.checkpoint.shard_file import DTYPES, Entry, entries_of, file_sha256, write_shard


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {
        f"t.{name}": (torch.randn(3, 5, generator=generator) * 9).to(dtype)
        for name, dtype in DTYPES.items()
    }
    found["scalar"] = torch.tensor(3.5)
    found["empty"] = torch.empty(0, 4)
    found["columns"] = torch.arange(6.0).view(2, 3).T
    return found


def test_write_shard_is_read_back_by_safetensors(tmp_path: Path):
    file = tmp_path / "a.safetensors"
    digest = write_shard(file, entries_of(tensors()))
    loaded = load_file(file)
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype
    assert digest == file_sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    headers = read_shard_headers(file)
    assert {name: header.shape for name, header in headers.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors().items()
    }


def test_write_shard_makes_one_tensor_at_a_time(tmp_path: Path):
    made: list[weakref.ref[torch.Tensor]] = []

    def make() -> torch.Tensor:
        assert all(ref() is None for ref in made)
        tensor = torch.ones(4)
        made.append(weakref.ref(tensor))
        return tensor

    entries = [Entry(name, torch.float32, (4,), make) for name in "abcd"]
    write_shard(tmp_path / "a.safetensors", entries)
    assert load_file(tmp_path / "a.safetensors").keys() == set("abcd")


def test_write_shard_does_not_depend_on_the_order_given(tmp_path: Path):
    entries = entries_of(tensors())
    first = write_shard(tmp_path / "a", entries)
    assert write_shard(tmp_path / "b", entries[::-1]) == first


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.ones(4, dtype=torch.float64)])
def test_write_shard_refuses_a_tensor_that_is_not_as_announced(wrong, tmp_path: Path):
    with pytest.raises(AssertionError):
        write_shard(tmp_path / "a", [Entry("x", torch.float32, (4,), lambda: wrong)])
