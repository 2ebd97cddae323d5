"""What quantization_config may say, and weights that others quantized."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from lillama.checkpoint.compression import check_compression, check_unquantized, compression_of
from lillama.checkpoint.headers import TensorHeader
from lillama.errors import InputError
from lillama.integrations.transformers import LillamaConfig
from lillama.models.config_json import read_config


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
def test_compression_of_a_config_without_ranks_raises(ranks):
    with pytest.raises(InputError, match="has no ranks"):
        compression_of(quantized(quant_method="lillama", format_version=3, ranks=ranks))


@pytest.mark.parametrize("rank", [0, -8, "8", 8.0, True, None])
def test_a_rank_that_is_no_positive_integer_raises(rank):
    with pytest.raises(InputError, match="the rank of bad must be a positive integer"):
        check_compression({"format_version": 3, "ranks": {"good": 8, "bad": rank}})
