"""transformers' conversions of what lies in a checkpoint otherwise than in a model: experts one by
one there and stacked here, pivot masks there and permutations here."""

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter

from lillama.checkpoint.names import (
    FACTOR_A,
    FACTOR_B,
    FACTOR_C,
    KEPT_DENSE,
    PERMUTATION,
    PIVOT_MASK,
    stacked_name,
    stacked_place,
)
from lillama.checkpoint.pivots import permutation_of
from lillama.models.families import FAMILIES, PROJECTIONS, Family

__all__ = ["factor_conversions"]


class _Conversion(ConversionOps):
    """`key`: of the checkpoint's tensors; `target`: the module's parameter or buffer."""

    def __init__(self, key: str, target: str) -> None:
        self.key, self.target = key, target

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        path = kwargs["full_layer_name"].removesuffix(f".{self.target}")
        module, tensors = kwargs["model"].get_submodule(path), next(iter(input_dict.values()))
        return {target_patterns[0]: self.converted(path, module, tensors)}

    def converted(self, path: str, module: Any, tensors: list[Any]) -> Any:
        (mask,) = tensors
        return permutation_of(mask, module.rank)

    @property
    def reverse_op(self) -> ConversionOps:
        # saving goes through get_state_dict_and_metadata, whose names no reversed pattern matches
        return self


class _Stack(_Conversion):
    """Per-expert tensors of one projection -> one stacked tensor, padded with zeros to the largest
    rank."""

    def __init__(self, projection: str, key: str, target: str) -> None:
        super().__init__(key, target)
        self.projection = projection

    def converted(self, path: str, module: Any, tensors: list[Any]) -> Any:
        ranks = module.ranks[self.projection]
        owners = [e for e, rank in enumerate(ranks) if (rank == 0) == (self.key == KEPT_DENSE)]
        if len(owners) != len(tensors):
            raise ValueError(
                f"{path} needs {len(owners)} tensors of {self.projection}, got {len(tensors)}"
            )
        target, is_mask = getattr(module, self.target), self.key == PIVOT_MASK
        stacked = tensors[0].new_zeros(target.shape, dtype=target.dtype if is_mask else None)
        if is_mask:  # of a dense expert, as the module has it from the beginning
            stacked[:] = torch.arange(target.shape[1])
        N, _ = module.projection_shape(self.projection)
        for expert, tensor in zip(owners, tensors, strict=True):
            value = permutation_of(tensor, ranks[expert]) if is_mask else tensor
            stacked[stacked_place(self.key, ranks, expert, N)] = value
        return stacked


def factor_conversions(found: Family | None = None) -> list[WeightConverter]:
    """Return those of every family's names and of `found`'s, which may not be declared, for both
    gauges."""
    families = [*FAMILIES.values(), *([found] if found else [])]
    namings = [family.experts for family in families if family.experts is not None]
    # a name stands for the same projection in every family
    shorts = {naming.hub_projection(p): p for naming in namings for p in PROJECTIONS}
    stacked = []
    for short, projection in shorts.items():
        for key in (FACTOR_A, FACTOR_B, FACTOR_C, PIVOT_MASK, KEPT_DENSE):
            target = stacked_name(projection, PERMUTATION if key == PIVOT_MASK else key)
            conversion = _Stack(projection, key, target)
            names = [f".experts.*.{short}.{key}"], [f".experts.{target}"]
            stacked.append(WeightConverter(*names, operations=[conversion]))
    # the first that fits a name is taken: experts' masks fit the last one, too
    last = _Conversion(PIVOT_MASK, PERMUTATION)
    return [*stacked, WeightConverter([f".{PIVOT_MASK}"], [f".{PERMUTATION}"], operations=[last])]
