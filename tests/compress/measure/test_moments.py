"""Moments against an explicit X^T X of what really flows through each target."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lillama.compress.measure.moments import MomentCollector
from lillama.compress.measure.svd import Moment
from lillama.compress.teacher.blocks import TeacherBlocks, block_output
from lillama.models.config_json import read_config
from lillama.models.families import family_of

EXPERTS = "mlp.experts"

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
def collect(teacher, block, moments: MomentCollector, mask: Tensor | None) -> dict[str, Tensor]:
    """Run the block over IDS in two batches; returns the inputs of every submodule [4, 11, K]."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0]) if args else None
        )
        for name, module in block.named_modules()
        if name
    ]
    with moments.attached(), teacher.embeddings():
        for rows in torch.arange(4).split(2):
            part = None if mask is None else mask[rows]
            hidden, calls = teacher.inputs(IDS[rows], part)
            moments.mask = part
            block_output(block, hidden, calls[0])
    for handle in handles:
        handle.remove()
    return {
        name: torch.cat([x.reshape(-1, 11, x.shape[-1]) for x in xs if x.ndim > 1])
        for name, xs in seen.items()
        if all(x.numel() % 11 == 0 for x in xs)
    }


def check(moment: Moment | None, inputs: Tensor, weight: Tensor, rtol: float = 1e-4) -> None:
    """The moment is of the smaller side of the weight, and counts these inputs."""
    N, K = weight.shape
    assert moment is not None
    assert moment.side == ("input" if K <= N else "output")
    rows = inputs if K <= N else inputs @ weight.mT
    torch.testing.assert_close(moment.gram.double(), second_moment(rows), rtol=rtol, atol=1e-5)
    assert moment.tokens == len(inputs)
    assert moment.energy == pytest.approx(float(inputs.double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("use_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("mask", MASKS)
def test_moments_of_linears_equal_the_explicit_product(mask, use_bias, make_checkpoint, device):
    """in_proj [128, 32] on its input side, out_proj [32, 64] on its output's, without its bias."""
    teacher = open_teacher(make_checkpoint("mamba", use_bias=use_bias), device)
    targets = ["mixer.in_proj", "mixer.x_proj", "mixer.out_proj"]
    with teacher.block(0) as block:
        moments = MomentCollector(block, teacher.family, targets, with_experts=False)
        inputs = collect(teacher, block, moments, mask)
        for name in targets:
            wanted = rows_of(inputs[name], mask)
            assert len(wanted) == (44 if mask is None else 28)
            check(moments.pop(name), wanted, block.get_parameter(f"{name}.weight"))
            assert moments.pop(name) is None, "popped"


@pytest.mark.parametrize("intermediate", [64, 16], ids=["I64", "I16"])
@pytest.mark.parametrize("mask", MASKS)
def test_moments_of_experts_equal_the_explicit_product(mask, intermediate, make_checkpoint, device):
    """Hidden 32: gate and up share their input's moment where I is larger, down's where smaller."""
    path = make_checkpoint("mixtral", intermediate_size=intermediate)
    teacher = open_teacher(path, device)
    with teacher.block(0) as block:
        moments = MomentCollector(block, teacher.family, [], with_experts=True)
        x = rows_of(collect(teacher, block, moments, mask)["mlp"], mask)
        router = block.get_parameter("mlp.gate.weight")
        gate_up = block.get_parameter("mlp.experts.gate_up_proj")
        down = block.get_parameter("mlp.experts.down_proj")
        chosen = (x @ router.mT).topk(2).indices
        total = 0
        for expert in range(4):
            rows = x[(chosen == expert).any(-1)]
            assert moments.expert_tokens()[expert] == len(rows)
            W_gate, W_up = gate_up[expert].chunk(2)
            gated = F.silu(rows @ W_gate.mT) * (rows @ W_up.mT)
            total += len(rows)
            for projection, inputs, weight in (
                ("up", rows, W_up),
                ("gate", rows, W_gate),
                ("down", gated, down[expert]),
            ):
                check(moments.pop((EXPERTS, expert, projection)), inputs, weight)
            assert moments.pop((EXPERTS, expert, "gate")) is None, "popped"
    # every token goes to 2 experts, padding to none
    assert total == 2 * (44 if mask is None else 28)


@pytest.mark.parametrize("mask", MASKS)
def test_collecting_does_not_change_what_the_block_computes(mask, mixtral, device):
    teacher = open_teacher(mixtral, device)
    with teacher.block(0) as block, torch.no_grad():
        moments = MomentCollector(block, teacher.family, ["self_attn.q_proj"], with_experts=True)
        moments.mask = mask
        with teacher.embeddings():
            hidden, calls = teacher.inputs(IDS, mask)
        plain = block_output(block, hidden, calls[0])
        with moments.attached():
            collected = block_output(block, hidden, calls[0])
        again = block_output(block, hidden, calls[0])
    assert torch.equal(plain, collected) and torch.equal(plain, again)


def test_collector_leaves_no_hook_behind(mixtral, device):
    teacher = open_teacher(mixtral, device)
    with teacher.block(0) as block:
        moments = MomentCollector(block, teacher.family, ["self_attn.q_proj"], with_experts=True)
        with pytest.raises(ZeroDivisionError), moments.attached():
            raise ZeroDivisionError
        with torch.no_grad(), teacher.embeddings():
            hidden, calls = teacher.inputs(IDS, None)
            block_output(block, hidden, calls[0])
    assert moments.expert_tokens() == {} and moments.pop("self_attn.q_proj") is None


def starved(model) -> None:
    """All rows point to experts 0 and 1."""
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.data[:] = 0
            parameter.data[0] = 1
            parameter.data[1] = -1


def test_expert_without_tokens_counts_zero(make_checkpoint, device):
    teacher = open_teacher(make_checkpoint("mixtral", edit=starved), device)
    with teacher.block(0) as block:
        moments = MomentCollector(block, teacher.family, [], with_experts=True)
        collect(teacher, block, moments, None)
        moments.finish()
    counts = moments.expert_tokens()
    assert sum(counts.values()) == 88 and counts[2] + counts[3] <= 44
    for expert, count in counts.items():
        moment = moments.pop((EXPERTS, expert, "down"))
        assert moment is not None and moment.gram.shape == (32, 32)
        assert (moment.energy > 0) == (count > 0)


def test_starved_expert_gets_the_layers_tokens_up_to_the_floor(make_checkpoint, device):
    """Below the floor the missing tokens are the layer's own, sent through the expert."""
    teacher = open_teacher(make_checkpoint("mixtral", edit=starved), device)
    with teacher.block(0) as block:
        moments = MomentCollector(
            block, teacher.family, [], with_experts=True, floor=40, sample_rows=20
        )
        inputs = collect(teacher, block, moments, None)["mlp"]
        before = moments.expert_tokens()
        moments.finish()
        poorest = min(before, key=before.__getitem__)
        assert 0 < before[poorest] < 40
        # the first 20 rows of each of the two batches
        sample = inputs.reshape(2, 22, 32)[:, :20].reshape(40, 32)
        chosen = (inputs.flatten(0, 1) @ block.get_parameter("mlp.gate.weight").mT).topk(2).indices
        own = inputs.flatten(0, 1)[(chosen == poorest).any(-1)]
        W_gate, W_up = block.get_parameter("mlp.experts.gate_up_proj")[poorest].chunk(2)
        W_down = block.get_parameter("mlp.experts.down_proj")[poorest]
    after = moments.expert_tokens()
    assert all(after[e] == max(40, before[e]) for e in before)
    share = (40 - before[poorest]) / 40
    moment = moments.pop((EXPERTS, poorest, "up"))
    assert moment is not None and moment.tokens == 40
    wanted = second_moment(own) + share * second_moment(sample)
    torch.testing.assert_close(moment.gram.double(), wanted, rtol=1e-4, atol=1e-5)
    moment = moments.pop((EXPERTS, poorest, "down"))
    assert moment is not None and moment.side == "output"

    def outputs(x: Tensor) -> Tensor:
        return second_moment((F.silu(x @ W_gate.mT) * (x @ W_up.mT)) @ W_down.mT)

    wanted = outputs(own) + share * outputs(sample)
    torch.testing.assert_close(moment.gram.double(), wanted, rtol=1e-4, atol=1e-5)
