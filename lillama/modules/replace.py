"""Exchange dense modules for factorised ones, by hub name."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lillama.models.dense_linear import DenseLinear, is_linear, linear_shape
from lillama.models.families import PROJECTIONS, Family, family_of
from lillama.modules.low_rank_embedding import LowRankEmbedding, PivotLowRankEmbedding
from lillama.modules.low_rank_experts import LowRankExperts, PivotLowRankExperts
from lillama.modules.low_rank_linear import LowRankLinear, PivotLowRankLinear

__all__ = ["dense_expert", "group_ranks", "replace_modules"]

ExpertRanks = dict[str, list[int]]


def _find(root: nn.Module, name: str, base_prefix: str) -> tuple[str, nn.Module | None]:
    """Return the submodule called `name`, with or without the base model's prefix, which AutoModel
    drops."""
    for candidate in (name, name.removeprefix(f"{base_prefix}."), f"{base_prefix}.{name}"):
        try:
            return candidate, root.get_submodule(candidate)
        except AttributeError:
            continue
    return name, None


def group_ranks(
    family: Family, ranks: Mapping[str, int], num_experts: int
) -> tuple[dict[str, int], dict[str, ExpertRanks]]:
    """Split {hub name: rank} into linear ranks and, per runtime experts module, ranks by
    projection and expert."""
    linears: dict[str, int] = {}
    experts: dict[str, ExpertRanks] = {}
    for name, rank in ranks.items():
        parsed = None if family.experts is None else family.experts.parse(name)
        if parsed is None:
            linears[name] = rank
            continue
        module, expert, projection = parsed
        if expert >= num_experts:
            raise ValueError(f"{name} names expert {expert}, but the model has {num_experts}")
        empty = {projection: [0] * num_experts for projection in PROJECTIONS}
        experts.setdefault(module, empty)[projection][expert] = rank
    return linears, experts


def replace_modules(
    root: nn.Module,
    config: PretrainedConfig,
    ranks: Mapping[str, int],
    *,
    base_prefix: str = "",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    pivot: bool = False,
    family: Family | None = None,
) -> dict[str, nn.Module]:
    """Replace in `root` every module that `ranks` names; return {runtime name: dense module}.

    `ranks` is {hub name: rank}, relative to `root`; names are looked up with and without
    `base_prefix`. Factors are left unset (zeros for experts) and have the dense weight's device and
    dtype where none is given; biases are not copied. `pivot`: in the pivot gauge. `family`: of
    the model, where it is not declared.

    Raises:
        ValueError: a name leads to no module, or to one that cannot be factorised (named).
    """
    family = family_of(config.model_type) if family is None else family
    linears, experts = group_ranks(family, ranks, family.num_experts(config))
    replaced: dict[str, nn.Module] = {}

    def put(path: str, old: nn.Module, weight: Tensor, kind: Any, *sizes: Any, **more: Any) -> None:
        own = weight.device if device is None else device
        root.set_submodule(path, kind(*sizes, **more, device=own, dtype=dtype or weight.dtype))
        replaced[path] = old

    for name, rank in linears.items():
        path, old = _find(root, family.runtime_name(name), base_prefix)
        if type(old) is nn.Embedding:
            sizes = old.num_embeddings, old.embedding_dim, rank, old.padding_idx
            put(path, old, old.weight, PivotLowRankEmbedding if pivot else LowRankEmbedding, *sizes)
        elif isinstance(old, DenseLinear) and is_linear(old):
            N, K = linear_shape(old)
            more = {"bias": old.bias is not None, "is_head": name == family.head}
            kind = PivotLowRankLinear if pivot else LowRankLinear
            put(path, old, old.weight, kind, K, N, rank, **more)
        else:  # what a subclass does would be lost
            raise ValueError(
                f"{name} is not a linear layer of this model; cannot give it rank {rank}"
            )
    for name, expert_ranks in experts.items():
        path, old = _find(root, name, base_prefix)
        if old is None or not hasattr(old, "gate_up_proj"):
            raise ValueError(f"{name} is not a stacked experts module of this model")
        weight = old.get_parameter("down_proj")
        # the module's own: it knows the experts implementation in use
        sizes = getattr(old, "config", config), *weight.shape, expert_ranks
        put(path, old, weight, PivotLowRankExperts if pivot else LowRankExperts, *sizes)
    return replaced


def dense_expert(experts: nn.Module, projection: str, expert: int) -> torch.Tensor:
    """Return the weight [N, K] of one projection of one expert in transformers' stacked experts."""
    if projection == "down":
        return experts.get_parameter("down_proj")[expert]
    gate_up = experts.get_parameter("gate_up_proj")[expert]
    half = gate_up.shape[0] // 2
    return gate_up[:half] if projection == "gate" else gate_up[half:]
