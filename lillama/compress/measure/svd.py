"""From a weight [N, K] to factors A [R, K], B [N, R]: pure maths in fp64, no hooks, no models.

Every decomposition here is an eigendecomposition of a square matrix of min(N, K): of an expert of
Mixtral (4096 x 14336) that is an eighth of the numbers and a fortieth of the work of the large
side.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lillama.compress.plan.matrix import Side, moment_side

__all__ = [
    "Moment",
    "balanced",
    "damped",
    "plain_svd",
    "shrunk",
    "spectrum",
    "whitened_svd",
]


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


def damped(weight: Tensor, gradient: Moment, floor: float, power: float, damping: float) -> Tensor:
    """The mean second moment [side, side] of the loss's gradient g at a weight's outputs.

    It is shrunk towards white gradients of `power` an element: `floor` tokens of them are added to
    those seen, and `damping` times their moment to the mean. Where none was seen the mean is that
    of white gradients. Positive definite where power and damping are positive (on the input side,
    unless W has not full rank).

    weight [N, K]. gradient: sums over `tokens` of (W^T g) (W^T g)^T [K, K] (side "input") or of
    g g^T [N, N] (side "output").
    """
    W, gram = weight.double(), gradient.gram.double()
    tokens = gradient.tokens + floor
    white = power * (damping + (floor / tokens if gradient.tokens else 1.0))
    gram = gram / (tokens or 1.0)
    if gradient.side == "input":
        return gram.addmm(W.mT, W, alpha=white)
    gram.diagonal().add_(white)
    return gram


def _root(moment: Tensor) -> tuple[Tensor, Tensor | None]:
    """F with moment = F F^T, and its inverse where it is not lower triangular."""
    factor, failed = torch.linalg.cholesky_ex(moment)
    if int(failed) == 0:
        return factor, None
    # singular: what flows here never leaves a plane, and was not shrunk
    values, vectors = torch.linalg.eigh(moment)
    root = values.clamp_min(max(float(values[-1]) * 1e-14, torch.finfo(values.dtype).tiny)).sqrt()
    return vectors * root, (vectors / root).mT


def _divided(rows: Tensor, factor: Tensor, inverse: Tensor | None) -> Tensor:
    """rows [R, n] F^-1 for the two values of `_root`."""
    if inverse is not None:
        return rows @ inverse
    return torch.linalg.solve_triangular(factor, rows, upper=False, left=False)


def _metric(weight: Tensor, moment: Tensor, gradient: Tensor | None) -> tuple[Tensor, Any]:
    """The symmetric matrix [side, side] whose eigenvalues are the squared singular values of
    H^1/2 W C^1/2, and the root that it was formed with (see `whitened_svd`)."""
    if moment_side(*weight.shape) == "output":
        if gradient is None:
            return moment, None
        root = _root(gradient)
        return root[0].mT @ moment @ root[0], root
    root = _root(moment)
    if gradient is None:
        whitened = weight @ root[0]
        return whitened.mT @ whitened, root
    return root[0].mT @ gradient @ root[0], root


def whitened_svd(
    weight: Tensor, moment: Tensor, rank: int, gradient: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """argmin over rank-R products of E ||(W - B A) x||^2 (SVD-LLM, arXiv 2403.07378), or with
    `gradient` of E (g^T (W - B A) x)^2 for inputs x and gradients g that are independent: twice the
    increase of a loss whose Hessian is E g g^T (the Kronecker factors of K-FAC, arXiv 1503.05671).

    With C = E x x^T and H = E g g^T (or the identity) that is the truncated SVD of
    H^1/2 W C^1/2. Everything happens on the smaller side: where N < K the best product is
    H^-1/2 U U^T H^1/2 W with the strongest eigenvectors U of H^1/2 (W C W^T) H^1/2, which needs the
    moment of the outputs only; else it comes from C and W^T H W in the same way.

    weight [N, K]; moment fp64, C [K, K] where K <= N, else W C W^T [N, N] (see `moment_side`);
    gradient fp64, W^T H W [K, K] or H [N, N] -> A [R, K], B [N, R] in fp64.
    """
    W = weight.double()
    metric, root = _metric(W, moment, gradient)
    _, vectors = torch.linalg.eigh(metric)
    strong = vectors[:, -rank:].contiguous()
    if moment_side(*W.shape) == "input":
        factor, inverse = root
        return balanced(W @ (factor @ strong), _divided(strong.mT, factor, inverse))
    if root is None:
        return balanced(strong, strong.mT @ W)
    factor, inverse = root
    return balanced(_divided(strong.mT, factor, inverse).mT, (strong.mT @ factor.mT) @ W)


def spectrum(weight: Tensor, moment: Tensor, gradient: Tensor | None = None) -> Tensor:
    """What each further rank of `whitened_svd` takes off its error, largest first
    [min(N, K)] in fp64: a product of rank R leaves the sum behind R."""
    values = torch.linalg.eigvalsh(_metric(weight.double(), moment, gradient)[0])
    return values.clamp_min(0).flip(0)
