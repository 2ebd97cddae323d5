"""Second moments of inputs and of the loss's gradients at every target matrix of one block,
gathered while gradients flow back through it; and gradients that must not flow on."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lillama.compress.measure.moments import Key, MomentCollector
from lillama.compress.measure.svd import Moment
from lillama.compress.plan.matrix import moment_side
from lillama.models.dense_linear import DenseLinear, linear_weight
from lillama.models.families import Family
from lillama.modules.replace import dense_expert

__all__ = ["GradientCollector", "MatrixSensitivity", "Pooled", "without_outliers"]


class MatrixSensitivity(NamedTuple):
    """losses: nats a token that each of `Matrix.ranks` is expected to cost. gradient [side, side]
    fp32: the damped moment for `whitened_svd`. moment: that of the inputs, where nothing measures
    it again."""

    losses: list[float]
    gradient: Tensor
    moment: Tensor | None = None


class Pooled(NamedTuple):
    """Of all matrices of one kind in a block (one projection of every expert): tokens, and means
    over them of ||x||^2 and ||g||^2."""

    tokens: float
    input_energy: float
    gradient_energy: float


class GradientCollector(MomentCollector):
    """As its base class, and the gradients' moments; everything is added in the backward pass, so
    that a forward pass that autograd repeats counts once.

    `mask` must be set before each forward pass and stay until its backward pass is through.
    """

    def __init__(
        self, block: nn.Module, family: Family, linears: list[str], with_experts: bool
    ) -> None:
        super().__init__(block, family, linears, with_experts)
        self._gradients: dict[Key, Moment] = {}

    def _add_gradient(self, key: Key, weight: Tensor, gradient: Tensor) -> None:
        N, K = weight.shape
        side = moment_side(N, K)
        with torch.autocast(gradient.device.type, enabled=False):
            gradient = gradient.reshape(-1, N).float()
            rows = gradient @ weight.to(gradient.dtype) if side == "input" else gradient
            gram = rows.mT @ rows
        energy = float(torch.linalg.vector_norm(gradient, dtype=torch.float64) ** 2)
        tokens = float(len(gradient))
        old = self._gradients.get(key)
        if old is not None:
            gram = old.gram.add_(gram)
            energy, tokens = energy + old.energy, tokens + old.tokens
        self._gradients[key] = Moment(side, gram, tokens, energy)

    def _see_linear(self, path: str, module: DenseLinear, x: Tensor, y: Tensor) -> None:
        inputs, outputs = x.detach(), y.detach()  # a hook that holds y itself would be a cycle

        def hook(gradient: Tensor) -> None:
            super(GradientCollector, self)._see_linear(path, module, inputs, outputs)
            self._add_gradient(path, linear_weight(module), self._kept(gradient))

        y.register_hook(hook)

    def _see_expert(self, rows: Tensor, expert: int, projection: str, x: Tensor, y: Tensor) -> None:
        if len(rows) == 0:
            return
        inputs, outputs = x.detach(), y.detach()
        kept = None if self.mask is None else self.mask.reshape(-1).to(rows.device)[rows]

        def hook(gradient: Tensor) -> None:
            super(GradientCollector, self)._see_expert(rows, expert, projection, inputs, outputs)
            assert self.experts_path is not None
            experts = self.block.get_submodule(self.experts_path)
            weight = dense_expert(experts, projection, expert)
            gradient = gradient if kept is None else gradient[kept]
            self._add_gradient((self.experts_path, expert, projection), weight, gradient)

        y.register_hook(hook)

    def pooled(self, keys: Iterable[Key]) -> dict[Key, Pooled]:
        """For each matrix what all matrices of its kind saw: the same projection of every expert; a
        linear layer stands alone."""

        def kind(key: Key) -> str:
            return key[2] if isinstance(key, tuple) else key

        def sums(found: dict[Key, Moment], wanted: str) -> tuple[float, float]:
            moments = [moment for key, moment in found.items() if kind(key) == wanted]
            return sum(m.tokens for m in moments), sum(m.energy for m in moments)

        pools = {}
        for name in {kind(key) for key in keys}:
            tokens, gradients = sums(self._gradients, name)
            seen, inputs = sums(self._found, name)
            if not seen:  # "up" where the moments of "gate" serve both
                seen, inputs = sums(self._found, "gate")
            pools[name] = Pooled(tokens, inputs / max(seen, 1.0), gradients / max(tokens, 1.0))
        return {key: pools[kind(key)] for key in keys}

    def pop_both(self, key: Key, weight: Tensor, pooled: Pooled) -> tuple[Moment, Moment]:
        """The moments of a weight [N, K]'s inputs or outputs and of its gradients, no longer held
        here. Of one that no token came to, such as an expert: of one made-up token of white inputs,
        and nothing."""
        side, size = moment_side(*weight.shape), min(weight.shape)
        moment, gradient = self.pop(key), self._gradients.pop(key, None)
        nothing = torch.zeros(size, size, device=weight.device)
        if moment is None:
            moment = Moment(side, nothing, 1.0, pooled.input_energy)
        if gradient is None:
            gradient = Moment(side, nothing, 0.0, 0.0)
        return moment, gradient


def without_outliers(gradient: Tensor, times: float) -> tuple[Tensor, Tensor]:
    """gradient [b, T, H] with 0 in place of tokens whose norm is over `times` the median of those
    that are not 0, and how many these are (int64, on its device).

    Where a hidden state is 0, a norm divides by the root of its epsilon: 316 times an ordinary
    gradient, once a norm. Models whose padding token, with its embedding of 0, also ends documents
    have such rows: behind nothing but that token every block puts out 0.
    """
    norms = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float32)
    median = norms.masked_fill(norms == 0, torch.nan).nanmedian()
    far = norms > times * median
    return gradient.masked_fill(far[..., None], 0.0), far.sum()
