"""Train one student block to reproduce its teacher's output; no gradient leaves the block.

The target is the teacher block's output on the teacher's stream. "teacher" feeds the student block
with the teacher's input, "student" with the previous student block's output, "joint" with both
(losses added), as in arXiv 2412.16719. Padding never counts. The step with the best held-out loss
is kept, the untrained start included.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lillama_kernels import distill_loss
from torch import Tensor, nn

from lillama.compress.blocks import block_output
from lillama.config import Loss, Recipe
from lillama.errors import RunError

__all__ = ["Stream", "TrainResult", "held_out_loss", "train_block"]


@dataclass
class Stream:
    """Activations of one set of token blocks at the border of two decoder blocks.

    teacher, student, target: [n, T, H]; `student` is the same object as `teacher` until a block
    was compressed. mask [n, T] bool or None. `kwargs(rows)` gives the block's keyword arguments
    for a list of rows.
    """

    teacher: Tensor
    student: Tensor
    target: Tensor
    mask: Tensor | None
    kwargs: Callable[[Tensor], dict[str, Any]]

    @property
    def diverged(self) -> bool:
        return self.student is not self.teacher


@dataclass(frozen=True)
class TrainResult:
    """Held-out loss before and at the kept step, the kept step and the number of steps."""

    loss_before: float
    loss_after: float
    best_step: int
    steps: int


def _passes(stream: Stream, loss: Loss) -> list[tuple[str, float]]:
    """Which inputs are run and their weights; one pass with twice the weight while both streams
    are equal."""
    if loss == "joint":
        return [("teacher", 1.0), ("student", 1.0)] if stream.diverged else [("teacher", 2.0)]
    return [(loss, 1.0)]


def batch_loss(
    student: nn.Module, stream: Stream, rows: Tensor, loss: Loss, device: torch.device
) -> Tensor:
    """Loss of the rows [b] of a stream: both passes run as one batch."""
    passes = _passes(stream, loss)
    inputs = torch.cat([getattr(stream, name)[rows].to(device) for name, _ in passes])
    repeated = rows.repeat(len(passes))
    target = stream.target[rows].to(device)
    mask = None if stream.mask is None else stream.mask[rows].to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        output = block_output(student, inputs, stream.kwargs(repeated))
    parts = output.chunk(len(passes))
    terms = [
        weight * distill_loss(part, target, mask)
        for part, (_, weight) in zip(parts, passes, strict=True)
    ]
    return torch.stack(terms).sum()


@torch.no_grad()
def held_out_loss(
    student: nn.Module, stream: Stream, loss: Loss, batch_size: int, device: torch.device
) -> float:
    """Mean over the counted tokens of a stream."""
    total = tokens = 0.0
    for rows in torch.arange(len(stream.target)).split(batch_size):
        count = rows.numel() if stream.mask is None else float(stream.mask[rows].sum())
        total += float(batch_loss(student, stream, rows, loss, device)) * count
        tokens += count
    return total / tokens


def _learning_rate(recipe: Recipe, peak: float, step: int, steps: int) -> float:
    """Step counts from 0. Cosine ends at a tenth of the peak."""
    if recipe.schedule == "constant":
        return peak
    warmup = max(1, round(recipe.warmup_fraction * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def _batches(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    yield from order.split(batch_size)


def train_block(
    student: nn.Module,
    train: Stream,
    held_out: Stream,
    *,
    recipe: Recipe,
    loss: Loss,
    peak_learning_rate: float,
    seed: int,
    device: torch.device,
    name: str,
    on_step: Callable[[int, float], None],
) -> TrainResult:
    """One pass over the training rows with AdamW on fp32 parameters; leaves the best state in
    `student`.

    `on_step(rows, loss)` is called after every step.

    Raises:
        RunError: the loss became NaN or infinite (names the block).
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=peak_learning_rate,
        weight_decay=recipe.weight_decay,
        fused=device.type == "cuda",
    )
    steps = math.ceil(len(train.target) / recipe.batch_size)
    every = max(1, math.ceil(steps / recipe.evaluations))

    def judge() -> float:
        value = held_out_loss(student, held_out, loss, recipe.batch_size, device)
        if not math.isfinite(value):
            raise RunError(
                f"the held-out loss of block {name} became {value}; lower the learning rate"
            )
        return value

    start = best = judge()
    best_step = 0
    best_state = {k: v.detach().clone() for k, v in student.state_dict().items()}
    for step, rows in enumerate(_batches(len(train.target), recipe.batch_size, seed)):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(recipe, peak_learning_rate, step, steps)
        value = batch_loss(student, train, rows, loss, device)
        current = float(value.detach())
        if not math.isfinite(current):
            raise RunError(
                f"the loss of block {name} became {current} at step {step}; lower the learning rate"
            )
        value.backward()
        if recipe.gradient_clip is not None:
            nn.utils.clip_grad_norm_(parameters, recipe.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        on_step(len(rows), current)
        if (step + 1) % every == 0 or step + 1 == steps:
            now = judge()
            if now < best:
                best, best_step = now, step + 1
                best_state = {k: v.detach().clone() for k, v in student.state_dict().items()}
    student.load_state_dict(best_state)
    return TrainResult(start, best, best_step, steps)
