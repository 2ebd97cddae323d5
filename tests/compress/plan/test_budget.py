"""Budgets in what one token uses, instead of what is stored."""

import math
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, MixtralConfig

import lillama
from lillama.checkpoint.headers import read_headers
from lillama.errors import InputError


def used_by_a_token(folder: Path, share: float) -> float:
    """Counted in the shards of a Mixtral with dense embeddings, of which a token reads a row."""
    sizes = {name: math.prod(header.shape) for name, header in read_headers(folder).items()}
    inside = sum(size for name, size in sizes.items() if ".experts." in name)
    rest = sum(sizes.values()) - inside
    return inside * share + rest - sizes["model.embed_tokens.weight"]


def test_active_parameters_of_mixtral_8x7b(tmp_path):
    config = MixtralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
        architectures=["MixtralForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    stored = lillama.plan(tmp_path, 0.2, preset="paper", strategy="uniform")
    active = lillama.plan(tmp_path, 0.2, preset="paper", strategy="uniform", budget="active")
    # the published 12.9 billion, less the embeddings
    assert active["active_params_before"] == 12_879_925_248 - 32000 * 4096
    assert stored["active_params_before"] == active["active_params_before"]
    lost = 1 - active["active_params_after"] / active["active_params_before"]
    assert 0.2 <= lost < 0.2005
    # only experts are targets: three quarters of theirs are not active
    assert active["reduction"] == pytest.approx(4 * lost * 12.7488 / 46.7028, rel=1e-3)
    assert 0.2 <= stored["reduction"] < 0.2005
    removed = stored["params_before"] - stored["params_after"]
    assert stored["active_params_before"] - stored["active_params_after"] == removed / 4


def test_compress_takes_from_what_every_token_uses(mixtral, text_file, tmp_path, device):
    """An expert's numbers count half, for two of four work at a time; the head's count whole."""
    report = lillama.compress(
        mixtral, tmp_path / "out", budget="active", reduction=0.3, text=text_file, preset="fast",
        tokens=600, seq_len=32, gauge="plain", device=str(device),
    )  # fmt: skip
    before, after = report["active_params_before"], report["active_params_after"]
    assert before == used_by_a_token(mixtral, 0.5)
    assert 0.3 <= 1 - after / before < 0.34
    # the format's sentinel is a number, too
    assert after == pytest.approx(used_by_a_token(tmp_path / "out", 0.5), abs=1)


@pytest.fixture
def untied(make_checkpoint):
    return make_checkpoint("mamba", tie_word_embeddings=False)


def test_embeddings_are_no_target_of_an_active_budget(untied):
    options = {"preset": "fast", "budget": "active"}
    document = lillama.plan(untied, 0.2, **options)
    assert not any("embed" in row["name"] for row in document["matrices"])
    dense = AutoModelForCausalLM.from_pretrained(untied)
    embeddings = dense.get_input_embeddings().weight.numel()
    total = sum(p.numel() for p in dense.parameters())
    assert document["active_params_before"] == total - embeddings
    with pytest.raises(InputError, match="--budget active: a token reads one row"):
        lillama.plan(untied, 0.2, targets=("embeddings", "in_proj"), **options)
    with pytest.raises(InputError, match=r"at most 0\.\d+ of the parameters that a token uses"):
        lillama.plan(untied, 0.99, **options)
    with pytest.raises(InputError, match="--budget must be one of stored, active"):
        lillama.plan(untied, 0.2, preset="fast", budget="bytes")


@pytest.mark.parametrize("gauge", ["plain", "pivot"])
def test_factors_of_the_embeddings_are_work(gauge, untied, text_file, tmp_path):
    report = lillama.compress(
        untied, tmp_path / "out", reduction=0.3, text=text_file, preset="fast", tokens=600,
        seq_len=32, device="cpu", gauge=gauge,
        targets=("in_proj", "out_proj", "embeddings", "lm_head"),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    embedding = model.get_input_embeddings()
    assert hasattr(embedding, "lr_B"), "the budget left the embeddings dense"
    rest = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in embedding.parameters()
    )
    # all but the table, of which a token reads one row
    work = embedding.lr_A if gauge == "plain" else embedding.lr_C
    assert report["active_params_after"] == rest + work.numel()
