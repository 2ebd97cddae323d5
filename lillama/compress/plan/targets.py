"""Which matrices of a model are targets, from its structure alone."""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from lillama.compress.plan.matrix import Matrix
from lillama.config import Gauge
from lillama.errors import InputError
from lillama.models.dense_linear import linear_shape
from lillama.models.families import Family
from lillama.models.skeleton import named_blocks

__all__ = ["find_matrices"]


def find_matrices(
    model: PreTrainedModel,
    family: Family,
    targets: tuple[str, ...] | None,
    gauge: Gauge = "plain",
    *,
    vocabulary: bool = False,
    by_worth: bool = False,
) -> tuple[Matrix, ...]:
    """Every target matrix in block order, experts as 0.w1, 0.w2, 0.w3, 1.w1, ...; embeddings before
    the blocks, the head behind them.

    vocabulary: without `targets` these two as well, where they are not one and the same.
    by_worth: without `targets` the family's `worth_targets` as well.

    Raises:
        InputError: a target the family or model does not have.
    """
    blocks = named_blocks(model)
    problem = _vocabulary_problem(model, family)
    asked = targets
    if targets is None:
        both = tuple(family.vocabulary) if vocabulary and problem is None else ()
        worth = family.worth_targets if by_worth else ()
        targets = (*family.default_targets, *worth, *both)
    elif problem is not None and (found := sorted(set(targets) & set(family.vocabulary))):
        raise InputError(f"--targets {', '.join(found)}: {problem}; leave them out")
    _check_targets(family, targets)
    matrices: list[Matrix] = []
    outside: list[Matrix] = []
    seen = set(family.vocabulary)
    for at, (short, name) in zip((-1, len(blocks)), family.vocabulary.items(), strict=True):
        if short in targets:
            N, K = linear_shape(model.get_submodule(family.runtime_name(name)))
            outside.append(Matrix(name, at, N, K, pivot=gauge == "pivot"))
    for index, (path, block) in enumerate(blocks.items()):
        for short, name, N, K in _inside(block, family):
            if short in targets:
                seen.add(short)
                name = f"{path}.{name}"
                matrices.append(Matrix(name, index, N, K, pivot=gauge == "pivot"))
    if asked is not None and (none := sorted(set(asked) - seen)):
        raise InputError(f"no block of this model has {', '.join(none)}; leave it out of --targets")
    return tuple(sorted([*outside, *matrices], key=lambda matrix: matrix.block))


def _vocabulary_problem(model: PreTrainedModel, family: Family) -> str | None:
    """Why embeddings and output head cannot be factorised; None where they can."""
    if model.config.tie_word_embeddings:
        return (
            "embeddings and output head of this model share one matrix, which cannot be factorised"
        )
    embedding = model.get_submodule(family.embedding)
    if type(embedding) is not nn.Embedding or embedding.embedding_dim != model.config.hidden_size:
        return "the embeddings of this model are scaled or projected, which factors cannot be"
    return None


def _check_targets(family: Family, targets: tuple[str, ...]) -> None:
    unknown = sorted(set(targets) - set(family.target_names))
    if unknown or not targets:
        raise InputError(
            f"--targets must be some of {', '.join(family.target_names)} for {family.model_type}, "
            f"got {', '.join(unknown) or 'none'}"
        )


def _inside(block: nn.Module, family: Family) -> Iterator[tuple[str, str, int, int]]:
    """(short name, hub name inside the block, N, K) of everything in a block that could be
    factorised; experts as 0.w1, 0.w2, 0.w3, 1.w1, ..."""
    modules = dict(block.named_modules())
    for short, path in family.targets.items():
        if path in modules:
            N, K = linear_shape(modules[path])
            yield short, path, N, K
    naming = family.experts
    if naming is None or naming.runtime not in modules:
        return
    num_experts, hidden, inner = modules[naming.runtime].get_parameter("down_proj").shape
    for expert in range(num_experts):
        for short in sorted(naming.projections):
            N, K = (hidden, inner) if short == naming.down else (inner, hidden)
            yield short, f"{naming.hub}.{expert}.{short}", N, K
