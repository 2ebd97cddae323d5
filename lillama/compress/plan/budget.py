"""What a token uses of a model, and what a number of each matrix counts under a budget."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from transformers import PretrainedConfig, PreTrainedModel

from lillama.compress.plan.matrix import Matrix
from lillama.errors import InputError
from lillama.models.families import Family

__all__ = ["active_params", "active_saved", "of_active", "token_share"]


def token_share(family: Family, config: PretrainedConfig, name: str) -> Fraction:
    """The share of tokens that a matrix (hub name) works for: of experts those routed to each, were
    all used alike."""
    if family.experts is None or not family.experts.parse(name):
        return Fraction(1)
    return Fraction(config.num_experts_per_tok, family.num_experts(config))


def active_params(model: PreTrainedModel, family: Family) -> Fraction:
    """Parameters that one token uses: of the experts the share routed to, of embeddings that are no
    output head as well none, for a token reads one row."""
    config = model.config
    total = sum(parameter.numel() for parameter in model.parameters())
    if not config.tie_word_embeddings:
        total -= sum(parameter.numel() for parameter in model.get_input_embeddings().parameters())
    if family.experts is None:
        return Fraction(total)
    inside = f".{family.experts.runtime}."
    experts = sum(p.numel() for name, p in model.named_parameters() if inside in f".{name}")
    used = Fraction(config.num_experts_per_tok, family.num_experts(config))
    return total - experts * (1 - used)


def active_saved(
    family: Family,
    config: PretrainedConfig,
    matrices: Sequence[Matrix],
    ranks: Mapping[str, int],
) -> Fraction:
    """What an allocation takes off `active_params`; factors of embeddings multiply one row more."""
    saved = Fraction(0)
    for matrix in matrices:
        if (rank := ranks.get(matrix.name)) is None:
            continue
        if matrix.block < 0:
            saved -= matrix.numbers(rank) - rank * matrix.N
        else:
            saved += token_share(family, config, matrix.name) * matrix.params_saved(rank)
    return saved


def of_active(
    matrices: Sequence[Matrix],
    model: PreTrainedModel,
    family: Family,
    targets: tuple[str, ...] | None,
) -> tuple[tuple[Matrix, ...], int]:
    """The matrices of a budget in active parameters, each with what its numbers count, and what the
    whole model counts; in a unit that makes all of these integers.

    Raises:
        InputError: the embeddings are among `targets`.
    """
    if targets is not None and any(matrix.block < 0 for matrix in matrices):
        name = next(iter(family.vocabulary))
        raise InputError(
            f"--targets {name} with --budget active: a token reads one row of the embeddings, "
            "factors of them would be more work; leave it out"
        )
    kept = [matrix for matrix in matrices if matrix.block >= 0]
    shares = [token_share(family, model.config, matrix.name) for matrix in kept]
    unit = math.lcm(*(share.denominator for share in shares))
    counted = (replace(m, counts=int(s * unit)) for m, s in zip(kept, shares, strict=True))
    return tuple(counted), round(active_params(model, family) * unit)
