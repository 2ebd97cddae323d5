"""Experts lie one by one in a checkpoint and stacked in a model: what transformers needs to know to
stack factors while it loads."""

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter

from lillama.families import FAMILIES, PROJECTIONS, Family

__all__ = ["expert_conversions"]


class _StackFactors(ConversionOps):
    """Per-expert tensors of one projection -> one stacked tensor, padded with zeros to the largest
    rank."""

    def __init__(self, projection: str, suffix: str) -> None:
        self.projection = projection
        self.suffix = suffix

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        tensors = next(iter(input_dict.values()))
        path = kwargs["full_layer_name"].removesuffix(f".{self.projection}_{self.suffix}")
        module = kwargs["model"].get_submodule(path)
        ranks = module.ranks[self.projection]
        owners = [e for e, rank in enumerate(ranks) if (rank == 0) == (self.suffix == "W")]
        if len(owners) != len(tensors):
            raise ValueError(
                f"{path} needs {len(owners)} tensors of {self.projection}, got {len(tensors)}"
            )
        shape = getattr(module, f"{self.projection}_{self.suffix}").shape
        stacked = tensors[0].new_zeros(shape)
        if self.suffix == "order":  # of a dense expert, as the module has it from the beginning
            stacked += torch.arange(shape[1], dtype=stacked.dtype, device=stacked.device)
        for row, (expert, tensor) in enumerate(zip(owners, tensors, strict=True)):
            if self.suffix == "A":
                stacked[expert, : ranks[expert]] = tensor
            elif self.suffix == "B":
                stacked[expert, :, : ranks[expert]] = tensor
            elif self.suffix == "C":
                stacked[expert, : len(tensor), : ranks[expert]] = tensor
            elif self.suffix == "order":
                stacked[expert] = tensor
            else:
                stacked[row] = tensor
        return {target_patterns[0]: stacked}

    @property
    def reverse_op(self) -> ConversionOps:
        # saving goes through get_state_dict_and_metadata, whose names no reversed pattern matches
        return self


def expert_conversions(found: Family | None = None) -> list[WeightConverter]:
    """Of every family's names and of `found`'s, which may not be declared, for both gauges."""
    families = [*FAMILIES.values(), *([found] if found else [])]
    namings = [family.experts for family in families if family.experts is not None]
    # a name stands for the same projection in every family
    shorts = {naming.hub_projection(p): p for naming in namings for p in PROJECTIONS}
    return [
        WeightConverter(
            [f".experts.*.{short}.lr_{suffix}"],
            [f".experts.{projection}_{suffix}"],
            operations=[_StackFactors(projection, suffix)],
        )
        for short, projection in shorts.items()
        for suffix in ("A", "B", "C", "order", "W")
    ]
