"""Gram matrices against an explicit X^T X of what really enters each target."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lillama.checkpoint import read_config
from lillama.compress.blocks import TeacherBlocks, block_output
from lillama.compress.calibrate import GramCollector
from lillama.families import family_of

IDS = torch.randint(1, 300, (4, 11), generator=torch.Generator().manual_seed(3))
MASK = torch.arange(11) < torch.tensor([[11], [6], [2], [9]])
MASKS = [pytest.param(None, id="packed"), pytest.param(MASK, id="padded")]


def second_moment(rows: Tensor) -> Tensor:
    return rows.double().mT @ rows.double()


def rows_of(hidden: Tensor, mask: Tensor | None) -> Tensor:
    return hidden.flatten(0, 1) if mask is None else hidden[mask.to(hidden.device)]


def open_teacher(path, device) -> TeacherBlocks:
    config = read_config(path)
    return TeacherBlocks(path, config, family_of(config.model_type), device, torch.float32)


@torch.no_grad()
def collect(teacher, block, grams: GramCollector, mask: Tensor | None) -> dict[str, Tensor]:
    """Run the block over IDS in two batches; returns the inputs of every submodule [4, 11, K]."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0]) if args else None
        )
        for name, module in block.named_modules()
        if name
    ]
    with grams.attached():
        for rows in torch.arange(4).split(2):
            part = None if mask is None else mask[rows]
            hidden, calls = teacher.inputs(IDS[rows], part)
            grams.mask = part
            block_output(block, hidden, calls[0])
    for handle in handles:
        handle.remove()
    return {
        name: torch.cat([x.reshape(-1, 11, x.shape[-1]) for x in xs if x.ndim > 1])
        for name, xs in seen.items()
        if all(x.numel() % 11 == 0 for x in xs)
    }


@pytest.mark.parametrize("mask", MASKS)
def test_gram_collector_linears_equal_the_explicit_product(mask, mamba, device):
    teacher = open_teacher(mamba, device)
    targets = ["mixer.in_proj", "mixer.x_proj", "mixer.out_proj"]
    with teacher.block(0) as block:
        grams = GramCollector(block, teacher.family, targets, with_experts=False)
        inputs = collect(teacher, block, grams, mask)
    assert set(grams.grams) == set(targets)
    for name in targets:
        wanted = rows_of(inputs[name], mask)
        assert grams.grams[name].dtype == torch.float64
        torch.testing.assert_close(grams.grams[name], second_moment(wanted), rtol=1e-9, atol=1e-9)
        assert grams.counts[name] == len(wanted) == (44 if mask is None else 28)


@pytest.mark.parametrize("mask", MASKS)
def test_gram_collector_experts_equal_the_explicit_product(mask, mixtral, device):
    teacher = open_teacher(mixtral, device)
    with teacher.block(0) as block:
        grams = GramCollector(block, teacher.family, [], with_experts=True)
        x = rows_of(collect(teacher, block, grams, mask)["mlp"], mask)
        router = block.get_parameter("mlp.gate.weight")
        gate_up = block.get_parameter("mlp.experts.gate_up_proj").clone()
        chosen = (x @ router.mT).topk(2).indices
    path = "mlp.experts"
    total = 0
    for expert in range(4):
        rows = x[(chosen == expert).any(-1)]
        gate, up = (rows @ gate_up[expert].mT).chunk(2, -1)
        wanted = {"gate": rows, "down": F.silu(gate) * up}
        for kind, inputs in wanted.items():
            key = (path, expert, kind)
            torch.testing.assert_close(
                grams.grams[key], second_moment(inputs), rtol=1e-4, atol=1e-6
            )
            assert grams.counts[key] == len(inputs)
        total += len(rows)
    # every token goes to 2 experts, padding to none
    assert total == 2 * (44 if mask is None else 28)
    assert set(grams.grams) == {(path, e, k) for e in range(4) for k in ("gate", "down")}


def test_gram_collector_shared_is_the_sum_over_experts(mixtral, device):
    teacher = open_teacher(mixtral, device)
    with teacher.block(0) as block:
        grams = GramCollector(block, teacher.family, [], with_experts=True)
        x = rows_of(collect(teacher, block, grams, None)["mlp"], None)
    shared, count = grams.shared("mlp.experts", "gate")
    # each token is counted by both of its experts
    torch.testing.assert_close(shared, 2 * second_moment(x), rtol=1e-4, atol=1e-6)
    assert count == 88


def test_gram_collector_leaves_no_hook_behind(mixtral, device):
    teacher = open_teacher(mixtral, device)
    with teacher.block(0) as block:
        grams = GramCollector(block, teacher.family, ["self_attn.q_proj"], with_experts=True)
        with pytest.raises(ZeroDivisionError), grams.attached():
            raise ZeroDivisionError
        collect_before = dict(grams.grams)
        hidden, calls = teacher.inputs(IDS, None)
        with torch.no_grad():
            block_output(block, hidden, calls[0])
    assert collect_before == grams.grams == {}


def test_gram_collector_expert_without_tokens_counts_zero(make_checkpoint, device):
    def edit(model):
        # all rows point to experts 0 and 1
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.data[:] = 0
                parameter.data[0] = 1
                parameter.data[1] = -1

    teacher = open_teacher(make_checkpoint("mixtral", edit=edit), device)
    with teacher.block(0) as block:
        grams = GramCollector(block, teacher.family, [], with_experts=True)
        collect(teacher, block, grams, None)
    counts = [grams.counts[("mlp.experts", e, "gate")] for e in range(4)]
    assert sum(counts) == 88 and max(counts[2:]) <= 44
    for expert, count in enumerate(counts):
        gram = grams.grams[("mlp.experts", expert, "down")]
        assert gram.shape == (64, 64)
        assert (float(gram.diagonal().sum()) > 0) == (count > 0)
