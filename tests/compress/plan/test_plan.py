"""The plan: the published Mixtral configuration, honest counts, and headers only."""

import importlib
import json
import math
import re
import sys
import time
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig

import lillama
from lillama.checkpoint.format import read_headers
from lillama.errors import InputError

KEYS = {
    "params_before",
    "params_after",
    "bytes_before",
    "bytes_after",
    "max_reduction",
    "matrices",
    "strategy",
    "reduction",
    "dense_targets",
}
MATRIX_KEYS = {
    "name",
    "shape",
    "rank",
    "break_even_rank",
    "params_before",
    "params_after",
    "bytes_before",
    "bytes_after",
    "flops_per_token_before",
    "flops_per_token_after",
}


@pytest.fixture(scope="module")
def mixtral_8x7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds only the config.json of Mixtral-8x7B."""
    path = tmp_path_factory.mktemp("mixtral-8x7b")
    config = MixtralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def published(mixtral_8x7b: Path) -> dict:
    started = time.monotonic()
    document = lillama.plan(mixtral_8x7b, 0.2, preset="paper")
    assert time.monotonic() - started < 20, "plan must be instant"
    return document


def layer(name: str) -> int:
    return int(name.split(".")[2])


def test_plan_reproduces_the_published_mixtral_ranks(published):
    ranks = {row["name"]: row["rank"] for row in published["matrices"]}
    assert published["strategy"] == "bottom"
    assert len(ranks) == 240
    assert {layer(name) for name in ranks} == set(range(10))
    assert {rank for name, rank in ranks.items() if layer(name) < 9} == {1024}
    last = {name: rank for name, rank in ranks.items() if layer(name) == 9}
    assert sorted(last.values()) == [1280, *[1536] * 23]
    assert next(name for name, rank in last.items() if rank == 1280).endswith(".w1")
    assert published["dense_targets"] == 22 * 24


def test_plan_reproduces_the_published_mixtral_sizes(published):
    assert published["params_before"] == 46_702_792_704
    assert published["params_after"] == 37_361_553_408
    assert published["reduction"] == pytest.approx(0.2, abs=1e-4)
    # no weights in the folder: counted in the config's bf16
    assert published["bytes_before"] == 2 * 46_702_792_704
    assert published["bytes_after"] == 2 * 37_361_553_408


def test_plan_row_holds_shape_rank_and_costs_of_the_matrix(published):
    row = published["matrices"][1]
    assert row["name"] == "model.layers.0.block_sparse_moe.experts.0.w2"
    assert row["shape"] == [4096, 14336]
    # 4096 * 14336 / (4096 + 14336) = 3185.8
    assert row["break_even_rank"] == 3184
    assert row["params_before"] == 4096 * 14336
    assert row["params_after"] == 1024 * (4096 + 14336)
    assert row["bytes_after"] == 2 * row["params_after"]
    # 2 of 8 experts see a token
    assert row["flops_per_token_before"] == 2 * row["params_before"] / 4
    assert row["flops_per_token_after"] == 2 * row["params_after"] / 4


@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_plan_is_json_with_the_promised_keys(kind, request):
    document = json.loads(json.dumps(lillama.plan(request.getfixturevalue(kind), 0.2)))
    assert document.keys() >= KEYS
    assert all(row.keys() == MATRIX_KEYS for row in document["matrices"])


@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_plan_counts_the_parameters_and_bytes_that_are_there(kind, dtype, make_checkpoint):
    path = make_checkpoint(kind, dtype)
    document = lillama.plan(path, 0.2)
    model = AutoModelForCausalLM.from_pretrained(path)
    # tied embeddings (Mamba) are one parameter
    assert document["params_before"] == sum(p.numel() for p in model.parameters())
    tensors = load_file(path / "model.safetensors")
    assert document["bytes_before"] == sum(tensor.nbytes for tensor in tensors.values())
    removed = document["params_before"] - document["params_after"]
    assert removed == sum(r["params_before"] - r["params_after"] for r in document["matrices"])
    # and of every output its mark, in the pivot gauge; those of the embeddings are its columns
    marks = sum(row["shape"]["embed" in row["name"]] for row in document["matrices"])
    assert document["bytes_before"] - document["bytes_after"] == removed * dtype.itemsize - marks
    assert document["reduction"] == pytest.approx(removed / document["params_before"])


def test_plan_counts_tied_embeddings_once(make_checkpoint):
    tied = lillama.plan(make_checkpoint("mamba", tie_word_embeddings=True), 0.1)
    apart = lillama.plan(make_checkpoint("mamba", tie_word_embeddings=False), 0.1)
    assert apart["params_before"] - tied["params_before"] == 300 * 32


@pytest.mark.parametrize(
    ("preset", "options", "strategy", "x_proj"),
    [
        ("default", {}, "global", True),
        # x_proj only where the loss's gradients say what its ranks are worth
        ("default", {"strategy": "uniform"}, "uniform", False),
        ("whitened", {"strategy": "global"}, "global", False),
        ("paper", {}, "uniform", False),
    ],
)
def test_plan_of_mamba_is_over_its_projections(preset, options, strategy, x_proj, make_checkpoint):
    path = make_checkpoint("mamba", tie_word_embeddings=True)
    document = lillama.plan(path, 0.2, preset=preset, **options)
    names = {row["name"] for row in document["matrices"]}
    assert document["strategy"] == strategy
    assert document["ranks_are_final"] == (strategy == "uniform")
    wanted = ("in_proj", "out_proj", "x_proj") if x_proj else ("in_proj", "out_proj")
    assert names == {f"backbone.layers.{i}.mixer.{m}" for i in (0, 1) for m in wanted}
    shapes = {row["name"].rsplit(".")[-1]: row["shape"] for row in document["matrices"]}
    assert (shapes["in_proj"], shapes["out_proj"]) == ([128, 32], [32, 64])


def test_plan_targets_can_add_x_proj(make_checkpoint):
    # wide enough for x_proj [2 * 16 + 16, 128] to have a break-even rank
    path = make_checkpoint("mamba", hidden_size=64, state_size=16, time_step_rank=16)
    document = lillama.plan(path, 0.1, targets=("x_proj", "out_proj"))
    assert {row["name"].rsplit(".")[-1] for row in document["matrices"]} == {"x_proj", "out_proj"}
    assert document["max_reduction"] < lillama.plan(path, 0.1)["max_reduction"]


def test_plan_targets_can_leave_out_projections_of_experts(mixtral):
    document = lillama.plan(mixtral, 0.1, targets=("w2",))
    assert {row["name"].rsplit(".")[-1] for row in document["matrices"]} == {"w2"}


def test_plan_max_reduction_is_reachable_and_more_is_not(mixtral):
    for gauge in ("plain", "pivot"):
        maximum = lillama.plan(mixtral, 0.1, gauge=gauge)["max_reduction"]
        found = lillama.plan(mixtral, maximum, gauge=gauge)
        saved = 1 - found["bytes_after"] / found["bytes_before"]
        if gauge == "plain":
            assert found["reduction"] == pytest.approx(maximum)
        # the order of the outputs is made up for by fewer parameters
        assert found["reduction"] >= saved - 1e-9 >= maximum - 0.02
        reachable = re.escape(str(math.floor(maximum * 1e4) / 1e4))
        with pytest.raises(InputError, match=rf"at most {reachable} of the model's parameters"):
            lillama.plan(mixtral, maximum + 0.001, gauge=gauge)


def test_plan_bottom_counts_the_targets_it_leaves_dense(mixtral):
    document = lillama.plan(mixtral, 0.03, strategy="bottom", gauge="plain")
    assert len(document["matrices"]) == 5
    assert document["dense_targets"] == 24 - 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"targets": ("w1", "q_proj")},
            "--targets must be some of w1, w2, w3, embed_tokens, lm_head for mixtral, got q_proj",
        ),
        (
            {"targets": ()},
            "--targets must be some of w1, w2, w3, embed_tokens, lm_head for mixtral, got none",
        ),
        ({"strategy": "middle"}, "--strategy must be one of"),
        ({"preset": "bset"}, "--preset must be one of"),
    ],
)
def test_plan_unknown_names_are_refused(options, message, mixtral):
    with pytest.raises(InputError) as caught:
        lillama.plan(mixtral, 0.2, **options)
    assert message in str(caught.value)


def test_plan_never_factorises_dt_proj_or_conv(mamba):
    with pytest.raises(
        InputError,
        match="in_proj, out_proj, x_proj, embeddings, lm_head for mamba, got conv1d, dt_proj",
    ):
        lillama.plan(mamba, 0.1, targets=("dt_proj", "conv1d"))


def test_plan_reads_headers_only(mixtral, tmp_path, monkeypatch):
    """Weights that cannot be opened do not matter: only the headers are."""

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("plan opened the weights")

    monkeypatch.setattr(safetensors, "safe_open", forbidden)
    monkeypatch.setattr(
        importlib.import_module("lillama.compress.teacher.blocks"), "safe_open", forbidden
    )
    monkeypatch.setattr(sys.modules["transformers.modeling_utils"], "safe_open", forbidden)
    assert lillama.plan(mixtral, 0.2)["bytes_before"] == sum(
        header.num_bytes for header in read_headers(mixtral).values()
    )


def test_plan_compressed_model_is_refused(mixtral, tmp_path):
    config = json.loads((mixtral / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "lillama",
        "format_version": 3,
        "sentinel": "model.layers.0.mlp.experts.down_proj",
        "ranks": {"model.layers.0.block_sparse_moe.experts.0.w1": 8},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="is itself compressed by lillama; give the dense base"):
        lillama.plan(tmp_path, 0.2)


def test_plan_model_quantized_by_something_else_is_refused(mixtral, tmp_path):
    config = json.loads((mixtral / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="quantized with 'gptq'.*the original checkpoint in bf16"):
        lillama.plan(tmp_path, 0.2)


def test_plan_unknown_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such"}')
    with pytest.raises(
        InputError, match="'no-such' is not supported; supported are cohere, .*mixtral"
    ):
        lillama.plan(tmp_path, 0.2)
