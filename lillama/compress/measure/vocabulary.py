"""The two matrices that the vocabulary has to itself: what each rank of the token embeddings and of
the output head is worth to the loss, and their factors.

The head is a linear layer behind the blocks. The embeddings [V, H] are one whose inputs are
one-hot: the second moment of its inputs is how often each token occurs. Calibration text says
little about tokens that it lacks, so a share of the tokens counts as drawn evenly from the
vocabulary, at the embeddings as inputs and at the head as labels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lillama.compress.measure.gradients import GradientCollector, MatrixSensitivity
from lillama.compress.measure.svd import shrunk, spectrum, whitened_svd
from lillama.compress.plan.matrix import Matrix, moment_side
from lillama.config import Recipe

# What blocks' matrices need (`Recipe.shrinkage`, 1.0) doubles what the head and the embeddings lose
# at three quarters of their rank: their moments come from every token.
SHRINKAGE = 0.01
# By that shrinkage the losses of blocks' matrices are estimated 3 to 4 times too high, these are
# not (benchmarks/NOTES.md); the allocator compares both.
INFLATION = 6.0

__all__ = ["embedding_sensitivity", "head_sensitivity", "vocabulary_factors"]


def _sensitivity(
    matrix: Matrix, weight: Tensor, moment: Tensor, gradient: Tensor
) -> MatrixSensitivity:
    """weight [N, K] as a linear layer; the moments of `whitened_svd`."""
    values = spectrum(weight, moment, gradient)
    left = (values.flip(0).cumsum(0).flip(0) * (INFLATION / 2)).tolist()
    losses = [left[rank] for rank in matrix.ranks]
    return MatrixSensitivity(losses, gradient.float(), moment.float())


def head_sensitivity(
    matrix: Matrix, weight: Tensor, collector: GradientCollector, path: str, recipe: Recipe
) -> MatrixSensitivity:
    """Of the head [V, H], whose inputs and gradients the collector saw at the module `path`."""
    pooled = collector.pooled([path])[path]
    moment, gradient = collector.pop_both(path, weight, pooled)
    W, V = weight.double(), matrix.N
    # the gradient of a label is its row less the prediction's mean row
    even = W.mT @ W if gradient.side == "input" else torch.eye(V).to(W)
    share = recipe.vocabulary_floor
    mixed = (1 - share) * gradient.gram.double() / max(gradient.tokens, 1.0) + share * even / V
    return _sensitivity(matrix, weight, shrunk(weight, moment, SHRINKAGE), mixed)


def embedding_sensitivity(
    matrix: Matrix, weight: Tensor, counts: Tensor, gram: Tensor, recipe: Recipe
) -> MatrixSensitivity:
    """Of the embeddings [V, H]. counts [V]: how often each token occurs; gram [H, H]: sum over all
    of them of g g^T, with the gradient g at the embeddings' output."""
    W, V = weight.double().mT, matrix.N
    tokens = counts.sum()
    share = recipe.vocabulary_floor
    chances = (1 - share) * counts.double() / tokens + share / V
    gradient = gram.double() / tokens
    gradient.diagonal().add_(SHRINKAGE * gradient.diagonal().mean())
    if moment_side(*W.shape) == "output":
        moment = (W * chances) @ W.mT
    else:
        moment, gradient = torch.diag(chances), W.mT @ gradient @ W
    return _sensitivity(matrix, W, moment, gradient)


def vocabulary_factors(
    matrix: Matrix,
    weight: Tensor,
    rank: int,
    measured: Callable[[str], Tensor],
) -> dict[str, Tensor]:
    """lr_A [R, H] and lr_B [V, R] of the embeddings or the head in fp64.

    measured(name) gives the tensors `<matrix>.moment` and `<matrix>.gradient` that the
    sensitivities above found.
    """
    is_embedding = matrix.block < 0
    W = weight.double()
    moments = (measured(f"{matrix.name}.{key}").to(W) for key in ("moment", "gradient"))
    moment, gradient = moments
    if is_embedding:
        B, A = (f.mT for f in whitened_svd(W.mT, moment, rank, gradient))
    else:
        A, B = whitened_svd(W, moment, rank, gradient)
    return {"lr_A": A.contiguous(), "lr_B": B.contiguous()}
