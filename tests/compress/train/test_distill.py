"""Training one block: what the losses feed, what is kept, and what stops it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lillama_kernels import distill_loss
from torch import Tensor, nn

from lillama.compress.teacher.activations import ActivationStore, stored
from lillama.compress.train.block_inputs import BlockInputs
from lillama.compress.train.distill import (
    BlockTraining,
    TrainResult,
    TrainState,
    _learning_rate,
    batch_loss,
    held_out_loss,
    train_block,
)
from lillama.config import PRESETS, Loss
from lillama.errors import RunError

ROWS, T, H = 24, 6, 16
LOSSES: list[Loss] = ["teacher", "student", "joint"]
FORM = PRESETS["default"].form


class Block(nn.Module):
    """hidden + W hidden, with a bias that cannot train."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(H, H, generator=generator) / H**0.5)
        self.bias = nn.Parameter(torch.zeros(H), requires_grad=False)

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        return hidden + hidden @ self.weight.mT + self.bias


def no_kwargs(rows: Tensor) -> dict[str, Any]:
    return {}


def make_stream(
    device: torch.device, seed: int = 0, *, noise: float = 0.0, mask: Tensor | None = None
) -> BlockInputs:
    """Targets come from Block(1) on the teacher's inputs; noise > 0 makes the student's differ."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(ROWS, T, H, generator=generator)
    student = teacher
    if noise:
        student = teacher + noise * torch.randn(ROWS, T, H, generator=generator)
    with torch.no_grad():
        target = Block(1)(teacher)
    same = stored(teacher)
    return BlockInputs(same, stored(student) if noise else same, stored(target), mask, no_kwargs)


def everything(store: ActivationStore) -> Tensor:
    return store.read(torch.arange(len(store)))


def spoil(stream: BlockInputs, row: int) -> None:
    values = stream.target.read(torch.tensor([row]))
    values[0, 0, 0] = float("nan")
    stream.target.write(torch.tensor([row]), values)


def damaged_block(device: torch.device) -> Block:
    block = Block(1).to(device)
    with torch.no_grad():
        block.weight.add_(0.3 * Block(2).to(device).weight)
    return block


def train(
    block: nn.Module,
    train: BlockInputs,
    held_out: BlockInputs,
    device: torch.device,
    learning_rate: float = 1e-2,
    loss: Loss = "joint",
    on_step: Callable[[int, Tensor], bool] = lambda rows, loss: False,
    **recipe: Any,
) -> TrainResult:
    return train_block(
        block,
        train,
        held_out,
        BlockTraining(
            recipe=dataclasses.replace(PRESETS["default"], batch_size=4, **recipe),
            loss=loss,
            peak_learning_rate=learning_rate,
            seed=0,
            device=device,
            name="layers.7",
            on_step=on_step,
        ),
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_train_block_lowers_the_held_out_loss_of_a_damaged_block(loss, device):
    block = damaged_block(device)
    held_out = make_stream(device, 9, noise=0.1)
    result = train(block, make_stream(device, noise=0.1), held_out, device, 3e-2, loss)
    before = held_out_loss(damaged_block(device), held_out, loss, FORM, 4, device)
    after = held_out_loss(block, held_out, loss, FORM, 4, device)
    assert result.loss_before == pytest.approx(before, rel=1e-6)
    assert result.loss_after == pytest.approx(after, rel=1e-6)
    floor = math.log(1 + math.exp(-1)) * (2 if loss == "joint" else 1)
    assert after - floor < 0.9 * (before - floor)
    assert result.steps == 6 and result.best_step > 0


def test_train_block_leaves_frozen_parameters_alone(device):
    block = damaged_block(device)
    train(block, make_stream(device), make_stream(device, 9), device)
    assert bool((block.bias == 0).all())


@pytest.mark.parametrize("clip", [1.0, None], ids=["clipped", "unclipped"])
def test_train_block_keeps_the_start_when_every_step_is_worse(clip, device):
    """A huge but finite learning rate ruins the block; step 0 must come back bit for bit."""
    block = damaged_block(device)
    start = {k: v.clone() for k, v in block.state_dict().items()}
    result = train(
        block, make_stream(device), make_stream(device, 9), device, 1e3, gradient_clip=clip
    )
    assert result.best_step == 0
    assert result.loss_after == result.loss_before
    assert all(torch.equal(value, start[key]) for key, value in block.state_dict().items())


def test_train_block_keeps_the_best_of_its_evaluations(device):
    """The kept state is the one whose held-out loss was lowest, not the last."""
    block, held_out = damaged_block(device), make_stream(device, 9)
    seen: list[float] = []

    def on_step(rows: int, loss: Tensor) -> bool:
        assert rows == 4 and math.isfinite(loss)
        if len(seen) == 3:  # something goes wrong in the fourth of six steps
            block.weight.data += 1
        seen.append(held_out_loss(block, held_out, "joint", FORM, 4, device))
        return False

    result = train(
        block, make_stream(device), held_out, device, 0.02, on_step=on_step, evaluations=6
    )
    values = [result.loss_before, *seen]
    assert len(values) == 7
    assert result.best_step == min(range(7), key=values.__getitem__) == 3
    assert result.loss_after == pytest.approx(min(values), rel=1e-6)
    assert held_out_loss(block, held_out, "joint", FORM, 4, device) == pytest.approx(
        result.loss_after
    )


def test_train_block_same_seed_is_bitwise_equal_and_another_is_not(device):
    def trained(seed: int) -> Tensor:
        block = damaged_block(device)
        train_block(
            block,
            make_stream(device),
            make_stream(device, 9),
            BlockTraining(
                recipe=dataclasses.replace(PRESETS["default"], batch_size=4),
                loss="joint",
                peak_learning_rate=1e-2,
                seed=seed,
                device=device,
                name="layers.7",
                on_step=lambda rows, loss: False,
            ),
        )
        return block.weight.detach()

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


def expected(
    block: nn.Module, inputs: ActivationStore, stream: BlockInputs, rows: Tensor, device
) -> Tensor:
    mask = None if stream.mask is None else stream.mask[rows].to(device)
    x, target = inputs.read(rows).to(device), stream.target.read(rows).to(device)
    return distill_loss(block(x), target, mask, form=FORM)


@pytest.mark.parametrize("masked", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("noise", [0.0, 0.5], ids=["equal", "diverged"])
@torch.no_grad()
def test_batch_loss_feeds_what_its_name_says(noise, masked, device):
    mask = torch.rand(ROWS, T, generator=torch.Generator().manual_seed(1)) < 0.7 if masked else None
    stream = make_stream(device, noise=noise, mask=mask)
    block, rows = damaged_block(device), torch.tensor([3, 1, 8, 20])
    teacher = expected(block, stream.teacher, stream, rows, device)
    student = expected(block, stream.student, stream, rows, device)
    found = {loss: batch_loss(block, stream, rows, loss, FORM, device) for loss in LOSSES}
    # bf16 autocast on a GPU
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
    if device.type == "cuda":
        close = {"rtol": 2e-2, "atol": 1e-2}
    torch.testing.assert_close(found["teacher"], teacher, **close)
    torch.testing.assert_close(found["student"], student, **close)
    torch.testing.assert_close(found["joint"], teacher + student, **close)
    if noise:
        assert abs(float(found["teacher"] - found["student"])) > 0.05 * float(found["student"])
    else:
        torch.testing.assert_close(found["joint"], 2 * found["teacher"], **close)


def test_batch_loss_runs_one_pass_while_the_streams_are_equal(device):
    sizes: list[int] = []

    class Counting(Block):
        def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
            sizes.append(len(hidden))
            return super().forward(hidden)

    block, rows = Counting(1).to(device), torch.arange(4)
    batch_loss(block, make_stream(device), rows, "joint", FORM, device)
    batch_loss(block, make_stream(device, noise=0.1), rows, "joint", FORM, device)
    assert sizes == [4, 8]


def test_batch_loss_asks_for_the_keyword_arguments_of_its_rows(device):
    asked: list[list[int]] = []

    def kwargs(rows: Tensor) -> dict[str, Any]:
        asked.append(rows.tolist())
        return {}

    stream = dataclasses.replace(make_stream(device, noise=0.1), kwargs=kwargs)
    batch_loss(damaged_block(device), stream, torch.tensor([5, 2]), "joint", FORM, device)
    batch_loss(damaged_block(device), stream, torch.tensor([5, 2]), "student", FORM, device)
    # joint runs teacher's and student's inputs as one batch
    assert asked == [[5, 2, 5, 2], [5, 2]]


@pytest.mark.parametrize("loss", LOSSES)
def test_masked_positions_have_no_influence(loss, device):
    mask = torch.arange(T) < torch.randint(
        1, T, (ROWS, 1), generator=torch.Generator().manual_seed(2)
    )
    stream = make_stream(device, noise=0.1, mask=mask)
    hidden = ~mask[..., None]
    garbage = BlockInputs(
        stored(everything(stream.teacher).masked_fill(hidden, 50.0)),
        stored(everything(stream.student).masked_fill(hidden, -70.0)),
        stored(everything(stream.target).masked_fill(hidden, 9.0)),
        mask,
        no_kwargs,
    )
    rows = torch.arange(4)
    results = []
    for case in (stream, garbage):
        block = damaged_block(device)
        value = batch_loss(block, case, rows, loss, FORM, device)
        value.backward()
        assert block.weight.grad is not None
        results.append((value.detach(), block.weight.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)
    block = damaged_block(device)
    means = [held_out_loss(block, case, loss, FORM, 5, device) for case in (stream, garbage)]
    assert means[0] == pytest.approx(means[1], rel=1e-6)


def test_held_out_loss_weighs_tokens_not_batches(device):
    """Batches with different numbers of real tokens: the mean is over tokens."""
    mask = torch.arange(T) < torch.tensor([1, 6] * (ROWS // 2)).sort().values[:, None]
    stream = make_stream(device, mask=mask)
    block = damaged_block(device)
    whole = held_out_loss(block, stream, "teacher", FORM, ROWS, device)
    assert held_out_loss(block, stream, "teacher", FORM, 5, device) == pytest.approx(
        whole, rel=1e-3
    )


def test_train_block_nan_in_the_loss_names_the_block(device):
    stream = make_stream(device)
    spoil(stream, 5)
    with pytest.raises(RunError, match=r"the loss of block layers\.7 became nan by step \d"):
        train(damaged_block(device), stream, make_stream(device, 9), device)


def test_train_block_nan_in_the_held_out_loss_names_the_block(device):
    held_out = make_stream(device, 9)
    spoil(held_out, 0)
    with pytest.raises(RunError, match=r"held-out loss of block layers\.7 became nan"):
        train(damaged_block(device), make_stream(device), held_out, device)


def test_train_block_rate_that_overflows_names_the_block(device):
    with pytest.raises(RunError, match=r"block layers\.7 became (nan|inf).*lower the learning"):
        train(damaged_block(device), make_stream(device), make_stream(device, 9), device, 1e30)


def test_learning_rate_cosine_warms_up_and_ends_at_a_tenth():
    recipe = dataclasses.replace(PRESETS["default"], warmup_fraction=0.1)
    rates = [_learning_rate(recipe, 2.0, step, 100) for step in range(101)]
    assert rates[:10] == pytest.approx([2.0 * (i + 1) / 10 for i in range(10)])
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[55] == pytest.approx(2.0 * 0.55)
    assert rates[100] == pytest.approx(0.2)


def test_learning_rate_constant_is_constant():
    assert {_learning_rate(PRESETS["paper"], 3e-4, step, 50) for step in range(50)} == {3e-4}


def test_train_block_applies_the_schedule(device, monkeypatch):
    """What the optimizer was given at each step, not only what the function says."""
    seen: list[float] = []
    step = torch.optim.AdamW.step

    def recording(self, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording)
    streams = make_stream(device), make_stream(device, 9)
    train(damaged_block(device), *streams, device, 1e-2)
    wanted = [_learning_rate(PRESETS["default"], 1e-2, i, 6) for i in range(6)]
    assert seen == pytest.approx(wanted) and seen[-1] < 0.2 * max(seen)


def test_recipe_scales_the_default_rate_with_width_and_not_the_published_one():
    default, paper = PRESETS["default"], PRESETS["paper"]
    assert default.peak_learning_rate(128) == pytest.approx(default.learning_rate)
    assert default.peak_learning_rate(512) == pytest.approx(default.learning_rate / 2)
    assert paper.peak_learning_rate(128) == paper.peak_learning_rate(4096) == 8.6e-5


@pytest.mark.parametrize("at", [1, 2, 3, 5])
@pytest.mark.parametrize("clip", [1.0, None], ids=["clipped", "unclipped"])
def test_train_block_resumed_from_a_state_ends_bit_for_bit(at, clip, device):
    """The state is what a file holds: nothing of the first run lives on in the second."""
    streams = make_stream(device, noise=0.1), make_stream(device, 9, noise=0.1)
    recipe = dataclasses.replace(PRESETS["default"], batch_size=4, gradient_clip=clip)
    kept: list[TrainState] = []
    seen: list[int] = []

    def run(block: Block, resume: TrainState | None = None) -> TrainResult:
        seen.clear()

        def on_step(rows: int, loss: Tensor) -> bool:
            seen.append(rows)
            return len(seen) == at and resume is None

        def save(state: TrainState) -> None:
            copies = {key: value.clone() for key, value in state.tensors.items()}
            kept.append(dataclasses.replace(state, tensors=copies))

        training = BlockTraining(
            recipe=recipe, loss="joint", peak_learning_rate=3e-2, seed=0, device=device,
            name="layers.7", on_step=on_step, save=save,
        )  # fmt: skip
        return train_block(block, *streams, training, resume)

    whole = damaged_block(device)
    wanted = run(whole)
    assert [state.step for state in kept] == [at] and seen == [4] * 6
    again = damaged_block(device)
    with torch.no_grad():
        again.weight.fill_(7.0)  # what resuming must replace
    assert run(again, kept[0]) == wanted and seen == [4] * 6
    assert torch.equal(whole.weight, again.weight)


def test_train_block_saves_by_the_clock(device):
    states: list[int] = []
    for every, wanted in ((0.0, [1, 2, 3, 4, 5]), (1000.0, [])):
        states.clear()
        training = BlockTraining(
            recipe=dataclasses.replace(PRESETS["default"], batch_size=4), loss="joint",
            peak_learning_rate=1e-2, seed=0, device=device, name="layers.7",
            on_step=lambda rows, loss: False, save=lambda state: states.append(state.step),
            save_every_s=every,
        )  # fmt: skip
        train_block(damaged_block(device), make_stream(device), make_stream(device, 9), training)
        assert states == wanted, "the last step is followed by the shard itself"
