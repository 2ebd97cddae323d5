"""The gradients' moments against autograd through the whole model, and what follows from them."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lillama
from lillama.compress.measure.gradients import (
    GradientCollector,
    MatrixSensitivity,
    without_outliers,
)
from lillama.compress.measure.sensitivity import OUTLIER, _of_matrix, measure_sensitivity, sample_of
from lillama.compress.measure.svd import Moment, plain_svd, shrunk, whitened_svd
from lillama.compress.measure.vocabulary import SHRINKAGE
from lillama.compress.plan.matrix import Matrix, moment_side
from lillama.compress.plan.plan import make_plan
from lillama.compress.teacher.activations import ActivationMemory
from lillama.compress.teacher.blocks import TeacherBlocks
from lillama.config import PRESETS, PlanConfig
from lillama.data.sequences import TokenBlocks
from lillama.errors import RunError
from lillama.models.config_json import read_config
from lillama.models.families import family_of

IDS = torch.randint(1, 300, (6, 11), generator=torch.Generator().manual_seed(3))
MASK = torch.arange(11) < torch.tensor([[11], [6], [2], [9], [11], [5]])
MASKS = [pytest.param(None, id="packed"), pytest.param(MASK, id="padded")]
SEED = 5
RECIPE = dataclasses.replace(PRESETS["default"], sensitivity_tokens=66, batch_size=4)


def measured(path, tmp_path, device, mask, recipe=RECIPE, host_bytes=2**30, on_tick=None):
    """{matrix name: sensitivity} and the matrices by name."""
    config = read_config(path)
    teacher = TeacherBlocks(path, config, family_of(config.model_type), device, torch.float32)
    plan = make_plan(PlanConfig(model=path, reduction=0.1))
    found: dict[str, MatrixSensitivity] = {}
    blocks: list[int] = []

    def on_block(index: int, values: dict[str, MatrixSensitivity]) -> None:
        blocks.append(index)
        found.update(values)

    memory = ActivationMemory(device, host_bytes, tmp_path)
    tick = on_tick or (lambda stage, tokens: None)
    tokens = TokenBlocks(IDS, mask)
    measure_sensitivity(teacher, plan.matrices, tokens, recipe, memory, tick, SEED, on_block)
    assert blocks == ([1, 0, -1] if min(m.block for m in plan.matrices) < 0 else [1, 0])
    return found, {m.name: m for m in plan.matrices}


def labels_drawn(model, mask: Tensor | None) -> Tensor:
    """The labels that the pass draws: row by row from the model's own prediction."""
    generator = torch.Generator(model.device).manual_seed(SEED)
    labels = []
    for row in range(len(IDS)):
        given = None if mask is None else mask[row : row + 1].long()
        with torch.no_grad():
            logits = model(IDS[row : row + 1], attention_mask=given, use_cache=False).logits[0]
        chances = logits.float().softmax(-1)
        labels.append(torch.multinomial(chances, 1, generator=generator)[:, 0])
    return torch.stack(labels)


def expected(path, mask: Tensor | None, weights: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """{runtime weight name: (x [n, K], g [n, N])} by autograd through transformers' own model;
    "embeddings": both at their output.

    For experts' stacked weights the gradient of each token follows from one backward pass a token;
    here only linear layers are asked for."""
    model = AutoModelForCausalLM.from_pretrained(path).requires_grad_(False)
    labels = labels_drawn(model, mask)
    kept: dict[str, list[Tensor]] = {}

    def hook(name: str):
        def save(module, args, output):
            kept[name] = [args[0].detach()]
            output.register_hook(lambda g: kept[name].append(g))

        return save

    for name in weights:
        model.get_submodule(name).register_forward_hook(hook(name))
    hidden = model.get_input_embeddings()(IDS).requires_grad_()
    given = None if mask is None else mask.long()
    logits = model(inputs_embeds=hidden, attention_mask=given, use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    losses[slice(None) if mask is None else mask.flatten()].sum().backward()
    assert hidden.grad is not None
    kept["embeddings"] = [hidden.detach(), hidden.grad]
    flat = torch.ones(IDS.numel(), dtype=torch.bool) if mask is None else mask.flatten()
    return {
        name: tuple(part.reshape(IDS.numel(), -1)[flat].double() for part in parts)  # type: ignore[misc]
        for name, parts in kept.items()
    }


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_are_those_of_the_whole_model(mask, mamba, tmp_path):
    recipe = dataclasses.replace(RECIPE, gradient_damping=0.0, shrinkage=1e-6)
    found, matrices = measured(mamba, tmp_path, torch.device("cpu"), mask, recipe)
    model = AutoModelForCausalLM.from_pretrained(mamba)
    seen = expected(mamba, mask, list(matrices))
    for name, (x, g) in ((name, seen[name]) for name in matrices):
        W = model.get_submodule(name).get_parameter("weight").detach().double()
        matrix = matrices[name]
        rows = g @ W if moment_side(*W.shape) == "input" else g
        want = rows.mT @ rows / len(g)
        scale = float(want.abs().max())
        torch.testing.assert_close(
            found[name].gradient.double(), want, rtol=1e-3, atol=1e-4 * scale
        )
        # half of what the optimal product of each rank leaves, by the definition
        H, C = g.mT @ g / len(g), x.mT @ x / len(x)
        square = torch.linalg.eigvals(H @ W @ C @ W.mT).real.clamp_min(0).sort(descending=True)[0]
        left = [float(square[rank:].sum()) / 2 for rank in matrix.ranks]
        assert found[name].losses == pytest.approx(left, rel=2e-2, abs=1e-3 * max(left))


@pytest.mark.parametrize("mask", MASKS)
def test_vocabulary_moments_are_those_of_the_whole_model(mask, make_checkpoint, tmp_path):
    path = make_checkpoint("mamba", tie_word_embeddings=False)
    found, matrices = measured(path, tmp_path, torch.device("cpu"), mask)
    model = AutoModelForCausalLM.from_pretrained(path)
    seen = expected(path, mask, ["lm_head"])
    share = RECIPE.vocabulary_floor

    def close(got: Tensor | None, want: Tensor) -> None:
        assert got is not None
        scale = float(want.abs().max())
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4 * scale)

    W = model.get_submodule("lm_head").get_parameter("weight").detach().double()
    V, K = W.shape
    assert moment_side(V, K) == "input" and matrices["lm_head"].block == 2
    (x, g), eye = seen["lm_head"], torch.eye(K)
    rows = g @ W
    close(found["lm_head"].gradient, (1 - share) * rows.mT @ rows / len(g) + share * W.mT @ W / V)
    close(found["lm_head"].moment, x.mT @ x / len(x) + SHRINKAGE * x.square().mean() * eye)

    name = "backbone.embeddings"
    assert matrices[name].block == -1
    e, g = seen["embeddings"]
    E = model.get_submodule(name).get_parameter("weight").detach().double()
    close(found[name].gradient, g.mT @ g / len(g) + SHRINKAGE * g.square().mean() * eye)
    close(found[name].moment, (1 - share) * e.mT @ e / len(e) + share * E.mT @ E / V)


@pytest.mark.parametrize("mask", MASKS)
def test_experts_gradients_are_those_of_the_whole_model(mask, mixtral, tmp_path):
    """By the definition of the mean over an expert's tokens, the parts of the floor taken off."""
    found, matrices = measured(mixtral, tmp_path, torch.device("cpu"), mask)
    model = AutoModelForCausalLM.from_pretrained(mixtral).requires_grad_(False)
    labels = labels_drawn(model, mask)
    seen: dict[int, list[Tensor]] = {}
    experts = model.model.layers[1].mlp.experts

    def forward(hidden: Tensor, topk_index: Tensor, topk_weight: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        kept = torch.ones(len(hidden), dtype=torch.bool) if mask is None else mask.flatten()
        for expert in range(4):
            rows, choice = torch.where(topk_index == expert)
            gate, up = F.linear(hidden[rows], experts.gate_up_proj[expert]).chunk(2, -1)
            y = F.linear(F.silu(gate) * up, experts.down_proj[expert])
            y.register_hook(
                lambda g, e=expert, r=kept[rows]: seen.setdefault(e, []).append(g[r].double())
            )
            out = out.index_add(0, rows, y * topk_weight[rows, choice, None])
        return out

    experts.forward = forward
    hidden = model.get_input_embeddings()(IDS).requires_grad_()
    given = None if mask is None else mask.long()
    logits = model(inputs_embeds=hidden, attention_mask=given, use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    losses[slice(None) if mask is None else mask.flatten()].sum().backward()
    gradients = {expert: torch.cat(parts) for expert, parts in seen.items()}
    tokens = sum(len(g) for g in gradients.values())
    power = sum(float(g.square().sum()) for g in gradients.values()) / tokens / 32
    for expert, g in gradients.items():
        name = f"model.layers.1.block_sparse_moe.experts.{expert}.w2"
        assert (matrices[name].N, matrices[name].K) == (32, 64)
        count = len(g) + 32.0
        want = g.mT @ g / count + torch.eye(32) * power * (RECIPE.gradient_damping + 32.0 / count)
        scale = float(want.abs().max())
        torch.testing.assert_close(
            found[name].gradient.double(), want, rtol=1e-3, atol=1e-4 * scale
        )


def test_outliers_are_tokens_far_beyond_the_median():
    gradient = torch.randn(4, 64, 8, generator=torch.Generator().manual_seed(0))
    kept, left_out = without_outliers(gradient, OUTLIER)
    assert int(left_out) == 0 and torch.equal(kept, gradient)
    median = torch.linalg.vector_norm(gradient, dim=-1).median()
    wild = gradient.clone()
    for token, times in (((0, 0), 0.9 * OUTLIER), ((1, 5), 1.1 * OUTLIER), ((3, 63), 1e25)):
        wild[token] *= times * median / torch.linalg.vector_norm(wild[token])
    wild[2, 1] = torch.inf
    wild[2, 2:] = 0.0  # padding: no part of the median
    kept, left_out = without_outliers(wild, OUTLIER)
    assert int(left_out) == 3
    for token in ((1, 5), (2, 1), (3, 63)):
        assert not kept[token].any()
        wild[token] = 0.0
    assert torch.equal(kept, wild)
    nothing, left_out = without_outliers(torch.zeros(1, 3, 8), OUTLIER)
    assert int(left_out) == 0 and not nothing.any()


@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_rows_that_begin_with_a_token_without_embedding(kind, make_checkpoint, tmp_path, caplog):
    """Every block puts out 0 behind nothing but such a token: each norm multiplies the gradient by
    the root of 1 / epsilon. The losses must be those of the other tokens."""
    path = make_checkpoint(kind, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.get_input_embeddings().weight.data[0] = 0.0
    model.save_pretrained(path)
    before = IDS[:, 0].clone()
    plain, matrices = measured(path, tmp_path, torch.device("cpu"), None)
    assert "left out" not in caplog.text
    try:
        IDS[::2, 0] = 0
        found, _ = measured(path, tmp_path, torch.device("cpu"), None)
    finally:
        IDS[:, 0] = before
    assert "left out" in caplog.text
    for name in matrices:
        # three of 66 tokens are another
        assert found[name].losses == pytest.approx(plain[name].losses, rel=0.8, abs=1e-6), name


@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_losses_fall_with_rank_and_streams_on_disk_change_nothing(kind, request, tmp_path, device):
    path = request.getfixturevalue(kind)
    ticks: list[int] = []
    found, matrices = measured(
        path, tmp_path, device, None, on_tick=lambda stage, tokens: ticks.append(tokens)
    )
    assert set(found) == set(matrices)
    assert sum(ticks) == 4 * IDS.numel()  # each block once forward and once back
    for name, matrix in matrices.items():
        losses = found[name].losses
        assert len(losses) == len(matrix.ranks) and min(losses) >= 0
        assert losses == sorted(losses, reverse=True) and losses[0] > 0
    again, _ = measured(path, tmp_path, device, None, host_bytes=0)
    assert all(again[name].losses == found[name].losses for name in found)
    assert not list(tmp_path.iterdir())


def test_an_expert_without_tokens_costs_a_share_and_is_finite(make_checkpoint, tmp_path, device):
    def starve(model):
        for layer in model.model.layers:
            layer.mlp.gate.weight.data[3] = 0
            layer.mlp.gate.weight.data[:3].mul_(0.01).add_(0.5)
            layer.input_layernorm.weight.data.fill_(1.0)
            layer.post_attention_layernorm.weight.data.abs_()

    path = make_checkpoint("mixtral", edit=starve)
    found, _ = measured(path, tmp_path, device, None)
    assert all(torch.isfinite(value.gradient).all() for value in found.values())
    assert all(0 < max(v.losses) < float("inf") for v in found.values())


class Branches(nn.Module):
    """Two layers, of which one has no part in the output."""

    def __init__(self, N: int, K: int) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(K, N), nn.Linear(K, N)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        return self.used(x)


@pytest.mark.parametrize(("N", "K"), [(24, 16), (16, 24)])
@pytest.mark.parametrize("linears", [["used", "unused"], ["unused"]], ids=["both", "alone"])
def test_a_layer_that_no_gradient_reaches_costs_nothing_and_has_factors(linears, N, K, tmp_path):
    torch.manual_seed(0)
    block = Branches(N, K)
    collector = GradientCollector(block, family_of("llama"), linears, False)
    with collector.attached():
        block(torch.randn(9, K, requires_grad=True)).square().sum().backward()
    pooled = collector.pooled(linears)
    for path in reversed(linears):
        matrix = Matrix(path, 0, N, K)
        weight = block.get_submodule(path).get_parameter("weight").detach()
        found = _of_matrix(matrix, weight, collector, path, pooled[path], 1, 9, RECIPE)
        assert all(math.isfinite(loss) for loss in found.losses)
        assert (max(found.losses) > 0) == (path == "used")
        if path == "unused":  # as if nothing was known of its gradients
            eye = Moment(moment_side(N, K), torch.zeros(()), 0.0, 0.0)
            inputs = shrunk(weight, eye, RECIPE.shrinkage)
            A, B = whitened_svd(weight, inputs, 8, found.gradient.double())
            plain_A, plain_B = plain_svd(weight, 8)
            torch.testing.assert_close(B @ A, plain_B @ plain_A, rtol=1e-5, atol=1e-6)


def test_sample_is_the_first_rows_and_all_where_there_are_fewer():
    blocks = TokenBlocks(IDS, MASK)
    part = sample_of(blocks, 12)
    assert torch.equal(part.input_ids, IDS[:2]) and part.mask is not None
    assert torch.equal(part.mask, MASK[:2])
    assert len(sample_of(blocks, 10**6).input_ids) == 6


def test_a_broken_block_is_named(make_checkpoint, tmp_path, device):
    def explode(model):
        model.model.layers[1].mlp.experts.down_proj.data.fill_(1e38)

    path = make_checkpoint("mixtral", edit=explode)
    with pytest.raises(RunError, match=r"model\.layers\.1 \(teacher\) holds NaN or infinity"):
        measured(path, tmp_path, device, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_global_ranks_meet_the_budget_and_are_recorded(
    kind, request, tmp_path, text_file, short_text, device
):
    path, out = request.getfixturevalue(kind), tmp_path / "out"
    report = lillama.compress(
        path, out, reduction=0.15, text=text_file, tokens=600, seq_len=32, preset="fast",
        device=str(device),
    )  # fmt: skip
    ranks = json.loads((out / "config.json").read_text())["quantization_config"]["ranks"]
    plan = make_plan(PlanConfig(model=path, reduction=0.15))
    by_name: dict[str, Matrix] = {m.name: m for m in plan.matrices}
    saved = sum(by_name[name].params_saved(rank) for name, rank in ranks.items())
    assert report["params_before"] - report["params_after"] == saved
    # the marks of the outputs count, and the budget is met with them to within one step
    freed = sum(by_name[name].saved(rank) for name, rank in ranks.items())
    share = freed / report["params_before"]
    assert 0.15 <= share < 0.15 + 8 * (64 + 32) / report["params_before"] + 1e-9
    assert report["predicted_loss_increase"] > 0
    assert not list(out.glob("gradients-*"))
    measured_again = lillama.eval(out, short_text, against=path, seq_len=64, device=str(device))
    assert measured_again["params"] == report["params_after"]
    assert 0.9 < measured_again["retained"] <= 1.1


def test_paper_with_global_ranks_uses_the_gradients_for_ranks_only(
    mixtral, tmp_path, text_file, device
):
    report = lillama.compress(
        mixtral, tmp_path / "out", reduction=0.15, text=text_file, tokens=600, seq_len=32,
        preset="paper", strategy="global", train=False, device=str(device),
    )  # fmt: skip
    assert report["predicted_loss_increase"] > 0 and report["reduction"] >= 0.15


def test_no_widened_expert_waits_for_the_backward_pass(make_checkpoint, device):
    """Also in blocks where nothing is collected: of a large model they would not fit."""
    path = make_checkpoint("mixtral", torch.bfloat16)
    config = read_config(path)
    teacher = TeacherBlocks(path, config, family_of(config.model_type), device, torch.float32)
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with teacher.block(0) as block:
        experts = block.get_submodule("mlp.experts")
        hidden = torch.randn(20, 32, device=device, requires_grad=True)
        index = torch.arange(40, device=device).view(20, 2) % 4
        weights = torch.full((20, 2), 0.5, device=device)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = experts(hidden, index, weights)
        out.sum().backward()
    assert kept and not {(64, 32), (32, 64), (32, 32)} & set(kept)
    assert hidden.grad is not None and hidden.grad.any()
