"""Which tensors of which shapes the ranks of a config.json promise, and whether they are there."""

import math
from collections.abc import Iterable, Mapping

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lillama.checkpoint.names import FACTOR_SUFFIXES, KEPT_DENSE, PIVOT_MASK, factor_shapes
from lillama.errors import InputError
from lillama.models.dense_linear import linear_shape
from lillama.models.detection import family_for
from lillama.models.families import PROJECTIONS, Family
from lillama.models.skeleton import skeleton

__all__ = ["check_factors", "count_params", "dense_shapes", "kept_dense", "stored_shapes"]


def dense_shapes(
    model: nn.Module, family: Family, names: Iterable[str]
) -> dict[str, tuple[int, int]]:
    """Return {matrix hub name: (N, K)} of a dense model (meta tensors will do).

    Raises:
        InputError: a name is not a matrix of this model.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    parameters = dict(model.named_parameters())
    shapes: dict[str, tuple[int, int]] = {}
    for name in names:
        parsed = None if family.experts is None else family.experts.parse(name)
        tensor = f"{parsed[0]}.down_proj" if parsed else f"{family.runtime_name(name)}.weight"
        tensor = tensor if tensor in parameters else tensor.removeprefix(prefix)
        found = parameters.get(tensor)
        ndim, experts = (2, 0) if parsed is None else (3, parsed[1] + 1)
        if found is None or found.ndim != ndim or found.shape[0] < experts:
            raise InputError(f"quantization_config names {name}, which is no matrix of this model")
        if parsed is None:
            shapes[name] = linear_shape(model.get_submodule(tensor.rpartition(".")[0]))
        else:
            hidden, intermediate = found.shape[1:]
            down = parsed[2] == "down"
            shapes[name] = (hidden, intermediate) if down else (intermediate, hidden)
    return shapes


def kept_dense(model: PreTrainedModel, family: Family, ranks: Iterable[str]) -> list[str]:
    """Return the hub names of the matrices without a rank in experts modules that have one
    elsewhere."""
    naming, ranked = family.experts, set(ranks)
    if naming is None:
        return []
    return [
        name
        for block in {name.partition(f".{naming.hub}.")[0] for name in ranked if naming.parse(name)}
        for expert in range(family.num_experts(model.config))
        for projection in PROJECTIONS
        if (name := f"{block}.{naming.hub}.{expert}.{naming.hub_projection(projection)}")
        not in ranked
    ]


def stored_shapes(
    model: PreTrainedModel, family: Family, ranks: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """Return {matrix hub name: (N, K)} of all that the format spells in its own way: every matrix
    with a rank and the `kept_dense` beside them. Raises InputError as `dense_shapes`."""
    return dense_shapes(model, family, [*ranks, *kept_dense(model, family, ranks)])


def count_params(
    config: PretrainedConfig, ranks: Mapping[str, int] | None = None, gauge: str = "plain"
) -> int:
    """Return the parameters of the dense model of this config, or with `ranks` of the factorised
    one; tied ones once."""
    model = skeleton(config)
    params = sum(parameter.numel() for parameter in model.parameters())
    if not ranks:
        return params
    family = family_for(config, model)
    for name, (N, K) in dense_shapes(model, family, ranks).items():
        shapes = factor_shapes((N, K), ranks[name], gauge, name == family.embedding)
        params -= N * K
        params += sum(math.prod(shape) for key, shape in shapes.items() if key != PIVOT_MASK)
    return params


def check_factors(
    names: Mapping[str, tuple[int, ...]],
    ranks: Mapping[str, int],
    shapes: Mapping[str, tuple[int, int]],
    gauge: str = "plain",
    embedding: str | None = None,
    sentinel: str | None = None,
) -> None:
    """Compare the factors present ({tensor name: shape}) with the ranks that config.json promises.

    Args:
        names: every tensor of the checkpoint.
        ranks: {matrix name: R}.
        shapes: {matrix name: (N, K)}, see `stored_shapes`.
        gauge: of the checkpoint.
        embedding: name of the token embeddings.
        sentinel: the one tensor that may lie under the dense name of a factorised matrix.

    Raises:
        InputError: a factor is missing, unexpected, or mis-shaped, or a matrix is dense as well;
        all are named (at most 5 of each).
    """
    wanted: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        parts: dict[str, tuple[int, ...]] = {KEPT_DENSE: shape}
        if name in ranks:
            parts = factor_shapes(shape, ranks[name], gauge, name == embedding)
        wanted |= {f"{name}.{key}": part for key, part in parts.items()}
    found = {name: shape for name, shape in names.items() if name.endswith(FACTOR_SUFFIXES)}
    problems = {
        "missing factors": [name for name in wanted if name not in found],
        "unexpected factors": [name for name in found if name not in wanted],
        "mis-shaped factors": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in wanted.items()
            if name in found and found[name] != shape
        ],
        "dense tensors of factorised matrices": [
            name for matrix in ranks if (name := f"{matrix}.weight") in names and name != sentinel
        ],
    }
    texts = []
    for problem, items in problems.items():
        if items:
            more = f" and {len(items) - 5} more" if len(items) > 5 else ""
            texts.append(f"{problem}: {', '.join(items[:5])}{more}")
    if texts:
        raise InputError(f"the checkpoint does not fit its config.json; {'; '.join(texts)}")
