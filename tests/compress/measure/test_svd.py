"""Factors of one matrix: optimal in the metric they claim, exact where they can be, never NaN."""

import pytest
import torch
from torch import Tensor

from lillama.compress.measure.svd import (
    Moment,
    balanced,
    damped,
    plain_svd,
    shrunk,
    spectrum,
    whitened_svd,
)
from lillama.compress.plan.matrix import moment_side

SHAPES = [pytest.param(24, 40, id="N24-K40"), pytest.param(40, 24, id="N40-K24")]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def anisotropic_gram(K: int, seed: int = 5) -> Tensor:
    """E x x^T with eigenvalues over four orders of magnitude, in no special basis."""
    basis, _ = torch.linalg.qr(random(K, K, seed=seed))
    return (basis * torch.logspace(0, -4, K, dtype=torch.float64)) @ basis.mT


def moment_of(W: Tensor, gram: Tensor) -> Tensor:
    """What whitened_svd wants of inputs with E x x^T = gram [K, K]."""
    return gram if moment_side(*W.shape) == "input" else W @ gram @ W.mT


def seen(W: Tensor, x: Tensor) -> Moment:
    """The collected moment of inputs x [n, K]."""
    side = moment_side(*W.shape)
    rows = x if side == "input" else x @ W.mT
    return Moment(side, rows.mT @ rows, len(x), float(x.square().sum()))


def expected_error(W: Tensor, A: Tensor, B: Tensor, gram: Tensor) -> Tensor:
    """E ||(W - B A) x||^2."""
    D = W - B @ A
    return ((D @ gram) * D).sum()


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_plain_svd_is_the_truncated_svd_and_optimal(N, K):
    W = random(N, K)
    A, B = plain_svd(W.float(), 8)
    assert A.shape == (8, K) and B.shape == (N, 8) and A.dtype == B.dtype == torch.float64
    u, s, vh = torch.linalg.svd(W.float().double(), full_matrices=False)
    torch.testing.assert_close(B @ A, (u[:, :8] * s[:8]) @ vh[:8], rtol=1e-9, atol=1e-9)
    # Eckart-Young: no other product of this rank does better
    error = (W.float().double() - B @ A).square().sum()
    torch.testing.assert_close(error, s[8:].square().sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_balanced_keeps_the_product_and_equalises_the_factors(N, K):
    B, A = random(N, 6) * 100, random(6, K, seed=1) / 100
    new_A, new_B = balanced(B, A)
    torch.testing.assert_close(new_B @ new_A, B @ A, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(new_A @ new_A.mT, new_B.mT @ new_B, rtol=1e-8, atol=1e-10)
    assert not torch.allclose(A @ A.mT, B.mT @ B, rtol=0.5)


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_whitened_svd_beats_plain_svd_on_anisotropic_inputs(N, K):
    W, gram = random(N, K), anisotropic_gram(K)
    plain = expected_error(W, *plain_svd(W, 8), gram)
    white = expected_error(W, *whitened_svd(W, moment_of(W, gram), 8), gram)
    assert white < 0.5 * plain


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_whitened_svd_attains_the_analytic_optimum(N, K):
    """The smallest error is the sum of the squares of the discarded singular values of W S."""
    W, gram = random(N, K), anisotropic_gram(K)
    S = torch.linalg.cholesky(gram)
    optimum = torch.linalg.svdvals(W @ S)[8:].square().sum()
    A, B = whitened_svd(W, moment_of(W, gram), 8)
    torch.testing.assert_close(expected_error(W, A, B, gram), optimum, rtol=1e-6, atol=0)
    torch.testing.assert_close(A @ A.mT, B.mT @ B, rtol=1e-6, atol=1e-9)


def test_whitened_svd_of_the_identity_is_plain_svd():
    W = random(24, 40)
    A, B = whitened_svd(W, moment_of(W, torch.eye(40, dtype=torch.float64)), 8)
    plain_A, plain_B = plain_svd(W, 8)
    torch.testing.assert_close(B @ A, plain_B @ plain_A, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("init", ["plain", "whitened"])
@pytest.mark.parametrize("rank", [8, 16])
def test_factors_of_a_low_rank_weight_are_exact(init, rank):
    W = random(48, 8) @ random(8, 32, seed=1)
    gram = anisotropic_gram(32)
    A, B = plain_svd(W, rank) if init == "plain" else whitened_svd(W, moment_of(W, gram), rank)
    torch.testing.assert_close(B @ A, W, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_whitened_svd_of_few_tokens_is_finite_and_serves_them(N, K, num_tokens):
    W = random(N, K)
    x = random(num_tokens, K, seed=2)
    A, B = whitened_svd(W, shrunk(W, seen(W, x), 1e-3), 8)
    assert bool(torch.isfinite(A).all() and torch.isfinite(B).all())
    error = ((W - B @ A) @ x.mT).square().sum()
    if num_tokens:
        # rank 8 holds what 1 or 3 tokens need almost exactly
        assert error < 1e-3 * (W @ x.mT).square().sum()
    else:
        best_A, best_B = plain_svd(W, 8)
        torch.testing.assert_close(B @ A, best_B @ best_A, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30], ids=["zero", "tiny", "huge"])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_whitened_svd_of_any_scale_is_finite(N, K, scale):
    W = random(N, K)
    x = random(100, K, seed=2) * scale**0.5
    A, B = whitened_svd(W, shrunk(W, seen(W, x), 1e-3), 8)
    assert bool(torch.isfinite(A).all() and torch.isfinite(B).all())
    assert (W - B @ A).square().sum() < W.square().sum()


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_whitened_svd_of_a_zero_weight_is_zero(N, K):
    W = torch.zeros(N, K, dtype=torch.float64)
    A, B = whitened_svd(W, moment_of(W, anisotropic_gram(K)), 8)
    assert bool((B @ A == 0).all()) and bool(torch.isfinite(A).all())


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_whitened_svd_of_a_singular_moment_is_finite(N, K):
    """Without any shrinkage: inputs that never leave a plane."""
    W, x = random(N, K), random(50, 2, seed=3) @ random(2, K, seed=4)
    A, B = whitened_svd(W, moment_of(W, x.mT @ x / 50), 8)
    assert bool(torch.isfinite(A).all() and torch.isfinite(B).all())
    torch.testing.assert_close(x @ (B @ A).mT, x @ W.mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 3.0])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_shrunk_is_the_moment_of_inputs_with_isotropic_noise(N, K, shrinkage):
    """On either side: E (x + e)(x + e)^T with E e e^T = shrinkage * mean power * I, or W of
    that."""
    W, x = random(N, K), random(500, K, seed=2)
    moment = x.mT @ x / 500
    noise = shrinkage * moment.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    torch.testing.assert_close(shrunk(W, seen(W, x), shrinkage), moment_of(W, moment + noise))


def gradient_of(W: Tensor, H: Tensor) -> Tensor:
    """What whitened_svd wants of gradients with E g g^T = H [N, N]."""
    return W.mT @ H @ W if moment_side(*W.shape) == "input" else H


def root_of(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return (vectors * values.sqrt()) @ vectors.mT


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_whitened_svd_with_gradients_attains_the_analytic_optimum(N, K):
    """The truncated SVD of H^1/2 W C^1/2, and its spectrum is what the ranks leave."""
    W, C, H = random(N, K), anisotropic_gram(K), anisotropic_gram(N, seed=9)
    u, s, vh = torch.linalg.svd(root_of(H) @ W @ root_of(C), full_matrices=False)
    values = spectrum(W, moment_of(W, C), gradient_of(W, H))
    torch.testing.assert_close(values, s.square(), rtol=1e-6, atol=1e-10)
    A, B = whitened_svd(W, moment_of(W, C), 8, gradient_of(W, H))
    assert A.shape == (8, K) and B.shape == (N, 8)
    best = torch.linalg.solve(root_of(H), (u[:, :8] * s[:8]) @ vh[:8])
    best = torch.linalg.solve(root_of(C), best.mT).mT
    torch.testing.assert_close(B @ A, best, rtol=1e-4, atol=1e-6)
    D = W - B @ A
    error = ((H @ D @ C) * D).sum()
    torch.testing.assert_close(error, values[8:].sum(), rtol=1e-6, atol=1e-10)
    # ignoring the gradients costs
    A, B = whitened_svd(W, moment_of(W, C), 8)
    D = W - B @ A
    assert ((H @ D @ C) * D).sum() > 1.05 * error


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_white_gradients_change_nothing(N, K):
    W, C = random(N, K), anisotropic_gram(K)
    plain = whitened_svd(W, moment_of(W, C), 8)
    white = whitened_svd(W, moment_of(W, C), 8, gradient_of(W, 3.0 * torch.eye(N).double()))
    torch.testing.assert_close(plain[1] @ plain[0], white[1] @ white[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("floor", [0.0, 25.0])
def test_damped_adds_white_gradients(N, K, floor):
    W, g = random(N, K), random(50, N, seed=2)
    rows = g @ W if moment_side(N, K) == "input" else g
    seen_gradients = Moment(moment_side(N, K), rows.mT @ rows, 50.0, float(g.square().sum()))
    found = damped(W, seen_gradients, floor, 0.5, 0.1)
    H = (g.mT @ g + floor * 0.5 * torch.eye(N).double()) / (50 + floor)
    want = gradient_of(W, H + 0.05 * torch.eye(N).double())
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("floor", [0.0, 25.0])
@pytest.mark.parametrize("power", [0.0, 0.5])
def test_damped_of_a_matrix_that_no_token_reached_is_white(N, K, floor, power):
    W, size = random(N, K), min(N, K)
    nothing = Moment(moment_side(N, K), torch.zeros(size, size), 0.0, 0.0)
    found = damped(W, nothing, floor, power, 0.1)
    want = gradient_of(W, 1.1 * power * torch.eye(N).double())
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
