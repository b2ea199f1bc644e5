"""The mixture that training starts from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.metrics import adjusted_rand_score

from scvae_tools._start import count_communities, fit_mixture


def make_clusters(n_clusters, *, n_cells=600, distance=8.0, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.linalg.qr(rng.normal(size=(10, 10)))[0][:n_clusters] * distance
    truth = np.arange(n_cells) % n_clusters
    return (centres[truth] + rng.normal(size=(n_cells, 10))).astype(np.float32), truth, centres


@pytest.mark.parametrize("n_clusters", [1, 2, 5, 9])
def test_communities_of_separate_clusters_are_counted(n_clusters):
    latent, _, _ = make_clusters(n_clusters)
    found = count_communities(latent, random_state=0)
    # One Gaussian has no structure to stop Leiden from cutting it a few times.
    assert found == n_clusters if n_clusters > 1 else found < 8


def test_counting_leaves_the_number_of_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        count_communities(make_clusters(3)[0], random_state=0)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("n_cells", [3, 8, 40])
def test_a_handful_of_cells_can_be_counted(n_cells):
    assert 1 <= count_communities(make_clusters(2, n_cells=n_cells)[0], random_state=0) <= n_cells


def test_the_mixture_finds_means_and_the_covariance_within_clusters():
    latent, truth, centres = make_clusters(4, n_cells=4000)
    start = fit_mixture(latent, 4, random_state=0)
    nearest = ((start.means[:, None] - centres) ** 2).sum(-1).argmin(1)
    assert sorted(nearest) == [0, 1, 2, 3]
    np.testing.assert_allclose(start.means, centres[nearest], atol=0.15)
    np.testing.assert_allclose(start.covariance, np.eye(10), atol=0.1)
    np.testing.assert_allclose(start.weights, 0.25, atol=0.01)
    log_joint = [multivariate_normal(mean, start.covariance).logpdf(latent) for mean in start.means]
    assert adjusted_rand_score(truth, np.argmax(log_joint, axis=0)) == 1


def test_the_same_seed_gives_the_same_mixture():
    latent, _, _ = make_clusters(5, distance=2.0)
    first, second = (fit_mixture(latent, 5, random_state=3, n_starts=2) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
