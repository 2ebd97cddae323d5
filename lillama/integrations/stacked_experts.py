"""What lies in a checkpoint otherwise than in a model, as transformers needs to know it to load:
experts one by one there and stacked here, marks of pivots there and the order of outputs here."""

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter

from lillama.checkpoint.pivots import order_of
from lillama.models.families import FAMILIES, PROJECTIONS, Family

__all__ = ["factor_conversions"]


class _StackFactors(ConversionOps):
    """Per-expert tensors of one projection -> one stacked tensor, padded with zeros to the largest
    rank; marks become orders. `target`: the module's parameter or buffer."""

    def __init__(self, projection: str, suffix: str, target: str) -> None:
        self.projection = projection
        self.suffix = suffix
        self.target = target

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        tensors = next(iter(input_dict.values()))
        path = kwargs["full_layer_name"].removesuffix(f".{self.target}")
        module = kwargs["model"].get_submodule(path)
        ranks = module.ranks[self.projection]
        owners = [e for e, rank in enumerate(ranks) if (rank == 0) == (self.suffix == "W")]
        if len(owners) != len(tensors):
            raise ValueError(
                f"{path} needs {len(owners)} tensors of {self.projection}, got {len(tensors)}"
            )
        target = getattr(module, self.target)
        if self.suffix == "pivots":  # of a dense expert, as the module has it from the beginning
            places = torch.arange(target.shape[1], dtype=target.dtype, device=tensors[0].device)
            stacked = places.repeat(len(ranks), 1)
        else:
            stacked = tensors[0].new_zeros(target.shape)
        for row, (expert, tensor) in enumerate(zip(owners, tensors, strict=True)):
            if self.suffix == "A":
                stacked[expert, : ranks[expert]] = tensor
            elif self.suffix == "B":
                stacked[expert, :, : ranks[expert]] = tensor
            elif self.suffix == "C":
                stacked[expert, : len(tensor), : ranks[expert]] = tensor
            elif self.suffix == "pivots":
                stacked[expert] = order_of(tensor, ranks[expert])
            else:
                stacked[row] = tensor
        return {target_patterns[0]: stacked}

    @property
    def reverse_op(self) -> ConversionOps:
        # saving goes through get_state_dict_and_metadata, whose names no reversed pattern matches
        return self


class _Order(ConversionOps):
    """The marks of a linear layer -> its order of outputs."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        (marks,) = next(iter(input_dict.values()))
        path = kwargs["full_layer_name"].removesuffix(".lr_order")
        return {target_patterns[0]: order_of(marks, kwargs["model"].get_submodule(path).rank)}

    @property
    def reverse_op(self) -> ConversionOps:
        return self  # as that of _StackFactors


def factor_conversions(found: Family | None = None) -> list[WeightConverter]:
    """Of every family's names and of `found`'s, which may not be declared, for both gauges."""
    families = [*FAMILIES.values(), *([found] if found else [])]
    namings = [family.experts for family in families if family.experts is not None]
    # a name stands for the same projection in every family
    shorts = {naming.hub_projection(p): p for naming in namings for p in PROJECTIONS}
    targets = {"A": "A", "B": "B", "C": "C", "pivots": "order", "W": "W"}
    stacked = [
        WeightConverter(
            [f".experts.*.{short}.lr_{suffix}"],
            [f".experts.{projection}_{target}"],
            operations=[_StackFactors(projection, suffix, f"{projection}_{target}")],
        )
        for short, projection in shorts.items()
        for suffix, target in targets.items()
    ]
    # the first that fits a name is taken: experts' marks fit the last one, too
    return [*stacked, WeightConverter([".lr_pivots"], [".lr_order"], operations=[_Order()])]
