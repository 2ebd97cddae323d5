"""Every model family: compressed with training, loaded, generated from, saved again."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

import lillama
from lillama.checkpoint.shapes import count_params
from lillama.compress.plan.plan import make_plan
from lillama.compress.teacher.blocks import TeacherBlocks, block_output
from lillama.config import PlanConfig
from lillama.errors import InputError
from lillama.integrations.loading import load_model
from lillama.models.config_json import read_config
from lillama.models.dense_linear import is_linear, is_transposed
from lillama.models.families import FAMILIES, family_of
from lillama.models.skeleton import block_list, skeleton

KINDS = sorted(FAMILIES)
TIED = {"cohere", "gemma", "gemma2", "gpt2", "mamba", "mamba2", "opt", "starcoder2"}
OPTIONS: dict[str, Any] = {"reduction": 0.2, "tokens": 300, "seq_len": 32}
PROMPT = "the cat sat on"
# Between them every kind of block: dense with and without biases, transposed and fused weights,
# experts of both layouts, a scan, and a hybrid
WHOLE = {"gpt2", "gpt_neox", "jamba", "llama", "mamba", "mixtral", "qwen3_moe"}


def case(kind: str, *marks: Any) -> Any:
    """A case of its family's group, whose tests one worker runs: what they share is made once."""
    return pytest.param(kind, marks=[pytest.mark.xdist_group(kind), *marks])


each_family = pytest.mark.parametrize("kind", [case(kind) for kind in KINDS])
# with what make test leaves to make test-all
each_whole_family = pytest.mark.parametrize(
    "kind", [case(kind, *([] if kind in WHOLE else [pytest.mark.full])) for kind in KINDS]
)
# ranks by the loss, in the pivot gauge; every target with factors, plain
each_preset = pytest.mark.parametrize("preset", ["default", "whitened"])


def tokens(masked: bool) -> tuple[Tensor, Tensor | None]:
    ids = torch.randint(1, 300, (3, 21), generator=torch.Generator().manual_seed(0))
    if not masked:
        return ids, None
    mask = torch.arange(21) < torch.tensor([[21], [14], [2]])
    return ids.masked_fill(~mask, 0), mask


@torch.no_grad()
def logits(model: Any, masked: bool = False) -> Tensor:
    ids, mask = tokens(masked)
    attention_mask = None if mask is None else mask.long().to(model.device)
    return model(
        input_ids=ids.to(model.device), attention_mask=attention_mask, use_cache=False
    ).logits


def tensors_of(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    del tensors[json.loads((path / "config.json").read_text())["quantization_config"]["sentinel"]]
    return tensors


def multiplied_out(path: Path) -> dict[str, Tensor]:
    """The tensors of a compressed checkpoint with a matrix in place of every pair of factors."""
    found = tensors_of(path)
    model = skeleton(read_config(path))
    transposed = {f"{n}.weight" for n, module in model.named_modules() if is_transposed(module)}
    dense = {}
    for name, tensor in found.items():
        matrix, _, key = name.rpartition(".")
        if key == "lr_W":
            dense[f"{matrix}.weight"] = tensor
        elif key == "lr_A" and f"{matrix}.lr_B" in found:
            dense[f"{matrix}.weight"] = found[f"{matrix}.lr_B"] @ tensor
        elif key == "lr_A":
            is_pivot = found[f"{matrix}.lr_pivots"].bool()
            B = torch.empty(len(is_pivot), len(tensor))
            B[is_pivot], B[~is_pivot] = torch.eye(len(tensor)), found[f"{matrix}.lr_C"]
            dense[f"{matrix}.weight"] = B @ tensor
        elif key == "lr_B" and f"{matrix}.lr_C" in found:
            # embeddings in the pivot gauge, whose outputs are columns
            is_pivot = found[f"{matrix}.lr_pivots"].bool()
            table = torch.empty(len(tensor), len(is_pivot))
            table[:, is_pivot], table[:, ~is_pivot] = tensor, tensor @ found[f"{matrix}.lr_C"].mT
            dense[f"{matrix}.weight"] = table
        elif not key.startswith("lr_"):
            dense[name] = tensor
    return {n: t.T.contiguous() if f"{n.removesuffix('.weight')}.lr_A" in found and n in transposed
            else t for n, t in dense.items()}  # fmt: skip


@pytest.mark.parametrize("masked", [False, True], ids=["packed", "padded"])
@each_family
@torch.no_grad()
def test_one_block_at_a_time_equals_the_model(kind, masked, base, device):
    """Embeddings, each block with its own mask and positions, and what follows the last."""
    path = base(kind)
    config = read_config(path)
    teacher = TeacherBlocks(path, config, family_of(kind), device, torch.float32)
    ids, mask = tokens(masked)
    found = torch.zeros(())
    for _ in range(2):  # what was released comes back
        with teacher.embeddings():
            hidden, calls = teacher.inputs(ids, mask)
        assert len(calls) == len(teacher.arguments((3, 21), mask)) == 2
        for index, kwargs in enumerate(teacher.arguments((3, 21), mask)):
            with teacher.block(index) as block:
                hidden = block_output(block, hidden, kwargs)
        with teacher.head():
            found = teacher.logits(hidden, mask)
    wanted = logits(load_model(path, device), masked)
    kept = slice(None) if mask is None else mask.to(device)
    torch.testing.assert_close(found[kept], wanted[kept], rtol=1e-4, atol=1e-4)


@each_preset
@each_whole_family
def test_logits_are_those_of_the_product(kind, preset, base, compressed, tmp_path, device):
    """Everything but the factors, biases among it, comes from the file as it is."""
    out, _ = compressed(kind, preset)
    shutil.copy(base(kind) / "config.json", tmp_path)
    save_file(multiplied_out(out), tmp_path / "model.safetensors", metadata={"format": "pt"})
    dense = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    model, info = dense
    assert not info["missing_keys"] and not info["unexpected_keys"]
    found = logits(load_model(out, device))
    torch.testing.assert_close(found, logits(model.to(device)), rtol=1e-4, atol=1e-4)
    before = logits(load_model(base(kind), device))
    assert (found - before).abs().max() > 1e-2, "the compression changed something"


@each_whole_family
def test_what_is_not_factorised_keeps_its_name(kind, base, compressed):
    """Biases, norms and routers; tied embeddings stay one matrix."""
    out, _ = compressed(kind)
    before, after = load_file(base(kind) / "model.safetensors"), multiplied_out(out)
    assert {name: t.shape for name, t in after.items()} == {n: t.shape for n, t in before.items()}
    model = load_model(out, torch.device("cpu"))
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    same = getattr(embeddings, "weight", None) is getattr(head, "weight", 0)
    assert same == (kind in TIED) == bool(model.config.tie_word_embeddings)


@each_whole_family
def test_whitened_factorises_and_trains_every_default_target(kind, compressed):
    out, report = compressed(kind, "whitened")
    improved = [b["held_out_loss_after"] < b["held_out_loss_before"] for b in report["blocks"]]
    assert len(improved) == 2
    assert any(improved) if FAMILIES[kind].experts is not None else all(improved)
    family = FAMILIES[kind]
    found = {name.rpartition(".")[2] for name in read_config(out).quantization_config["ranks"]}
    wanted = {family.targets.get(n, n).rpartition(".")[2] for n in family.default_targets}
    assert found == wanted


@each_preset
@each_whole_family
def test_saved_again_it_is_the_same(kind, preset, compressed, tmp_path, device):
    out, _ = compressed(kind, preset)
    model = load_model(out, device)
    model.save_pretrained(tmp_path)
    before, after = tensors_of(out), tensors_of(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(load_model(tmp_path, device)), logits(model))


@each_whole_family
@torch.no_grad()
def test_auto_model_has_the_same_states(kind, compressed, device):
    out, _ = compressed(kind)
    whole: Any = load_model(out, device)
    alone = AutoModel.from_pretrained(out, dtype=torch.float32).to(device).eval()
    ids = tokens(masked=False)[0].to(device)
    wanted = whole.base_model(input_ids=ids).last_hidden_state
    assert torch.equal(alone(input_ids=ids).last_hidden_state, wanted)


@each_whole_family
@torch.no_grad()
def test_generate_is_greedy_without_a_cache(kind, compressed, tokenizer, device):
    out, _ = compressed(kind)
    model: Any = load_model(out, device)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"].to(device)
    length = ids.shape[1]
    for _ in range(12):
        following = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], 1)
        if int(following) == tokenizer.eos_token_id:
            break
    wanted = tokenizer.decode(ids[0, length:], skip_special_tokens=True)
    assert lillama.generate(out, PROMPT, max_new_tokens=12, device=str(device)) == wanted


@each_whole_family
def test_report_counts_what_is_there(kind, base, compressed):
    out, report = compressed(kind)
    config = read_config(out)
    values: Any = config.quantization_config
    assert report["params_before"] == count_params(read_config(base(kind)))
    assert report["params_after"] == count_params(config, values["ranks"], values["gauge"])
    assert 0.2 - 1e-9 <= report["reduction"] < 0.26
    assert report["bytes_before"] == lillama.plan(base(kind), 0.2)["bytes_before"]
    stored = sum(t.nbytes for t in tensors_of(out).values())
    assert report["bytes_after"] == stored
    marks = sum(t.nbytes for n, t in tensors_of(out).items() if n.endswith("lr_pivots"))
    buffers = {name for name, _ in skeleton(config).named_buffers()}
    kept = sum(t.nbytes for n, t in tensors_of(out).items() if n in buffers)
    assert stored - marks - kept == 4 * report["params_after"]


@each_family
def test_plan_is_what_the_paper_preset_does(kind, base, text_file, tmp_path, device):
    options = {**OPTIONS, "preset": "paper", "train": False}
    planned = lillama.plan(base(kind), **options)
    report = lillama.compress(
        base(kind), tmp_path / "out", text=text_file, device=str(device), **options
    )
    ranks = read_config(tmp_path / "out").quantization_config["ranks"]
    assert planned["ranks_are_final"]
    assert {row["name"]: row["rank"] for row in planned["matrices"]} == ranks
    for key in ("params_before", "params_after", "reduction", "bytes_before", "bytes_after"):
        assert planned[key] == report[key], key
    assert planned["strategy"] == FAMILIES[kind].paper_strategy
    # without training everything that is not a factor, biases too, is the teacher's
    before = load_file(base(kind) / "model.safetensors")
    kept = {
        n: v
        for n, v in multiplied_out(tmp_path / "out").items()
        if n.removesuffix(".weight") not in ranks
    }
    assert kept.keys() == {name for name in before if name.removesuffix(".weight") not in ranks}
    assert all(torch.equal(value, before[name]) for name, value in kept.items())


@each_whole_family
def test_eval_and_fast(kind, base, text_file, short_text, tmp_path, device):
    """Preset fast; where nothing is removed but little, nothing is lost but little."""
    out = tmp_path / "out"
    options = {**OPTIONS, "reduction": 0.02, "preset": "fast", "device": str(device)}
    report = lillama.compress(base(kind), out, text=text_file, **options)
    # of so small a head the places of the outputs take much, and parameters go for them
    assert 0.02 - 1e-9 <= report["reduction"] < 0.07
    quality = lillama.eval(out, short_text, against=base(kind), seq_len=32, device=str(device))
    assert 0.9 < quality["retained"] < 1.1


@pytest.mark.parametrize("kind", [case(kind) for kind in ("gpt2", "gpt_neox", "qwen3_moe")])
def test_export_dense_is_an_ordinary_checkpoint(kind, base, compressed, tmp_path, device):
    """Transposed weights, a head of another name, and blocks with and without experts."""
    out, _ = compressed(kind)
    lillama.export(out, tmp_path / "dense", format="dense")
    names = set(load_file(base(kind) / "model.safetensors"))
    shards = (tmp_path / "dense").glob("*.safetensors")
    assert {name for file in shards for name in load_file(file)} == names
    found = logits(load_model(tmp_path / "dense", device))
    torch.testing.assert_close(found, logits(load_model(out, device)), rtol=1e-4, atol=1e-4)


def test_one_name_means_experts_and_the_dense_blocks_mlp(base):
    """qwen3_moe's first block is dense here; attention is a target when asked for."""

    def names(*targets: str) -> set[str]:
        options = PlanConfig(model=base("qwen3_moe"), reduction=0.02, targets=targets)
        return {matrix.name for matrix in make_plan(options).matrices}

    experts = {f"model.layers.1.mlp.experts.{expert}.up_proj" for expert in range(4)}
    assert names("up_proj") == {"model.layers.0.mlp.up_proj", *experts}
    attention = {f"model.layers.{block}.self_attn.q_proj" for block in range(2)}
    assert names("q_proj", "up_proj") == names("up_proj") | attention


def test_targets_that_no_block_has_are_refused(make_checkpoint):
    path = make_checkpoint("qwen2_moe", mlp_only_layers=[0, 1])
    options = PlanConfig(model=path, reduction=0.02, targets=("up_proj", "shared_up_proj"))
    with pytest.raises(InputError, match="no block of this model has shared_up_proj; leave it out"):
        make_plan(options)


def test_tensors_that_the_model_does_not_use_are_left_out(
    base, text_file, tmp_path, device, caplog
):
    """As old checkpoints of GPT-NeoX have them."""
    old = shutil.copytree(base("gpt_neox"), tmp_path / "old")
    tensors = load_file(old / "model.safetensors")
    extra = {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 512, 512, dtype=torch.bool)}
    save_file({**tensors, **extra}, old / "model.safetensors", metadata={"format": "pt"})
    options = {**OPTIONS, "preset": "fast", "device": str(device)}
    report = lillama.compress(old, tmp_path / "out", text=text_file, **options)
    assert "holds 1 tensors that the model does not use" in caplog.text
    assert report["bytes_before"] == sum(tensor.nbytes for tensor in tensors.values())
    assert extra.keys().isdisjoint(tensors_of(tmp_path / "out"))


@each_family
def test_targets_are_linear_layers_of_the_blocks(kind, base):
    """The declaration fits the model: every linear layer in a block is a target, or is a router or
    what the family leaves out on purpose; no target is anything else."""
    family = FAMILIES[kind]
    model = load_model(base(kind), torch.device("cpu"))
    found = set()
    for block in block_list(model)[1]:
        found |= {name for name, module in block.named_modules() if is_linear(module)}
    left_out = {
        "mamba": {"mixer.dt_proj"},
        "falcon_mamba": {"mixer.dt_proj"},
        # transformers 5.17 has the router as a linear layer
        "jamba": {"mamba.dt_proj", "feed_forward.router"},
        "mixtral": {f"self_attn.{name}_proj" for name in "qkvo"},
        "qwen2_moe": {"mlp.shared_expert_gate"},
    }
    # of the two ways to queries these models have one
    absent = {
        "deepseek_v2": {"self_attn.q_a_proj", "self_attn.q_b_proj"},
        "deepseek_v3": {"self_attn.q_proj"},
    }
    wanted = set(family.targets.values()) - absent.get(kind, set())
    assert wanted == found - left_out.get(kind, set())
    assert set(family.default_targets) <= set(family.target_names)


def test_gauge_is_the_presets_for_linear_layers_and_experts(base):
    def gauge(kind: str, **options: Any) -> str:
        return make_plan(PlanConfig(model=base(kind), reduction=0.1, **options)).gauge

    assert gauge("llama") == gauge("mixtral") == gauge("qwen2_moe") == "pivot"
    assert gauge("llama", preset="paper") == "plain"


def test_docs_list_every_family():
    """docs/families.md: one row a family, with its targets."""
    lines = (Path(__file__).parents[2] / "docs" / "families.md").read_text("utf-8").splitlines()
    rows = [re.match(r"\| `(\w+)` \|([^|]*)\|([^|]*)\|", line) for line in lines]
    found = {
        row[1]: tuple(set(re.findall(r"`(\w+)`", row[place])) for place in (2, 3))
        for row in rows
        if row is not None
    }
    wanted = {}
    for kind, family in FAMILIES.items():
        default = set(family.default_targets)
        wanted[kind] = default, set(family.target_names) - default - set(family.vocabulary)
    assert found == wanted


def test_unknown_family_names_the_known_ones():
    with pytest.raises(InputError) as caught:
        family_of("no-such")
    assert ", ".join(KINDS) in str(caught.value) and "families.py" in str(caught.value)


def test_scaled_embeddings_are_no_target(make_checkpoint):
    path = make_checkpoint("gemma", tie_word_embeddings=False)
    options: dict[str, Any] = {"model": path, "reduction": 0.1}
    names = [m.name for m in make_plan(PlanConfig(**options)).matrices]
    assert names and not any("embed" in name or "lm_head" in name for name in names)
    with pytest.raises(InputError, match="lm_head: the embeddings of this model are scaled"):
        make_plan(PlanConfig(**options, targets=("lm_head",)))
