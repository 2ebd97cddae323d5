"""Reading a checkpoint folder: what is refused, and that config.json names the sentinel."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

import lillama
from lillama.checkpoint.format import (
    TensorHeader,
    check_factors,
    check_ranks,
    check_unquantized,
    compression_of,
    read_config,
    read_headers,
    read_shard_headers,
    saved_sentinel,
    sentinel,
    tensor_bytes,
)
from lillama.errors import InputError
from lillama.integrations.transformers import LillamaConfig
from lillama.models.families import FAMILIES

EXPERTS = "block_sparse_moe.experts"
RANKS = {
    "mixtral": {f"model.layers.{n}.{EXPERTS}.{e}.w1": 8 for n in (2, 10) for e in range(4)},
    "mamba": {f"backbone.layers.{n}.mixer.in_proj": 8 for n in (2, 10)},
}


# read_config
def test_read_config_returns_the_config(mixtral):
    config = read_config(mixtral)
    assert (config.model_type, config.hidden_size) == ("mixtral", 32)


@pytest.mark.parametrize("kind", ["absent", "file"])
def test_read_config_not_a_folder(tmp_path, kind):
    path = tmp_path / "model"
    if kind == "file":
        path.write_text("x")
    with pytest.raises(InputError, match=f"{path} is not a checkpoint folder"):
        read_config(path)


def test_read_config_missing(tmp_path):
    with pytest.raises(InputError, match=r"is not a checkpoint: it has no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"model_type": ', b"[1, 2]", b'{"a": "\xff"}'])
def test_read_config_broken_json(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json is not a JSON object"):
        read_config(tmp_path)


@pytest.mark.parametrize("model_type", ["t5", "no-such-thing", None, ["mixtral"]])
def test_read_config_unknown_architecture(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(InputError, match="unknown architecture: .*supported are .*mamba, mamba2"):
        read_config(tmp_path)


@pytest.mark.parametrize("values", [{"hidden_size": "wide"}, {"dtype": "nonsense"}])
def test_read_config_values_of_the_wrong_kind(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", **values}))
    with pytest.raises(InputError, match=r"config\.json is not a config of mixtral") as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)


# compression_of
def quantized(**values: object):
    return AutoConfig.for_model("mixtral", quantization_config=values)


def test_compression_of_dense_is_none(mixtral):
    assert compression_of(read_config(mixtral)) is None


def test_compression_of_dict_and_of_config_object():
    values = {
        **{"quant_method": "lillama", "format_version": 3, "ranks": {"a": 8}},
        "sentinel": "a.weight",
    }
    assert compression_of(quantized(**values)) == values
    config = AutoConfig.for_model("mixtral")
    config.quantization_config = LillamaConfig(ranks={"a": 8}, sentinel="a.weight")
    found = compression_of(config)
    assert found is not None and found["ranks"] == {"a": 8}


def test_compression_of_other_quantizer_raises():
    with pytest.raises(InputError, match="quantized with 'awq'.*the original checkpoint in bf16"):
        compression_of(quantized(quant_method="awq", bits=4))


@pytest.mark.parametrize(
    "method", ["fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4", "aqlm", None]
)
def test_compression_of_any_quantizer_says_what_to_take(method):
    with pytest.raises(InputError, match=r"in bf16, fp16 or fp32, .*without -GPTQ, -AWQ, -FP8"):
        compression_of(quantized(quant_method=method))


def test_compression_of_the_first_compressed_tensors_key():
    config = AutoConfig.for_model("mixtral", compression_config={"format": "pack-quantized"})
    with pytest.raises(InputError, match="quantized with 'compressed-tensors'"):
        compression_of(config)


@pytest.mark.parametrize(
    ("name", "dtype", "refused"),
    [
        ("layers.0.q_proj.weight", "F8_E4M3", True),
        ("layers.0.q_proj.weight", "F8_E5M2", True),
        ("layers.0.q_proj.weight", "F4", True),
        ("layers.0.q_proj.weight", "I8", True),  # bitsandbytes
        ("layers.0.q_proj.weight", "U8", True),
        ("layers.0.q_proj.qweight", "I32", True),  # GPTQ, AWQ
        ("layers.0.q_proj.weight_packed", "I32", True),  # compressed-tensors
        ("layers.0.mlp.experts.down_proj_blocks", "U8", True),  # MXFP4
        ("layers.0.q_proj.weight", "BF16", False),
        ("layers.0.q_proj.weight", "F16", False),
        ("layers.0.q_proj.weight", "F32", False),
        ("layers.0.q_proj.weight", "F64", False),
        # buffers of old checkpoints
        ("gpt_neox.layers.0.attention.bias", "U8", False),
        ("gpt_neox.layers.0.attention.bias", "BOOL", False),
        ("embeddings.position_ids", "I64", False),
    ],
)
def test_check_unquantized(name, dtype, refused):
    headers = {"a": TensorHeader(Path("s"), "F32", (2,), 8)}
    headers[name] = TensorHeader(Path("shard"), dtype, (2, 2), 4)
    if not refused:
        return check_unquantized(headers)
    with pytest.raises(InputError, match=f"{name} in shard is of dtype {dtype}: .*in bf16, fp16"):
        check_unquantized(headers)


@pytest.mark.parametrize("version", [0, 1, 2, 4, "3", None])
def test_compression_of_other_format_version_raises(version):
    config = quantized(quant_method="lillama", format_version=version, ranks={"a": 8})
    with pytest.raises(InputError, match=f"must be 3, got {version!r}; the .*: compress again, or"):
        compression_of(config)


@pytest.mark.parametrize("name", [None, "", 7])
def test_compression_of_a_config_that_does_not_name_the_sentinel_raises(name):
    values = {"quant_method": "lillama", "format_version": 3, "ranks": {"a": 8}, "sentinel": name}
    with pytest.raises(InputError, match=f"must name the sentinel, got {name!r}; compress again"):
        compression_of(quantized(**values))


@pytest.mark.parametrize("value", [["lillama"], "lillama"])
def test_compression_of_no_object_raises(value):
    config = AutoConfig.for_model("mixtral")
    config.quantization_config = value
    with pytest.raises(InputError, match="quantization_config must be an object"):
        compression_of(config)


@pytest.mark.parametrize("ranks", [None, {}, [8], "w1"])
def test_check_ranks_none_raises(ranks):
    with pytest.raises(InputError, match="has no ranks"):
        check_ranks(ranks)
    with pytest.raises(InputError, match="has no ranks"):
        compression_of(quantized(quant_method="lillama", format_version=3, ranks=ranks))


@pytest.mark.parametrize("rank", [0, -8, "8", 8.0, True, None])
def test_check_ranks_not_a_positive_integer_raises(rank):
    with pytest.raises(InputError, match="the rank of bad must be a positive integer"):
        check_ranks({"good": 8, "bad": rank})


# read_headers
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


# check_factors
SHAPES = {f"m{i}": (6, 4) for i in range(8)}
FITTING = {
    f"m{i}.{key}": shape for i in range(8) for key, shape in (("lr_A", (2, 4)), ("lr_B", (6, 2)))
}
ALL = dict.fromkeys(SHAPES, 2)


def test_check_factors_that_fit():
    check_factors({**FITTING, "norm.weight": (9,)}, ALL, SHAPES)
    check_factors({**FITTING, "m8.lr_W": (3, 5)}, ALL, {**SHAPES, "m8": (3, 5)})


def test_check_factors_in_the_pivot_gauge():
    """Of the embeddings it is the columns that have an order."""
    shapes, ranks = {"m": (6, 4), "e": (6, 4)}, {"m": 2, "e": 3}
    fitting = {"m.lr_A": (2, 4), "m.lr_C": (4, 2), "m.lr_pivots": (6,)}
    fitting |= {"e.lr_B": (6, 3), "e.lr_C": (1, 3), "e.lr_pivots": (4,)}
    check_factors(fitting, ranks, shapes, "pivot", "e")
    with pytest.raises(InputError, match=r"missing factors: e\.lr_A; unexpected factors: e\.lr_B"):
        check_factors(fitting, ranks, shapes, "pivot", "another")
    with pytest.raises(InputError, match="missing factors: m.lr_B, e.lr_A;"):
        check_factors(fitting, ranks, shapes, "plain", "e")


def test_check_factors_matrix_without_a_rank_is_dense():
    shapes = {**SHAPES, "m8": (3, 5)}
    with pytest.raises(InputError, match=r"missing factors: m8\.lr_W$"):
        check_factors(FITTING, ALL, shapes)
    with pytest.raises(InputError, match=r"mis-shaped factors: m8\.lr_W \[5, 3\] instead of"):
        check_factors({**FITTING, "m8.lr_W": (5, 3)}, ALL, shapes)
    with pytest.raises(InputError, match=r"unexpected factors: m7\.lr_W$"):
        check_factors({**FITTING, "m7.lr_W": (6, 4)}, ALL, SHAPES)


@pytest.mark.parametrize("name", ["m3.lr_A", "m3.lr_B"])
def test_check_factors_missing(name):
    present = {key: shape for key, shape in FITTING.items() if key != name}
    with pytest.raises(InputError, match=f"missing factors: {name}$"):
        check_factors(present, ALL, SHAPES)


def test_check_factors_unexpected():
    with pytest.raises(InputError, match=r"unexpected factors: other\.lr_A$"):
        check_factors({**FITTING, "other.lr_A": (2, 4)}, ALL, SHAPES)


@pytest.mark.parametrize("shape", [(3, 4), (2, 5), (4, 2), (8,)])
def test_check_factors_mis_shaped(shape):
    got = str(list(shape)).replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(
        InputError, match=rf"mis-shaped factors: m1\.lr_A {got} instead of \[2, 4\]"
    ):
        check_factors({**FITTING, "m1.lr_A": shape}, ALL, SHAPES)


def test_check_factors_names_five_of_each_and_counts_the_rest():
    with pytest.raises(InputError) as caught:
        check_factors({"x.lr_B": (1, 1)}, ALL, SHAPES)
    text = str(caught.value)
    assert text.count("lr_A") + text.count("lr_B") == 6
    assert "and 11 more" in text and "unexpected factors: x.lr_B" in text


def test_check_factors_of_a_matrix_that_is_dense_as_well():
    names = {"a.lr_A": (2, 8), "a.lr_B": (8, 2), "a.weight": (8, 8), "b.weight": (8, 8)}
    with pytest.raises(InputError, match="dense tensors of factorised matrices: a.weight$"):
        check_factors(names, {"a": 2}, {"a": (8, 8)}, sentinel="b.weight")
    check_factors(names, {"a": 2}, {"a": (8, 8)}, sentinel="a.weight")


# The sentinel
@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_sentinel_does_not_depend_on_the_order_of_ranks(kind):
    ranks, family = RANKS[kind], FAMILIES[kind]
    backwards = dict(reversed(ranks.items()))
    assert sentinel(family, ranks) == sentinel(family, backwards)
    assert saved_sentinel(family, ranks) == saved_sentinel(family, backwards)


def test_sentinel_has_the_name_of_a_dense_tensor_and_a_wrong_shape(make_model):
    for kind, layers in (("mixtral", 11), ("mamba", 11)):
        dense = make_model(kind, num_hidden_layers=layers).state_dict()
        name, shape = sentinel(FAMILIES[kind], RANKS[kind])
        assert tuple(dense[name].shape) != shape
        assert len(shape) == (3 if kind == "mixtral" else 1)


@pytest.mark.parametrize("save_original_format", [True, False], ids=["hub", "runtime"])
@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_config_names_the_sentinel_of_save_pretrained(
    make_low_rank, tmp_path, kind, save_original_format
):
    # layers 2 and 10: config.json sorts the names, in memory 2 comes first
    model = make_low_rank(kind, RANKS[kind], num_hidden_layers=11)
    model.save_pretrained(tmp_path, save_original_format=save_original_format)
    check_the_sentinel(tmp_path, sum(p.numel() for p in model.parameters()) * 4)


@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_config_names_the_sentinel_of_our_writer(request, text_file, tmp_path, kind):
    report = lillama.compress(
        request.getfixturevalue(kind), tmp_path / "out", reduction=0.1, text=text_file, tokens=64,
        seq_len=16, train=False, gauge="plain",
    )  # fmt: skip
    check_the_sentinel(tmp_path / "out", report["params_after"] * 4)
    assert report["bytes_after"] == report["params_after"] * 4


def check_the_sentinel(folder: Path, model_bytes: int) -> None:
    """One tensor of four bytes is the sentinel, and without it the bytes are the model's."""
    headers, compression = read_headers(folder), compression_of(read_config(folder))
    assert compression is not None
    name = compression["sentinel"]
    assert headers[name].num_bytes == 4
    assert tensor_bytes(headers, skip=[name]) == model_bytes
    shutil.rmtree(folder)
