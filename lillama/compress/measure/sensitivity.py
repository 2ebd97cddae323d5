"""How much each rank of each matrix is worth to the model's loss: before any block is compressed, a
sample of the calibration tokens runs forward through the whole teacher and gradients run back, one
block in memory at a time.

For a weight error D at inputs x the loss rises by E (g^T D x)^2 / 2, where g is the gradient at the
outputs for labels drawn from the teacher's own prediction: its Fisher information, which is also
the Hessian of the divergence from the teacher. With x and g taken as independent (K-FAC, arXiv
1503.05671) that is half a sum of squared singular values of H^1/2 W C^1/2, H = E g g^T and
C = E x x^T: what a rank saves, in nats a token, the same unit for every matrix of the model.

A token whose gradient is far beyond all others says nothing about ranks and would decide them alone
(`without_outliers`).
"""

import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lillama.compress.measure.gradients import (
    GradientCollector,
    MatrixSensitivity,
    Pooled,
    without_outliers,
)
from lillama.compress.measure.moments import Key, key_of
from lillama.compress.measure.svd import damped, shrunk, spectrum
from lillama.compress.measure.vocabulary import embedding_sensitivity, head_sensitivity
from lillama.compress.plan.matrix import Matrix
from lillama.compress.teacher.activations import (
    ActivationMemory,
    ActivationStore,
    prefetched,
    stored_dtype,
)
from lillama.compress.teacher.blocks import TeacherBlocks, block_output
from lillama.config import Recipe
from lillama.data.sequences import TokenBlocks
from lillama.errors import RunError

__all__ = ["measure_sensitivity", "sample_of"]

logger = logging.getLogger(__name__)

Tick = Callable[[str, int], None]
# times the median norm of a batch: ordinary tokens stay below 15 (benchmarks/NOTES.md), and one of
# 50 weighs as much as 2,500 of them
OUTLIER = 50.0


def sample_of(blocks: TokenBlocks, tokens: int) -> TokenBlocks:
    """Return the first rows with at least `tokens` tokens, all where there are fewer; rows are
    shuffled already."""
    count = -(-tokens // blocks.shape[1])
    mask = None if blocks.mask is None else blocks.mask[:count]
    return TokenBlocks(blocks.input_ids[:count], mask)


class _Pass:
    """Borders of every block, and one gradient that moves down through them."""

    def __init__(
        self, teacher: TeacherBlocks, sample: TokenBlocks, recipe: Recipe, memory: ActivationMemory,
        tick: Tick, seed: int,
    ) -> None:  # fmt: skip
        self.teacher, self.sample, self.recipe = teacher, sample, recipe
        self.memory, self.tick, self.seed = memory, tick, seed
        self.device = teacher.device
        self.dtype = stored_dtype(self.device)
        self.count, self.seq_len = sample.shape
        self.arguments: dict[int, list[dict]] = {}  # by batch size, where nothing is padded
        self.borders: list[ActivationStore] = []
        self.left_out = torch.zeros((), dtype=torch.int64, device=self.device)
        self.gradient = self._new()

    def _new(self) -> ActivationStore:
        shape = (self.count, self.seq_len, self.teacher.model.config.hidden_size)
        return self.memory.new(shape, self.dtype)

    def close(self) -> None:
        for store in (*self.borders, self.gradient):
            store.close()

    def write_gradient(self, rows: Tensor, hidden: Tensor) -> None:
        """That of the border `hidden` [b, T, H], from which the next block down starts."""
        assert hidden.grad is not None
        gradient, left_out = without_outliers(hidden.grad, OUTLIER)
        self.left_out += left_out
        self.gradient.write(rows, gradient)

    def batches(self) -> tuple[Tensor, ...]:
        size = self.teacher.model.config.hidden_size
        rows = self.recipe.gradient_rows(self.seq_len, size)
        return torch.arange(self.count).split(rows)

    def mask(self, rows: Tensor) -> Tensor | None:
        return None if self.sample.mask is None else self.sample.mask[rows]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def forward(self) -> None:
        """Fill the borders: before each block, and behind the last."""
        first = self._new()
        with self.teacher.embeddings():
            for rows in self.batches():
                ids = self.sample.input_ids[rows]
                first.write(rows, self.teacher.inputs(ids, self.mask(rows))[0])
        first.flush()
        self.borders.append(first)
        for index in range(len(self.teacher.blocks)):
            source, sink = self.borders[-1], self._new()
            self.borders.append(sink)
            finite = torch.ones((), dtype=torch.bool, device=self.device)
            with self.teacher.block(index) as block, torch.no_grad():
                for rows, hidden in prefetched(self.batches(), source.read, source.background):
                    hidden = hidden.to(self.device, torch.float32)
                    with self.autocast():
                        hidden = block_output(block, hidden, self.kwargs(index, rows))
                    finite &= torch.isfinite(hidden).all()
                    sink.write(rows, hidden)
                    self.tick(f"block {index} sensitivity", rows.numel() * self.seq_len)
            sink.flush()
            if not bool(finite):
                raise RunError(
                    f"the output of {self.teacher.block_paths[index]} (teacher) holds NaN or "
                    "infinity; the weights of this block or of one before it are broken"
                )

    def kwargs(self, index: int, rows: Tensor) -> dict:
        if self.sample.mask is not None:
            return self.teacher.arguments((len(rows), self.seq_len), self.mask(rows))[index]
        if len(rows) not in self.arguments:
            self.arguments[len(rows)] = self.teacher.arguments((len(rows), self.seq_len), None)
        return self.arguments[len(rows)][index]

    def head(self, collector: GradientCollector) -> None:
        """The loss's gradient behind the last block, for labels that the teacher draws; the
        collector sees the output head."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        last = self.borders[-1]
        with self.teacher.head():
            for row in torch.arange(self.count).split(1):  # logits are large
                hidden = last.read(row).to(self.device, torch.float32).requires_grad_()
                collector.mask = self.mask(row)
                with torch.enable_grad(), collector.attached():
                    logits = self.teacher.logits(hidden, self.mask(row))[0].float()
                    chances = logits.detach().softmax(-1)
                    labels = torch.multinomial(chances, 1, generator=generator)[:, 0]
                    losses = F.cross_entropy(logits, labels, reduction="none")
                    if (mask := self.mask(row)) is not None:
                        losses = losses * mask[0].to(losses.device)
                    losses.sum().backward()
                assert hidden.grad is not None
                if not bool(torch.isfinite(hidden.grad).all()):
                    raise RunError(
                        "the gradient of the teacher's loss holds NaN or infinity; its weights are "
                        "broken"
                    )
                self.write_gradient(row, hidden)
        self.gradient.flush()
        self.borders.pop().close()

    def at_embeddings(self, matrix: Matrix) -> MatrixSensitivity:
        """Of the embeddings, once the gradient is through all blocks."""
        size = self.teacher.model.config.hidden_size
        gram = torch.zeros(size, size, device=self.device)
        counts = torch.zeros(matrix.N, dtype=torch.int64)
        weight = self.teacher.read(f"{matrix.name}.weight").to(self.device)
        for rows, gradient in prefetched(
            self.batches(), self.gradient.read, self.gradient.background
        ):
            ids, found = self.sample.input_ids[rows], gradient.to(self.device, torch.float32)
            embeddings = F.embedding(ids.to(self.device), weight).float().requires_grad_()
            self.teacher.embedded(embeddings, self.mask(rows)).backward(found)
            assert embeddings.grad is not None
            found = embeddings.grad
            if (mask := self.mask(rows)) is not None:
                ids, found = ids[mask], found[mask.to(self.device)]
            found = found.reshape(-1, size)
            gram += found.mT @ found
            counts += torch.bincount(ids.reshape(-1).cpu(), minlength=matrix.N)
        return embedding_sensitivity(matrix, weight, counts.to(self.device), gram, self.recipe)

    def backward(self, index: int, collector: GradientCollector, block: nn.Module) -> None:
        """Move the gradient down through a block; borders must end before it."""
        source = self.borders[-1]

        background = source.background or self.gradient.background

        def read(rows: Tensor) -> tuple[Tensor, Tensor]:
            return source.read(rows), self.gradient.read(rows)

        for rows, (hidden, gradient) in prefetched(self.batches(), read, background):
            collector.mask = self.mask(rows)
            hidden = hidden.to(self.device, torch.float32).requires_grad_()
            with torch.enable_grad(), collector.attached(), self.autocast():
                out = block_output(block, hidden, self.kwargs(index, rows))
                out.backward(gradient.to(self.device, out.dtype))
            self.write_gradient(rows, hidden)
            self.tick(f"block {index} sensitivity", rows.numel() * self.seq_len)
        self.gradient.flush()
        self.borders.pop().close()


def _of_matrix(
    matrix: Matrix,
    weight: Tensor,
    collector: GradientCollector,
    key: Key,
    pooled: Pooled,
    num_experts: int,
    sample_tokens: int,
    recipe: Recipe,
) -> MatrixSensitivity:
    moment, gradient = collector.pop_both(key, weight, pooled)
    # so many tokens as it has dimensions are made up for an expert that few were routed to
    floor = float(min(matrix.N, matrix.K)) if num_experts > 1 else 0.0
    # no token came to it or to its kind: nothing that it does is known to matter, so that no rank
    # costs anything, and its factors are those of white gradients
    power = pooled.gradient_energy / matrix.N or 1.0
    noisy = damped(weight, gradient, floor, power, recipe.gradient_damping)
    values = spectrum(weight, shrunk(weight, moment, recipe.shrinkage), noisy)
    left = values.flip(0).cumsum(0).flip(0)
    # other text than this is routed otherwise: every expert counts for something
    mean = pooled.tokens / num_experts
    used = (1 - recipe.share_floor) * gradient.tokens + recipe.share_floor * mean
    used = used if pooled.gradient_energy else 0.0
    losses = (left * (used / sample_tokens / 2)).tolist()
    return MatrixSensitivity([losses[rank] for rank in matrix.ranks], noisy.float())


def measure_sensitivity(
    teacher: TeacherBlocks,
    matrices: Sequence[Matrix],
    blocks: TokenBlocks,
    recipe: Recipe,
    memory: ActivationMemory,
    tick: Tick,
    seed: int,
    on_block: Callable[[int, dict[str, MatrixSensitivity]], None],
) -> None:
    """Call `on_block(index, {matrix name: its sensitivity})` for every block with target matrices,
    from the last to the first, and at the end with index -1 for embeddings and head, if they are
    among the matrices.

    Args:
        matrices: those that may be factorised. blocks: training tokens, of which
        `recipe.gradient_tokens` are used. tick(stage, tokens): progress; stops by raising.

    Raises:
        RunError: a weight, an activation or a gradient is not finite; no room for the activations.
    """
    sample = sample_of(blocks, recipe.gradient_tokens(teacher.model.config.hidden_size))
    run = _Pass(teacher, sample, recipe, memory, tick, seed)
    by_block: dict[int, list[Matrix]] = {}
    for matrix in matrices:
        by_block.setdefault(matrix.block, []).append(matrix)
    embeddings, heads = by_block.pop(-1, []), by_block.pop(len(teacher.blocks), [])
    outside: dict[str, MatrixSensitivity] = {}
    first = 0 if embeddings else min(by_block, default=len(teacher.blocks))
    try:
        run.forward()
        path = teacher.family.runtime_head
        seen = GradientCollector(teacher.model, teacher.family, [path] if heads else [], False)
        run.head(seen)
        for matrix in heads:
            weight = teacher.read(f"{matrix.name}.weight").to(teacher.device)
            outside[matrix.name] = head_sensitivity(matrix, weight, seen, path, recipe)
        for index in range(len(teacher.blocks) - 1, first - 1, -1):
            targets = by_block.get(index, [])
            with teacher.block(index) as block:
                prefix = f"{teacher.block_paths[index]}."
                keys = {m.name: key_of(teacher.family, prefix, m.name) for m in targets}
                linears = [key for key in keys.values() if isinstance(key, str)]
                with_experts = len(linears) < len(keys)
                collector = GradientCollector(block, teacher.family, linears, with_experts)
                run.backward(index, collector, block)
            if targets:
                on_block(index, _of_block(teacher, targets, keys, collector, sample, recipe))
        for matrix in embeddings:
            outside[matrix.name] = run.at_embeddings(matrix)
        if outside:
            on_block(-1, outside)
        if left_out := int(run.left_out):
            logger.warning(
                "ranks: left out %d gradients of single tokens between blocks, each over %g times "
                "the median of its batch, as where the embedding of the first token is 0",
                left_out, OUTLIER,
            )  # fmt: skip
    finally:
        run.close()


def _of_block(
    teacher: TeacherBlocks,
    targets: Sequence[Matrix],
    keys: dict[str, Key],
    collector: GradientCollector,
    sample: TokenBlocks,
    recipe: Recipe,
) -> dict[str, MatrixSensitivity]:
    found = {}
    pooled = collector.pooled(keys.values())
    # an expert's "up" may share the moment of its "gate", which therefore comes last
    for matrix in sorted(targets, key=lambda m: keys[m.name][-1] != "up"):
        key = keys[matrix.name]
        weight = teacher.matrix(matrix.name).to(teacher.device)
        config = teacher.model.config
        experts = teacher.family.num_experts(config) if isinstance(key, tuple) else 1
        found[matrix.name] = _of_matrix(
            matrix, weight, collector, key, pooled[key], experts, sample.num_tokens, recipe
        )
    return found
