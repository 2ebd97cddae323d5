"""LowRankExperts with factors in the pivot gauge."""

import torch
from lillama_kernels import PivotExpertFactors, PivotProjectionFactors, pivot_low_rank_experts
from torch import Tensor

from lillama.checkpoint.pivots import marks_of
from lillama.models.families import PROJECTIONS
from lillama.modules.low_rank_experts import LowRankExperts

__all__ = ["PivotLowRankExperts"]


class PivotLowRankExperts(LowRankExperts):
    """As LowRankExperts, a factorised matrix being cat([A, C A])[order]; parameters
    `<projection>_A`, `<projection>_C`, `<projection>_W`, buffers `<projection>_order` [E, N] int32
    (of a dense expert without a meaning). A checkpoint holds marks in place of the order, see
    checkpoint/pivots.py; loading and saving exchange them."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for name in PROJECTIONS:
            A, order = getattr(self, f"{name}_A"), None
            if A is not None:
                N, _ = self.projection_shape(name)
                order = torch.arange(N, dtype=torch.int32, device=A.device)
                order = order.repeat(self.num_experts, 1)
            self.register_buffer(f"{name}_order", order)

    def _shapes(self, projection: str) -> dict[str, tuple[int, int, int] | None]:
        shapes, ranks = super()._shapes(projection), self.ranks[projection]
        C = shapes.pop("B")
        if C is not None:
            num_experts, N, rank = C
            C = num_experts, N - min(rank for rank in ranks if rank), rank
        return {"A": shapes["A"], "C": C, "W": shapes["W"]}

    def factors(self) -> PivotExpertFactors:  # type: ignore[override]
        return PivotExpertFactors(
            *(
                PivotProjectionFactors(
                    self.ranks[name],
                    *(getattr(self, f"{name}_{suffix}") for suffix in ("A", "C", "order", "W")),
                )
                for name in PROJECTIONS
            )
        )

    def stored(self, projection: str, expert: int) -> dict[str, Tensor]:
        """As of LowRankExperts, {"lr_A": [R, K], "lr_C": [N - R, R], "lr_pivots": [N]} or
        {"lr_W": [N, K]}; the marks are no view.

        Raises:
            ValueError: marks cannot express the order of outputs.
        """
        rank = self.ranks[projection][expert]
        if rank == 0:
            return super().stored(projection, expert)
        order = self.order(projection, expert)
        return {
            "lr_A": getattr(self, f"{projection}_A")[expert, :rank],
            "lr_C": getattr(self, f"{projection}_C")[expert, : len(order) - rank, :rank],
            "lr_pivots": marks_of(order, rank),
        }

    def order(self, projection: str, expert: int) -> Tensor:
        """Of the outputs of one factorised matrix, [N] int32; a view."""
        return self.get_buffer(f"{projection}_order")[expert]

    def combined(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return pivot_low_rank_experts(hidden_states, top_k_index, top_k_weights, self.factors())

    @torch.no_grad()
    def plain(self) -> LowRankExperts:
        """The same experts with B = cat([identity, C])[order] written out: R^2 numbers more for
        each matrix, and an operation that has a Triton kernel."""
        like = next(self.parameters())
        new = LowRankExperts(
            self.config, self.num_experts, self.hidden_dim, self.intermediate_dim, self.ranks,
            like.device, like.dtype,
        )  # fmt: skip
        for projection in PROJECTIONS:
            for expert, rank in enumerate(self.ranks[projection]):
                old, target = self.stored(projection, expert), new.stored(projection, expert)
                if rank == 0:
                    target["lr_W"].copy_(old["lr_W"])
                    continue
                eye = torch.eye(rank, dtype=like.dtype, device=like.device)
                target["lr_A"].copy_(old["lr_A"])
                order = self.order(projection, expert).long()
                target["lr_B"].copy_(torch.cat([eye, old["lr_C"]])[order])
        return new.requires_grad_(like.requires_grad)
