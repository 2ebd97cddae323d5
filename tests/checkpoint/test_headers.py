"""Headers of shards: what they hold, and the damage that is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lillama.checkpoint.headers import read_headers, read_shard_headers, tensor_bytes
from lillama.errors import InputError


@pytest.fixture
def sharded(tmp_path) -> Path:
    """Two shards and an index."""
    tensors = [
        {"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16)},
        {"c": torch.zeros(4)},
    ]
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {}
    for name, shard in zip(names, tensors, strict=True):
        save_file(shard, tmp_path / name)
        weight_map.update(dict.fromkeys(shard, name))
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_read_headers_of_shards(sharded):
    headers = read_headers(sharded)
    assert {n: (h.shape, h.dtype, h.num_bytes) for n, h in headers.items()} == {
        "a": ((2, 3), "F32", 24),
        "b": ((5,), "BF16", 10),
        "c": ((4,), "F32", 16),
    }
    assert headers["c"].file == sharded / "model-00002-of-00002.safetensors"
    assert tensor_bytes(headers) == 50
    assert tensor_bytes(headers, skip=["a", "absent"]) == 26


def test_read_headers_of_one_file(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert list(read_headers(tmp_path)) == ["a"]


def test_read_headers_missing_shard(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"model-00002-of-00002\.safetensors is missing; the index"
    ):
        read_headers(sharded)


@pytest.mark.parametrize("kept", [0, 4, 8, 40, -1], ids=lambda n: f"{n}-bytes")
def test_read_headers_truncated_shard(sharded, kept):
    file = sharded / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"model-00001-of-00002\.safetensors is truncated"):
        read_headers(sharded)


def test_read_headers_shard_with_bytes_too_many(sharded):
    file = sharded / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(InputError, match="truncated or damaged: it has .* bytes, its header wants"):
        read_headers(sharded)


GARBAGE = {
    "no-json": b"\xff\x00garbage",
    "list": b"[1, 2]",
    "entry-is-number": b'{"a": 1}',
    "no-offsets": b'{"a": {"dtype": "F32", "shape": [1]}}',
    "shape-is-number": b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
    "one-offset": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
}


@pytest.mark.parametrize("header", GARBAGE.values(), ids=GARBAGE.keys())
def test_read_headers_garbage_header(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(InputError, match="has a broken safetensors header"):
        read_shard_headers(file)


INDEXES = ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']


@pytest.mark.parametrize("content", INDEXES)
def test_read_headers_garbage_index(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=r"index\.json is not an index of shards"):
        read_headers(sharded)


def test_read_headers_no_weights(tmp_path):
    with pytest.raises(InputError, match=r"no model\.safetensors and no index of shards$"):
        read_headers(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="only safetensors are read"):
        read_headers(tmp_path)
