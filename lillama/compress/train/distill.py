"""Train one student block to reproduce its teacher's output; no gradient leaves the block.

The target is the teacher block's output on the teacher's stream. "teacher" feeds the student block
with the teacher's input, "student" with the previous student block's output, "joint" with both
(losses added), as in arXiv 2412.16719. Padding never counts. The step with the best held-out loss
is kept, the untrained start included.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from lillama_kernels import distill_loss
from torch import Tensor, nn

from lillama.compress.teacher.activations import prefetched
from lillama.compress.teacher.blocks import block_output
from lillama.compress.train.block_inputs import BlockInputs
from lillama.config import Loss, LossForm, Recipe
from lillama.errors import RunError

__all__ = [
    "BlockTraining",
    "TrainResult",
    "TrainState",
    "held_out_loss",
    "learning_rate_at",
    "shuffled",
    "train_block",
]


@dataclass(frozen=True)
class TrainResult:
    """Held-out loss before and at the kept step, the kept step and the number of steps."""

    loss_before: float
    loss_after: float
    best_step: int
    steps: int


@dataclass
class TrainState:
    """Everything that the rest of a block's training depends on, after `step` steps.

    tensors: "student.<name>", "best.<name>" and, after the first step, AdamW's "exp_avg.<n>" and
    "exp_avg_sq.<n>" of the n-th trained parameter. The values are those in use, not copies.
    """

    step: int
    loss_before: float
    best_loss: float
    best_step: int
    tensors: dict[str, Tensor]


def _passes(stream: BlockInputs, loss: Loss) -> list[tuple[str, float]]:
    """Which inputs are run and their weights; one pass with twice the weight while both streams
    are equal."""
    if loss == "joint":
        return [("teacher", 1.0), ("student", 1.0)] if stream.diverged else [("teacher", 2.0)]
    return [(loss, 1.0)]


def read_batch(stream: BlockInputs, rows: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Inputs [passes * b, T, H] and targets [b, T, H] of the rows [b]."""
    inputs = [getattr(stream, name).read(rows) for name, _ in _passes(stream, loss)]
    return torch.cat(inputs) if len(inputs) > 1 else inputs[0], stream.target.read(rows)


def batch_loss(
    student: nn.Module,
    stream: BlockInputs,
    rows: Tensor,
    loss: Loss,
    form: LossForm,
    device: torch.device,
    batch: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Loss of the rows [b] of a stream: both passes run as one batch (`batch`, as `read_batch`
    gives it, where it was read before)."""
    passes = _passes(stream, loss)
    inputs, target = read_batch(stream, rows, loss) if batch is None else batch
    # what is stored in bf16 is computed with as fp32, as in the model itself
    inputs = inputs.to(device, torch.float32, non_blocking=True)
    target = target.to(device, torch.float32, non_blocking=True)
    mask = None if stream.mask is None else stream.mask[rows].to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        output = block_output(student, inputs, stream.kwargs(rows.repeat(len(passes))))
    parts = output.chunk(len(passes))
    terms = [
        weight * distill_loss(part, target, mask, form=form)
        for part, (_, weight) in zip(parts, passes, strict=True)
    ]
    return torch.stack(terms).sum()


@torch.no_grad()
def held_out_loss(
    student: nn.Module,
    stream: BlockInputs,
    loss: Loss,
    form: LossForm,
    batch_size: int,
    device: torch.device,
) -> float:
    """Mean over the counted tokens of a stream."""
    batches = torch.arange(len(stream.target)).split(batch_size)
    total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    for rows, batch in prefetched(
        batches, lambda rows: read_batch(stream, rows, loss), stream.background
    ):
        count = rows.numel() if stream.mask is None else int(stream.mask[rows].sum())
        total += batch_loss(student, stream, rows, loss, form, device, batch).double() * count
        tokens += count
    return float(total) / tokens


def _learning_rate(recipe: Recipe, peak: float, step: int, steps: int) -> float:
    if recipe.schedule == "constant":
        return peak
    return learning_rate_at(peak, step, steps, recipe.warmup_fraction)


def learning_rate_at(peak: float, step: int, steps: int, warmup_fraction: float) -> float:
    """Linear warmup, then a cosine that ends at a tenth of the peak; step counts from 0."""
    warmup = max(1, round(warmup_fraction * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def shuffled(count: int, batch_size: int, seed: int) -> tuple[Tensor, ...]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order.split(batch_size)


@dataclass(frozen=True, kw_only=True)
class BlockTraining:
    """How one block is trained, and who hears of it.

    seed: of the order. name: of the block, for messages. on_step(rows, loss): called after every
    step with the loss on the device, and for the steps that a resumed run spares; where it returns
    True, and at least every `save_every_s` seconds, `save` gets the state. on_judge(step, loss):
    told each held-out loss.
    """

    recipe: Recipe
    loss: Loss
    peak_learning_rate: float
    seed: int
    device: torch.device
    name: str
    on_step: Callable[[int, Tensor], bool]
    save: Callable[[TrainState], None] = lambda state: None
    save_every_s: float = math.inf
    on_judge: Callable[[int, float], None] = lambda step, loss: None


class _Trainer:
    """The state of one block's training and its three moves: judge, step, restore."""

    def __init__(self, student: nn.Module, held_out: BlockInputs, training: BlockTraining) -> None:
        self.student, self.held_out, self.training = student, held_out, training
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=training.peak_learning_rate,
            weight_decay=training.recipe.weight_decay,
            fused=True,
        )
        self.step = self.best_step = 0
        self.loss_before = self.best_loss = math.inf
        # of steps since the last look; reading each would stop the device at every step
        self.worst = torch.zeros((), device=training.device)
        self.best: dict[str, Tensor] = {}

    def judge(self) -> None:
        """Look at the held-out loss and keep the student if it is the best so far."""
        self.check()
        how = self.training
        value = held_out_loss(
            self.student,
            self.held_out,
            how.loss,
            how.recipe.form,
            how.recipe.batch_size,
            how.device,
        )
        if not math.isfinite(value):
            raise RunError(
                f"the held-out loss of block {how.name} became {value}; lower the learning rate"
            )
        how.on_judge(self.step, value)
        if self.step == 0:
            self.loss_before = value
        if self.step == 0 or value < self.best_loss:
            self.best_loss, self.best_step = value, self.step
            for key, parameter in self.trained().items():
                if key not in self.best:
                    self.best[key] = torch.empty_like(parameter)
                self.best[key].copy_(parameter)

    def trained(self) -> dict[str, Tensor]:
        return {k: p.detach() for k, p in self.student.named_parameters() if p.requires_grad}

    def take_step(self, value: Tensor, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.worst = torch.maximum(self.worst, value.detach().abs())  # NaN stays NaN
        value.backward()
        if self.training.recipe.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.training.recipe.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def check(self) -> None:
        """Raises RunError when the loss of a step since the last check was NaN or infinite."""
        worst = float(self.worst)
        if not math.isfinite(worst):
            raise RunError(
                f"the loss of block {self.training.name} became {worst} by step {self.step}; "
                "lower the learning rate"
            )
        self.worst.zero_()

    def state(self) -> TrainState:
        self.check()
        tensors = {f"student.{key}": value for key, value in self.trained().items()}
        tensors |= {f"best.{key}": value for key, value in self.best.items()}
        for number, parameter in enumerate(self.parameters):
            for key in ("exp_avg", "exp_avg_sq") if self.step else ():
                tensors[f"{key}.{number}"] = self.optimizer.state[parameter][key]
        return TrainState(self.step, self.loss_before, self.best_loss, self.best_step, tensors)

    @torch.no_grad()
    def restore(self, state: TrainState) -> None:
        """Takes the tensors out of the state as it goes: it is as large as what training holds."""
        self.step, self.loss_before = state.step, state.loss_before
        self.best_loss, self.best_step = state.best_loss, state.best_step
        for key, value in self.trained().items():
            value.copy_(state.tensors.pop(f"student.{key}"))
            self.best[key] = state.tensors.pop(f"best.{key}").to(value.device)
        for number, parameter in enumerate(self.parameters if state.step else ()):
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(state.step), device=parameter.device),
                **{
                    key: state.tensors.pop(f"{key}.{number}").to(parameter.device)
                    for key in ("exp_avg", "exp_avg_sq")
                },
            }

    @torch.no_grad()
    def keep_best(self) -> None:
        for key, value in self.trained().items():
            value.copy_(self.best[key])


@torch.enable_grad()
def train_block(
    student: nn.Module,
    train: BlockInputs,
    held_out: BlockInputs,
    training: BlockTraining,
    resume: TrainState | None = None,
) -> TrainResult:
    """Train for one pass over the training rows with AdamW on fp32 parameters, and leave the best
    state in `student`.

    A run resumed from a state ends bit for bit as the one that went on; it takes the tensors out of
    `resume`.

    Raises:
        RunError: the loss became NaN or infinite (names the block).
    """
    recipe, loss, device = training.recipe, training.loss, training.device
    trainer = _Trainer(student, held_out, training)
    batches = shuffled(len(train.target), recipe.batch_size, training.seed)
    steps = len(batches)
    every = max(1, math.ceil(steps / recipe.evaluations))
    if resume is None:
        trainer.judge()
    else:
        trainer.restore(resume)
        for rows in batches[: resume.step]:
            training.on_step(len(rows), torch.tensor(math.nan))
    saved_at = time.monotonic()
    for rows, batch in prefetched(
        batches[trainer.step :], lambda rows: read_batch(train, rows, loss), train.background
    ):
        rate = _learning_rate(recipe, training.peak_learning_rate, trainer.step, steps)
        value = batch_loss(student, train, rows, loss, recipe.form, device, batch)
        trainer.take_step(value, rate)
        wanted = training.on_step(len(rows), value.detach())
        if trainer.step % every == 0 or trainer.step == steps:
            trainer.judge()
        overdue = time.monotonic() - saved_at >= training.save_every_s
        if wanted or (overdue and trainer.step < steps):
            training.save(trainer.state())
            saved_at = time.monotonic()
    trainer.keep_best()
    return TrainResult(trainer.loss_before, trainer.best_loss, trainer.best_step, steps)
