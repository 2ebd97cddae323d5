"""The parts of the vLLM plugin that need no vLLM: who holds what, what config.json tells it, and
registering it."""

import json
import sys
import types

import pytest
import torch
from transformers import AutoModelForCausalLM

import lillama
from lillama.checkpoint.format import read_headers
from lillama.integrations import vllm
from lillama.integrations.transformers import LillamaConfig
from lillama.integrations.vllm.shards import (
    Part,
    local_rows,
    multiplied_out,
    not_loaded,
    pivot_rows,
)


@pytest.mark.parametrize("sizes", [(4,), (4, 2), (1, 3, 2)], ids=str)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_local_rows_are_every_row_once_and_keep_the_segments(sizes, tp_size):
    whole = torch.arange(sum(sizes) * tp_size)
    segments = whole.split([size * tp_size for size in sizes])
    for rank in range(tp_size):
        wanted = torch.cat([segment.chunk(tp_size)[rank] for segment in segments])
        assert torch.equal(local_rows(sizes, rank, tp_size), wanted)


def test_pivot_rows_are_rows_of_the_plain_factor():
    generator = torch.Generator().manual_seed(0)
    C, order = torch.randn(7, 3, generator=generator), torch.randperm(10, generator=generator)
    whole = torch.cat([torch.eye(3), C])[order]
    rows = torch.tensor([8, 1, 5])
    assert torch.equal(pivot_rows(C, order.int(), rows), whole[rows])


@pytest.mark.parametrize(
    ("rank", "rows", "in_features", "worth"),
    [
        (1024, 14336, 4096, True),  # Mixtral's w1
        (1024, 14336 // 8, 4096, True),
        (1024, 14336 // 16, 4096, False),
        (50, 64, 128, False),
        (42, 64, 128, True),
    ],
)
def test_factors_are_worth_it_while_they_are_smaller(rank, rows, in_features, worth):
    assert Part("w", rank, (rows,)).is_worth_factors(in_features) == worth
    assert (rank * (rows + in_features) < rows * in_features) == worth


def test_multiplied_out_is_rounded_once():
    A, B = torch.randn(5, 9).bfloat16(), torch.randn(12, 5).bfloat16()
    found = multiplied_out(A, B)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (B.float() @ A.float()).bfloat16())


def test_not_loaded_names_what_is_not_finite_or_no_permutation():
    good = {"a": torch.ones(3), "o": torch.tensor([2, 0, 1], dtype=torch.int32)}
    assert not_loaded(good) == []
    bad = {
        "nan": torch.tensor([1.0, torch.nan]),
        "inf": torch.tensor([torch.inf]),
        "twice": torch.tensor([0, 1, 1], dtype=torch.int32),
        "unset": torch.tensor([-1, -1]),
        "": torch.tensor([torch.nan]),
    }
    assert not_loaded({**good, **bad}) == ["nan", "inf", "twice", "unset", ""]


@pytest.mark.parametrize("producer", [None, "lillama 0.1.0", {"name": "lillama"}], ids=str)
def test_every_config_names_its_producer_as_vllm_asks_for_it(producer):
    values = LillamaConfig(ranks={"a": 1}, sentinel="a.weight", producer=producer).to_dict()
    assert values["producer"].get("name") == (producer and "lillama")


@pytest.mark.parametrize(
    ("version", "message"),
    [("0.99.1", "lillama cannot be used with vLLM 0.99.1, only with 0.32"), ("0.32.5", "vllm")],
)
def test_register_says_which_vllm_it_needs(version, message, monkeypatch, caplog):
    for name in [name for name in sys.modules if name.startswith("lillama.integrations.vllm.q")]:
        monkeypatch.delitem(sys.modules, name)
    empty = types.ModuleType("vllm")
    empty.__version__ = version
    monkeypatch.setitem(sys.modules, "vllm", empty)
    with pytest.raises(ImportError, match=message):
        vllm.register()
    assert ("was tested with vLLM 0.32, this is 0.99.1" in caplog.text) == (version == "0.99.1")


@pytest.mark.parametrize("saved_again", [False, True])
def test_config_names_the_sentinel_of_a_gpt_neox_with_a_factorised_head(
    make_checkpoint, text_file, tmp_path, saved_again
):
    """Its head is embed_out: which name the sentinel has cannot be told from the ranks alone."""
    base, out = make_checkpoint("gpt_neox"), tmp_path / "out"
    targets = ("query_key_value", "embed_out")
    reduction = 0.9 * lillama.plan(base, 0.01, targets=targets)["max_reduction"]
    lillama.compress(
        base, out, reduction=reduction, targets=targets, text=text_file, tokens=64, seq_len=16,
        train=False, device="cpu",
    )  # fmt: skip
    if saved_again:
        AutoModelForCausalLM.from_pretrained(out).save_pretrained(tmp_path / "again")
        out = tmp_path / "again"
    values = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "embed_out" in values["ranks"]
    name = LillamaConfig(**values).sentinel
    headers = read_headers(out)
    assert headers[name].shape == (1,) and name.removesuffix(".weight") in values["ranks"]
    # nothing else lies under the name of a factorised matrix, which vLLM's layers refuse
    dense = {f"{matrix}.weight" for matrix in values["ranks"]} & headers.keys()
    assert dense == {name} and name != "embed_out.weight"
