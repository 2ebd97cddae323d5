"""The factorised output head, trained as if it were a last block.

It is fed what the student's blocks put out and learns the teacher's predictions from what the
teacher's put out: the divergence of the predictions, since behind the head there is no feature left
to compare. The final norm learns with it. Nothing but what is outside the blocks is in memory.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lillama.compress.teacher.blocks import TeacherBlocks
from lillama.compress.train.block_inputs import HeadInputs
from lillama.compress.train.distill import learning_rate_at, shuffled
from lillama.compress.train.finetune import divergence
from lillama.config import Recipe
from lillama.errors import RunError

__all__ = ["HeadTrainer"]


class HeadTrainer:
    """Factors A [R, H] and B [V, R] of the head, and the vectors behind the blocks by runtime name.

    Args:
        teacher: used inside `teacher.head()` only. head: runtime name of the head's weight.
        factors: A and B. recipe: rates, batches, how often to judge. seed: of the order.
    """

    def __init__(
        self,
        teacher: TeacherBlocks,
        head: str,
        factors: tuple[Tensor, Tensor],
        vectors: dict[str, Tensor],
        recipe: Recipe,
        seed: int,
    ) -> None:
        self.teacher, self.head, self.recipe, self.seed = teacher, head, recipe, seed
        device = teacher.device
        self.A, self.B = (nn.Parameter(f.to(device, torch.float32).contiguous()) for f in factors)
        self.vectors = {
            name: nn.Parameter(value.to(device, torch.float32)) for name, value in vectors.items()
        }
        self.parameters = [self.A, self.B, *self.vectors.values()]
        self.peak = recipe.peak_learning_rate(self.A.shape[1])
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.peak, weight_decay=recipe.weight_decay, fused=True
        )
        self.best = [parameter.detach().clone() for parameter in self.parameters]

    def _loss(self, stream: HeadInputs, row: Tensor, product: Tensor) -> Tensor:
        """Divergence summed over the counted tokens of one sequence; `row` [1]."""
        device = self.teacher.device
        mask = None if stream.mask is None else stream.mask[row].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            with torch.no_grad():
                hidden = stream.teacher.read(row).to(device, torch.float32)
                theirs = self.teacher.logits(hidden, mask)
            hidden = stream.student.read(row).to(device, torch.float32)
            weights = {self.head: product, **self.vectors}
            ours = self.teacher.logits(hidden, mask, weights)
        return divergence(ours, theirs, mask)

    @torch.no_grad()
    def judge(self, stream: HeadInputs) -> float:
        """Mean divergence of a whole stream.

        Raises:
            RunError: it is NaN or infinite.
        """
        product = self.B @ self.A
        rows = torch.arange(len(stream.student))
        total = torch.zeros((), dtype=torch.float64, device=self.teacher.device)
        for row in rows.split(1):
            total += self._loss(stream, row, product).double()
        mean = float(total) / stream.tokens(rows)
        if not math.isfinite(mean):
            raise RunError(
                f"the held-out divergence of the output head became {mean}; lower the learning rate"
            )
        return mean

    def step(self, stream: HeadInputs, rows: Tensor, rate: float) -> None:
        """One step on a batch, sequence by sequence: their logits are large. The gradient of the
        product B A is summed over them, and then passed on to the factors."""
        product = (self.B @ self.A).detach().requires_grad_()
        tokens = stream.tokens(rows)
        with torch.enable_grad():
            for row in rows.split(1):
                (self._loss(stream, row, product) / max(1, tokens)).backward()
        if product.grad is not None:
            with torch.no_grad():
                self.A.grad, self.B.grad = self.B.mT @ product.grad, product.grad @ self.A.mT
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.recipe.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def train(
        self, train: HeadInputs, held_out: HeadInputs, on_step: Callable[[int], None]
    ) -> dict[str, Any]:
        """One pass over the rows; leaves the best state, the untrained one if nothing was better.

        Raises:
            RunError: a divergence is NaN or infinite.
        """
        batches = shuffled(len(train.student), self.recipe.batch_size, self.seed)
        every = max(1, math.ceil(len(batches) / self.recipe.evaluations))
        before = best = self.judge(held_out)
        best_step = 0
        for step, rows in enumerate(batches, start=1):
            rate = learning_rate_at(self.peak, step - 1, len(batches), self.recipe.warmup_fraction)
            self.step(train, rows, rate)
            on_step(len(rows))
            if step % every and step < len(batches):
                continue
            if (value := self.judge(held_out)) < best:
                best, best_step = value, step
                for kept, parameter in zip(self.best, self.parameters, strict=True):
                    kept.copy_(parameter.detach())
        with torch.no_grad():
            for kept, parameter in zip(self.best, self.parameters, strict=True):
                parameter.copy_(kept)
        return {
            "held_out_kl_before": before,
            "held_out_kl_after": best,
            "steps": len(batches),
            "best_step": best_step,
        }
