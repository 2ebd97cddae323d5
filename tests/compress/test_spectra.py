"""Singular values beside those of random matrices, and which matrices are looked at."""

import math

import pytest
import torch

from lillama.compress import spectra
from lillama.compress.allocate import Matrix
from lillama.compress.spectra import Spectrum, random_share, sample_matrices, spectrum_of

CPU = torch.device("cpu")
SIZES = [(64, 160), (200, 200), (300, 100)]


def look(weight: torch.Tensor) -> Spectrum:
    N, K = weight.shape
    matrix = Matrix("blocks.0.mixer.in_proj", 0, N, K)
    return spectrum_of(matrix, lambda name: {matrix.name: weight}[name], CPU)


def noise(N: int, K: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("N", "K"), SIZES)
def test_values_are_the_singular_values(N, K):
    weight = noise(N, K)
    torch.testing.assert_close(
        look(weight).values, torch.linalg.svdvals(weight.double()), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(("N", "K"), SIZES)
@pytest.mark.parametrize("part", [0.1, 0.3, 0.7])
def test_random_share_is_that_of_random_matrices(N, K, part):
    rank = math.floor(part * min(N, K))
    found = [look(noise(N, K, seed)).share(rank) for seed in range(3)]
    assert sum(found) / 3 == pytest.approx(random_share(N, K, rank), abs=0.012)


def test_random_share_runs_from_nothing_to_all():
    assert random_share(100, 300, 0) == 0
    assert random_share(100, 300, 100) == pytest.approx(1, abs=1e-3)
    shares = [random_share(100, 300, rank) for rank in range(101)]
    assert shares == sorted(shares)


@pytest.mark.parametrize(("N", "K"), SIZES)
def test_near_random_is_what_has_no_structure(N, K):
    plain = look(noise(N, K))
    assert plain.near_random and plain.above_edge <= 1
    strong = noise(N, 5, 1) @ noise(5, K, 2)
    mixed = look(noise(N, K) + strong)
    assert not mixed.near_random and mixed.above_edge >= 5
    assert mixed.share(mixed.half_rank) > plain.share(plain.half_rank) + 0.1
    # a structure too weak to be worth anything
    assert look(noise(N, K) + 0.02 * strong).near_random


def test_a_matrix_of_zeros_is_not_random():
    found = look(torch.zeros(32, 64))
    assert found.share(4) == 1.0 and not found.near_random
    assert found.as_json()["singular_values"] == [0.0] * 32


def test_json_has_evenly_spaced_values_and_both_ranks():
    row = look(noise(200, 200)).as_json()
    assert len(row["singular_values"]) == spectra.POINTS
    assert row["singular_values"] == sorted(row["singular_values"], reverse=True)
    assert (row["half_rank"], row["break_even_rank"]) == (50, 96)
    assert row["random_energy"] < row["random_energy_at_break_even"]
    assert row["near_random"] is True


def matrices(count: int, N: int, K: int) -> list[Matrix]:
    names = [f"layers.{block}.{kind}" for block in range(count) for kind in ("up", "down")]
    return [
        Matrix(name, place // 2, *((N, K) if place % 2 == 0 else (K, N)))
        for place, name in enumerate(names)
    ]


def test_sample_is_everything_where_that_is_cheap():
    small = matrices(30, 64, 128)
    assert sample_matrices(small) == small


def test_sample_of_a_large_model_spans_kinds_and_depth():
    large = matrices(32, 4096, 14336)
    names = [matrix.name for matrix in sample_matrices(large)]
    assert len(names) < len(large)
    # one of each kind whatever it costs; the middle comes first
    assert {"layers.16.up", "layers.16.down"} <= set(names)
    middling = matrices(32, 1024, 2048)
    names = [matrix.name for matrix in sample_matrices(middling)]
    assert {f"layers.{block}.{kind}" for block in (0, 16, 31) for kind in ("up", "down")} <= set(
        names
    )
    assert names == [m.name for m in middling if m.name in names]


def test_sample_leaves_out_a_huge_vocabulary():
    head = Matrix("lm_head", 32, 128_000, 8192)
    assert head not in sample_matrices([*matrices(2, 64, 128), head])
