"""Drop-in for transformers' stacked experts module (MixtralExperts and its kin) with low-rank
factors.

Each expert and projection has a rank of its own; factors are stored stacked and padded with zeros
to the largest rank of their projection. The padding gets exactly zero gradient (each padded row of
A meets a zero column of B), so it stays zero through training. Not a subclass of MixtralExperts:
transformers initialises that class by touching `gate_up_proj`.
"""

from collections.abc import Mapping, Sequence

import torch
from lillama_kernels import ExpertFactors, ProjectionFactors, low_rank_experts
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    ExpertsInterface,
    use_experts_implementation,
)

from lillama.models.families import PROJECTIONS

__all__ = ["LowRankExperts"]


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
            for suffix, shape in self._shapes(name).items():
                value = None if shape is None else torch.zeros(shape, device=device, dtype=dtype)
                self.register_parameter(
                    f"{name}_{suffix}", None if value is None else nn.Parameter(value)
                )

    def _shapes(self, projection: str) -> dict[str, tuple[int, int, int] | None]:
        """{suffix: shape} of one projection's parameters; None for one that it does not have."""
        (N, K), ranks = self.projection_shape(projection), self.ranks[projection]
        num_dense, rank = ranks.count(0), max(ranks)
        return {
            "A": (self.num_experts, rank, K) if rank else None,
            "B": (self.num_experts, N, rank) if rank else None,
            "W": (num_dense, N, K) if num_dense else None,
        }

    def projection_shape(self, projection: str) -> tuple[int, int]:
        """(N, K) of one projection: gate and up [I, H], down [H, I]."""
        if projection == "down":
            return self.hidden_dim, self.intermediate_dim
        return self.intermediate_dim, self.hidden_dim

    def factors(self) -> ExpertFactors:
        return ExpertFactors(
            *(
                ProjectionFactors(
                    self.ranks[name], *(getattr(self, f"{name}_{suffix}") for suffix in "ABW")
                )
                for name in PROJECTIONS
            )
        )

    def stored(self, projection: str, expert: int) -> dict[str, Tensor]:
        """Views, without padding, of what the checkpoint stores: {"lr_A": [r, K], "lr_B": [N, r]}
        or {"lr_W": [N, K]}."""
        rank = self.ranks[projection][expert]
        if rank == 0:
            index = self.ranks[projection][:expert].count(0)
            return {"lr_W": getattr(self, f"{projection}_W")[index]}
        return {
            "lr_A": getattr(self, f"{projection}_A")[expert, :rank],
            "lr_B": getattr(self, f"{projection}_B")[expert, :, :rank],
        }

    def combined(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What `forward` returns, whatever implementation the config names."""
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
