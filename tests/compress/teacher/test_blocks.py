"""TeacherBlocks: one block at a time computes what the whole model computes, and nothing stays."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lillama.compress.teacher.blocks import TeacherBlocks, block_output
from lillama.errors import InputError, RunError
from lillama.models.config_json import read_config
from lillama.models.families import family_of

KINDS = ["mixtral", "mamba"]


def open_teacher(path: Path, device: torch.device, dtype=torch.float32) -> TeacherBlocks:
    config = read_config(path)
    return TeacherBlocks(path, config, family_of(config.model_type), device, dtype)


def tokens(masked: bool) -> tuple[Tensor, Tensor | None]:
    ids = torch.randint(1, 300, (3, 17), generator=torch.Generator().manual_seed(0))
    if not masked:
        return ids, None
    mask = torch.arange(17) < torch.tensor([[17], [9], [2]])
    return ids.masked_fill(~mask, 0), mask


@torch.no_grad()
def full_model_states(path: Path, ids: Tensor, mask: Tensor | None, device) -> list[Tensor]:
    """Input of block 0 and output of every block, from hooks on the whole model."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
    states: list[Tensor] = []

    def before(module, args, kwargs):
        states.append(args[0] if args else kwargs["hidden_states"])

    def after(module, args, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    layers: Any = model.get_decoder().layers
    layers[0].register_forward_pre_hook(before, with_kwargs=True)
    for layer in layers:
        layer.register_forward_hook(after)
    model(
        input_ids=ids.to(device),
        attention_mask=None if mask is None else mask.long().to(device),
        use_cache=False,
    )
    return states


@torch.no_grad()
def streamed_states(teacher: TeacherBlocks, ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    with teacher.embeddings():
        hidden, calls = teacher.inputs(ids, mask)
    states = [hidden]
    for index, kwargs in enumerate(calls):
        with teacher.block(index) as block:
            states.append(block_output(block, states[-1], kwargs))
    return states


@pytest.mark.parametrize("masked", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_one_at_a_time_equal_the_full_model(kind, masked, request, device):
    path = request.getfixturevalue(kind)
    ids, mask = tokens(masked)
    wanted = full_model_states(path, ids, mask, device)
    found = streamed_states(open_teacher(path, device), ids, mask)
    assert len(found) == len(wanted) == 3
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0], found[2], atol=0.1), "the blocks do something"


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_padding_does_not_reach_real_tokens(kind, request, device):
    """The mask given to `inputs` really masks: other padding tokens, same real outputs."""
    teacher = open_teacher(request.getfixturevalue(kind), device)
    ids, mask = tokens(masked=True)
    assert mask is not None
    other = torch.where(mask, ids, 5)
    for ours, theirs in zip(
        streamed_states(teacher, ids, mask), streamed_states(teacher, other, mask), strict=True
    ):
        torch.testing.assert_close(ours[mask.to(device)], theirs[mask.to(device)])


def live_blocks(teacher: TeacherBlocks) -> list[int]:
    """Blocks with at least one parameter or buffer in memory."""
    return [
        index
        for index, block in enumerate(teacher.blocks)
        if any(not t.is_meta for t in [*block.parameters(), *block.buffers()])
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_block_is_alive_only_inside_its_context(kind, request, device):
    teacher = open_teacher(request.getfixturevalue(kind), device)
    assert live_blocks(teacher) == []
    for index in (0, 1, 0):
        with teacher.block(index) as block:
            assert live_blocks(teacher) == [index]
            assert not any(p.is_meta or p.requires_grad for p in block.parameters())
            assert not block.training
        assert live_blocks(teacher) == []
    assert all(p.is_meta for p in teacher.model.parameters())
    with teacher.embeddings():
        loaded = [name for name, p in teacher.model.named_parameters() if not p.is_meta]
        assert len(loaded) == 1 and "embed" in loaded[0]
    assert all(p.is_meta for p in teacher.model.parameters())


def test_block_is_released_when_its_context_raises(mixtral, device):
    teacher = open_teacher(mixtral, device)
    with pytest.raises(ZeroDivisionError), teacher.block(0):
        raise ZeroDivisionError
    assert live_blocks(teacher) == []


def test_block_keeps_stacked_experts_as_stored_and_computes_as_if_widened(make_checkpoint, device):
    """They are nearly all of a block: widened all at once they would take twice the memory."""
    path = make_checkpoint("mixtral", torch.bfloat16)
    teacher = open_teacher(path, device, torch.float32)
    ids, _ = tokens(masked=False)
    wanted = full_model_states(path, ids, None, device)
    with teacher.block(0) as block:
        dtypes = {name: p.dtype for name, p in block.named_parameters()}
        norm = block.get_parameter("input_layernorm.weight").cpu()
    narrow = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert narrow == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    stored = load_file(path / "model.safetensors")["model.layers.0.input_layernorm.weight"]
    assert stored.dtype == torch.bfloat16
    assert torch.equal(norm, stored.float())
    for ours, theirs in zip(streamed_states(teacher, ids, None), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_arguments_without_embeddings_are_those_of_inputs(kind, masked, request, device):
    teacher = open_teacher(request.getfixturevalue(kind), device)
    ids, mask = tokens(masked)
    with teacher.embeddings():
        _, wanted = teacher.inputs(ids, mask)
    found = teacher.arguments((3, 17), mask)
    assert [sorted(kwargs) for kwargs in found] == [sorted(kwargs) for kwargs in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_a_sharded_checkpoint_equal_those_of_one_file(kind, request, tmp_path, device):
    path = request.getfixturevalue(kind)
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids, _ = tokens(masked=False)
    wanted = streamed_states(open_teacher(path, device), ids, None)
    found = streamed_states(open_teacher(tmp_path, device), ids, None)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def damaged(path: Path, folder: Path, edit) -> Path:
    """A copy of the checkpoint whose tensors went through `edit(tensors)`."""
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((path / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize(
    ("kind", "name", "shown"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w2.weight", "model.layers.1.mlp"),
        ("mamba", "backbone.layers.1.mixer.A_log", "backbone.layers.1.mixer.A_log"),
    ],
)
def test_block_with_a_bad_weight_is_named(kind, name, shown, bad, request, tmp_path, device):
    def edit(tensors):
        tensors[name].view(-1)[3] = bad

    teacher = open_teacher(damaged(request.getfixturevalue(kind), tmp_path, edit), device)
    with teacher.block(0):
        pass
    with pytest.raises(RunError, match=f"{shown}.* NaN or infinity"), teacher.block(1):
        pass
    with pytest.raises(RunError, match=f"{name} .*NaN or infinity"):
        teacher.read(name)


def test_teacher_with_a_bad_embedding_names_it(mixtral, tmp_path, device):
    def edit(tensors):
        tensors["model.embed_tokens.weight"][7, 7] = float("nan")

    teacher = open_teacher(damaged(mixtral, tmp_path, edit), device)
    with (
        pytest.raises(RunError, match="model.embed_tokens.weight holds NaN or infinity"),
        teacher.embeddings(),
    ):
        pass


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.q_proj.weight", "lm_head.weight", "model.norm.weight"]
)
def test_teacher_with_a_missing_tensor_names_it(name, mixtral, tmp_path, device):
    with pytest.raises(InputError, match=f"lacks tensors the model needs: {name}"):
        open_teacher(damaged(mixtral, tmp_path, lambda tensors: tensors.pop(name)), device)


def test_teacher_without_one_expert_names_what_does_not_fit(mixtral, tmp_path, device):
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    with pytest.raises(InputError, match="layers.1"):
        teacher = open_teacher(damaged(mixtral, tmp_path, lambda t: t.pop(name)), device)
        with teacher.block(1):
            pass


def test_block_with_a_misshaped_tensor_names_it(mixtral, tmp_path, device):
    def edit(tensors):
        tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(32, 31)

    with pytest.raises(InputError, match="model.layers.1.self_attn.q_proj"):
        teacher = open_teacher(damaged(mixtral, tmp_path, edit), device)
        with teacher.block(1):
            pass


def test_teacher_read_gives_the_stored_bytes(mixtral, device):
    teacher = open_teacher(mixtral, device)
    with safe_open(mixtral / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            assert torch.equal(teacher.read(name), file.get_tensor(name))
