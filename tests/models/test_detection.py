"""Model types that no declaration names: what is found in them, and what a run makes of it."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import lillama
from lillama.compress.teacher.blocks import TeacherBlocks, block_output
from lillama.errors import InputError
from lillama.integrations.loading import load_model
from lillama.models.config_json import read_config
from lillama.models.detection import family_for, find_family
from lillama.models.families import FAMILIES
from lillama.models.skeleton import block_list

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {"reduction": 0.2, "tokens": 300, "seq_len": 32, "device": "cpu"}
# Not Mamba: its mixer reads the weights of its layers, which only a declaration can allow.
DECLARED = (
    *("cohere", "deepseek_v2", "deepseek_v3", "gemma", "gemma2", "glm4", "gpt2", "gpt_neox"),
    *("llama", "mistral", "mixtral", "olmoe", "opt", "phi", "phi3", "phimoe", "qwen2"),
    *("qwen2_moe", "qwen3", "qwen3_moe", "starcoder2"),
)
# Never declared: biases beside layers without, and two norms a block; scaled embeddings and
# logits; a norm of the embeddings, and blocks that return tuples
UNDECLARED = ("stablelm", "granite", "bloom")
each_undeclared = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.xdist_group(kind)) for kind in UNDECLARED]
)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def token_ids() -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, 300, (3, 21), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(21) < torch.tensor([[21], [14], [2]])
    return ids.masked_fill(~mask, 0), mask


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids, mask = token_ids()
    return model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[mask]


@pytest.mark.parametrize("kind", DECLARED)
def test_what_is_found_is_what_is_declared(kind, make_model):
    model = make_model(kind)
    declared, found = FAMILIES[kind], find_family(model)

    def of_block(block: nn.Module, family: Any, names: tuple[str, ...]) -> set[str]:
        there = {name for name, _ in block.named_modules()}
        return {family.targets[name] for name in names if name in family.targets} & there

    for block in block_list(model)[1]:
        wanted = of_block(block, declared, tuple(declared.targets))
        assert wanted <= of_block(block, found, tuple(found.targets))
        if kind != "mixtral":  # whose declaration has no attention
            assert wanted == of_block(block, found, tuple(found.targets))
        wanted = of_block(block, declared, declared.default_targets)
        assert wanted == of_block(block, found, found.default_targets)
    assert found.num_experts(model.config) == declared.num_experts(model.config)
    if declared.experts is None or found.experts is None:
        assert declared.experts is found.experts
    else:
        # a config may call their number by two names
        assert dataclasses.replace(found.experts, count=declared.experts.count) == declared.experts
        assert set(found.experts.projections) <= set(found.default_targets)
    for name in ("embedding", "head", "runtime_head"):
        assert getattr(found, name) == getattr(declared, name)
    present = {name for name, _ in model.named_modules()}
    assert set(declared.before_blocks) & present <= set(found.before_blocks)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.xdist_group(k)) for k in ("gpt2", "gpt_neox", "qwen3_moe")],
)
def test_without_its_declaration_a_family_is_compressed_the_same(
    kind, base, compressed, text_file, tmp_path, monkeypatch, caplog
):
    wanted, report = compressed(kind)
    monkeypatch.delitem(FAMILIES, kind)
    found = lillama.compress(base(kind), tmp_path / "out", text=text_file, **OPTIONS)
    assert found["params_after"] == report["params_after"]
    assert f"model_type '{kind}' is not tested; factorised by default: " in caplog.text
    ranks = [read_config(p).quantization_config["ranks"] for p in (wanted, tmp_path / "out")]
    assert ranks[0] == ranks[1]
    before, after = tensors_of(wanted), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    model = load_model(tmp_path / "out", CPU)
    monkeypatch.undo()
    assert torch.equal(logits(model), logits(load_model(wanted, CPU)))


@each_undeclared
@torch.no_grad()
def test_one_block_at_a_time_equals_the_model(kind, base):
    config = read_config(base(kind))
    teacher = TeacherBlocks(base(kind), config, family_for(config), CPU, torch.float32)
    ids, mask = token_ids()
    with teacher.embeddings():
        hidden, calls = teacher.inputs(ids, mask)
    for index, kwargs in enumerate(calls):
        with teacher.block(index) as block:
            hidden = block_output(block, hidden, kwargs)
    with teacher.head():
        found = teacher.logits(hidden, mask)
    wanted = logits(load_model(base(kind), CPU))
    torch.testing.assert_close(found[mask], wanted, rtol=1e-4, atol=1e-4)


@each_undeclared
def test_undeclared_is_compressed_loaded_and_saved_again(kind, base, compressed, tmp_path):
    out, report = compressed(kind)
    assert 0.2 - 1e-9 <= report["reduction"] < 0.26
    planned = lillama.plan(base(kind), 0.2, preset="paper")
    assert planned["params_before"] == report["params_before"]
    assert planned["bytes_before"] == report["bytes_before"]
    before, after = tensors_of(base(kind)), tensors_of(out)
    ranks = read_config(out).quantization_config["ranks"]
    assert {name for name in before if name.removesuffix(".weight") not in ranks} <= after.keys()
    assert [name for name in ranks if f"{name}.weight" not in before] == []
    model: Any = load_model(out, CPU)
    model.save_pretrained(tmp_path / "again")
    again = tensors_of(tmp_path / "again")
    assert again.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in again.items())
    assert torch.equal(logits(load_model(tmp_path / "again", CPU)), logits(model))
    alone: Any = AutoModel.from_pretrained(out, dtype=torch.float32).eval()
    ids = token_ids()[0]
    with torch.no_grad():
        wanted = model.base_model(input_ids=ids).last_hidden_state
        assert torch.equal(alone(input_ids=ids).last_hidden_state, wanted)


@each_undeclared
def test_undeclared_is_exported_judged_and_generated_from(
    kind, base, compressed, short_text, tokenizer, tmp_path
):
    out, report = compressed(kind)
    lillama.export(out, tmp_path / "dense", format="dense")
    names = {name: value.shape for name, value in tensors_of(base(kind)).items()}
    assert {n: value.shape for n, value in tensors_of(tmp_path / "dense").items()} == names
    dense: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(logits(dense), logits(load_model(out, CPU)), rtol=1e-4, atol=1e-4)
    quality = lillama.eval(out, short_text, against=base(kind), seq_len=32, device="cpu")
    assert quality["kl"] > 0 and 0.5 < quality["retained"] < 1.5
    assert quality["params"] == report["params_after"]
    prompt = tokenizer("the cat sat on", return_tensors="pt")["input_ids"]
    ids = dense.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
    found = lillama.generate(out, "the cat sat on", max_new_tokens=8, device="cpu")
    assert found == tokenizer.decode(ids, skip_special_tokens=True)


def test_gradients_at_scaled_embeddings_are_scaled(base):
    """Granite multiplies what its embeddings put out by 3."""
    config = read_config(base("granite"))
    teacher = TeacherBlocks(base("granite"), config, family_for(config), CPU, torch.float32)
    embeddings, gradient = torch.randn(2, 5, 32, requires_grad=True), torch.randn(2, 5, 32)
    teacher.embedded(embeddings, None).backward(gradient)
    assert torch.equal(embeddings.grad, 3 * gradient)


def test_blocks_that_are_told_of_the_tokens_are_refused(base, monkeypatch):
    config = read_config(base("stablelm"))
    teacher = TeacherBlocks(base("stablelm"), config, family_for(config), CPU, torch.float32)
    rotary: Any = type(teacher.model.get_decoder().rotary_emb)
    forward = rotary.forward

    def of_tokens(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = forward(self, x, position_ids)
        return cos + x.sum(), sin

    monkeypatch.setattr(rotary, "forward", of_tokens)
    with pytest.raises(InputError, match="the argument position_embeddings of its blocks depends"):
        with teacher.embeddings():
            teacher.inputs(*token_ids())


def test_layers_that_a_module_reads_itself_stay_dense(make_model):
    """Bloom multiplies by slices of two of its weights when it imitates its training."""
    found = find_family(make_model("bloom"))
    assert set(found.targets) == {"query_key_value", "dense_h_to_4h"}
    assert "self_attention.dense stays dense: BloomAttention reads its weight itself" in (
        found.left_out
    )
    assert "transformer.word_embeddings_layernorm" in found.before_blocks


def test_experts_of_another_form_stay_dense(make_model, monkeypatch):
    model = make_model("qwen3_moe")
    experts = model.model.layers[1].mlp.experts
    for change, reason in (
        (lambda: monkeypatch.setattr(experts, "has_bias", True), "a way of its own"),
        (lambda: monkeypatch.setattr(model.config, "hidden_act", "gelu"), "another activation"),
    ):
        change()
        found = find_family(model)
        assert found.experts is None and found.targets
        assert len(found.left_out) == 1 and reason in found.left_out[0]
        monkeypatch.undo()


def test_a_block_with_nothing_to_factorise_is_refused(make_model):
    class Own(nn.Linear):
        pass

    model = make_model("llama")
    for _, module in block_list(model)[1].named_modules():
        if isinstance(module, nn.Linear):
            module.__class__ = Own
    with pytest.raises(InputError, match=r"'llama' cannot be compressed: .* belong to Own$"):
        find_family(model)


def test_blocks_that_share_weights_are_refused(make_model):
    model = make_model("llama")
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(InputError, match="its blocks share weights"):
        find_family(model)


@pytest.mark.parametrize("alone", [False, True], ids=["whole", "decoder alone"])
@pytest.mark.parametrize("kind", ["bart", "whisper"])
def test_a_model_with_an_encoder_is_refused(kind, alone, tmp_path):
    values = {"model_type": kind, "is_encoder_decoder": not alone}
    (tmp_path / "config.json").write_text(json.dumps(values))
    wanted = f"unknown architecture: model_type '{kind}' is not supported; supported are cohere, "
    for refuses in (
        lambda: lillama.plan(tmp_path, 0.2),
        lambda: lillama.compress(tmp_path, tmp_path / "out", reduction=0.2, text="text.txt"),
        lambda: lillama.generate(tmp_path, "the cat"),
        lambda: family_for(AutoConfig.for_model(**values)),  # as transformers' loading asks
    ):
        with pytest.raises(InputError, match=f"{wanted}.*; models with an encoder cannot be added"):
            refuses()


def test_declared_families_say_nothing(base, caplog):
    with caplog.at_level(logging.WARNING):
        lillama.plan(base("gpt2"), 0.2)
    assert "not tested" not in caplog.text
