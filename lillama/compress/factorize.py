"""From a weight [N, K] to factors A [R, K], B [N, R]: pure maths in fp64, no hooks, no models."""

import torch
from torch import Tensor

__all__ = ["balanced", "blend_gram", "plain_svd", "whitened_svd"]


def balanced(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with both factors carrying the square root of its singular values.

    Adam sees two factors of one scale, whatever metric the product was fitted in. Returns (A, B).
    """
    q_b, r_b = torch.linalg.qr(B)
    q_a, r_a = torch.linalg.qr(A.mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT)
    root = s.sqrt()
    return root[:, None] * (vh @ q_a.mT), (q_b @ u) * root


def plain_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Truncated SVD: argmin ||W - B A||_F. weight [N, K] -> A [R, K], B [N, R] in fp64."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def blend_gram(
    gram: Tensor, count: float, shared: Tensor | None, shared_count: float, shrinkage: float
) -> Tensor:
    """Second moment of the inputs, made safe to invert.

    Args:
        gram: [K, K] fp64, sum of x x^T over `count` tokens (an expert's, say).
        shared: the same over `shared_count` tokens of all experts, towards which few tokens are
            pulled with the weight of K tokens; None for none.
        shrinkage: share of the mean diagonal added to the diagonal.

    Returns:
        [K, K] fp64, positive definite; the identity when no token was seen at all.
    """
    K = gram.shape[0]
    total = gram
    weight = count
    if shared is not None and shared_count > 0:
        total = total + shared * (K / shared_count)
        weight = count + K
    identity = torch.eye(K, dtype=gram.dtype, device=gram.device)
    mean = float(total.diagonal().mean())
    if weight == 0 or mean <= 0:
        return identity
    return (total + identity * (shrinkage * mean)) / weight


def whitened_svd(weight: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """argmin over rank-R products of E ||(W - B A) x||^2, given E x x^T.

    With S S^T = gram, truncate the SVD of W S and undo S (SVD-LLM, arXiv 2403.07378; S from an
    eigendecomposition rather than Cholesky, so that a near-singular Gram does no harm).

    weight [N, K], gram [K, K] fp64 positive definite -> A [R, K], B [N, R] in fp64.
    """
    values, vectors = torch.linalg.eigh(gram)
    root = values.clamp_min(values[-1] * 1e-14).sqrt()
    u, s, vh = torch.linalg.svd((weight.double() @ vectors) * root, full_matrices=False)
    A = (vh[:rank] / root) @ vectors.mT
    return balanced(u[:, :rank] * s[:rank], A)
