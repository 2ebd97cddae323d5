"""Second moments of what flows into each target matrix, in fp64, gathered while the teacher block
runs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lillama.families import PROJECTIONS, Family
from lillama.modules.replace import dense_expert

__all__ = ["GramCollector"]


class GramCollector:
    """Gram matrices sum x x^T [K, K] and token counts per target of one block.

    Linear layers are keyed by their path in the block; experts by (path, expert, "gate" | "down"),
    as gate and up share their input. `mask` must be set before each forward pass ([b, T] bool or
    None): padding is left out.
    """

    def __init__(
        self, block: nn.Module, family: Family, linears: list[str], with_experts: bool
    ) -> None:
        self.block = block
        self.family = family
        self.linears = linears
        self.with_experts = with_experts
        self.grams: dict[Any, Tensor] = {}
        self.counts: dict[Any, int] = {}
        self.mask: Tensor | None = None

    def _add(self, key: Any, rows: Tensor) -> None:
        rows = rows.double()
        gram = rows.mT @ rows
        if key in self.grams:
            self.grams[key] += gram
        else:
            self.grams[key] = gram
        self.counts[key] = self.counts.get(key, 0) + rows.shape[0]

    def _kept(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        return rows if self.mask is None else rows[self.mask.reshape(-1).to(rows.device)]

    def _experts_hook(self, path: str, experts: nn.Module, args: tuple, kwargs: Mapping) -> None:
        hidden, topk_index = args[0], args[1]
        kept = None if self.mask is None else self.mask.reshape(-1).to(hidden.device)
        for expert in range(experts.get_parameter("down_proj").shape[0]):
            routed = (topk_index == expert).any(-1)
            rows = hidden[routed if kept is None else routed & kept]
            self._add((path, expert, "gate"), rows)
            gate, up = (dense_expert(experts, name, expert) for name in PROJECTIONS[:2])
            self._add((path, expert, "down"), F.silu(rows @ gate.mT) * (rows @ up.mT))

    @contextmanager
    def attached(self) -> Iterator["GramCollector"]:
        """Collect from every forward pass of the block inside the context."""
        handles = []
        for path in self.linears:

            def linear_hook(module: nn.Module, args: tuple, path: str = path) -> None:
                self._add(path, self._kept(args[0]))

            handles.append(self.block.get_submodule(path).register_forward_pre_hook(linear_hook))
        if self.with_experts and self.family.experts is not None:
            path = self.family.experts.runtime

            def experts_hook(module: nn.Module, args: tuple, kwargs: Mapping) -> None:
                self._experts_hook(path, module, args, kwargs)

            experts = self.block.get_submodule(path)
            handles.append(experts.register_forward_pre_hook(experts_hook, with_kwargs=True))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def shared(self, path: str, kind: str) -> tuple[Tensor, int]:
        """Gram and count summed over all experts of a module."""
        keys = [
            key
            for key in self.grams
            if isinstance(key, tuple) and key[0] == path and key[2] == kind
        ]
        total = torch.stack([self.grams[key] for key in keys]).sum(0)
        return total, sum(self.counts[key] for key in keys)
