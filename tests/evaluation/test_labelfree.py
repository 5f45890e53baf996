import math

import numpy as np
import pytest
import torch

from evaluation.labelfree import alpha_req, effective_dimension, rankme, scores, spectrum, uniformity


def gaussian(num: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(eigenvalues: np.ndarray, num: int = 400) -> torch.Tensor:
    """Features [num, D] whose covariance has exactly these eigenvalues."""
    dim = len(eigenvalues)
    raw = gaussian(num, dim)
    white = torch.linalg.qr(raw - raw.mean(dim=0)).Q * math.sqrt(num - 1)
    turn = torch.linalg.qr(gaussian(dim, dim, seed=1)).Q
    return white * torch.from_numpy(eigenvalues).sqrt() @ turn + 3.0


def test_rankme_by_hand():
    # singular values 3 and 1: p = (3/4, 1/4), entropy ln 4 - (3/4) ln 3
    features = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert rankme(features) == pytest.approx(4 / 3**0.75, rel=1e-5)


def test_rankme_of_equal_directions_is_their_number():
    features = torch.cat([torch.eye(5), torch.zeros(5, 3)], dim=1)
    assert rankme(features) == pytest.approx(5, rel=1e-4)
    assert rankme(torch.ones(9, 4)) == pytest.approx(1, rel=1e-4)
    assert rankme(torch.zeros(9, 4)) == 1


def test_rankme_equals_the_formula_one_value_at_a_time():
    features = gaussian(30, 12)
    sigma = np.sqrt(np.clip(np.linalg.eigvalsh(features.numpy().T @ features.numpy()), 0, None))
    entropy = 0.0
    for value in sigma:
        p = value / sigma.sum() + 1e-7
        entropy -= p * math.log(p)
    assert rankme(features) == pytest.approx(math.exp(entropy), rel=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_of_an_exact_power_law(alpha: float):
    eigenvalues = np.arange(1, 33) ** -alpha
    features = with_spectrum(eigenvalues)
    assert spectrum(features).numpy() == pytest.approx(eigenvalues, rel=1e-9)
    assert alpha_req(spectrum(features)) == pytest.approx(alpha, rel=1e-6)


def test_alpha_equals_weighted_least_squares():
    eigenvalues = spectrum(gaussian(50, 20) * torch.linspace(2, 0.1, 20))
    rank = np.arange(1, 11)
    expected = -np.polyfit(np.log(rank), np.log(eigenvalues[:10].numpy()), 1, w=np.sqrt(1 / rank))[0]
    assert alpha_req(eigenvalues) == pytest.approx(expected, rel=1e-9)


def test_alpha_of_a_spectrum_too_short():
    assert alpha_req(spectrum(gaussian(4, 8))) is None  # three directions, of which two would be fitted
    assert alpha_req(spectrum(torch.ones(9, 4))) is None


def slow_uniformity(features: np.ndarray, t: float) -> float:
    points = features / np.linalg.norm(features, axis=1, keepdims=True)
    pairs = [(i, j) for i in range(len(points)) for j in range(i)]
    return math.log(np.mean([math.exp(-t * np.sum((points[i] - points[j]) ** 2)) for i, j in pairs]))


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_uniformity_equals_the_slow_loop(block: int):
    features = gaussian(25, 6) + 0.5
    assert uniformity(features, block=block) == pytest.approx(slow_uniformity(features.numpy(), 2.0), rel=1e-5)


def test_uniformity_by_hand():
    assert uniformity(torch.tensor([[2.0, 0.0], [0.0, 5.0]])) == pytest.approx(-4)  # distance^2 = 2, t = 2
    assert uniformity(torch.tensor([[1.0, 0.0], [3.0, 0.0]])) == pytest.approx(0)
    assert uniformity(gaussian(500, 512)) == pytest.approx(-4, abs=0.1)


def test_effective_dimension_by_hand():
    assert effective_dimension(torch.tensor([3.0, 1.0, 0.0])) == pytest.approx(16 / 10)
    assert effective_dimension(spectrum(with_spectrum(np.ones(6)))) == pytest.approx(6)
    assert effective_dimension(torch.zeros(3)) == 1


def test_scores_are_plain_numbers():
    found = scores(gaussian(40, 16).float())
    assert set(found) == {"rankme", "alpha_req", "uniformity", "effective_dimension"}
    assert all(isinstance(value, float) and math.isfinite(value) for value in found.values())
    assert scores(torch.ones(9, 4)) == pytest.approx(
        {"rankme": 1.0, "alpha_req": None, "uniformity": 0.0, "effective_dimension": 1.0}, abs=1e-4
    )
