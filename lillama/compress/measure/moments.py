"""Second moments of what flows through each target matrix, gathered while the teacher block runs.

An expert that few calibration tokens were routed to says little about itself. Below `floor` tokens
(hidden_size of them: fewer cannot span its inputs) the missing ones are made up by spread routing:
a sample of the whole layer's tokens is sent through the expert as if the router had chosen it.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lillama.compress.measure.svd import Moment
from lillama.compress.plan.matrix import moment_side
from lillama.compress.teacher.experts import dense_experts_forward, expert_forward
from lillama.models.dense_linear import DenseLinear
from lillama.models.families import PROJECTIONS, Family

__all__ = ["Key", "MomentCollector", "key_of"]

# (runtime path of the experts module, expert, projection), or the path of a linear layer
Key = tuple[str, int, str] | str


def key_of(family: Family, prefix: str, name: str) -> Key:
    """Of the matrix with the hub name `name` in the block whose names begin with `prefix`."""
    inside = name.removeprefix(prefix)
    parsed = None if family.experts is None else family.experts.parse(inside)
    return inside if parsed is None else parsed


class MomentCollector:
    """Moments per target matrix of one block, each of its smaller side.

    Args:
        block: the teacher's block, with its weights.
        linears: paths in the block of the linear targets; with_experts: all experts too.
        floor: tokens an expert should have seen (the missing ones are made up in `finish`).
        sample_rows: rows kept of each batch for that.

    `mask` must be set before each forward pass ([b, T] bool or None): padding is left out.
    """

    def __init__(
        self,
        block: nn.Module,
        family: Family,
        linears: list[str],
        with_experts: bool,
        *,
        floor: int = 0,
        sample_rows: int = 0,
    ) -> None:
        self.block = block
        self.linears = linears
        self.experts_path = family.experts.runtime if with_experts and family.experts else None
        self.floor = floor
        self.sample_rows = sample_rows
        self.mask: Tensor | None = None
        self._found: dict[Key, Moment] = {}
        self._sample: list[Tensor] = []

    def _add(self, key: Key, x: Tensor, y: Tensor, weight: float = 1.0) -> None:
        side = moment_side(y.shape[-1], x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            rows = (x if side == "input" else y).float()
            gram = rows.mT @ rows
            energy = float(torch.linalg.vector_norm(x.float(), dtype=torch.float64) ** 2) * weight
        count = float(x.shape[0]) * weight
        old = self._found.get(key)
        if old is None:
            # in fp32: half the memory, and shrinkage drowns the last digits anyway
            found = gram.mul_(weight)
        else:
            found = old.gram.add_(gram, alpha=weight)
            count, energy = old.tokens + count, old.energy + energy
        self._found[key] = Moment(side, found, count, energy)

    def _kept(self, hidden: Tensor) -> Tensor:
        """Return the rows that count of what a layer sees."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        return rows if self.mask is None else rows[self.mask.reshape(-1).to(rows.device)]

    def _see_expert(self, rows: Tensor, expert: int, projection: str, x: Tensor, y: Tensor) -> None:
        assert self.experts_path is not None
        # gate and up have the same inputs: one moment serves both
        if projection == "up" and moment_side(y.shape[-1], x.shape[-1]) == "input":
            return
        if self.mask is not None:
            kept = self.mask.reshape(-1).to(rows.device)[rows]
            x, y = x[kept], y[kept]
        self._add((self.experts_path, expert, projection), x, y)

    def _experts_forward(
        self, experts: nn.Module, hidden: Tensor, topk_index: Tensor, topk_weight: Tensor
    ) -> Tensor:
        if sum(map(len, self._sample)) < self.floor:
            self._sample.append(self._kept(hidden)[: self.sample_rows].clone())
        return dense_experts_forward(experts, hidden, topk_index, topk_weight, self._see_expert)

    def _see_linear(self, path: str, module: DenseLinear, x: Tensor, y: Tensor) -> None:
        y = y if module.bias is None else y - module.bias
        self._add(path, self._kept(x), self._kept(y))

    @contextmanager
    def attached(self) -> Iterator["MomentCollector"]:
        """Collect from every forward pass of the block inside the context."""
        handles: list[Any] = []
        experts, previous = None, None
        for path in self.linears:

            def linear_hook(module: nn.Module, args: tuple, output: Tensor, path: str = path):
                assert isinstance(module, DenseLinear)
                self._see_linear(path, module, args[0], output)

            handles.append(self.block.get_submodule(path).register_forward_hook(linear_hook))
        if self.experts_path is not None:
            experts = self.block.get_submodule(self.experts_path)
            previous = experts.__dict__.get("forward")
            experts.forward = functools.partial(self._experts_forward, experts)
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            if experts is not None:
                del experts.forward
                if previous is not None:
                    experts.forward = previous

    @torch.no_grad()
    def finish(self) -> None:
        """Make up the missing tokens of experts below the floor; once, after the last batch."""
        if self.experts_path is None or not self._sample:
            return
        sample = torch.cat(self._sample)[: self.floor]
        self._sample = []
        experts = self.block.get_submodule(self.experts_path)
        for expert, count in self.expert_tokens().items():
            if count >= self.floor:
                continue
            weight = (self.floor - count) / len(sample)

            def spread(
                projection: str, x: Tensor, y: Tensor, expert: int = expert, weight: float = weight
            ) -> None:
                assert self.experts_path is not None
                if (key := (self.experts_path, expert, projection)) in self._found:
                    self._add(key, x, y, weight)

            expert_forward(experts, expert, sample, spread)

    def expert_tokens(self) -> dict[int, int]:
        """Calibration tokens routed to each expert; after `finish`, those made up count too."""
        return {
            key[1]: round(moment.tokens)
            for key, moment in self._found.items()
            if isinstance(key, tuple) and key[2] == PROJECTIONS[0]
        }

    def pop(self, key: Key) -> Moment | None:
        """The moment of a matrix, no longer held here; None when none was collected. That of an
        expert's "up" may be its "gate"'s."""
        if isinstance(key, tuple) and key[2] == "up" and key not in self._found:
            key = (key[0], key[1], "gate")
            return self._found.get(key)
        return self._found.pop(key, None)
