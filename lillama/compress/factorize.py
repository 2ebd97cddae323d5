"""From a weight [N, K] to factors A [R, K], B [N, R]: pure maths in fp64, no hooks, no models.

Every decomposition here is an eigendecomposition of a square matrix of min(N, K): of an expert of
Mixtral (4096 x 14336) that is an eighth of the numbers and a fortieth of the work of the large
side.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["Moment", "balanced", "moment_side", "plain_svd", "shrunk", "whitened_svd"]

Side = Literal["input", "output"]


class Moment(NamedTuple):
    """Second moments of one matrix's inputs or outputs.

    gram: sum of x x^T [K, K] (side "input") or of y y^T [N, N] with y = W x (side "output").
    tokens: those summed over; may be a fraction where some count less. energy: sum of ||x||^2 over
    the same tokens.
    """

    side: Side
    gram: Tensor
    tokens: float
    energy: float


def moment_side(N: int, K: int) -> Side:
    """The smaller side of a weight [N, K]: the one whose moments `whitened_svd` needs."""
    return "input" if K <= N else "output"


def balanced(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with both factors carrying the square root of its singular values.

    Adam sees two factors of one scale, whatever metric the product was fitted in. Returns (A, B).
    """
    q, r = torch.linalg.qr(A.mT)
    product = B @ r.mT  # the product in the orthonormal basis q of its rows
    _, vectors = torch.linalg.eigh(product.mT @ product)
    vectors = vectors.flip(-1)
    product = product @ vectors
    sizes = torch.linalg.vector_norm(product, dim=0)
    root = sizes.sqrt()
    inverse = torch.where(root > 0, 1 / root.clamp_min(torch.finfo(root.dtype).tiny), 0.0)
    return root[:, None] * (q @ vectors).mT, product * inverse


def plain_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Truncated SVD: argmin ||W - B A||_F. weight [N, K] -> A [R, K], B [N, R] in fp64."""
    W = weight.double()
    N, K = W.shape
    if moment_side(N, K) == "input":
        _, vectors = torch.linalg.eigh(W.mT @ W)
        A = vectors[:, -rank:].mT.contiguous()
        return balanced(W @ A.mT, A)
    _, vectors = torch.linalg.eigh(W @ W.mT)
    B = vectors[:, -rank:].contiguous()
    return balanced(B, B.mT @ W)


def shrunk(weight: Tensor, moment: Moment, shrinkage: float) -> Tensor:
    """The mean second moment [side, side] of inputs to which isotropic noise was added.

    The noise has `shrinkage` times the mean power of an input's element; on the output side it
    arrives as noise * W W^T. Positive definite on the input side; inputs without any power (or no
    token at all) count as white.
    """
    W, gram = weight.double(), moment.gram.double()
    K = W.shape[1]
    power = moment.energy / K
    seen = moment.tokens > 0 and power > 0
    noise = shrinkage * power if seen else 1.0
    if moment.side == "output":
        gram = gram.addmm(W, W.mT, alpha=noise, beta=1.0 if seen else 0.0)
    elif seen:
        gram = gram.clone()
        gram.diagonal().add_(noise)
    else:
        gram = torch.eye(K, dtype=gram.dtype, device=gram.device)
    return gram / moment.tokens if seen else gram


def whitened_svd(weight: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """argmin over rank-R products of E ||(W - B A) x||^2 (SVD-LLM, arXiv 2403.07378).

    Where N < K only the outputs y = W x matter: the best product is U U^T W with the strongest
    eigenvectors U of E y y^T, which spares the large moment of the inputs and its inverse.

    weight [N, K]; moment fp64, E x x^T [K, K] where K <= N, else E y y^T [N, N] (see `moment_side`)
    -> A [R, K], B [N, R] in fp64.
    """
    W = weight.double()
    if moment_side(*W.shape) == "output":
        _, vectors = torch.linalg.eigh(moment)
        B = vectors[:, -rank:].contiguous()
        return balanced(B, B.mT @ W)
    factor, failed = torch.linalg.cholesky_ex(moment)
    if int(failed) == 0:
        right = _top_right(W @ factor, rank)
        A = torch.linalg.solve_triangular(factor, right.mT, upper=False, left=False)
        return balanced(W @ (factor @ right), A)
    # singular: the inputs never leave a plane, and were not shrunk
    values, vectors = torch.linalg.eigh(moment)
    root = values.clamp_min(max(float(values[-1]) * 1e-14, torch.finfo(values.dtype).tiny)).sqrt()
    whitened = (W @ vectors) * root
    right = _top_right(whitened, rank)
    return balanced(whitened @ right, (right.mT / root) @ vectors.mT)


def _top_right(matrix: Tensor, rank: int) -> Tensor:
    """The strongest right singular vectors [K, R] of a matrix [N, K]."""
    _, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    return vectors[:, -rank:]
