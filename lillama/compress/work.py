"""What a compression computes, phase by phase, and what a decoded token reads: counted from shapes
and options alone.

Only matrix products and decompositions count. Norms, scans, the optimiser, routing and files do
not: `forecast` multiplies by what they made of it in measured runs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lillama.checkpoint import TensorHeader
from lillama.compress.allocate import Matrix
from lillama.compress.memory import held_out_blocks
from lillama.compress.plan import Plan
from lillama.config import PlanConfig
from lillama.skeleton import block_of

__all__ = ["Work", "count_work", "decoded_numbers", "token_share"]


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs: matrix products in the dtype to compute in, those in fp64, eigendecompositions."""

    products: float = 0.0
    doubles: float = 0.0
    eigen: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.products + other.products,
            self.doubles + other.doubles,
            self.eigen + other.eigen,
        )


def token_share(plan: Plan, matrix: Matrix) -> float:
    """Of the tokens that a matrix sees: less than 1 for an expert."""
    return plan.flops_per_token(matrix, None) / (2 * matrix.N * matrix.K)


def _numbers_of_blocks(plan: Plan, headers: Mapping[str, TensorHeader]) -> list[float]:
    """For each block the numbers that one token is multiplied with."""
    experts = plan.family.experts
    share = 0.0
    if experts is not None:
        share = plan.config.num_experts_per_tok / plan.family.num_experts(plan.config)
    places = {path: index for index, path in enumerate(plan.block_paths)}
    found = [0.0] * len(places)
    for name, header in headers.items():
        index = block_of(name, places)
        if index is None:
            continue
        inside = experts is not None and experts.parse(name.removesuffix(".weight"))
        found[index] += math.prod(header.shape) * (share if inside else 1.0)
    return found


def _saved(plan: Plan, index: int) -> float:
    """Of those numbers, what factors do without."""
    ranks = plan.ranks_of_block(index)
    return sum(
        m.params_saved(ranks[m.name]) * token_share(plan, m)
        for m in plan.matrices
        if m.name in ranks
    )


def _attention(plan: Plan, seq_len: int) -> float:
    """FLOPs of one token's attention in one block."""
    heads = getattr(plan.config, "num_attention_heads", None)
    if heads is None:
        return 0.0
    size = getattr(plan.config, "head_dim", None) or plan.config.hidden_size // heads
    return 4.0 * seq_len * heads * size


def _sensitivity(plan: Plan, options: PlanConfig, numbers: list[float]) -> Work:
    """Forward through all blocks, again with gradients back through all; moments on both sides of
    every candidate, and its spectrum."""
    wanted = min(options.recipe.gradient_tokens(plan.config.hidden_size), options.num_tokens)
    tokens = -(-wanted // options.seq_len) * options.seq_len
    attention = _attention(plan, options.seq_len)
    vocabulary = plan.config.vocab_size * plan.config.hidden_size
    products = 4.0 * vocabulary
    for size in numbers:
        products += 3 * 2 * size + 4 * attention
    work = Work()
    for matrix in plan.matrices:
        side, full = min(matrix.N, matrix.K), matrix.N * matrix.K
        through = 2.0 * full if matrix.K <= matrix.N else 0.0
        products += token_share(plan, matrix) * (4.0 * side**2 + through)
        # two roots and products of squares, and one of the weight with itself
        work += Work(doubles=2.0 * full * side + 6.0 * side**3, eigen=4 / 3 * side**3)
    return work + Work(products=products * tokens)


def _factorise(plan: Plan, ranks: dict[str, int]) -> Work:
    work = Work()
    for matrix in plan.matrices:
        rank = ranks.get(matrix.name)
        if rank is None:
            continue
        side, full = min(matrix.N, matrix.K), matrix.N * matrix.K
        work += Work(
            doubles=4.0 * full * (side + rank) + 8.0 * side**3,
            eigen=9.0 * side**3 + 9.0 * rank**3,
        )
    return work


def count_work(
    plan: Plan, options: PlanConfig, headers: Mapping[str, TensorHeader]
) -> dict[str, Work]:
    """Of each phase of a run with these ranks: sensitivity, teacher, factorise, and train or judge.
    For presets that measure gradients.

    train counts the student's passes with their gradients, the evaluations in between and the pass
    that carries its outputs to the next block.
    """
    numbers = _numbers_of_blocks(plan, headers)
    attention = _attention(plan, options.seq_len)
    train = -(-options.num_tokens // options.seq_len) * options.seq_len
    held_out = held_out_blocks(options.num_tokens, options.seq_len) * options.seq_len
    blocks = plan.blocks
    last = max(blocks, default=-1)
    begun = plan.embedding is not None
    teacher = student = 0.0
    for index in range(last + 1):
        forward = 2 * numbers[index] + attention
        teacher += forward * (train + held_out)
        small = forward - 2 * _saved(plan, index)
        if index in blocks:
            squares = sum(
                2.0 * min(m.N, m.K) ** 2 * token_share(plan, m)
                for m in plan.matrices
                if m.block == index and m.name in plan.ranks
            )
            teacher += squares * train
        if not options.train:
            student += small * held_out * (index in blocks)
            continue
        passes = 2 if begun else 1
        if index in blocks:
            judged = held_out * (options.recipe.evaluations + 1)
            student += passes * small * (3 * train + judged)
            begun = True
        if begun and index < last:
            student += small * (train + held_out)
    return {
        "sensitivity": _sensitivity(plan, options, numbers),
        "teacher": Work(products=teacher),
        "factorise": _factorise(plan, plan.ranks),
        "train" if options.train else "judge": Work(products=student),
    }


def decoded_numbers(plan: Plan, headers: Mapping[str, TensorHeader]) -> tuple[float, float]:
    """Weights that one decoded token reads at batch 1, dense and with the plan's ranks: all but the
    experts that it is not routed to, and one row of the embeddings where they are a matrix of their
    own."""
    embeddings = plan.config.vocab_size * plan.config.hidden_size
    outside = sum(
        math.prod(header.shape)
        for name, header in headers.items()
        if not name.startswith(tuple(f"{path}." for path in plan.block_paths))
    )
    if not plan.config.tie_word_embeddings:
        outside -= embeddings - plan.config.hidden_size
    elif f"{plan.family.head}.weight" in headers:  # stored twice
        outside -= embeddings
    dense = outside + sum(_numbers_of_blocks(plan, headers))
    saved = 0.0
    for matrix in plan.matrices:
        rank = plan.ranks.get(matrix.name)
        if rank is None:
            continue
        if matrix is plan.embedding:  # one row of one factor, and all of the other
            saved += matrix.K - rank - (matrix.numbers(rank) - rank * matrix.N)
        else:
            saved += matrix.params_saved(rank) * token_share(plan, matrix)
    return dense, dense - saved
