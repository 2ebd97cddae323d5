"""Drop-in for transformers' stacked experts module (MixtralExperts and its kin) with low-rank
factors.

Each expert and projection has a rank of its own; factors are stored stacked and padded with zeros
to the largest rank of their projection. The padding gets exactly zero gradient (each padded row of
A meets a zero column of B), so it stays zero through training. Not a subclass of MixtralExperts:
transformers initialises that class by touching `gate_up_proj`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lillama_kernels import (
    ExpertFactors,
    PivotExpertFactors,
    PivotProjectionFactors,
    ProjectionFactors,
    low_rank_experts,
    pivot_low_rank_experts,
)
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    ExpertsInterface,
    use_experts_implementation,
)

from lillama.checkpoint.gauge import plain_tensors
from lillama.checkpoint.names import (
    PERMUTATION,
    STACKED,
    stacked_name,
    stacked_place,
    stacked_shape,
)
from lillama.checkpoint.pivots import as_stored
from lillama.models.families import PROJECTIONS

__all__ = ["LowRankExperts", "PivotLowRankExperts"]


class _LowRankExpertsInterface(ExpertsInterface):
    """The names a user or generate() may set ("grouped_mm", "batched_mm" and any other that
    transformers knows for its dense experts), all served by our op.

    A mapping of its own: ExpertsInterface.register writes the class's mapping.
    """

    _global_mapping = {}


def _forward(
    experts: "LowRankExperts", hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    return experts.combined(hidden_states, top_k_index, top_k_weights)


_INTERFACE = _LowRankExpertsInterface()
for _name in ALL_EXPERTS_FUNCTIONS:
    _INTERFACE.register(_name, _forward)


class LowRankExperts(nn.Module):
    """out = sum_k w_k down(silu(gate(x)) * up(x)); parameters `<projection>_A`, `<projection>_B`,
    `<projection>_W`.

    Args:
        config: the model's config; `hidden_act` must be silu.
        num_experts, hidden_size, intermediate_size: E, H, I.
        ranks: for "gate", "up" and "down" the E ranks; 0 keeps that expert's projection dense (in
            `_W`).

    Raises:
        ValueError: activation other than silu, or ranks of the wrong number.
    """

    gauge: ClassVar[str] = "plain"
    config: PretrainedConfig  # set by use_experts_implementation

    def __init__(
        self,
        config: PretrainedConfig,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        ranks: Mapping[str, Sequence[int]],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if config.hidden_act != "silu":
            raise ValueError(f"experts must use silu, got hidden_act {config.hidden_act!r}")
        self.num_experts = num_experts
        self.hidden_dim = hidden_size
        self.intermediate_dim = intermediate_size
        self.ranks = {name: tuple(ranks[name]) for name in PROJECTIONS}
        for name, ranks_e in self.ranks.items():
            if len(ranks_e) != num_experts:
                raise ValueError(f"{name} needs {num_experts} ranks, got {len(ranks_e)}")
            for key in STACKED[self.gauge]:
                self._register(name, key, device, dtype)

    def _register(
        self,
        projection: str,
        key: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Make one tensor of a projection; None where no expert has it."""
        shape = stacked_shape(key, self.projection_shape(projection), self.ranks[projection])
        name, value = stacked_name(projection, key), None
        if key == PERMUTATION:
            if shape is not None:
                value = torch.arange(shape[1], dtype=torch.int32, device=device)
                value = value.repeat(self.num_experts, 1)
            self.register_buffer(name, value)
            return
        if shape is not None:
            value = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.register_parameter(name, value)

    def projection_shape(self, projection: str) -> tuple[int, int]:
        """Return (N, K) of one projection: gate and up [I, H], down [H, I]."""
        if projection == "down":
            return self.hidden_dim, self.intermediate_dim
        return self.intermediate_dim, self.hidden_dim

    def _stacked(self, projection: str) -> list[Any]:
        return [getattr(self, stacked_name(projection, key)) for key in STACKED[self.gauge]]

    def factors(self) -> ExpertFactors:
        return ExpertFactors(
            *(ProjectionFactors(self.ranks[name], *self._stacked(name)) for name in PROJECTIONS)
        )

    def matrix(self, projection: str, expert: int) -> dict[str, Tensor]:
        """Return the tensors of one matrix by the ends of their names: views, without padding."""
        (N, _), ranks = self.projection_shape(projection), self.ranks[projection]
        return {
            key: stack[place]
            for key, stack in zip(STACKED[self.gauge], self._stacked(projection), strict=True)
            if (place := stacked_place(key, ranks, expert, N)) is not None
        }

    def stored(self, projection: str, expert: int) -> dict[str, Tensor]:
        """As `matrix`, what a checkpoint stores. Raises ValueError as `pivot_mask_of`."""
        return as_stored(self.matrix(projection, expert), self.ranks[projection][expert])

    def combined(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return what `forward` returns, whatever implementation the config names."""
        return low_rank_experts(hidden_states, top_k_index, top_k_weights, self.factors())

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [M, H], top_k_index [M, k], top_k_weights [M, k] -> [M, H]."""
        return _forward(self, hidden_states, top_k_index, top_k_weights)

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{name} {min(r)}..{max(r)}" for name, r in self.ranks.items())
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_dim}, "
            f"intermediate_size={self.intermediate_dim}, ranks: {ranks}"
        )


# Edits the class in place; as a decorator it would hide the class from type checkers.
use_experts_implementation(LowRankExperts, experts_interface=_INTERFACE)


class PivotLowRankExperts(LowRankExperts):
    """As LowRankExperts, a factorised matrix being cat([A, C A])[permutation]; parameters
    `<projection>_A`, `<projection>_C`, `<projection>_W`, buffers `<projection>_order` [E, N] int32
    (of a dense expert without a meaning). A checkpoint holds a mask in place of the permutation
    (`checkpoint/pivots.py`); loading and saving exchange them."""

    gauge = "pivot"

    def factors(self) -> PivotExpertFactors:  # type: ignore[override]
        return PivotExpertFactors(
            *(
                PivotProjectionFactors(self.ranks[name], *self._stacked(name))
                for name in PROJECTIONS
            )
        )

    def combined(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return pivot_low_rank_experts(hidden_states, top_k_index, top_k_weights, self.factors())

    @torch.no_grad()
    def plain(self) -> LowRankExperts:
        """Return the same experts with B = cat([identity, C])[permutation] written out: R^2 numbers
        more for each matrix, and an operation that has a Triton kernel."""
        like = next(self.parameters())
        new = LowRankExperts(
            self.config, self.num_experts, self.hidden_dim, self.intermediate_dim, self.ranks,
            like.device, like.dtype,
        )  # fmt: skip
        for projection in PROJECTIONS:
            for expert, rank in enumerate(self.ranks[projection]):
                old = self.stored(projection, expert)
                if rank:
                    old = dict(zip(STACKED["plain"], plain_tensors(old), strict=False))
                for key, target in new.matrix(projection, expert).items():
                    target.copy_(old[key])
        return new.requires_grad_(like.requires_grad)
