"""The sentinel: its name, its shape, and that config.json names it."""

import shutil
from pathlib import Path

import pytest

import lillama
from lillama.checkpoint.compression import compression_of
from lillama.checkpoint.headers import read_headers, tensor_bytes
from lillama.checkpoint.sentinel import saved_sentinel, sentinel
from lillama.models.config_json import read_config
from lillama.models.families import FAMILIES

EXPERTS = "block_sparse_moe.experts"
RANKS = {
    "mixtral": {f"model.layers.{n}.{EXPERTS}.{e}.w1": 8 for n in (2, 10) for e in range(4)},
    "mamba": {f"backbone.layers.{n}.mixer.in_proj": 8 for n in (2, 10)},
}


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
